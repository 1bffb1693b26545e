# SPDX-License-Identifier: Apache-2.0
"""ScienceQA: letters are found as officially, and failures count as wrong."""

import json

import pytest

from moellava_jax.evals import base, scienceqa


@pytest.mark.parametrize(
    'text, letter',
    [
        ('B', 'B'),
        ('F', 'FAILED'),
        ('b', 'FAILED'),
        ('B ', 'FAILED'),
        ('B.', 'FAILED'),
        ('B. Because', 'B'),
        ('F. Because', 'FAILED'),
        ('B.Because', 'FAILED'),
        ('', 'FAILED'),
        ('The answer is C.', 'C'),
        ('So: The answer is C!', 'C'),
        ('The answer is Cats', 'C'),
        ('The answer is C', 'FAILED'),
        ('The answer is C\n', 'FAILED'),
        ('the answer is C.', 'FAILED'),
        ('The answer is F.', 'F'),
        ('The answer is C. The answer is C.', 'FAILED'),
        ('A. The answer is C.', 'A'),
    ],
)
def test_letters(text, letter):
  assert scienceqa.parse(text) == letter


def test_a_letter_beyond_the_choices_is_no_choice():
  assert [scienceqa.choice(x, 2) for x in ('A', 'B', 'C', 'F', 'FAILED')] == [
      0,
      1,
      -1,
      -1,
      -1,
  ]


PROBLEMS = {
    '7': {'choices': ['x', 'y'], 'answer': 1},
    '3': {'choices': ['x', 'y', 'z'], 'answer': 0},
    '9': {'choices': ['x', 'y'], 'answer': 0},
    '5': {'choices': ['x', 'y'], 'answer': 1},
    '1': {'choices': ['x', 'y'], 'answer': 0},  # Of another split.
}
TEST = ['9', '3', '7', '5']


@pytest.fixture
def files(tmp_path):
  """The official files of four test problems, of which two have images."""
  rows = [
      {
          'id': key,
          'conversations': [
              {'from': 'human', 'value': f'<image>\nWhich, {key}?'}
          ],
          **({'image': f'{key}/image.png'} if key in '73' else {}),
      }
      for key in PROBLEMS
  ]
  for name, value in [
      ('llava_test_CQM-A.json', rows),
      ('problems.json', PROBLEMS),
      ('pid_splits.json', {'test': TEST, 'val': ['1']}),
  ]:
    (tmp_path / name).write_text(json.dumps(value))
  return tmp_path


def _load(files):
  return scienceqa.load(str(files / 'llava_test_CQM-A.json'), str(files))


def _answer(key, text, prompt='Which?', metadata=None):
  return base.Answer(key, prompt, text, '', 'm', metadata or {})


def test_problems_are_asked_in_the_order_of_the_split(files):
  ((name, questions),) = _load(files).items()
  assert name == 'llava_test_CQM-A'
  assert [(q.question_id, q.image, q.answer) for q in questions] == [
      ('9', None, 'A'),
      ('3', '3/image.png', 'A'),
      ('7', '7/image.png', 'B'),
      ('5', None, 'B'),
  ]
  assert questions[1].text == (
      "Which, 3?\nAnswer with the option's letter from the given choices"
      ' directly.'
  )


def test_scores_are_those_of_the_script(files):
  rows = [
      _answer('7', 'B', '<image>\nWhich?'),  # Right.
      _answer('3', 'It is A.', '<image>\nWhich?'),  # Not understood.
      _answer('9', 'A. x'),  # Right.
      _answer('5', 'E'),  # Not among its choices.
  ]
  assert scienceqa.score(_load(files), {'llava_test_CQM-A': rows}) == {
      'accuracy': 0.5,
      'accuracy_img': 0.5,
      'correct': 2,
      'count': 4,
      'correct_img': 1,
      'count_img': 2,
      'failed': 1,
  }


def test_what_the_script_writes(files):
  problems = scienceqa.read_problems(str(files), 'test')
  answers = {
      '7': _answer('7', 'B', '<image>\nWhich?'),
      '3': _answer('3', 'D. x'),
  }
  output, result = scienceqa.grade(problems, answers)
  assert output['correct'] == [
      {
          'question_id': '7',
          'parsed_ans': 'B',
          'ground_truth': 'B',
          'question': '<image>\nWhich?',
          'pred': 'B',
          'is_multimodal': True,
      }
  ]
  assert [row['question_id'] for row in output['incorrect']] == ['9', '3', '5']
  assert output['incorrect'][2]['question'] == 'Unknown'
  assert result == {
      'acc': 25.0,
      'correct': 1,
      'count': 4,
      'results': {'9': -1, '3': -1, '7': 1, '5': -1},
      'outputs': {'9': 'FAILED', '3': 'D. x', '7': 'B', '5': 'FAILED'},
  }


def test_our_own_answers_say_in_the_metadata_what_was_shown(files):
  rows = [
      _answer('7', 'A', metadata={'image': '7/image.png'}),
      *(_answer(key, 'A', metadata={'image': None}) for key in ('9', '3', '5')),
  ]
  scores = scienceqa.score(_load(files), {'llava_test_CQM-A': rows})
  assert (scores['correct_img'], scores['count_img']) == (0, 1)
  assert scores['correct'] == 2


def test_without_images_their_accuracy_is_zero(files):
  rows = [_answer(key, 'A') for key in TEST]
  scores = scienceqa.score(_load(files), {'llava_test_CQM-A': rows})
  assert (scores['accuracy'], scores['accuracy_img']) == (0.5, 0.0)


def test_no_score_for_a_partial_doubled_or_foreign_set(files):
  rows = [_answer(key, 'A') for key in TEST]
  for bad, message in [
      (rows[1:], r"missing: 1 \('9'\)"),
      ([*rows, rows[0]], r"answered more than once: 1 \('9'\)"),
      ([*rows, _answer('1', 'A')], r"not in the question file: 1 \('1'\)"),
  ]:
    with pytest.raises(base.EvalError, match=message):
      scienceqa.score(_load(files), {'llava_test_CQM-A': bad})


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('pid_splits.json', {'val': []}, r"no split 'test' in \['val'\]"),
        ('pid_splits.json', {'test': ['8']}, r'problems.json: .* in 1 \(.8.\)'),
        (
            'problems.json',
            {**PROBLEMS, '3': {'choices': [], 'answer': 5}},
            "'3'",
        ),
        ('llava_test_CQM-A.json', [], r"no question for 4 \('9', "),
        ('llava_test_CQM-A.json', [{'id': '3'}], 'A.json, item 0: expected'),
    ],
)
def test_a_bad_file_is_named(files, name, value, message):
  (files / name).write_text(json.dumps(value))
  with pytest.raises(base.EvalError, match=message):
    _load(files)


def test_labels_are_asked_for(files):
  with pytest.raises(base.EvalError, match='--annotations=DIR with problems'):
    scienceqa.load(str(files / 'llava_test_CQM-A.json'), None)
