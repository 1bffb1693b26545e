# SPDX-License-Identifier: Apache-2.0
"""How many positions each row takes, counted once and kept.

Packing is planned from these numbers. They depend on the tokenizer, the
template and the positions of an image; next to prepared rows there is a file
for each such key, and what it says is counted again where the key differs.
"""

from collections.abc import Sequence
import contextlib
import hashlib
import io
import json
import os
from typing import NamedTuple
import zipfile

import numpy as np

from moellava_jax import config
from moellava_jax.data import rows, templates
from moellava_jax.data import tokenizer as tokenizer_lib


class Key(NamedTuple):
  """What a length depends on."""

  tokenizer: str  # `fingerprint`.
  template: str
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
) -> np.ndarray:
  """Returns lengths_N, int32: of each row, in order.

  Reads what is kept beside the rows; counts what is not, and keeps it if the
  directory can be written. Several processes may do so at once.
  """
  if isinstance(found, rows.Rows) and len(found.parts) > 1:
    return np.concatenate(
        [count(part, tok, template, image_tokens) for part in found.parts]
    )
  key = key_of(tok, template, image_tokens)
  if isinstance(found, rows.Rows) and (kept_N := read(found, key)) is not None:
    return kept_N
  from rich import console, progress

  screen = console.Console(stderr=True)
  lengths_N = np.array(
      [
          of_row(row, tok, template, image_tokens)
          for row in progress.track(
              found,
              'counting tokens',
              console=screen,
              transient=True,
              disable=not screen.is_terminal,
          )
      ],
      np.int32,
  )
  if isinstance(found, rows.Rows) and found.directory and found.digest:
    with contextlib.suppress(OSError):  # A read-only disk: counted again.
      write(found.directory, found.digest, key, lengths_N)
  return lengths_N


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
