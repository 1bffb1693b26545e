# SPDX-License-Identifier: Apache-2.0
"""How many positions each row takes, counted once and kept.

Packing is planned from these numbers. They depend on the tokenizer, the
template and the positions of an image; next to prepared rows there is a file
for each such key, and what it says is counted again where the key differs.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
from typing import NamedTuple
import zipfile

import numpy as np

from moellava_jax import config
from moellava_jax.data import processes, rows, templates
from moellava_jax.data import tokenizer as tokenizer_lib

_RANGE = 1000  # Rows that a process counts at a time.


class Key(NamedTuple):
  """What a length depends on."""

  tokenizer: str  # `fingerprint`.
  template: str  # And in what way its text is another than it once was.
  image_tokens: int  # Positions of an image (`VisionConfig.num_tokens`).

  @property
  def file(self) -> str:
    text = json.dumps(self)
    return f'lengths-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz'


def fingerprint(tok: tokenizer_lib.Tokenizer) -> str:
  """Equal for tokenizers that give equal ids."""
  text = tok.backend.to_str() + json.dumps([tok.special, tok.adds_bos])
  return hashlib.sha256(text.encode()).hexdigest()


def key_of(tok: tokenizer_lib.Tokenizer, template: str, image_tokens: int):
  if templates.get(template).wraps_images:
    template += ', images wrapped'
  return Key(fingerprint(tok), template, image_tokens)


def of_row(
    row: rows.Row,
    tok: tokenizer_lib.Tokenizer,
    template: str,
    image_tokens: int,
) -> int:
  """Positions of the row after expansion, before it is cut to any length."""
  segments = templates.render(templates.get(template), row.turns)
  ids_L, _ = tokenizer_lib.tokenize(segments, tok)
  marks = int(np.sum(ids_L == config.IMAGE_TOKEN))
  return len(ids_L) + marks * (image_tokens - 1)


def count(
    found: Sequence[rows.Row],
    tok: tokenizer_lib.Tokenizer,
    template: str,
    image_tokens: int,
    *,
    workers: int,
) -> np.ndarray:
  """Returns lengths_N, int32: of each row, in order.

  Reads what is kept beside the rows; counts what is not, and keeps it if the
  directory can be written. Several processes may do so at once.

  Args:
    found: rows; their images are not opened.
    tok: tokenizer.
    template: a key of `templates.TEMPLATES`.
    image_tokens: positions of an image.
    workers: processes that count; 0: none but this. Rows that are in memory
      are always counted here.
  """
  if isinstance(found, rows.Rows) and len(found.parts) > 1:
    parts = [
        count(part, tok, template, image_tokens, workers=workers)
        for part in found.parts
    ]
    return np.concatenate(parts)
  key = key_of(tok, template, image_tokens)
  if not isinstance(found, rows.Rows) or not (found.directory and found.digest):
    return _count(found, tok, template, image_tokens, 0)
  if (kept_N := read(found, key)) is not None:
    return kept_N
  lengths_N = _count(found, tok, template, image_tokens, workers)
  with contextlib.suppress(OSError):  # A read-only disk: counted again.
    write(found.directory, found.digest, key, lengths_N)
  return lengths_N


def _count(found, tok, template, image_tokens, workers: int) -> np.ndarray:
  from rich import console, progress

  ranges = [
      range(start, min(start + _RANGE, len(found)))
      for start in range(0, len(found), _RANGE)
  ]
  work = functools.partial(_of_range, found, tok, template, image_tokens)
  screen = console.Console(stderr=True)
  with contextlib.ExitStack() as stack:
    if workers and len(ranges) > 1:
      pool = futures.ProcessPoolExecutor(
          workers,
          multiprocessing.get_context('spawn'),
          initializer=_start,
          initargs=(work,),
      )
      stack.callback(pool.shutdown, cancel_futures=True)
      counted = pool.map(_of_range_there, ranges)
    else:
      counted = map(work, ranges)
    parts = list(
        progress.track(
            counted,
            'counting tokens',
            total=len(ranges),
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
        )
    )
  return np.array([n for part in parts for n in part], np.int32)


def _of_range(found, tok, template, image_tokens, numbers: range) -> list[int]:
  return [of_row(found[n], tok, template, image_tokens) for n in numbers]


_work: list[Callable[[range], list[int]]] = []  # One in each process.


def _start(work: Callable[[range], list[int]]) -> None:
  processes.end_with_parent()
  _work.append(work)


def _of_range_there(numbers: range) -> list[int]:
  return _work[0](numbers)


def read(found: rows.Rows, key: Key) -> np.ndarray | None:
  """What was counted before; None if it was not, or for other rows."""
  if not found.directory or not found.digest:
    return None
  path = os.path.join(found.directory, key.file)
  try:
    with open(path, 'rb') as file:
      data = io.BytesIO(file.read())
    with np.load(data, allow_pickle=False) as file:
      same = str(file['key']) == json.dumps([*key, found.digest])
      lengths_N = file['lengths_N']
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return None
  return lengths_N if same and len(lengths_N) == len(found) else None


def write(directory: str, digest: str, key: Key, lengths_N: np.ndarray) -> None:
  path = os.path.join(directory, key.file)
  # Its own name for each process: the last one wins, and all are the same.
  temporary = f'{path}.{os.getpid()}.tmp'
  with open(temporary, 'wb') as file:
    np.savez(
        file,
        lengths_N=lengths_N.astype(np.int32),
        key=np.array(json.dumps([*key, digest])),
    )
  os.replace(temporary, path)
