# SPDX-License-Identifier: Apache-2.0
"""MME: points by hand, the official words restored, no total of a part."""

import json

import pytest

from moellava_jax.evals import base, mme, prompts

TASKS = (*mme.PERCEPTION, *mme.COGNITION)


@pytest.fixture
def files(tmp_path, write_jsonl):
  """Two images of each task, in both layouts of the official directory."""
  rows = []
  for n, task in enumerate(TASKS):
    folder = tmp_path / 'mme' / task
    if n % 2:
      folder = folder / 'questions_answers_YN'
    folder.mkdir(parents=True)
    for image in ('7', '8'):
      # One question has two spaces before its ending, as in the real files.
      gap = '  ' if (task, image) == ('count', '8') else ' '
      (folder / f'{image}.txt').write_text(
          f'Is {image} there?{gap}Please answer yes or no.\tYes\n'
          f'Is {image} gone? Please answer yes or no.\tNo\n'
      )
      rows += [
          {
              'question_id': f'{task}/{image}.jpg',
              'image': f'{task}/{image}.jpg',
              'text': f'Is {image} {word}?\n{prompts.SHORT}',
              'category': task,
          }
          for word in ('there', 'gone')
      ]
  write_jsonl('llava_mme.jsonl', rows)
  return tmp_path


def _load(files):
  return mme.load(str(files / 'llava_mme.jsonl'), str(files / 'mme'))


def _answers(questions, reply):
  return {
      'llava_mme': [
          base.Answer(q.question_id, q.text, reply(q), '', 'm', {})
          for q in questions['llava_mme']
      ]
  }


def test_points_by_hand(files):
  questions = _load(files)

  def reply(question):
    if question.category == 'count':
      return 'Yes'  # One of each pair is right: 50 + 0.
    if question.category == 'OCR' and question.question_id.endswith('7.jpg'):
      return 'It is.'  # Neither: 2 of 4 right, 1 of 2 images: 50 + 50.
    if question.category == 'code_reasoning':
      return 'No.' if 'gone' in question.text else 'yes, it is'
    return question.answer

  scores = mme.score(questions, _answers(questions, reply))
  assert scores['tasks']['count'] == {
      'score': 50.0,
      'acc': 0.5,
      'acc_plus': 0.0,
      'other': 0,
      'questions': 4,
  }
  assert scores['tasks']['OCR'] == {
      'score': 100.0,
      'acc': 0.5,
      'acc_plus': 0.5,
      'other': 2,
      'questions': 4,
  }
  assert scores['tasks']['code_reasoning']['score'] == 200.0
  assert scores['perception'] == 8 * 200 + 50 + 100
  assert scores['cognition'] == 800
  assert scores['total'] == 2550


@pytest.mark.parametrize(
    'text, decision',
    [
        ('Yes', 'yes'),
        ('yes.', 'yes'),
        ('NO', 'no'),
        ('Not sure', 'no'),  # The first four letters hold a "no".
        ('Nope', 'no'),
        ('I no', 'no'),
        ('I know', 'other'),  # Here they do not.
        ('a yes', 'other'),
        ('It is not', 'other'),
        ('', 'other'),
    ],
)
def test_only_four_letters_count(text, decision):
  assert mme.decide(text) == decision


def test_each_protocol_asks_in_its_way(files):
  question = next(
      q for q in _load(files)['llava_mme'] if q.question_id == 'count/8.jpg'
  )
  assert question.text == f'Is 8 there?\n{prompts.SHORT}'
  assert mme.PROMPTS['lmms'](question) == f'Is 8 there? \n{prompts.SHORT}'
  assert mme.PROMPTS['vlmevalkit'](question) == (
      'Is 8 there?  Please answer yes or no.'
  )


def test_the_official_script_gets_its_lines(files, tmp_path):
  questions = _load(files)
  answers = _answers(questions, lambda q: f'{q.answer},\n\tand so on ')
  mme.submission(tmp_path / 'results', questions, answers)
  assert {p.stem for p in (tmp_path / 'results').iterdir()} == set(TASKS)
  assert (tmp_path / 'results' / 'count.txt').read_text().splitlines() == [
      '7.txt\tIs 7 there? Please answer yes or no.\tYes\tYes, and so on',
      '7.txt\tIs 7 gone? Please answer yes or no.\tNo\tNo, and so on',
      '8.txt\tIs 8 there?  Please answer yes or no.\tYes\tYes, and so on',
      '8.txt\tIs 8 gone? Please answer yes or no.\tNo\tNo, and so on',
  ]


def test_no_total_of_some_tasks(files, write_jsonl):
  lines = (files / 'llava_mme.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  write_jsonl('llava_mme.jsonl', [r for r in rows if r['category'] != 'OCR'])
  with pytest.raises(base.EvalError, match=r"absent or unknown: \['OCR'\]"):
    _load(files)
  write_jsonl('llava_mme.jsonl', rows[1:])
  with pytest.raises(base.EvalError, match="'existence/7.jpg' has 1 questions"):
    _load(files)
  write_jsonl('llava_mme.jsonl', rows[2:])
  with pytest.raises(
      base.EvalError, match=r"question for 1 \(\('existence', '7'\)\) of the 28"
  ):
    _load(files)


def test_no_points_for_a_partial_or_doubled_set(files):
  questions = _load(files)
  answers = _answers(questions, lambda q: q.answer)['llava_mme']
  with pytest.raises(base.EvalError, match=r'missing: 1 \("?.code_reasoning/8'):
    mme.score(questions, {'llava_mme': answers[:-1]})
  with pytest.raises(base.EvalError, match='answered more than once: 1'):
    mme.score(questions, {'llava_mme': [*answers, answers[0]]})


def test_answers_of_another_release_are_an_error(files):
  (files / 'mme' / 'existence' / '7.txt').write_text('Other?\tYes\n')
  with pytest.raises(base.EvalError, match=r"no answer to question 'Is 7 th"):
    _load(files)
  (files / 'mme' / 'existence' / '7.txt').write_text('Other? Yes\n')
  with pytest.raises(base.EvalError, match=r'7.txt, line 1: expected a quest'):
    _load(files)
  with pytest.raises(base.EvalError, match='--annotations=MME_Benchmark'):
    mme.load(str(files / 'llava_mme.jsonl'), None)
  with pytest.raises(base.EvalError, match='gone: no such directory'):
    mme.load(str(files / 'llava_mme.jsonl'), 'gone')
