# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench: multiple choice about images and frames of videos.

arXiv 2307.16125, scored as LLaVA's `convert_seed_for_submission.py` scores it:
right is the letter alone. --questions is `llava-seed-bench.jsonl`, or its
lines about images only; --annotations is `SEED-Bench.json`. The other way:
--questions is VLMEvalKit's `SEEDBench_IMG.tsv`, which has the images and their
answers in it.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from moellava_jax.evals import base, prompts, tsv

MAX_NEW_TOKENS = 128  # As LLaVA's runner.
IMAGE, VIDEO = 'image', 'video'
_LETTERS = 'ABCD'


def _options(question: base.Question) -> dict[str, str]:
  row = question.extra
  if 'choice_a' not in row:
    return tsv.options(row)
  return {letter: row[f'choice_{letter.lower()}'] for letter in _LETTERS}


PROMPTS: prompts.Prompts = {
    'lmms': lambda q: prompts.choices_llava(q.extra['question'], _options(q)),
    'vlmevalkit': lambda q: prompts.choices_vlmevalkit(
        q.extra['question'], _options(q)
    ),
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  The category is the official type of question, `extra` the official entry;
  its `data_type` is 'image' or 'video'.

  Raises:
    EvalError: a file is missing or malformed, or they do not belong together.
  """
  stem = pathlib.Path(questions_path).stem
  if questions_path.endswith('.tsv'):
    if annotations is not None:
      raise base.EvalError('A .tsv has its answers in it; drop --annotations.')
    return {stem: _load_tsv(questions_path)}
  if annotations is None:
    raise base.EvalError(
        'seed has its answers apart: give --annotations=SEED-Bench.json.'
    )
  types, official = _read_annotations(annotations)
  questions = base.read_questions(questions_path)
  if unknown := [
      q.question_id for q in questions if str(q.question_id) not in official
  ]:
    raise base.EvalError(
        f'{annotations}: no entry for questions {base.listed(unknown)} of'
        f' {questions_path}.'
    )
  loaded = []
  for question in questions:
    entry = official[str(question.question_id)]
    loaded.append(
        dataclasses.replace(
            question,
            category=types[entry['question_type_id']],
            answer=entry['answer'],
            extra=entry,
        )
    )
  return {stem: loaded}


def _load_tsv(path: str) -> list[base.Question]:
  images = tsv.image_names(path)
  questions = []
  for row in tsv.rows(path, ('question', 'answer', 'category', 'A', 'B')):
    index = str(row['index'])
    extra = {**row, 'data_type': IMAGE}
    questions.append(
        base.Question(
            question_id=index,
            image=next(iter(images[index]), None),
            text=prompts.choices_llava(row['question'] or '', tsv.options(row)),
            category=row['category'] or '',
            answer=row['answer'],
            extra=extra,
        )
    )
  return questions


def _read_annotations(
    path: str,
) -> tuple[dict[int, str], dict[str, Mapping[str, Any]]]:
  """The names of types, and the entries by question id."""
  data = base.read_json(path)
  if not isinstance(data, dict) or not {'questions', 'question_type'} <= set(
      data
  ):
    raise base.EvalError(
        f'{path}: expected {{"question_type", "questions"}}, as in'
        ' SEED-Bench.json.'
    )
  types = {number: name for name, number in data['question_type'].items()}
  return types, {str(row['question_id']): row for row in data['questions']}


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Accuracies in [0, 1]; right is the letter and nothing else.

  Returns:
    `{image, video, total, types: {type: {accuracy, questions}}}`; of the first
    three only what there are questions of, and a total only of both.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  right = {q.question_id: texts[q.question_id] == q.answer for q in group}
  found: dict[str, Any] = {}
  for kind in (IMAGE, VIDEO):
    hits = [right[q.question_id] for q in group if q.extra['data_type'] == kind]
    if hits:
      found[kind] = sum(hits) / len(hits)
  if len(found) == 2:
    found['total'] = sum(right.values()) / len(right)
  types: dict[str, list[bool]] = {}
  for question in group:
    types.setdefault(question.category, []).append(right[question.question_id])
  found['types'] = {
      name: {'accuracy': sum(hits) / len(hits), 'questions': len(hits)}
      for name, hits in types.items()
  }
  return found


def submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes the lines `{question_id, prediction}` for the leaderboard.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  lines = [
      json.dumps(
          {
              'question_id': q.extra.get('question_id', q.question_id),
              'prediction': texts[q.question_id],
          }
      )
      for q in group
  ]
  path.write_text(''.join(f'{x}\n' for x in lines), encoding='utf-8')
