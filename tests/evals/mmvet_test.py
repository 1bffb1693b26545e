# SPDX-License-Identifier: Apache-2.0
"""MM-Vet: grades by hand, unclear replies, the file for the official grader."""

import json

import pytest

from moellava_jax.evals import base, judge, mmvet

OFFICIAL = {
    'v1_0': {
        'question': 'x?',
        'answer': '1<AND>2',
        'capability': ['ocr', 'math'],
    },
    'v1_1': {'question': 'who?', 'answer': 'me<OR>you', 'capability': ['rec']},
    'v1_2': {'question': 'why?', 'answer': 'so', 'capability': ['rec', 'ocr']},
}


@pytest.fixture
def files(tmp_path, write_jsonl):
  (tmp_path / 'mm-vet.json').write_text(json.dumps(OFFICIAL))
  write_jsonl(
      'llava-mm-vet.jsonl',
      [
          {
              'question_id': n,
              'image': f'v1_{n}.png',
              'text': OFFICIAL[f'v1_{n}']['question'],
              'category': 'default',
          }
          for n in range(3)
      ],
  )
  return tmp_path


@pytest.fixture
def questions(files):
  return mmvet.load(
      str(files / 'llava-mm-vet.jsonl'), str(files / 'mm-vet.json')
  )


ANSWERS = {
    'llava-mm-vet': [
        base.Answer(n, '', text, '', 'm', {})
        for n, text in enumerate(['one and two', 'you', 'because'])
    ]
}


@pytest.fixture
def judged(judge_server, tmp_path):
  return judge.Judge(
      url=judge_server.url,
      model='gpt-4-0613',
      key=None,
      cache=tmp_path / 'judge',
      prices=None,
      workers=1,
  )


def test_grades_by_hand(questions, judged, judge_server):
  grades = {'x?': '0.5', 'who?': '1.0 |', 'why?': '0.75'}

  def reply(body, _):
    row = body['messages'][0]['content'].splitlines()[-1]
    return grades[row.split(' | ')[0]]

  judge_server.reply = reply
  scores = mmvet.grade(questions, ANSWERS, judged)
  assert scores == {
      # 2.25 of 3.
      'total': 75.0,
      'ungraded': 0,
      'capability': {
          # 62.5, and 87.5 of 100.
          'ocr': {'score': 62.5, 'questions': 2},
          'rec': {'score': 87.5, 'questions': 2},
          'math': {'score': 50.0, 'questions': 1},
      },
      'integration': {
          'math_ocr': {'score': 50.0, 'questions': 1},
          'ocr_rec': {'score': 75.0, 'questions': 1},
          'rec': {'score': 100.0, 'questions': 1},
      },
  }
  body = judge_server.bodies[0]
  assert (body['temperature'], body['max_tokens']) == (0.0, 3)
  assert body['messages'][0]['content'].endswith(
      '| 1.0\n\nx? | 1 <AND> 2 | one and two | '
  )
  # All kept: nothing is sent twice.
  mmvet.grade(questions, ANSWERS, judged)
  assert len(judge_server.bodies) == 3


def test_an_unclear_grade_is_asked_for_again(questions, judged, judge_server):
  judge_server.reply = lambda body, n: ['good', '1.5', ' 1', '0.4'][min(n, 3)]
  scores = mmvet.grade(questions, ANSWERS, judged)
  assert scores['total'] == 40.0
  asked = judge_server.bodies[:4]
  assert [body['temperature'] for body in asked] == [0.0, 0.0, 0.5, 1.0]
  assert all(
      body['messages'][0]['content'].endswith('answer (digit): ')
      for body in asked[1:]
  )


def test_without_any_grade_an_answer_has_none(questions, judged, judge_server):
  judge_server.reply = lambda body, n: 'well'
  scores = mmvet.grade(questions, ANSWERS, judged)
  assert (scores['total'], scores['ungraded']) == (0.0, 3)
  assert len(judge_server.bodies) == 3 * 5


def test_points_are_rounded_as_numpy_rounds():
  assert mmvet._points([0.0015]) == 0.2  # A float would give 0.1.


def test_the_official_grader_gets_its_file(questions, tmp_path):
  mmvet.submission(tmp_path / 'r.json', questions, ANSWERS)
  assert json.loads((tmp_path / 'r.json').read_text()) == {
      'v1_0': 'one and two',
      'v1_1': 'you',
      'v1_2': 'because',
  }


def test_no_score_without_a_judge_or_of_a_part(questions):
  with pytest.raises(base.UnscoredError, match='--judge_url'):
    mmvet.score(questions, ANSWERS)
  part = {'llava-mm-vet': ANSWERS['llava-mm-vet'][1:]}
  with pytest.raises(base.EvalError, match=r'missing: 1 \(0\)'):
    mmvet.requests(questions, part)


def test_files_of_different_sets_are_an_error(files):
  path = files / 'mm-vet.json'
  path.write_text(json.dumps({k: OFFICIAL[k] for k in ('v1_0', 'v1_1')}))
  args = str(files / 'llava-mm-vet.jsonl'), str(path)
  with pytest.raises(base.EvalError, match=r"in one only: 1 \('v1_2'\)"):
    mmvet.load(*args)
  path.write_text(json.dumps({**OFFICIAL, 'v1_2': {'question': 'why?'}}))
  with pytest.raises(base.EvalError, match=r"no \['answer', 'capability'\]"):
    mmvet.load(*args)
  with pytest.raises(base.EvalError, match='--annotations=mm-vet.json'):
    mmvet.load(args[0], None)
