# SPDX-License-Identifier: Apache-2.0
"""VQAv2 (arXiv 1612.00837): open questions, ten answers to each.

--questions is `llava_vqav2_mscoco_test-dev2015.jsonl`. The answers to the test
set are with the EvalAI server, which wants an answer to every question of it,
of which test-dev is a part: with --annotations=
`llava_vqav2_mscoco_test2015.jsonl` --submission writes the file, as LLaVA's
`convert_vqav2_for_submission.py` does; what was not asked is answered with
nothing. With --annotations=`v2_mscoco_val2014_annotations.json` answers to the
validation set are scored as the official `vqaEval.py` scores that file.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from moellava_jax.evals import base, prompts, textnorm

MAX_NEW_TOKENS = 128  # As LLaVA's runner.
PROMPTS: prompts.Prompts = {'lmms': prompts.short}
_ALL = 'test set'  # The group of questions that are submitted, not asked.


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  `extra` of a question of the validation set has its `answers`; that of the
  first one of the test set, the ids of the whole set.

  Raises:
    EvalError: a file is missing or malformed, or they do not belong together.
  """
  questions = base.read_questions(questions_path)
  stem = pathlib.Path(questions_path).stem
  if annotations is None:
    return {stem: questions}
  if annotations.endswith('.jsonl'):
    every = [row['question_id'] for row in base.read_jsonl(annotations)]
    known, scored = set(every), ()
    unknown = [q.question_id for q in questions if q.question_id not in known]
    extra: dict[int | str, Any] = {questions[0].question_id: {_ALL: every}}
  else:
    found = scored = _read_annotations(annotations)
    unknown = [q.question_id for q in questions if q.question_id not in found]
    extra = {i: {'answers': answers} for i, answers in found.items()}
  if unknown:
    raise base.EvalError(
        f'{annotations}: nothing about questions {base.listed(unknown)} of'
        f' {questions_path}.'
    )
  asked = {q.question_id for q in questions}
  base.check_asked(scored, asked, questions_path, annotations)
  return {
      stem: [
          dataclasses.replace(
              q, extra={**q.extra, **extra.get(q.question_id, {})}
          )
          for q in questions
      ]
  }


def _read_annotations(path: str) -> dict[int | str, list[str]]:
  """The ten answers to each question."""
  rows = base.read_json(path)
  if not isinstance(rows, dict) or 'annotations' not in rows:
    raise base.EvalError(
        f'{path}: expected {{"annotations": [...]}}, as in VQA.'
    )
  return {
      row['question_id']: [answer['answer'] for answer in row['answers']]
      for row in rows['annotations']
  }


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """`{'accuracy': ...}` in [0, 1] of the validation set.

  Raises:
    EvalError: the answers are not those of exactly these questions.
    UnscoredError: they are of a test set.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  if any('answers' not in q.extra for q in group):
    raise base.UnscoredError(
        'VQAv2 test sets are scored by https://eval.ai/challenge/830 from the'
        ' file that --submission=FILE.json writes. A validation set is scored'
        ' here: --annotations=v2_mscoco_val2014_annotations.json.'
    )
  # What is scored is what would be submitted.
  return {'accuracy': accuracy(group, texts)}


def accuracy(
    questions: Sequence[base.Question], texts: Mapping[int | str, str]
) -> float:
  """Mean VQA accuracy in [0, 1] of the normal forms of answers.

  Args:
    questions: whose `extra['answers']` people gave.
    texts: answers by question id.
  """
  total = 0.0
  for question in questions:
    submitted = textnorm.normalize(texts[question.question_id])
    total += textnorm.vqa_accuracy(submitted, question.extra['answers'])
  return total / len(questions)


def submission(
    questions: Sequence[base.Question], answers: Sequence[base.Answer]
) -> list[dict[str, int | str]]:
  """The rows `{question_id, answer}` of the JSON list to upload.

  Args:
    questions: of the whole test set (`llava_vqav2_mscoco_test2015.jsonl`).
    answers: to some of them; of several to one question the last counts.
  """
  return _rows([question.question_id for question in questions], answers)


def _rows(
    ids: Sequence[int | str], answers: Sequence[base.Answer]
) -> list[dict[str, int | str]]:
  texts = {answer.question_id: answer.text for answer in answers}
  return [
      {
          'question_id': question_id,
          'answer': textnorm.normalize(texts.get(question_id, '')),
      }
      for question_id in ids
  ]


def write_submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes the JSON list to upload.

  Raises:
    EvalError: answers are missing, or the whole test set is not known.
  """
  ((key, group),) = questions.items()
  base.check_complete(group, answers[key])
  if _ALL not in group[0].extra:
    raise base.EvalError(
        'The server wants an answer to every question of the test set: give'
        ' --annotations=llava_vqav2_mscoco_test2015.jsonl.'
    )
  rows = _rows(group[0].extra[_ALL], answers[key])
  path.write_text(json.dumps(rows), encoding='utf-8')
