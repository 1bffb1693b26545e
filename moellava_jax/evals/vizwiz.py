# SPDX-License-Identifier: Apache-2.0
"""VizWiz (arXiv 1802.08218): questions of blind people about their photographs.

--questions is `llava_test.jsonl`. The answers to the test set are with the
EvalAI server; --submission writes its file, as LLaVA's
`convert_vizwiz_for_submission.py` does. With --annotations=`val.json` answers
to the validation set are scored by the VQA accuracy of normal forms, as
lmms-eval does (`vizwiz_vqa_process_results`); the server's own normal forms are
not published with the data.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from moellava_jax.evals import base, prompts, textnorm, textvqa

MAX_NEW_TOKENS = 128  # As LLaVA's runner.
PROMPTS: prompts.Prompts = {
    'lmms': lambda q: '\n'.join(
        [prompts.bare(q).capitalize(), prompts.UNANSWERABLE, prompts.SHORT]
    ),
    'vlmevalkit': prompts.bare,
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  Raises:
    EvalError: a file is missing or malformed, an image not annotated, or one
      that is annotated not asked about.
  """
  questions = base.read_questions(questions_path)
  if annotations is not None:
    rows = base.read_json(annotations)
    try:
      found = {
          row['image']: [answer['answer'] for answer in row['answers']]
          for row in rows
      }
    except (KeyError, TypeError) as e:
      raise base.EvalError(
          f'{annotations}: expected a list of {{"image", "answers": [{{"answer"'
          '}, ...]}, as in val.json of VizWiz.'
      ) from e
    if unknown := [q.image for q in questions if q.image not in found]:
      raise base.EvalError(
          f'{annotations}: no answers about {base.listed(unknown)} of'
          f' {questions_path}.'
      )
    asked = {q.image for q in questions}
    base.check_asked(found, asked, questions_path, annotations)
    questions = [
        dataclasses.replace(q, extra={**q.extra, 'answers': found[q.image]})
        for q in questions
    ]
  return {pathlib.Path(questions_path).stem: questions}


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """`{'accuracy': ...}` in [0, 1] of the validation set.

  Raises:
    EvalError: the answers are not those of exactly these questions.
    UnscoredError: they are of the test set.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  if any('answers' not in q.extra for q in group):
    raise base.UnscoredError(
        'The VizWiz test set is scored by the challenge on https://eval.ai from'
        ' the file that --submission=FILE.json writes. The validation set is'
        ' scored here: --annotations=val.json.'
    )
  said = [(texts[q.question_id], q.extra['answers']) for q in group]
  return {'accuracy': textvqa.accuracy(said)}


def submission(
    questions: Sequence[base.Question], answers: Sequence[base.Answer]
) -> list[dict[str, Any]]:
  """The rows `{image, answer}` of the JSON list to upload.

  Args:
    questions: of the test set (`llava_test.jsonl`).
    answers: to all of them; of several to one question the last counts.

  Raises:
    EvalError: a question is not answered.
  """
  texts = {answer.question_id: answer.text for answer in answers}
  if missing := [
      q.question_id for q in questions if q.question_id not in texts
  ]:
    raise base.EvalError(
        f'Of {len(questions)} questions, without an answer:'
        f' {base.listed(missing)}; the server takes complete sets only.'
    )
  return [
      {
          'image': question.image,
          'answer': textnorm.normalize(texts[question.question_id]),
      }
      for question in questions
  ]


def write_submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes the JSON list to upload.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  base.check_complete(group, answers[key])
  path.write_text(json.dumps(submission(group, answers[key])), encoding='utf-8')
