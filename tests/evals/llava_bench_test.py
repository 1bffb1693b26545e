# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench: what the judge reads, how its reviews are summed up."""

import pytest

from moellava_jax.evals import base, judge, llava_bench

CATEGORIES = ('conv', 'detail', 'complex', 'conv')


@pytest.fixture
def files(tmp_path, write_jsonl):
  write_jsonl(
      'questions.jsonl',
      [
          {
              'question_id': n,
              'image': '001.jpg',
              'text': f'Q{n}?',
              'category': category,
          }
          for n, category in enumerate(CATEGORIES)
      ],
  )
  write_jsonl(
      'context.jsonl',
      [{'id': '001', 'image': '001.jpg', 'caption': ['A hill.', 'A house.']}],
  )
  write_jsonl(
      'answers_gpt4.jsonl',
      [{'question_id': n, 'text': f'R{n}'} for n in range(4)],
  )
  return tmp_path


@pytest.fixture
def questions(files):
  return llava_bench.load(str(files / 'questions.jsonl'), str(files))


ANSWERS = {
    'questions': [base.Answer(n, '', f'M{n}', '', 'm', {}) for n in range(4)]
}


@pytest.mark.parametrize(
    'review, scores',
    [
        ('8 6\nBecause.', (8.0, 6.0)),
        ('8,6', (8.0, 6.0)),
        ('8.5 6.5', (8.5, 6.5)),
        ('8, 6', (-1.0, -1.0)),  # A comma and a space: three fields.
        ('8 6 ', (-1.0, -1.0)),
        ('Assistant 1: 8\n8 6', (-1.0, -1.0)),
        ('', (-1.0, -1.0)),
    ],
)
def test_scores_are_the_first_line(review, scores):
  assert llava_bench.read_scores(review) == scores


def test_reviews_are_summed_up_as_officially(questions, tmp_path, judge_server):
  reviews = {'M0': '9 7', 'M1': '8 8', 'M2': 'hm', 'M3': '7 6'}

  def reply(body, _):
    text = body['messages'][1]['content']
    return reviews[text.split('[Assistant 2]\n')[1].split('\n')[0]]

  judge_server.reply = reply
  judged = judge.Judge(
      url=judge_server.url,
      model='gpt-4-0314',
      key=None,
      cache=tmp_path / 'judge',
      prices=None,
  )
  scores = llava_bench.grade(questions, ANSWERS, judged)
  # Means of 9, 8, -1, 7 and 7, 8, -1, 6.
  assert scores['all'] == {'ratio': 87.0, 'reference': 57.5, 'model': 50.0}
  assert scores['conv'] == {'ratio': 81.2, 'reference': 80.0, 'model': 65.0}
  assert scores['complex']['ratio'] == 100.0  # -1 of -1, as in the script.
  assert scores['unreadable'] == 1
  body = next(
      b for b in judge_server.bodies if 'M0' in b['messages'][1]['content']
  )
  assert (body['temperature'], body['max_tokens']) == (0.2, 1024)
  assert body['messages'][0] == {
      'role': 'system',
      'content': (
          'You are a helpful and precise assistant for checking the quality of'
          ' the answer.'
      ),
  }
  assert body['messages'][1]['content'].startswith(
      '[Context]\nA hill.\nA house.\n\n[Question]\nQ0?\n\n[Assistant 1]\nR0\n\n'
      '[End of Assistant 1]\n\n[Assistant 2]\nM0\n\n[End of Assistant 2]\n\n'
      '[System]\nWe would like to request your feedback'
  )
  assert body['messages'][1]['content'].endswith('affect your judgment.\n\n')


def test_a_caption_may_be_one_string_as_in_the_published_file(
    files, write_jsonl
):
  write_jsonl(
      'context.jsonl',
      [{'id': '001', 'image': '001.jpg', 'caption': 'A hill.\nA house.'}],
  )
  questions = llava_bench.load(str(files / 'questions.jsonl'), str(files))
  (_, (_, content)), *_ = (
      request.messages for request in llava_bench.requests(questions, ANSWERS)
  )
  assert content.startswith('[Context]\nA hill.\nA house.\n\n[Question]\nQ0?')


def test_no_score_without_a_judge_or_of_a_part(questions):
  with pytest.raises(base.UnscoredError, match='--judge_url'):
    llava_bench.score(questions, ANSWERS)
  with pytest.raises(base.EvalError, match=r'missing: 1 \(3\)'):
    llava_bench.requests(questions, {'questions': ANSWERS['questions'][:-1]})


def test_what_is_lacking_is_listed(files, write_jsonl):
  write_jsonl(
      'answers_gpt4.jsonl',
      [{'question_id': n, 'text': f'R{n}'} for n in range(5)],
  )
  with pytest.raises(base.EvalError, match=r'no question for 1 \(4\) of the 5'):
    llava_bench.load(str(files / 'questions.jsonl'), str(files))
  write_jsonl('answers_gpt4.jsonl', [{'question_id': 0, 'text': 'R'}])
  write_jsonl('context.jsonl', [{'image': 'other.jpg', 'caption': []}])
  with pytest.raises(
      base.EvalError,
      match=r'without a caption: 4 .*; reference: 3 \(1, 2, 3\)',
  ):
    llava_bench.load(str(files / 'questions.jsonl'), str(files))
  write_jsonl('context.jsonl', [{'image': '001.jpg', 'caption': ['A', 1]}])
  with pytest.raises(base.EvalError, match='context.jsonl, line 1: expected'):
    llava_bench.load(str(files / 'questions.jsonl'), str(files))
  with pytest.raises(base.EvalError, match='--annotations=DIR with context'):
    llava_bench.load(str(files / 'questions.jsonl'), None)
