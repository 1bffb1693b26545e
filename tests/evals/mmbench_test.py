# SPDX-License-Identifier: Apache-2.0
"""MMBench: circular by hand, prompts, what the server is sent, a judge."""

import pytest

from moellava_jax.evals import base, judge, mmbench, prompts
from tests.evals import tables

IMAGE = 'x' * 80
ROWS = [
    # index, question, hint, A, B, C, answer, category, l2-category
    (1, 'Which?', '', 'cat', 'dog', '', 'A', 'animal', 'perception'),
    (1_000_001, 'Which?', '', 'dog', 'cat', '', 'B', 'animal', 'perception'),
    (2, 'How many?', 'Count.', '1', '2', '3', 'C', 'count', 'reasoning'),
    (
        1_000_002,
        'How many?',
        'Count.',
        '3',
        '1',
        '2',
        'A',
        'count',
        'reasoning',
    ),
    (
        2_000_002,
        'How many?',
        'Count.',
        '2',
        '3',
        '1',
        'B',
        'count',
        'reasoning',
    ),
    (3, 'What?', '', 'sky', 'sea', '', 'B', 'scene', 'perception'),
    (1_000_003, 'What?', '', 'sea', 'sky', '', 'A', 'scene', 'perception'),
]


def _write(path, rows=ROWS, answers=True):
  table = []
  for index, question, hint, a, b, c, answer, category, l2 in rows:
    row = {
        'index': str(index),
        'question': question,
        'hint': hint,
        'A': a,
        'B': b,
        'C': c,
        'D': 'nan',
        'answer': answer,
        'category': category,
        'image': IMAGE,
        'source': 's',
        'l2-category': l2,
        'comment': 'c',
        'split': 'dev',
    }
    if not answers:
      del row['answer']
    table.append(row)
  return tables.write(path, table)


@pytest.fixture
def questions(tmp_path):
  return mmbench.load(_write(tmp_path / 'dev.tsv'), None)


def _answers(questions, texts, prompt=lambda q: q.text):
  return {
      'dev': [
          base.Answer(q.question_id, prompt(q), text, '', 'm', {})
          for q, text in zip(questions['dev'], texts, strict=True)
      ]
  }


def test_right_is_right_in_every_order(questions):
  texts = ['A', 'B. cat', 'C', 'A', 'A', 'the sea', 'water']
  scores = mmbench.score(questions, _answers(questions, texts))
  # 1 is right twice; 2 is wrong once; 3 is unclear once.
  assert scores == {
      'accuracy': pytest.approx(1 / 3),
      'first_pass': 1.0,
      'questions_circular': 3,
      'rows': 7,
      'unclear': 1,
      'l2-category': {
          'perception': {'accuracy': 0.5, 'questions': 2},
          'reasoning': {'accuracy': 0.0, 'questions': 1},
      },
      'category': {
          'animal': {'accuracy': 1.0, 'questions': 1},
          'count': {'accuracy': 0.0, 'questions': 1},
          'scene': {'accuracy': 0.0, 'questions': 1},
      },
  }


def test_the_judge_is_asked_only_what_can_still_be_right(
    questions, tmp_path, judge_server
):
  texts = ['meow', 'B', 'unclear', 'B', 'B', 'a bus', 'a plane']
  answers = _answers(questions, texts)
  judged = judge.Judge(
      url=judge_server.url,
      model='g',
      key=None,
      cache=tmp_path / 'judge',
      prices=None,
      workers=1,
  )
  # Question 2 is lost by its second row, so its first is not asked about.
  assert [
      request.messages[0][1].split('Answer: ')[-1].split('\n')[0]
      for request in mmbench.requests(questions, answers)
  ] == ['meow', 'a bus', 'a plane']
  judge_server.reply = lambda body, _: (
      'A' if 'Answer: meow' in body['messages'][0]['content'] else 'hm'
  )
  scores = mmbench.grade(questions, answers, judged)
  assert scores['accuracy'] == pytest.approx(1 / 3)
  assert scores['unclear'] == 4
  # One reply for `meow`; three tries for each of the others.
  assert len(judge_server.bodies) == 1 + 3 + 3


def test_each_protocol_asks_in_its_way(questions, tmp_path):
  asked = questions['dev'][2]
  assert asked.image == '2.jpg'
  assert asked.text == (
      f'Count.\nHow many?\nA. 1\nB. 2\nC. 3\n{prompts.LETTER}'
  )
  assert mmbench.PROMPTS['lmms'](asked) == (
      'Count. How many? There are several options:\nA. 1\nB. 2\nC. 3\n\n'
      + prompts.LETTER
  )
  assert mmbench.PROMPTS['vlmevalkit'](asked) == (
      'Hint: Count.\nQuestion: How many?\nOptions:\nA. 1\nB. 2\nC. 3\n'
      'Please select the correct answer from the options above. \n'
  )
  chinese = mmbench.load_cn(str(tmp_path / 'dev.tsv'), None)['dev'][0]
  assert chinese.text == 'Which?\nA. cat\nB. dog\n请直接回答选项字母。'
  assert mmbench.PROMPTS_CN['lmms'](chinese) == (
      'Which? 有如下几个选项：\nA. cat\nB. dog\n\n'
      '请直接使用所提供的选项字母作为答案回答。'
  )


def test_options_end_where_llava_ends_them(tmp_path):
  rows = [(1, 'Q', '', 'x', 'none', 'z', 'A', 'c', 'l')]
  (asked,) = mmbench.load(_write(tmp_path / 'dev.tsv', rows), None)['dev']
  assert asked.text == f'Q\nA. x\n{prompts.LETTER}'


def test_answers_of_the_original_do_not_record_the_last_line(questions):
  answers = _answers(
      questions,
      'ABCABBA',
      prompt=lambda q: q.text.removesuffix('\n' + prompts.LETTER),
  )
  assert mmbench.score(questions, answers)['accuracy'] == 1.0


def test_the_server_gets_its_columns(questions, tmp_path):
  path = tmp_path / 'up.xlsx'
  mmbench.submission(path, questions, _answers(questions, 'ABCABBA'))
  rows = tables.read_xlsx(path)
  # As `DataFrame.insert(6, 'prediction')` after the drop.
  assert rows[0] == [
      *('index', 'question', 'A', 'B', 'C', 'D', 'prediction'),
      *('answer', 'split'),
  ]
  assert rows[1] == [1, 'Which?', 'cat', 'dog', None, None, 'A', 'A', 'dev']
  assert len(rows) == 8


def test_the_test_set_is_not_scored_here(tmp_path):
  questions = mmbench.load(_write(tmp_path / 'dev.tsv', answers=False), None)
  with pytest.raises(base.UnscoredError, match='opencompass'):
    mmbench.score(questions, _answers(questions, 'ABCABBA'))


def test_no_score_of_a_part(questions, tmp_path):
  answers = _answers(questions, 'ABCABBA')['dev']
  with pytest.raises(base.EvalError, match=r'missing: 1 \(1000003\)'):
    mmbench.score(questions, {'dev': answers[:-1]})
  with pytest.raises(base.EvalError, match=r'moved rows without .* 1 \(1\)'):
    mmbench.load(_write(tmp_path / 'dev.tsv', ROWS[1:]), None)
  with pytest.raises(base.EvalError, match=r'fewer rows than options: 1 \(2\)'):
    mmbench.load(_write(tmp_path / 'dev.tsv', ROWS[:4] + ROWS[5:]), None)


UNMOVED = [row for row in ROWS if row[0] < 10]


def test_rows_in_one_order_have_a_first_pass_alone(tmp_path):
  questions = mmbench.load(_write(tmp_path / 'dev.tsv', UNMOVED), None)
  assert mmbench.score(questions, _answers(questions, 'ACA')) == {
      'first_pass': pytest.approx(2 / 3),
      'rows': 3,
      'unclear': 0,
      'l2-category': {
          'perception': {'first_pass': 0.5, 'questions': 2},
          'reasoning': {'first_pass': 1.0, 'questions': 1},
      },
      'category': {
          'animal': {'first_pass': 1.0, 'questions': 1},
          'count': {'first_pass': 1.0, 'questions': 1},
          'scene': {'first_pass': 0.0, 'questions': 1},
      },
  }


ROUNDS = [  # index, round, options as shown, text
    (1, 0, ('cat', 'dog'), 'A'),
    (1, 1, ('dog', 'cat'), 'B'),
    (2, 0, ('1', '2', '3'), 'C'),
    (2, 1, ('2', '3', '1'), 'B'),
    (2, 2, ('3', '1', '2'), '3'),
    (3, 0, ('sky', 'sea'), 'B'),
    (3, 1, ('sea', 'sky'), 'B'),  # Wrong: always the second.
]


def test_rounds_of_the_original_are_scored_as_circular(tmp_path, write_jsonl):
  questions = mmbench.load(_write(tmp_path / 'dev.tsv', UNMOVED), None)
  asked = {q.question_id: q.extra for q in questions['dev']}
  lines = []
  for index, number, shown, text in ROUNDS:
    hint = 'Count.\n' if asked[index]['hint'] else ''
    options = [f'{x}. {y}' for x, y in zip('ABC', shown, strict=False)]
    lines.append(
        {
            'question_id': index,
            'round_id': number,
            'prompt': '\n'.join([hint + asked[index]['question'], *options]),
            'text': text,
            'options': shown,
            'option_char': ['A', 'B', 'C'][: len(shown)],
            'answer_id': f'{index}-{number}',
            'model_id': 'm',
            'metadata': {},
        }
    )
  answers = {'dev': base.read_answers(write_jsonl('a.jsonl', lines))}
  scores = mmbench.score(questions, answers)
  assert scores['accuracy'] == pytest.approx(2 / 3)
  assert (scores['first_pass'], scores['rows']) == (1.0, 7)
  assert scores['category']['scene'] == {'accuracy': 0.0, 'questions': 1}
  with pytest.raises(base.EvalError, match='missing: 1 .2000000002'):
    mmbench.score(questions, {'dev': answers['dev'][:4] + answers['dev'][5:]})
  with pytest.raises(base.EvalError, match='those of --all-rounds are several'):
    mmbench.submission(tmp_path / 'up.xlsx', questions, answers)
  # One round, which is what the original asks by default.
  once = {'dev': [a for a in answers['dev'] if not a.metadata['round_id']]}
  assert mmbench.score(questions, once)['first_pass'] == 1.0


def test_a_row_without_an_image_is_an_error(tmp_path):
  path = tmp_path / 'dev.tsv'
  _write(path)
  path.write_text(path.read_text().replace(IMAGE, '', 1))
  with pytest.raises(base.EvalError, match='row 1 has no image'):
    mmbench.load(str(path), None)
