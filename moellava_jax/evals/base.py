# SPDX-License-Identifier: Apache-2.0
"""Questions in, answers out: what all benchmarks share.

A question file and an answers file are the original's (one JSON object a
line), so that either side can be exchanged with its scripts:

  {"question_id", "image", "text", "category", ("label" | "answer"), ...}
  {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}

A score is a function of a question file and an answers file alone; it can be
recomputed without a model.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

from moellava_jax import config

IMAGE_MARK = '<image>\n'  # The original's runners prepend it to the question.
_KEYS = ('question_id', 'image', 'text', 'category')
_LISTED = 5  # Offenders that an error spells out.


class EvalError(config.UserError):
  """A mistake in the files or options given; its message is all one needs."""


class UnscoredError(EvalError):
  """The answers are in order, but their score is not computed here."""


@dataclasses.dataclass(frozen=True)
class Question:
  """A line of a question file."""

  question_id: int | str
  image: str | None  # Relative to the image root; None: a text-only question.
  text: str  # With the benchmark's prompt suffix, without the image mark.
  category: str
  answer: str | None  # The file's `label` or `answer`.
  extra: Mapping[str, Any]  # The line's other fields.
  more_images: tuple[str, ...] = ()  # Those after `image`, in order.

  @property
  def images(self) -> tuple[str, ...]:
    """All images, in the order in which they are shown."""
    return () if self.image is None else (self.image, *self.more_images)


class Answer(NamedTuple):
  """A line of an answers file."""

  question_id: int | str
  prompt: str  # The question's text.
  text: str
  answer_id: str
  model_id: str
  metadata: dict[str, Any]  # Of the original: {} or {'round_id'}.


def listed(items: Sequence[Any]) -> str:
  """`3 (1, 2, 3)`: the count and the first few, for error messages."""
  dots = ', ...' if len(items) > _LISTED else ''
  return f'{len(items)} ({", ".join(map(repr, items[:_LISTED]))}{dots})'


def _read(path: str | os.PathLike[str]) -> bytes:
  """The bytes of a file that must be there and hold something."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise EvalError(f'{path}: no such file.')
  if not (data := path.read_bytes()).strip():
    raise EvalError(f'{path}: the file is empty.')
  return data


def read_json(path: str | os.PathLike[str]) -> Any:
  """The value in a .json file.

  Raises:
    EvalError: no such file, nothing in it, or no JSON.
  """
  try:
    return json.loads(_read(path))
  except ValueError as e:
    raise EvalError(f'{path}: not valid JSON ({e}).') from e


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of a .jsonl file.

  Raises:
    EvalError: no such file, nothing in it, or a line that is no object.
  """
  return parse_jsonl(_read(path), path)


def parse_jsonl(
    data: bytes, path: str | os.PathLike[str]
) -> list[dict[str, Any]]:
  """The objects of .jsonl data; item n is line n + 1 of `path`.

  Raises:
    EvalError: a line is no JSON object.
  """
  rows = []
  # Not splitlines(): strings in JSON may hold other line separators.
  lines = data.rstrip().split(b'\n') if data.strip() else []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as e:
      raise EvalError(f'{path}, line {number}: not valid JSON ({e}).') from e
    if not isinstance(row, dict):
      raise EvalError(
          f'{path}, line {number}: expected a JSON object, got'
          f' {type(row).__name__}.'
      )
    rows.append(row)
  return rows


def read_questions(
    path: str | os.PathLike[str], *, unique: bool = True
) -> list[Question]:
  """Reads a question file.

  Args:
    path: the file.
    unique: whether a question_id may occur only once.

  Raises:
    EvalError: with file and line, if a line is malformed or repeats an id.
  """
  questions, line_of = [], {}
  for number, row in enumerate(read_jsonl(path), 1):
    question = _question(row, f'{path}, line {number}')
    first = line_of.setdefault(question.question_id, number)
    if unique and first != number:
      raise EvalError(
          f'{path}, line {number}: question_id {question.question_id!r} occurs'
          f' already in line {first}.'
      )
    questions.append(question)
  return questions


def _question(row: dict[str, Any], where: str) -> Question:
  if missing := [key for key in _KEYS if key not in row]:
    raise EvalError(
        f'{where}: missing {missing}; a question has {list(_KEYS)}, where'
        ' "image" may be null.'
    )
  extra = {key: row[key] for key in row if key not in _KEYS}
  gold = [extra.pop(key) for key in ('label', 'answer') if key in extra]
  strings = [row['text'], row['category'], *gold]
  if row['image'] is not None:
    strings.append(row['image'])
  if wrong := [value for value in strings if not isinstance(value, str)]:
    raise EvalError(
        f'{where}: image, text, category, label and answer are strings, not'
        f' {wrong[0]!r}.'
    )
  if len(gold) == 2:
    raise EvalError(f'{where}: has both "label" and "answer"; keep one.')
  if IMAGE_MARK.strip() in row['text']:
    raise EvalError(
        f'{where}: the text holds {IMAGE_MARK.strip()!r}, which is added when'
        ' the question is asked; remove it.'
    )
  return Question(
      question_id=_id(row, where),
      image=row['image'],
      text=row['text'],
      category=row['category'],
      answer=gold[0] if gold else None,
      extra=extra,
  )


def _id(row: dict[str, Any], where: str) -> int | str:
  value = row['question_id']
  if isinstance(value, bool) or not isinstance(value, int | str):
    raise EvalError(f'{where}: question_id {value!r} is no integer or string.')
  return value


def _round_id(row: dict[str, Any], where: str) -> int:
  value = row['round_id']
  if isinstance(value, bool) or not isinstance(value, int):
    raise EvalError(f'{where}: round_id {value!r} is no integer.')
  return value


def read_answers(path: str | os.PathLike[str]) -> list[Answer]:
  """Reads an answers file of ours or of the original.

  Raises:
    EvalError: with file and line, if a line has no question_id or no text.
  """
  return parse_answers(_read(path), path)


def parse_answers(data: bytes, path: str | os.PathLike[str]) -> list[Answer]:
  """The answers in `data`, the bytes of `path` or the first of them."""
  answers = []
  for number, row in enumerate(parse_jsonl(data, path), 1):
    where = f'{path}, line {number}'
    if 'question_id' not in row or not isinstance(row.get('text'), str):
      raise EvalError(
          f'{where}: an answer has a "question_id" and a string "text"; this'
          f' line has {sorted(row)}.'
      )
    metadata = row.get('metadata') or {}
    if 'round_id' in row:  # Of MMBench; the original has it outside.
      metadata = {**metadata, 'round_id': _round_id(row, where)}
    answers.append(
        Answer(
            question_id=_id(row, where),
            prompt=row.get('prompt', ''),
            text=row['text'],
            answer_id=row.get('answer_id', ''),
            model_id=row.get('model_id', ''),
            metadata=metadata,
        )
    )
  return answers


def check_asked(
    annotated: Iterable[Any],
    asked: Container[Any],
    questions_path: str,
    annotations: str,
) -> None:
  """Raises EvalError unless all that is annotated is asked.

  The score of some questions would pass for that of the benchmark.
  """
  ids = list(annotated)
  if missing := [i for i in ids if i not in asked]:
    raise EvalError(
        f'{questions_path}: no question for {listed(missing)} of the'
        f' {len(ids)} in {annotations}; a part is not scored. Give the question'
        ' file that asks all of them.'
    )


def check_complete(
    questions: Sequence[Question], answers: Sequence[Answer]
) -> dict[int | str, str]:
  """Pairs by id: every question has exactly one answer, or nothing is scored.

  Answers are also compared by prompt where they carry one, because ids count
  from 0 in most question files.

  Returns:
    The text of the answer of each question id.

  Raises:
    EvalError: lists a few of the missing, repeated, foreign or swapped ids.
  """
  asked = {q.question_id: q.text for q in questions}
  texts: dict[int | str, str] = {}
  repeated, foreign, other = [], [], []
  for answer in answers:
    if answer.question_id not in asked:
      foreign.append(answer.question_id)
    elif answer.question_id in texts:
      repeated.append(answer.question_id)
    else:
      texts[answer.question_id] = answer.text
      prompt = answer.prompt.removeprefix(IMAGE_MARK)
      if prompt and prompt != asked[answer.question_id]:
        other.append(answer.question_id)
  found = {
      'missing': [i for i in asked if i not in texts],
      'answered more than once': repeated,
      'not in the question file': foreign,
      'answered for another prompt': other,
  }
  if bad := [f'{what}: {listed(ids)}' for what, ids in found.items() if ids]:
    raise EvalError(
        f'The answers do not match the {len(asked)} questions; question ids '
        f'{"; ".join(bad)}.'
    )
  return texts
