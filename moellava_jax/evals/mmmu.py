# SPDX-License-Identifier: Apache-2.0
"""MMMU (arXiv 2311.16502): college exams with pictures in the questions.

Parsed and scored as `eval/eval_utils.py` of the official repository does;
where an answer names no option it draws one, with seed 42 and in the order of
its subjects, and so do we. --questions is VLMEvalKit's `MMMU_DEV_VAL.tsv`
(images in it), or a .jsonl with the fields of the data set on the hub: `id`,
`question`, `options`, `answer`, `question_type`, `image_1` to `image_7` (paths
below --images). Of a file with several splits the validation set is taken.
--annotations may be the official `answer_dict_val.json`. The test set is scored
by EvalAI from the file of --submission.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import random
import re
from typing import Any

from moellava_jax.evals import base, mmmu_parse, mmmu_subjects, prompts, tsv

MAX_NEW_TOKENS = 1024
_ID = re.compile('([a-z]+)_(.+)_([0-9]+)')
_MARK = re.compile('<image ([1-7])>')
_SEED = 42


def _llava(question: base.Question) -> str:
  """The official prompt for LLaVA-1.5 (`construct_prompt`): all images first."""
  row = question.extra
  if not row['options']:
    return f'{row["question"]}\n{prompts.SHORT}'
  listed = ''.join(f'({k}) {v}\n' for k, v in row['options'].items())
  return f'{row["question"]}\n{listed}\n{prompts.LETTER}'


def _lmms(question: base.Question) -> str:
  row = question.extra
  if not row['options']:
    return f'{row["question"]}\n\n{prompts.SHORT}'
  listed = '\n'.join(f'{k}. {v}' for k, v in row['options'].items())
  return f'{row["question"]}\n{listed}\n\n{prompts.LETTER}'


def _vlmevalkit(question: base.Question) -> str:
  """The images stand where the question names them (`split_MMMU`).

  Where it does not name each once and in order, they come first.
  """
  row = question.extra
  text = prompts.choices_vlmevalkit(
      row['question'], row['options'], row.get('hint')
  )
  named = _MARK.findall(text)
  shown = [str(n) for n in range(1, len(question.images) + 1)]
  if named != shown:
    return text
  return _MARK.sub(base.IMAGE_MARK.strip(), text)


PROMPTS: prompts.Prompts = {'lmms': _lmms, 'vlmevalkit': _vlmevalkit}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  The category is the subject; `extra` has `question`, `options` (letter ->
  text, empty of an open question) and `gold`, a list.

  Raises:
    EvalError: a file is missing or malformed.
  """
  golds = {}
  if annotations is not None:
    golds = {
        key: row['ground_truth']
        for key, row in base.read_json(annotations).items()
    }
  if questions_path.endswith('.tsv'):
    rows = _tsv_rows(questions_path)
  else:
    rows = _jsonl_rows(questions_path)
  questions = [
      _question(row, images, golds, f'{questions_path}, {where}')
      for where, row, images in rows
  ]
  splits = {str(q.question_id).split('_')[0] for q in questions}
  if len(splits) > 1 and 'validation' in splits:
    questions = [
        q for q in questions if str(q.question_id).startswith('validation_')
    ]
  return {pathlib.Path(questions_path).stem: questions}


_Row = tuple[str, Mapping[str, Any], tuple[str, ...]]


def _tsv_rows(path: str) -> Iterator[_Row]:
  images = tsv.image_names(path)
  for row in tsv.rows(path, ('id', 'question', 'answer')):
    where = f'index {row["index"]}'
    yield where, {**row, 'options': tsv.options(row)}, images[str(row['index'])]


def _jsonl_rows(path: str) -> Iterator[_Row]:
  for number, row in enumerate(base.read_jsonl(path), 1):
    listed = row.get('options') or []
    if isinstance(listed, str):  # As the hub has it.
      listed = ast.literal_eval(listed)
    letters = {chr(ord('A') + n): text for n, text in enumerate(listed)}
    if row.get('question_type') == 'open':
      letters = {}
    names = [row.get(f'image_{n}') for n in range(1, 8)]
    images = tuple(name for name in names if name)
    yield f'line {number}', {**row, 'options': letters}, images


def _question(
    row: Mapping[str, Any],
    images: Sequence[str],
    golds: Mapping[str, Any],
    where: str,
) -> base.Question:
  name = _ID.fullmatch(str(row.get('id')))
  if (
      name is None
      or name[2] not in mmmu_subjects.SUBJECTS
      or not row.get('question')
  ):
    raise base.EvalError(
        f'{where}: expected an "id" such as validation_Accounting_1 and a'
        f' "question", got {row.get("id")!r} and {row.get("question")!r}.'
    )
  gold = golds.get(row['id'], row.get('answer'))
  if isinstance(gold, str) and gold.startswith('['):
    gold = ast.literal_eval(gold)
  known = gold is not None and gold != '?'  # As in the test set.
  golden = (gold if isinstance(gold, list) else [gold]) if known else []
  question = base.Question(
      question_id=row['id'],
      image=next(iter(images), None),
      text='',
      category=name[2],
      answer=str(gold) if known else None,
      extra={
          'question': row['question'],
          'options': row['options'],
          'gold': [str(text) for text in golden],
          'hint': row.get('hint'),
      },
      more_images=tuple(images[1:]),
  )
  return dataclasses.replace(question, text=_llava(question))


def _parsed(
    group: Sequence[base.Question], texts: Mapping[int | str, str]
) -> dict[int | str, tuple[Any, bool]]:
  """What each answer says, and whether it was drawn."""
  draw = random.Random(_SEED)
  found = {}
  for subject in mmmu_subjects.SUBJECTS:
    for question in (q for q in group if q.category == subject):
      text = texts[question.question_id]
      letters = question.extra['options']
      if letters:
        said = mmmu_parse.choice(text, letters)
        drawn = said is None
        said = draw.choice(list(letters)) if drawn else said
        found[question.question_id] = said, drawn
      else:
        found[question.question_id] = mmmu_parse.open_answers(text), False
  return found


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Accuracies in [0, 1] over questions.

  Returns:
    `{accuracy, drawn, disciplines, subjects}`: `drawn` answers named no
    option; the last two are tables of `{name: {accuracy, questions}}`.

  Raises:
    EvalError: the answers are not those of exactly these questions.
    UnscoredError: the questions are of the test set, without answers.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  if unknown := [q.question_id for q in group if q.answer is None]:
    raise base.UnscoredError(
        f'{key}: no answer to {base.listed(unknown)}; the test set is scored by'
        ' https://eval.ai/challenge/2179 from the file that'
        ' --submission=FILE.json writes.'
    )
  parsed = _parsed(group, texts)
  right: dict[str, list[bool]] = {name: [] for name in mmmu_subjects.SUBJECTS}
  for question in group:
    said, _ = parsed[question.question_id]
    gold = question.extra['gold']
    hit = (
        said in gold
        if question.extra['options']
        else mmmu_parse.is_right(said, gold)
    )
    right[question.category].append(hit)
  every = [hit for hits in right.values() for hit in hits]
  fields = {
      name: [hit for subject in inner for hit in right[subject]]
      for name, inner in mmmu_subjects.DISCIPLINES.items()
  }
  return {
      'accuracy': sum(every) / len(every),
      'drawn': sum(drawn for _, drawn in parsed.values()),
      'disciplines': _table(fields),
      'subjects': _table(right),
  }


def _table(groups: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
  return {
      name: {'accuracy': sum(hits) / len(hits), 'questions': len(hits)}
      for name, hits in groups.items()
      if hits
  }


def submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes `{id: letter, or the answer to an open question}`.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  parsed = _parsed(group, texts)
  found = {
      q.question_id: (
          parsed[q.question_id][0]
          if q.extra['options']
          else texts[q.question_id]
      )
      for q in group
  }
  path.write_text(json.dumps(found, indent=1), encoding='utf-8')
