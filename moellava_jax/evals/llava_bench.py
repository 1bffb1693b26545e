# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench (in the wild): 60 open questions, reviewed by a language model.

arXiv 2304.08485, reviewed and summed up as LLaVA's `eval_gpt_review_bench.py`
and `summarize_gpt_review.py` do. --questions is `questions.jsonl`,
--annotations the directory with `context.jsonl` (captions of the images) and
`answers_gpt4.jsonl` (what the answers are measured by). LLaVA's judge is
gpt-4-0314, that of MoE-LLaVA's scripts gpt-3.5-turbo: scores compare only
under one judge.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from moellava_jax.evals import base, judge, prompts

MAX_NEW_TOKENS = 1024  # As LLaVA's runner.
CATEGORIES = ('conv', 'detail', 'complex')
_REPLY_TOKENS = 1024
_TEMPERATURE = 0.2
_UNREADABLE = (-1.0, -1.0)  # Which the script averages as well.

PROMPTS: prompts.Prompts = {
    'lmms': lambda q: q.text,
    'vlmevalkit': lambda q: q.text,
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  `answer` is the reference answer, `extra['caption']` what the judge is told of
  the image.

  Raises:
    EvalError: a file is missing or malformed, or lacks something, or a question
      with a reference is not asked.
  """
  if annotations is None:
    raise base.EvalError(
        'llava_bench has its references apart: give --annotations=DIR with'
        ' context.jsonl and answers_gpt4.jsonl.'
    )
  folder = pathlib.Path(annotations)
  captions = {}
  for number, row in enumerate(base.read_jsonl(folder / 'context.jsonl'), 1):
    caption = row.get('caption')
    # The published file has one string; the official script takes both.
    sentences = [caption] if isinstance(caption, str) else caption
    if (
        'image' not in row
        or not isinstance(sentences, list)
        or not all(isinstance(sentence, str) for sentence in sentences)
    ):
      raise base.EvalError(
          f'{folder}/context.jsonl, line {number}: expected an "image" and a'
          f' "caption", a string or a list of strings; got {row}.'
      )
    captions[row['image']] = '\n'.join(sentences)
  references = {
      answer.question_id: answer.text
      for answer in base.read_answers(folder / 'answers_gpt4.jsonl')
  }
  questions = base.read_questions(questions_path)
  lacking = {
      'caption': [q.question_id for q in questions if q.image not in captions],
      'reference': [
          q.question_id for q in questions if q.question_id not in references
      ],
      f'category of {list(CATEGORIES)}': [
          q.question_id for q in questions if q.category not in CATEGORIES
      ],
  }
  if found := [f'{k}: {base.listed(v)}' for k, v in lacking.items() if v]:
    raise base.EvalError(f'{folder}: questions without a {"; ".join(found)}.')
  base.check_asked(
      references,
      {q.question_id for q in questions},
      questions_path,
      f'{folder}/answers_gpt4.jsonl',
  )
  return {
      pathlib.Path(questions_path).stem: [
          dataclasses.replace(
              q,
              answer=references[q.question_id],
              extra={**q.extra, 'caption': captions[q.image]},
          )
          for q in questions
      ]
  }


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Raises UnscoredError, or EvalError if the answers are not complete."""
  ((key, group),) = questions.items()
  base.check_complete(group, answers[key])
  raise base.UnscoredError(
      'llava_bench is reviewed by a language model: give --judge_url and'
      ' --judge_model.'
  )


def requests(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> list[judge.Request]:
  """What `grade` asks."""
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  return [_request(q, texts[q.question_id]) for q in group]


def grade(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
    judged: judge.Judge,
) -> dict[str, Any]:
  """What the official summary prints.

  Returns:
    `{all, conv, detail, complex, unreadable}`, each but the last `{ratio,
    reference, model}`: mean scores of reference and model times 10, and the
    second as percentage of the first, which papers print as LLaVA-W.
    `unreadable` reviews have no two scores in their first line; they count as
    -1 for both.
  """
  (group,) = questions.values()
  reviews = judged.map(judged.ask, requests(questions, answers))
  pairs = [read_scores(review) for review in reviews]
  found = {'all': summary(pairs)}
  for category in CATEGORIES:
    chosen = [
        pair
        for pair, question in zip(pairs, group, strict=True)
        if question.category == category
    ]
    if chosen:
      found[category] = summary(chosen)
  return {**found, 'unreadable': pairs.count(_UNREADABLE)}


def read_scores(review: str) -> tuple[float, float]:
  """Two numbers with a single space or comma between, alone in a first line.

  `8, 9` is unreadable: a comma and a space make three fields.
  """
  fields = review.split('\n')[0].replace(',', ' ').split(' ')
  try:
    first, second = map(float, fields)
  except ValueError:
    return _UNREADABLE
  return first, second


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
  """Ratio and means, rounded where the official script rounds them."""
  reference, model = (
      round(mean, 3) for mean in np.asarray(pairs).mean(0).tolist()
  )
  return {
      'ratio': round(model / reference * 100, 1) if reference else 0.0,
      'reference': round(reference * 10, 1),
      'model': round(model * 10, 1),
  }


def _request(question: base.Question, text: str) -> judge.Request:
  content = (
      f'[Context]\n{question.extra["caption"]}\n\n'
      f'[Question]\n{question.text}\n\n'
      f'[Assistant 1]\n{question.answer}\n\n[End of Assistant 1]\n\n'
      f'[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n'
      f'[System]\n{RULE}\n\n'
  )
  messages = (('system', _SYSTEM), ('user', content))
  return judge.Request(messages, _TEMPERATURE, _REPLY_TOKENS)


_SYSTEM = (
    'You are a helpful and precise assistant for checking the quality of the'
    ' answer.'
)
# `llava_bench_conv`, `_detail` and `_complex` of LLaVA's `rule.json`, which
# are the same.
RULE = (
    'We would like to request your feedback on the performance of two AI'
    ' assistants in response to the user question displayed above. The user asks'
    ' the question on observing an image. For your reference, the visual content'
    ' in the image is represented with a few sentences describing the image. \n'
    'Please rate the helpfulness, relevance, accuracy, level of details of their'
    ' responses. Each assistant receives an overall score on a scale of 1 to 10,'
    ' where a higher score indicates better overall performance.\n'
    'Please first output a single line containing only two values indicating the'
    ' scores for Assistant 1 and 2, respectively. The two scores are separated'
    ' by a space.\n'
    'In the subsequent line, please provide a comprehensive explanation of your'
    ' evaluation, avoiding any potential bias and ensuring that the order in'
    ' which the responses were presented does not affect your judgment.'
)
