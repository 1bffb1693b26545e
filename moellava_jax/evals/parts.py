# SPDX-License-Identifier: Apache-2.0
"""One answers file written by several processes.

  OUT/NAME.jsonl                    as a single process writes it
  OUT/NAME.parts/0-of-4.jsonl ...   what the processes have answered

Processes share nothing but the directory. Whole batches are shared out, so
that an answer is computed with the same neighbours as by a single process.
Whoever finds the last answer in place merges.
"""

from collections.abc import Iterator, Sequence
import os
import pathlib
import re
from typing import NamedTuple

from moellava_jax.evals import base


class Shard(NamedTuple):
  """Which of the processes this is."""

  index: int  # From 0.
  count: int

  def mine(self, total: int, batch_size: int) -> list[int]:
    """The questions of `total` that this process answers."""
    return [
        i for i in range(total) if i // batch_size % self.count == self.index
    ]


def parse(flag: str | None) -> Shard | None:
  """`--shard=I/N`; raises EvalError for anything else."""
  if flag is None:
    return None
  match = re.fullmatch(r'(\d+)/(\d+)', flag)
  if match is None or int(match[1]) >= int(match[2]):
    raise base.EvalError(
        f'--shard={flag}: expected I/N for process I of N, counted from 0:'
        ' 0/4, 1/4, 2/4 and 3/4 for four processes.'
    )
  return Shard(int(match[1]), int(match[2]))


def own(path: pathlib.Path, shard: Shard | None) -> pathlib.Path:
  """The file that a process writes for the answers file `path`."""
  if shard is None:
    return path
  return _folder(path) / f'{shard.index}-of-{shard.count}.jsonl'


def files(path: pathlib.Path) -> list[pathlib.Path]:
  """All files that may hold answers of `path`; of any number of shards."""
  return [path, *sorted(_folder(path).glob('*-of-*.jsonl'))]


def lines(path: pathlib.Path) -> Iterator[tuple[str, bytes, base.Answer]]:
  """(where, line, answer) of every whole line of a file that may be missing.

  The last line is left out if it is torn: someone is writing it, or was killed.
  """
  data = path.read_bytes() if path.exists() else b''
  whole = data[: data.rfind(b'\n') + 1]
  answers = base.parse_answers(whole, path)
  pieces = whole.split(b'\n')[: len(answers)]
  for number, (line, answer) in enumerate(zip(pieces, answers, strict=True), 1):
    yield f'{path}, line {number}', line + b'\n', answer


def write(path: pathlib.Path, found: Sequence[bytes], writer: str) -> None:
  """Puts the lines of all answers into `path`; atomic.

  `writer` tells processes apart that do so at the same time.
  """
  data = b''.join(found)
  if path.exists() and path.read_bytes() == data:
    return
  new = path.with_name(f'{path.name}.{writer}.tmp')
  new.write_bytes(data)
  os.replace(new, path)


def _folder(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('.parts')
