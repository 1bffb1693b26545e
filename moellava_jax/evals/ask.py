# SPDX-License-Identifier: Apache-2.0
"""Puts the questions of a file to a model; resumable."""

import collections
from collections.abc import Iterable, Sequence
import hashlib
import itertools
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

from moellava_jax import config
from moellava_jax.evals import base, controls, parts, progress, traces


class Settings(NamedTuple):
  """How answers are generated."""

  max_new_tokens: int
  temperature: float  # 0: greedy, as in every published number.
  batch_size: int
  routing_trace: bool  # Whether to record where tokens go, see `traces`.
  image_aspect: str | None = None  # None: the one of training.


def check_images(
    questions: Iterable[base.Question],
    images_root: str | None,
    listing: pathlib.Path | None = None,
) -> None:
  """Raises EvalError unless every image of the questions is a file.

  Args:
    questions: of all files.
    images_root: where the images are.
    listing: is written with a line for each that is missing, and removed if
      none is.
  """
  names = dict.fromkeys(name for q in questions for name in q.images)
  if not names:
    return
  if images_root is None:
    raise base.EvalError(
        'The questions have images; give their root as --images=DIR.'
    )
  root = pathlib.Path(images_root)
  missing = [name for name in names if not (root / name).is_file()]
  if not missing:
    if listing is not None:
      listing.unlink(missing_ok=True)
    return
  message = f'{root}: of {len(names)} images, missing: {base.listed(missing)}.'
  if listing is not None:
    listing.parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(f'{name}\n' for name in missing)
    listing.write_text(text, encoding='utf-8')
    message += f' All of them are listed in {listing}.'
  raise base.EvalError(message)


def check_prompts(
    chat: Any,
    questions: Sequence[base.Question],
    max_new_tokens: int,
    name: str,
) -> None:
  """Finds what cannot be asked, before hours of answers.

  Warns of questions beyond the positions that the model was made for. They are
  asked all the same: rotary positions go on, and the original has no limit.

  Args:
    chat: a `moellava_jax.infer.chat.Chat`.
    questions: all questions of a file.
    max_new_tokens: of an answer.
    name: of the file, for messages.

  Raises:
    EvalError: a prompt has not as many image marks as the question has images.
  """
  lengths, wrong = [], {}
  for question in questions:
    try:
      lengths.append(chat.positions(_request(question.text, question.images)))
    except config.UserError as e:
      wrong.setdefault(question.question_id, e)
  if wrong:
    first = next(iter(wrong.values()))
    raise base.EvalError(
        f'{name}: questions that cannot be asked: {base.listed(list(wrong))}.'
        f' The first: {first}'
    ) from first
  limit = chat.max_positions
  if limit is None or max(lengths, default=0) + max_new_tokens <= limit:
    return
  beyond = sum(n + max_new_tokens > limit for n in lengths)
  print(
      f'{name}: with {max_new_tokens} new tokens {beyond} of'
      f' {len(lengths)} questions take more than the {limit} positions that'
      f' {chat.name} was made for, {sum(n > limit for n in lengths)} of them'
      f' by the question alone (the longest: {max(lengths)}). They are asked all'
      ' the same; the original has no limit either.',
      file=sys.stderr,
      flush=True,
  )


def run(
    chat: Any,
    questions: Sequence[base.Question],
    images_root: str | None,
    answers_path: str | os.PathLike[str],
    control: str,
    settings: Settings,
    *,
    model_id: str,
    shard: parts.Shard | None = None,
) -> list[base.Answer] | None:
  """Answers the questions that are not answered yet; see `ask` and `collect`."""
  rows = ask(
      chat,
      questions,
      images_root,
      answers_path,
      control,
      settings,
      model_id=model_id,
      shard=shard,
  )
  return collect(rows, answers_path, shard)


def ask(
    chat: Any,
    questions: Sequence[base.Question],
    images_root: str | None,
    answers_path: str | os.PathLike[str],
    control: str,
    settings: Settings,
    *,
    model_id: str,
    shard: parts.Shard | None = None,
) -> list[base.Answer]:
  """Answers the questions that `answers_path` does not answer yet.

  Every finished batch is on disk before the next one starts, so a killed run
  loses one batch at most and goes on with the same command.

  Args:
    chat: a `moellava_jax.infer.chat.Chat`.
    questions: all questions of the file.
    images_root: where their images are.
    answers_path: the .jsonl to write or to continue.
    control: what the model is shown, one of `controls.CONTROLS`.
    settings: how to generate.
    model_id: the model's name in the answers.
    shard: answer a share of the questions, into a file beside `answers_path`.

  Returns:
    The answers that are to be in the file, in order, without their texts.

  Raises:
    EvalError: an image is missing, a question cannot be asked, or the file
      holds answers of another model, question file, control or other settings.
  """
  check_images(questions, images_root)
  shown = _shown(questions, control)
  rows = [
      _unanswered(question, images, chat.digest, control, settings, model_id)
      for question, images in zip(questions, shown, strict=True)
  ]
  whole = pathlib.Path(answers_path)
  path = parts.own(whole, shard)
  done = set(_answered(whole, rows))
  path.parent.mkdir(parents=True, exist_ok=True)
  _mend(path)
  mine = range(len(rows))
  if shard is not None:
    mine = shard.mine(len(rows), settings.batch_size)
  firsts = _firsts(rows)
  pending = [i for i in mine if i in firsts and _key(rows[i]) not in done]
  traces_at = None
  if settings.routing_trace:
    traces_at = traces.folder(whole)
    _check_traced(traces_at, [(i, rows[i]) for i in sorted(firsts)], done)
  with (
      progress.bar(path.name, len(mine), len(mine) - len(pending)) as advance,
      path.open('a', encoding='utf-8') as file,
  ):
    for start in range(0, len(pending), settings.batch_size):
      batch = pending[start : start + settings.batch_size]
      images = [_load(shown[i], images_root, control) for i in batch]
      asked = [rows[i] for i in batch]
      found = _generate(chat, asked, images, settings, batch)
      if traces_at is not None:
        # First, so that no answer is without.
        routings = [answer.routing for answer in found]
        experts = chat.model.cfg.moe.num_experts
        traces.write(traces_at, batch, asked, routings, experts)
      for row, answer in zip(asked, found, strict=True):
        row = row._replace(text=answer.text.strip())
        file.write(json.dumps(row._asdict(), ensure_ascii=False) + '\n')
      file.flush()
      os.fsync(file.fileno())
      advance(len(batch))
  return rows


def collect(
    rows: Sequence[base.Answer],
    answers_path: str | os.PathLike[str],
    shard: parts.Shard | None,
) -> list[base.Answer] | None:
  """All answers, brought together in `answers_path` in the order of `rows`.

  Args:
    rows: what `ask` has returned.
    answers_path: the .jsonl of all answers.
    shard: which process this is.

  Returns:
    None if other processes have not answered all of theirs yet.
  """
  path = pathlib.Path(answers_path)
  alone = shard is None and len(parts.files(path)) == 1
  if alone and len(_firsts(rows)) == len(rows):
    return base.read_answers(path)
  found = _answered(path, rows)
  if any(_key(row) not in found for row in rows):
    return None
  writer = 'all' if shard is None else f'{shard.index}-of-{shard.count}'
  parts.write(path, [found[_key(row)] for row in rows], writer)
  return base.read_answers(path)


def _check_traced(
    where: pathlib.Path,
    rows: Sequence[tuple[int, base.Answer]],
    done: set[tuple[int | str, str]],
) -> None:
  """Raises EvalError if an answer is there, but not its expert choices."""
  about = rows[0][1].metadata
  traced = traces.questions(where, about['digest'], about['control'])
  lacking = [
      row.question_id
      for i, row in rows
      if _key(row) in done and i not in traced
  ]
  if lacking:
    raise base.EvalError(
        f'{where}: the expert choices of answered questions are missing:'
        f' {base.listed(lacking)}. They were answered without --routing_trace;'
        ' remove the answers or write to another directory.'
    )


def _shown(
    questions: Sequence[base.Question], control: str
) -> list[tuple[str, ...]]:
  """The names of the images that each question is shown with."""
  names = [name for q in questions for name in q.images]
  shown = iter(controls.shown_images(names, control))
  return [
      tuple(filter(None, itertools.islice(shown, len(q.images))))
      for q in questions
  ]


def _load(
    names: Sequence[str], root: str | None, control: str
) -> tuple[Any, ...]:
  return tuple(
      image for name in names for image in controls.load(name, root, control)
  )


def _marked(prompt: str, count: int) -> str:
  """The prompt with `count` image marks: those it has, or all in front."""
  mark = base.IMAGE_MARK.strip()
  if mark in prompt:
    return prompt
  return base.IMAGE_MARK * count + prompt


def _request(prompt: str, images: Sequence[Any]) -> Any:
  """`infer.chat.Request` of a question."""
  # Imported here because scoring alone needs neither a model nor JAX.
  from moellava_jax.infer import chat as chat_lib

  turn = ('human', _marked(prompt, len(images)))
  return chat_lib.Request(turns=(turn,), images=tuple(images))


def _generate(
    chat: Any,
    rows: Sequence[base.Answer],
    images: Sequence[tuple[Any, ...]],
    settings: Settings,
    seeds: Sequence[int],
) -> list[Any]:
  """`infer.chat.Answer` of each question.

  Raises:
    EvalError: a question cannot be asked; it is named.
  """
  from moellava_jax.infer import sampling

  # No limit: see `check_prompts`.
  chat = chat._replace(
      max_positions=None,
      image_aspect=settings.image_aspect or chat.image_aspect,
  )
  requests = [
      _request(row.prompt, shown)
      for row, shown in zip(rows, images, strict=True)
  ]
  try:
    return chat.answer(
        requests,
        # Of its own for each, so that a sampled answer is the same in any
        # batch.
        [
            sampling.Options(temperature=settings.temperature, seed=seed)
            for seed in seeds
        ],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        trace=settings.routing_trace,
    )
  except config.UserError:
    for row, request in zip(rows, requests, strict=True):
      try:
        chat.encode(request)
      except config.UserError as e:
        raise base.EvalError(f'Question {row.question_id!r}: {e}') from e
    raise


def _unanswered(
    question: base.Question,
    images: Sequence[str],
    digest: str,
    control: str,
    settings: Settings,
    model_id: str,
) -> base.Answer:
  """The row of a question, still without a text.

  `metadata` is all that the answer depends on. The batch size is not in it: an
  answer does not depend on its neighbours in the batch.
  """
  metadata = {
      'digest': digest,
      'control': control,
      # One name or none, as in every file written so far; several as a list.
      'image': list(images) if len(images) > 1 else next(iter(images), None),
      'max_new_tokens': settings.max_new_tokens,
      'temperature': settings.temperature,
  }
  if settings.image_aspect is not None:
    metadata['image_aspect'] = settings.image_aspect
  key = json.dumps([question.question_id, question.text, metadata])
  return base.Answer(
      question_id=question.question_id,
      prompt=question.text,
      text='',
      answer_id=hashlib.sha256(key.encode()).hexdigest()[:22],
      model_id=model_id,
      metadata=metadata,
  )


def _key(row: base.Answer) -> tuple[int | str, str]:
  """What tells questions apart: in TextVQA and MME the id is the image's."""
  return row.question_id, row.prompt


def _firsts(rows: Sequence[base.Answer]) -> set[int]:
  """The rows that are asked: those that repeat one have its answer."""
  found: dict[tuple[int | str, str], int] = {}
  for i, row in enumerate(rows):
    found.setdefault(_key(row), i)
  return set(found.values())


def _answered(
    path: pathlib.Path, rows: Sequence[base.Answer]
) -> dict[tuple[int | str, str], bytes]:
  """The line of each question that is answered, in `path` or its parts.

  Raises:
    EvalError: a file is not of this very run.
  """
  expected = {_key(row): row for row in rows}
  times = collections.Counter(map(_key, rows))
  found: dict[tuple[int | str, str], bytes] = {}
  for file in parts.files(path):
    here: collections.Counter[tuple[int | str, str]] = collections.Counter()
    for where, line, answer in parts.lines(file):
      key = _key(answer)
      _check_same(answer, expected.get(key), where)
      here[key] += 1
      if here[key] > times[key]:
        raise base.EvalError(
            f'{where}: question {answer.question_id!r} is answered twice;'
            ' remove one of the lines.'
        )
      if found.setdefault(key, line) != line:
        raise base.EvalError(
            f'{where}: question {answer.question_id!r} is answered otherwise in'
            f' another of {path} and its parts. Remove one of the lines.'
        )
  return found


def _mend(path: pathlib.Path) -> None:
  """Drops the last line if a kill tore it; the file is known to be ours."""
  data = path.read_bytes() if path.exists() else b''
  whole = data.rfind(b'\n') + 1
  if whole != len(data):
    os.truncate(path, whole)


def _check_same(
    found: base.Answer, expected: base.Answer | None, where: str
) -> None:
  """Raises EvalError unless this run would have written `found`."""
  advice = 'Remove the file or write to another directory.'
  if expected is None:
    raise base.EvalError(
        f'{where}: question {found.question_id!r} is not one of this question'
        f' file. {advice}'
    )
  for key in {**expected.metadata, **found.metadata}:
    there, here = found.metadata.get(key), expected.metadata.get(key)
    if there != here:
      raise base.EvalError(
          f'{where}: answered with {key} {there!r}, but this run has {here!r}.'
          f' {advice}'
      )
