# SPDX-License-Identifier: Apache-2.0
"""TextVQA: soft scores by hand, and questions that share an image."""

import json

import pytest

from moellava_jax.evals import base, textvqa

ASK = 'Answer the question using a single word or phrase.'


def test_scores_leave_each_person_out():
  answers = ['Stop'] * 4 + ['a stop'] + ['go'] * 2 + ['Halt', 'no', 'yes']
  # "stop" of 5: each sees at least 4 others. "go" of 2: eight people see 2,
  # two see 1. The others of 1: nine people see 1, one sees none.
  assert textvqa.answer_scores(answers) == {
      'stop': 1.0,
      'go': pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10, rel=1e-12),
      'halt': pytest.approx(0.3, rel=1e-12),
      'no': pytest.approx(0.3, rel=1e-12),
      'yes': pytest.approx(0.3, rel=1e-12),
  }
  three = textvqa.answer_scores(['x'] * 3 + ['y'] * 7)
  assert three == {'x': pytest.approx(0.9), 'y': 1.0}
  four = textvqa.answer_scores(['x'] * 4 + ['y'] * 6)
  assert four == {'x': 1.0, 'y': 1.0}


def test_accuracy_is_of_normal_forms():
  answers = ['two dogs'] * 10
  said = ['2 dogs.', 'The two dogs!', 'dogs', '']
  assert [textvqa.accuracy([(text, answers)]) for text in said] == [1, 1, 0, 0]
  assert textvqa.accuracy([(text, answers) for text in said]) == 0.5


@pytest.mark.parametrize(
    'prompt',
    [
        f'What Is it?\nReference OCR token: A, B\n{ASK}',
        f'Reference OCR token: A, B\nWhat Is it?\n{ASK}',
        f'What Is it?\n{ASK}',
        'OCR tokens: A, B. Question: What Is it? Short answer:',
    ],
)
def test_the_question_is_found_in_the_prompt(prompt):
  assert textvqa.question_of(prompt) == 'what is it?'


@pytest.mark.parametrize(
    'prompt',
    ['What is it?', f'What\nis\n{ASK}', 'OCR tokens: A. What is it?', ''],
)
def test_a_prompt_of_another_form_is_an_error(prompt):
  with pytest.raises(base.EvalError, match='No question found in the prompt'):
    textvqa.question_of(prompt)


ROWS = [
    ('img', 'What is it?', 'cat'),
    ('img', 'Who?', 'me'),
    ('b', 'Who?', 'x'),
]


@pytest.fixture
def files(tmp_path, write_jsonl):
  """Three questions about two images, with the annotations."""
  data = [
      {'image_id': image, 'question': text.upper(), 'answers': [answer] * 10}
      for image, text, answer in ROWS
  ]
  write_jsonl(
      'q.jsonl',
      [
          {
              'question_id': image,
              'image': f'{image}.jpg',
              'text': f'{text}\nReference OCR token: T\n{ASK}',
              'category': 'default',
          }
          for image, text, _ in ROWS
      ],
  )
  (tmp_path / 'val.json').write_text(json.dumps({'data': data}))
  return tmp_path


def _load(files):
  return textvqa.load(str(files / 'q.jsonl'), str(files / 'val.json'))


def _answers(*texts):
  return [
      base.Answer(
          image, f'{text}\nReference OCR token: T\n{ASK}', said, '', 'm', {}
      )
      for (image, text, _), said in zip(ROWS, texts, strict=False)
  ]


def test_questions_about_one_image_are_kept_apart(files):
  answers = _answers('cat', 'you', 'X.')
  scores = textvqa.score(_load(files), {'q': answers[::-1]})
  assert scores == {'accuracy': pytest.approx(2 / 3, rel=1e-15)}


def test_no_score_for_a_partial_or_doubled_set(files):
  with pytest.raises(base.EvalError, match=r"missing: 1 \('b: who\?'\)"):
    textvqa.score(_load(files), {'q': _answers('cat', 'me')})
  answers = _answers('cat', 'me', 'x')
  with pytest.raises(base.EvalError, match=r"more than once: 1 \('img: who"):
    textvqa.score(_load(files), {'q': [*answers, answers[1]]})


def test_a_line_that_is_repeated_is_scored_as_often(files):
  path = files / 'q.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join([*lines, lines[0]]))
  answers = _answers('cat', 'me', 'x')
  again = answers[0]._replace(text='dog')
  for said, accuracy in (
      ([*answers, again], 0.75),
      ([*answers, answers[0]], 1),
  ):
    assert textvqa.score(_load(files), {'q': said}) == {'accuracy': accuracy}
  with pytest.raises(
      base.EvalError, match=r"missing: 1 \('img: what .* \(2\)'"
  ):
    textvqa.score(_load(files), {'q': answers})


def test_annotations_that_are_not_asked_are_an_error(files):
  path = files / 'q.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(lines[1:]))
  with pytest.raises(
      base.EvalError, match=r"no question for 1 \(\('img', 'what.*of the 3 in"
  ):
    _load(files)


def test_annotations_of_another_release_are_an_error(files):
  data = json.loads((files / 'val.json').read_text())['data']
  for rows, message in [
      (data[:2], r"No annotation for question 'who\?' about image 'b'"),
      ([*data[:2], {**data[2], 'answers': []}], r"image 'b' has no 10"),
  ]:
    (files / 'val.json').write_text(json.dumps({'data': rows}))
    with pytest.raises(base.EvalError, match=message):
      _load(files)
  (files / 'val.json').write_text('[]')
  with pytest.raises(base.EvalError, match=r'val.json: expected \{"data"'):
    _load(files)
  with pytest.raises(base.EvalError, match='--annotations=TextVQA_0.5.1'):
    textvqa.load(str(files / 'q.jsonl'), None)
