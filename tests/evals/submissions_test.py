# SPDX-License-Identifier: Apache-2.0
"""VQAv2 and VizWiz: what their servers are sent, and the validation sets."""

import json
import pathlib

import pytest

from moellava_jax.evals import base, prompts, textnorm, vizwiz, vqav2

QUESTIONS = [
    base.Question(i, f'{i}.jpg', 'What?', 'default', None, {})
    for i in (3, 1, 2)
]


def _answer(question_id, text):
  return base.Answer(question_id, 'What?', text, '', 'm', {})


def test_vqav2_answers_the_whole_test_set():
  answers = [
      _answer(1, 'first'),
      _answer(3, 'A red/blue Cat.'),
      _answer(9, 'not of this set'),
      _answer(1, 'two'),  # The last one counts.
  ]
  assert vqav2.submission(QUESTIONS, answers) == [
      {'question_id': 3, 'answer': 'red blue cat'},
      {'question_id': 1, 'answer': '2'},
      {'question_id': 2, 'answer': ''},
  ]


def test_vizwiz_wants_every_image():
  answers = [_answer(2, 'Unanswerable'), _answer(1, 'x'), _answer(3, 'The.')]
  assert vizwiz.submission(QUESTIONS, answers) == [
      {'image': '3.jpg', 'answer': ''},
      {'image': '1.jpg', 'answer': 'x'},
      {'image': '2.jpg', 'answer': 'unanswerable'},
  ]
  with pytest.raises(base.EvalError, match=r'without an answer: 1 \(2\)'):
    vizwiz.submission(QUESTIONS, answers[1:])


@pytest.fixture
def asked(write_jsonl):
  """A question file with two questions."""
  lines = f'\n{prompts.UNANSWERABLE}\n{prompts.SHORT}'
  return write_jsonl(
      'asked.jsonl',
      [
          {
              'question_id': n,
              'image': f'{n}.jpg',
              'text': f'what is it?{lines}',
              'category': 'default',
          }
          for n in (1, 3)
      ],
  )


def _two(first, second):
  said = ((1, first), (3, second))
  return {'asked': [base.Answer(n, '', x, '', 'm', {}) for n, x in said]}


def test_vqav2_is_submitted_for_the_whole_test_set(
    asked, write_jsonl, tmp_path
):
  every = write_jsonl('all.jsonl', [{'question_id': n} for n in (1, 2, 3)])
  questions = vqav2.load(asked, every)
  answers = _two('The cat!', 'two')
  vqav2.write_submission(tmp_path / 'up.json', questions, answers)
  assert json.loads((tmp_path / 'up.json').read_text()) == [
      {'question_id': 1, 'answer': 'cat'},
      {'question_id': 2, 'answer': ''},
      {'question_id': 3, 'answer': '2'},
  ]
  with pytest.raises(base.UnscoredError, match='eval.ai/challenge/830'):
    vqav2.score(questions, answers)
  with pytest.raises(base.EvalError, match='llava_vqav2_mscoco_test2015'):
    vqav2.write_submission(
        tmp_path / 'up.json', vqav2.load(asked, None), answers
    )
  with pytest.raises(base.EvalError, match=r'missing: 1 \(3\)'):
    vqav2.write_submission(
        tmp_path / 'up.json', questions, {'asked': answers['asked'][:1]}
    )
  part = write_jsonl('part.jsonl', [{'question_id': 1}])
  with pytest.raises(base.EvalError, match=r'nothing about questions 1 \(3\)'):
    vqav2.load(asked, part)


def test_vqav2_validation_is_scored(asked, tmp_path):
  path = tmp_path / 'val.json'
  people = {1: ['cat'] * 2 + ['dog'] * 8, 3: ['yes'] * 10}
  path.write_text(
      json.dumps(
          {
              'annotations': [
                  {'question_id': n, 'answers': [{'answer': x} for x in found]}
                  for n, found in people.items()
              ]
          }
      )
  )
  questions = vqav2.load(asked, str(path))
  # 2 of 10 said cat: eight folds of 2/3, two of 1/3. All said yes.
  assert vqav2.score(questions, _two('A cat.', 'Yes.')) == {
      'accuracy': pytest.approx((0.6 + 1) / 2, rel=1e-12)
  }
  part = tmp_path / 'part.jsonl'
  part.write_text(pathlib.Path(asked).read_text().splitlines()[0])
  with pytest.raises(base.EvalError, match=r'no question for 1 \(3\) of the 2'):
    vqav2.load(str(part), str(path))
  path.write_text('[]')
  with pytest.raises(base.EvalError, match='expected {"annotations"'):
    vqav2.load(asked, str(path))


@pytest.mark.parametrize(
    'text, people, accuracy',
    [
        ('the cat', ['the cat'] * 10, 1.0),  # All agree: letters are compared.
        ('cat', ['the cat'] * 10, 0.0),
        ('Cat', ['cat'] * 10, 1.0),
        ('cat', ['the cat'] * 9 + ['dog'], 1.0),  # Else they are normalised.
        ('1,000', ['1000'] * 9 + ['x'], 1.0),
        ('red/blue', ['red blue'] * 9 + ['x'], 1.0),
        ('x', ['x'] + ['y'] * 9, 0.3),
    ],
)
def test_the_vqa_rule(text, people, accuracy):
  found = textnorm.vqa_accuracy(text, people)
  assert found == pytest.approx(accuracy, rel=1e-12)


def test_vizwiz_validation_is_scored_and_test_submitted(asked, tmp_path):
  path = tmp_path / 'val.json'
  rows = [
      {'image': f'{n}.jpg', 'answers': [{'answer': x} for x in found]}
      for n, found in ((1, ['unanswerable'] * 10), (3, ['a dog'] * 10))
  ]
  path.write_text(json.dumps(rows))
  questions = vizwiz.load(asked, str(path))
  answers = _two('Unanswerable', 'cat')
  assert vizwiz.score(questions, answers) == {'accuracy': 0.5}
  with pytest.raises(base.UnscoredError, match='--annotations=val.json'):
    vizwiz.score(vizwiz.load(asked, None), answers)
  vizwiz.write_submission(tmp_path / 'up.json', questions, answers)
  assert json.loads((tmp_path / 'up.json').read_text()) == [
      {'image': '1.jpg', 'answer': 'unanswerable'},
      {'image': '3.jpg', 'answer': 'cat'},
  ]
  part = tmp_path / 'part.jsonl'
  part.write_text(pathlib.Path(asked).read_text().splitlines()[0])
  with pytest.raises(
      base.EvalError, match=r"question for 1 \('3.jpg'\) of the 2"
  ):
    vizwiz.load(str(part), str(path))
  path.write_text(json.dumps(rows[:1]))
  with pytest.raises(base.EvalError, match=r"no answers about 1 \('3.jpg'\)"):
    vizwiz.load(asked, str(path))
  path.write_text('[{"image": "1.jpg"}]')
  with pytest.raises(base.EvalError, match='as in val.json of VizWiz'):
    vizwiz.load(asked, str(path))
