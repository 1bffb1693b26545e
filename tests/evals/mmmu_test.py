# SPDX-License-Identifier: Apache-2.0
"""MMMU: answers are parsed, drawn and scored as the official script does."""

import json
import random

import pytest

from moellava_jax.evals import base, mmmu, mmmu_parse, prompts
from tests.evals import tables

OPTIONS = {'A': 'supply', 'B': 'demand', 'C': 'price'}


@pytest.mark.parametrize(
    'text, letter',
    [
        ('B', 'B'),
        ('B.', 'B'),
        ('(B)', 'B'),
        ('b', None),
        ('B. demand', None),  # No space after the letter, and too short.
        ('The answer is (A), not (C)', 'C'),  # The last one counts.
        ('(A) or B', 'A'),  # Brackets come first.
        ('A and B', 'B'),
        ('Either A or C, I would say A .', 'A'),
        ('I think that it is the demand', 'B'),
        ('It is demand', None),  # Five words or fewer.
        ('it is the supply and not demand', 'B'),
        ('it is neither of these, as I said', None),
        ('', None),
    ],
)
def test_the_letter_that_an_answer_names(text, letter):
  assert mmmu_parse.choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    'text, said',
    [
        ('4.5', [4.5, 4.5]),
        ('1,234.567', [1234.57, 1234.0, 234.57]),  # And what follows the comma.
        ('The result is 12 m.', ['12 m', 12.0]),
        ('so x = 7', [7.0, 7.0]),  # An equals sign in the last line.
        ('x = 7\ndone', ['x = 7\ndone', 7.0]),  # Not in the first of two.
        # No split at sentences: the capitals are gone by then.
        ('It is A. So it is B.', [' b', 'b ']),
        ('about -3e2', ['about -3e2', -300.0, 2.0]),
        ('the answer is :', ['the answer is :']),
    ],
)
def test_what_an_open_answer_may_mean(text, said):
  found = mmmu_parse.open_answers(text)
  assert sorted(map(str, set(found))) == sorted(map(str, set(said)))


@pytest.mark.parametrize(
    'said, gold, right',
    [
        ([4.5], ['4.50'], True),
        ([4.51], ['4.5'], False),
        (['the red cat'], ['red'], True),
        (['reddish'], ['red'], True),  # A part of a word is enough.
        (['bad'], ['b'], False),  # But not for a single letter.
        (['a b'], ['b'], True),
        (['four'], ['4', 'four'], True),
        ([4.0], ['four'], False),
    ],
)
def test_open_answers_are_compared_as_officially(said, gold, right):
  assert mmmu_parse.is_right(said, gold) is right


ROWS = [
    {
        'id': 'validation_Physics_1',
        'question': 'Which one, <image 1> or <image 2>?',
        'options': "['left', 'right', 'none']",
        'answer': 'B',
        'question_type': 'multiple-choice',
        'image_1': 'a.png',
        'image_2': 'b.png',
    },
    {
        'id': 'validation_Art_2',
        'question': 'Who? <image 1>',
        'options': ['x', 'y'],
        'answer': 'A',
        'question_type': 'multiple-choice',
        'image_1': 'a.png',
    },
    {
        'id': 'validation_Physics_3',
        'question': 'How much? <image 1>',
        'options': '[]',
        'answer': "['6.3', 'six']",
        'question_type': 'open',
        'image_1': 'a.png',
    },
]


def _load(write_jsonl, rows=ROWS, annotations=None):
  return mmmu.load(write_jsonl('mmmu.jsonl', rows), annotations)


def _answers(questions, texts):
  ((key, group),) = questions.items()
  return {
      key: [
          base.Answer(q.question_id, '', text, '', 'm', {})
          for q, text in zip(group, texts, strict=True)
      ]
  }


def test_scores_by_hand(write_jsonl):
  questions = _load(write_jsonl)
  texts = ['(B)', 'B', 'It is 6.3 kg']
  assert mmmu.score(questions, _answers(questions, texts)) == {
      'accuracy': pytest.approx(2 / 3),
      'drawn': 0,
      'disciplines': {
          'Art and Design': {'accuracy': 0.0, 'questions': 1},
          'Science': {'accuracy': 1.0, 'questions': 2},
      },
      'subjects': {
          'Art': {'accuracy': 0.0, 'questions': 1},
          'Physics': {'accuracy': 1.0, 'questions': 2},
      },
  }


def test_what_names_no_option_is_drawn_as_officially(write_jsonl):
  rows = [
      {**ROWS[0], 'id': f'validation_{subject}_{n}', 'answer': 'A'}
      for n in range(5)
      for subject in ('Physics', 'Art')
  ]
  questions = _load(write_jsonl, rows)
  scores = mmmu.score(questions, _answers(questions, ['?'] * 10))
  official = random.Random(42)  # Art comes before Physics.
  art, physics = (
      [official.choice('ABC') for _ in range(5)].count('A') / 5
      for _ in range(2)
  )
  assert art != physics
  assert scores['drawn'] == 10
  assert scores['subjects']['Art']['accuracy'] == art
  assert scores['subjects']['Physics']['accuracy'] == physics


def test_each_protocol_asks_in_its_way(write_jsonl):
  first, _, last = _load(write_jsonl)['mmmu']
  assert first.images == ('a.png', 'b.png')
  words = 'Which one, <image 1> or <image 2>?'
  assert first.text == (
      f'{words}\n(A) left\n(B) right\n(C) none\n\n{prompts.LETTER}'
  )
  assert mmmu.PROMPTS['lmms'](first) == (
      f'{words}\nA. left\nB. right\nC. none\n\n{prompts.LETTER}'
  )
  assert mmmu.PROMPTS['vlmevalkit'](first) == (
      'Question: Which one, <image> or <image>?\nOptions:\nA. left\nB. right\n'
      'C. none\nPlease select the correct answer from the options above. \n'
  )
  assert last.text == f'How much? <image 1>\n{prompts.SHORT}'
  assert mmmu.PROMPTS['vlmevalkit'](last) == 'Question: How much? <image>\n'
  # Named in another order, the images come first.
  swapped = {**ROWS[0], 'question': '<image 2> or <image 1>?'}
  (question,) = _load(write_jsonl, [swapped])['mmmu']
  assert mmmu.PROMPTS['vlmevalkit'](question).startswith(
      'Question: <image 2> or <image 1>?\n'
  )


def test_a_table_with_images_is_read(tmp_path):
  rows = [
      {
          'index': str(n),
          'id': name,
          'question': 'Q <image 1>',
          'A': a,
          'B': b,
          'answer': answer,
          'image': str(['x' * 80, 'y' * 80]) if n == 2 else 'x' * 80,
      }
      for n, (name, a, b, answer) in enumerate(
          [
              ('dev_Math_1', 'x', 'y', 'A'),
              ('validation_Math_1', 'x', 'y', 'B'),
              ('validation_Math_2', '', '', '12'),
          ]
      )
  ]
  questions = mmmu.load(tables.write(tmp_path / 'M.tsv', rows), None)
  assert [q.question_id for q in questions['M']] == [
      'validation_Math_1',
      'validation_Math_2',
  ]
  assert questions['M'][1].images == ('2_1.jpg', '2_2.jpg')
  scores = mmmu.score(questions, _answers(questions, ['B', '= 12']))
  assert scores['accuracy'] == 1.0


def test_official_answers_come_first(write_jsonl, tmp_path):
  path = tmp_path / 'answer_dict_val.json'
  path.write_text(
      json.dumps(
          {
              'validation_Art_2': {
                  'question_type': 'multiple-choice',
                  'ground_truth': 'B',
              }
          }
      )
  )
  questions = _load(write_jsonl, annotations=str(path))
  scores = mmmu.score(questions, _answers(questions, ['B', 'B', '6.3']))
  assert scores['accuracy'] == 1.0


def test_the_test_set_is_submitted(write_jsonl, tmp_path):
  rows = [
      {**row, 'id': row['id'].replace('validation', 'test'), 'answer': '?'}
      for row in ROWS
  ]
  questions = _load(write_jsonl, rows)
  answers = _answers(questions, ['(B)', 'A', 'six'])
  with pytest.raises(base.UnscoredError, match='eval.ai/challenge/2179'):
    mmmu.score(questions, answers)
  mmmu.submission(tmp_path / 'up.json', questions, answers)
  assert json.loads((tmp_path / 'up.json').read_text()) == {
      'test_Physics_1': 'B',
      'test_Art_2': 'A',
      'test_Physics_3': 'six',
  }


def test_bad_rows_and_partial_sets_are_errors(write_jsonl):
  questions = _load(write_jsonl)
  answers = _answers(questions, ['B', 'B', '6.3'])['mmmu']
  with pytest.raises(base.EvalError, match=r"missing: 1 \('validation_Phy"):
    mmmu.score(questions, {'mmmu': answers[:-1]})
  with pytest.raises(base.EvalError, match='line 1: expected an "id" such as'):
    _load(write_jsonl, [{**ROWS[0], 'id': 'validation_Alchemy_1'}])
