# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench: the letter alone is right; images, videos and types apart."""

import json

import pytest

from moellava_jax.evals import base, prompts, seed
from tests.evals import tables

ROWS = [  # id, data type, type of question, answer
    ('101', 'image', 1, 'A'),
    ('102', 'image', 1, 'B'),
    ('103', 'image', 2, 'C'),
    ('v_4', 'video', 10, 'D'),
]


@pytest.fixture
def files(tmp_path, write_jsonl):
  official = [
      {
          'question_id': i,
          'data_type': kind,
          'question_type_id': number,
          'answer': answer,
          'question': 'What?',
          **{f'choice_{x}': f'{x}-text' for x in 'abcd'},
      }
      for i, kind, number, answer in ROWS
  ]
  names = {'Scene Understanding': 1, 'Instance Identity': 2, 'Action': 10}
  (tmp_path / 'SEED-Bench.json').write_text(
      json.dumps({'question_type': names, 'questions': official})
  )
  rows = [
      {
          'question_id': int(i) if i.isdecimal() else i,  # As LLaVA has them.
          'image': f'{i}.jpg',
          'text': f'What?\nA. a-text\n{prompts.LETTER}',
          'category': str(number),
      }
      for i, _, number, _ in ROWS
  ]
  write_jsonl('llava-seed-bench.jsonl', rows)
  write_jsonl('images-only.jsonl', rows[:3])
  return tmp_path


def _load(files, name='llava-seed-bench'):
  return seed.load(str(files / f'{name}.jsonl'), str(files / 'SEED-Bench.json'))


def _answers(questions, texts):
  ((key, group),) = questions.items()
  return {
      key: [
          base.Answer(q.question_id, '', text, '', 'm', {})
          for q, text in zip(group, texts, strict=True)
      ]
  }


def test_scores_by_hand(files):
  questions = _load(files)
  texts = ['A', 'B.', 'C', 'A']  # `B.` is not the letter alone.
  assert seed.score(questions, _answers(questions, texts)) == {
      'image': pytest.approx(2 / 3),
      'video': 0.0,
      'total': 0.5,
      'types': {
          'Scene Understanding': {'accuracy': 0.5, 'questions': 2},
          'Instance Identity': {'accuracy': 1.0, 'questions': 1},
          'Action': {'accuracy': 0.0, 'questions': 1},
      },
  }


def test_the_image_part_alone_has_no_total(files):
  questions = _load(files, 'images-only')
  scores = seed.score(questions, _answers(questions, 'ABC'))
  assert scores['image'] == 1.0
  assert {'video', 'total'}.isdisjoint(scores)


def test_a_table_with_images_is_read(tmp_path):
  row = {'index': '7', 'question': 'Who?', 'A': 'x', 'B': 'y', 'answer': 'B'}
  path = tables.write(
      tmp_path / 'SEEDBench_IMG.tsv',
      [{**row, 'category': 'Instance Identity', 'image': 'x' * 80}],
  )
  questions = seed.load(path, None)
  (question,) = questions['SEEDBench_IMG']
  assert question.image == '7.jpg'
  assert question.text == f'Who?\nA. x\nB. y\n{prompts.LETTER}'
  assert seed.score(questions, _answers(questions, 'B'))['image'] == 1.0
  with pytest.raises(base.EvalError, match='drop --annotations'):
    seed.load(path, 'SEED-Bench.json')


def test_each_protocol_asks_in_its_way(files):
  question = _load(files)['llava-seed-bench'][0]
  lines = 'A. a-text\nB. b-text\nC. c-text\nD. d-text\n'
  assert seed.PROMPTS['lmms'](question) == f'What?\n{lines}{prompts.LETTER}'
  assert seed.PROMPTS['vlmevalkit'](question) == (
      f'Question: What?\nOptions:\n{lines}'
      'Please select the correct answer from the options above. \n'
  )


def test_the_leaderboard_gets_its_lines(files, tmp_path):
  questions = _load(files)
  seed.submission(tmp_path / 'up.jsonl', questions, _answers(questions, 'ABCD'))
  lines = (tmp_path / 'up.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in lines][2:] == [
      {'question_id': '103', 'prediction': 'C'},
      {'question_id': 'v_4', 'prediction': 'D'},
  ]


def test_no_score_of_a_part_or_of_other_files(files):
  questions = _load(files)
  answers = _answers(questions, 'ABCD')['llava-seed-bench']
  with pytest.raises(base.EvalError, match=r"missing: 1 \('v_4'\)"):
    seed.score(questions, {'llava-seed-bench': answers[:-1]})
  (files / 'SEED-Bench.json').write_text(
      json.dumps({'question_type': {}, 'questions': []})
  )
  with pytest.raises(base.EvalError, match=r'no entry for questions 4 \(101,'):
    _load(files)
  (files / 'SEED-Bench.json').write_text('[]')
  with pytest.raises(base.EvalError, match='expected {"question_type", "q'):
    _load(files)
  with pytest.raises(base.EvalError, match='--annotations=SEED-Bench.json'):
    seed.load(str(files / 'llava-seed-bench.jsonl'), None)
