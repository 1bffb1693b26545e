# SPDX-License-Identifier: Apache-2.0
"""TextVQA: questions about text in images, with the OCR tokens in the prompt.

arXiv 1904.08920, validation set 0.5.1, scored as LLaVA's `eval_textvqa.py` and
`TextVQAAccuracyEvaluator` score it. --questions is
`llava_textvqa_val_v051_ocr.jsonl`, whose question_id is that of the image, so
that a question is known by it and by its words; --annotations is
`TextVQA_0.5.1_val.json`, with ten answers to each. A line that occurs several
times is scored as often.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from moellava_jax.evals import base, prompts, textnorm

MAX_NEW_TOKENS = 128  # As LLaVA's runner.
PROMPTS: prompts.Prompts = {  # Neither shows the OCR tokens.
    'lmms': lambda q: f'{q.extra["question"].capitalize()}\n{prompts.SHORT}',
    'vlmevalkit': lambda q: f'{q.extra["question"]}\n{prompts.SHORT}',
}
_ANSWERS = 10
_OCR = 'Reference OCR token: '

Annotations = Mapping[tuple[int | str, str], Mapping[str, Any]]


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions, annotations in `extra`, under their file's stem.

  Raises:
    EvalError: a file is missing or malformed, a question not annotated, or an
      annotation not asked.
  """
  if annotations is None:
    raise base.EvalError(
        'textvqa has its answers apart: give'
        ' --annotations=TextVQA_0.5.1_val.json.'
    )
  annotated = read_annotations(annotations)
  questions = []
  for question in base.read_questions(questions_path, unique=False):
    found = annotation(annotated, question.question_id, question.text)
    questions.append(
        dataclasses.replace(question, extra={**question.extra, **found})
    )
  base.check_asked(
      annotated,
      {(q.question_id, question_of(q.text)) for q in questions},
      questions_path,
      annotations,
  )
  return {pathlib.Path(questions_path).stem: questions}


def read_annotations(path: str) -> Annotations:
  """The entries of an official annotation file, by image and question."""
  rows = base.read_json(path)
  if not isinstance(rows, dict) or not isinstance(rows.get('data'), list):
    raise base.EvalError(f'{path}: expected {{"data": [...]}}, as in TextVQA.')
  return {
      (row['image_id'], row['question'].lower()): row for row in rows['data']
  }


def annotation(
    annotations: Annotations, question_id: int | str, prompt: str
) -> Mapping[str, Any]:
  """The entry of the question that `prompt` asks about an image.

  Raises:
    EvalError: there is none, or it does not have ten answers.
  """
  question = question_of(prompt)
  if (question_id, question) not in annotations:
    raise base.EvalError(
        f'No annotation for question {question!r} about image {question_id!r};'
        ' questions and annotations are of different releases.'
    )
  found = annotations[question_id, question]
  if len(found.get('answers', ())) != _ANSWERS:
    raise base.EvalError(
        f'The annotation of question {question!r} about image {question_id!r}'
        f' has no {_ANSWERS} "answers"; the test set has them on the server.'
    )
  return found


def question_of(prompt: str) -> str:
  """The question alone in lower case, from a prompt in one of three forms.

  Raises:
    EvalError: the prompt is in none of them.
  """
  lines = prompt.split('\n')
  found = None
  if prompt.startswith('OCR tokens: '):
    match = re.search('Question: (.*?) Short answer:', prompt, re.DOTALL)
    found = match and match[1]
  elif _OCR in prompt and len(lines) == 3:
    found = lines[prompt.startswith(_OCR.strip())]
  elif len(lines) == 2:
    found = lines[0]
  if found is None:
    raise base.EvalError(
        f'No question found in the prompt {prompt!r}; expected it before or'
        f' after a line {_OCR!r}, and a last line that asks for one word.'
    )
  return found.lower()


def answer_scores(answers: Sequence[str]) -> dict[str, float]:
  """The score of each distinct answer of ten people, by its normal form.

  The mean over leaving one person out of min(1, how many others said it / 3).
  """
  normal = [textnorm.normalize(answer) for answer in answers]
  return {
      said: sum(
          min(1.0, (normal.count(said) - (left_out == said)) / 3)
          for left_out in normal
      )
      / len(normal)
      for said in dict.fromkeys(normal)
  }


def accuracy(texts: Sequence[tuple[str, Sequence[str]]]) -> float:
  """Mean score in [0, 1] of predictions, each with its ten answers."""
  return sum(
      answer_scores(answers).get(textnorm.normalize(text), 0.0)
      for text, answers in texts
  ) / len(texts)


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """`{'accuracy': ...}` in [0, 1].

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  # Ids that are unique, and the same for a question and its answer.
  names = [_name(q.question_id, q.text) for q in group]
  counts = collections.Counter(names)
  asked = [
      dataclasses.replace(q, question_id=name)
      for q, name in zip(group, _numbered(names, counts), strict=True)
  ]
  named = [_name(a.question_id, a.prompt) for a in answers[key]]
  said = [
      a._replace(question_id=name)
      for a, name in zip(answers[key], _numbered(named, counts), strict=True)
  ]
  texts = base.check_complete(asked, said)
  return {
      'accuracy': accuracy(
          [(texts[q.question_id], q.extra['answers']) for q in asked]
      )
  }


def _numbered(names: Sequence[str], counts: Mapping[str, int]) -> list[str]:
  """The names, numbered in their order where `counts` has several of one."""
  seen: collections.Counter[str] = collections.Counter()
  found = []
  for name in names:
    seen[name] += 1
    repeated = counts.get(name, 0) > 1
    found.append(f'{name} ({seen[name]})' if repeated else name)
  return found


def _name(question_id: int | str, prompt: str) -> str:
  prompt = prompt.removeprefix(base.IMAGE_MARK)
  return f'{question_id}: {question_of(prompt)}'
