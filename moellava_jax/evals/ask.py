# SPDX-License-Identifier: Apache-2.0
"""Puts the questions of a file to a model; resumable."""

from collections.abc import Sequence
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

from moellava_jax.evals import base, controls, progress


class Settings(NamedTuple):
  """How answers are generated."""

  max_new_tokens: int
  temperature: float  # 0: greedy, as in every published number.
  batch_size: int


def check_images(
    questions: Sequence[base.Question], images_root: str | None
) -> None:
  """Raises EvalError unless every image of the questions is a file."""
  names = dict.fromkeys(name for q in questions for name in q.images)
  if not names:
    return
  if images_root is None:
    raise base.EvalError(
        'The questions have images; give their root as --images=DIR.'
    )
  root = pathlib.Path(images_root)
  if missing := [name for name in names if not (root / name).is_file()]:
    raise base.EvalError(
        f'{root}: of {len(names)} images, missing: {base.listed(missing)}.'
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

  Returns:
    All answers in the file.

  Raises:
    EvalError: an image is missing, or the file holds answers of another model,
      question file, control or other settings.
  """
  check_images(questions, images_root)
  shown = _shown(questions, control)
  rows = [
      _unanswered(question, images, chat.digest, control, settings, model_id)
      for question, images in zip(questions, shown, strict=True)
  ]
  path = pathlib.Path(answers_path)
  done = _resume(path, rows)
  pending = [i for i, row in enumerate(rows) if _key(row) not in done]
  path.parent.mkdir(parents=True, exist_ok=True)
  with (
      progress.bar(path.name, len(rows), len(done)) as advance,
      path.open('a', encoding='utf-8') as file,
  ):
    for start in range(0, len(pending), settings.batch_size):
      batch = pending[start : start + settings.batch_size]
      images = [_load(shown[i], images_root, control) for i in batch]
      prompts = [rows[i].prompt for i in batch]
      # Sampled batches must not repeat each other's noise.
      texts = _generate(chat, prompts, images, settings, seed=batch[0])
      for i, text in zip(batch, texts, strict=True):
        row = rows[i]._replace(text=text.strip())
        file.write(json.dumps(row._asdict(), ensure_ascii=False) + '\n')
      file.flush()
      os.fsync(file.fileno())
      advance(len(batch))
  return base.read_answers(path)


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


def _generate(
    chat: Any,
    prompts: Sequence[str],
    images: Sequence[tuple[Any, ...]],
    settings: Settings,
    *,
    seed: int,
) -> list[str]:
  # Imported here because scoring alone needs neither a model nor JAX.
  from moellava_jax.infer import chat as chat_lib

  requests = [
      chat_lib.Request(
          turns=(('human', _marked(prompt, len(shown))),),
          images=shown,
      )
      for prompt, shown in zip(prompts, images, strict=True)
  ]
  return chat.generate(
      requests,
      max_new_tokens=settings.max_new_tokens,
      temperature=settings.temperature,
      seed=seed,
      batch_size=settings.batch_size,
  )


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


def _resume(
    path: pathlib.Path, rows: Sequence[base.Answer]
) -> set[tuple[int | str, str]]:
  """Questions answered in `path`; drops its last line if a kill tore it.

  Raises:
    EvalError: the file is not the beginning of this very run.
  """
  data = path.read_bytes() if path.exists() else b''
  whole = data[: data.rfind(b'\n') + 1]
  expected = {_key(row): row for row in rows}
  done = set()
  for number, answer in enumerate(base.parse_answers(whole, path), 1):
    where = f'{path}, line {number}'
    _check_same(answer, expected.get(_key(answer)), where)
    if _key(answer) in done:
      raise base.EvalError(
          f'{where}: question {answer.question_id!r} is answered twice; remove'
          ' one of the lines.'
      )
    done.add(_key(answer))
  if whole != data:  # Only now is the file known to be ours to change.
    os.truncate(path, len(whole))
  return done


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
  for key, value in expected.metadata.items():
    if found.metadata.get(key) != value:
      raise base.EvalError(
          f'{where}: answered with {key} {found.metadata.get(key)!r}, but this'
          f' run has {value!r}. {advice}'
      )
