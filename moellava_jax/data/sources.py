# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: LLaVA JSON, prepared records, TFDS; one door for all.

A LLaVA JSON file is an array (or JSON lines) of `{"id", "image": path |
[paths], "conversations": [{"from": "human" | "gpt", "value": text}, ...]}`;
`image` may be absent. All that can be known without opening an image is
checked here, before a run starts, by the rules of `check`.
"""

import bisect
from collections import Counter
from collections.abc import Sequence
import itertools
import os

from moellava_jax import config
from moellava_jax.data import check, records, rows, tfds_rows

# For those who only need to know what a source yields.
Row = rows.Row
DataError = rows.DataError
BadRowError = rows.BadRowError


class Listed(rows.Rows):
  """The rows of a JSON file, in memory."""

  stored_as = None

  def __init__(self, path: str, root: str, attributes: bool, on_bad: str):
    checker = check.Checker(root, on_bad, attributes)
    self.origin = path
    self._rows = [
        row for raw in check.read(path) if (row := checker.row(raw)) is not None
    ]
    self.dropped, self.repaired = checker.reasons, checker.repaired
    left = len(self._rows)
    seen = sum(bool(row.images) for row in self._rows)
    rows.check_left(
        path,
        (left, left + len(checker.dropped)),
        (seen, checker.with_images),
        self.dropped,
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    return self._rows[index]


class Joined(rows.Rows):
  """Several sources, one after the other."""

  def __init__(self, parts: Sequence[rows.Rows]):
    self._parts = tuple(parts)
    self._ends = list(itertools.accumulate(len(part) for part in parts))
    self.origin = ','.join(part.origin for part in parts)
    self.dropped, self.repaired = Counter(), Counter()
    for part in parts:
      self.dropped += part.dropped
      self.repaired += part.repaired
    self.stored_as = None  # Each part has its own; see `check_stored`.

  @property
  def parts(self) -> Sequence[rows.Rows]:
    return self._parts

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index):
    number = self._index(index)
    part = bisect.bisect_right(self._ends, number)
    before = self._ends[part - 1] if part else 0
    return self._parts[part][number - before]


def read(
    paths: str,
    image_root: str,
    *,
    attributes: bool = False,
    on_bad: str = 'error',
) -> rows.Rows:
  """Opens and concatenates the comma-separated sources `paths`.

  Args:
    paths: LLaVA JSON files; directories written by `prepare`, or by TFDS (the
      one with `dataset_info.json`; its split `train`). Only files are read
      into memory. Directories hold their images.
    image_root: where the paths of images begin.
    attributes: rows have `attributes` (the warm-up of the embedded task), and
      their images no mark. Elsewhere that field means nothing.
    on_bad: 'error': the first row that is not as it should be stops; 'skip': it
      is repaired or dropped, and counted. What is in a directory was checked
      when it was written.

  Raises:
    DataError: a row that cannot be used (`check`), a missing file or
      directory, no row at all, or too few that can be used.
  """
  parts = [
      _open(path.strip(), image_root, attributes, on_bad)
      for path in paths.split(',')
  ]
  found = parts[0] if len(parts) == 1 else Joined(parts)
  if not len(found):
    raise rows.DataError(f'{paths} holds no rows; expected at least one.')
  return found


def _open(path: str, root: str, attributes: bool, on_bad: str) -> rows.Rows:
  if not os.path.isdir(path):
    return Listed(path, root, attributes, on_bad)
  if records.is_prepared(path):
    return records.Prepared(path)
  if tfds_rows.is_dataset(path):
    return tfds_rows.Dataset(path, 'train')
  raise rows.DataError(
      f'{path} is a directory without {records.MANIFEST} (of data.prepare) and'
      ' dataset_info.json (of TensorFlow Datasets; name the directory of the'
      ' version, such as llava_pt/1.0.0). If data.prepare was stopped, run its'
      ' command again.'
  )


def check_stored(
    found: Sequence[rows.Row], vision: config.VisionConfig, aspect: str
) -> None:
  """Raises DataError if stored images were made for another tower or stage."""
  for part in found.parts if isinstance(found, rows.Rows) else ():
    made = part.stored_as
    if made is None:
      continue
    wanted = rows.StoredAs(
        vision.image_size, aspect, vision.resize, vision.mean, made.encoding
    )
    if made != wanted:
      differ = [
          f'{name} {old!r}, now {new!r}'
          for name, old, new in zip(made._fields, made, wanted, strict=True)
          if old != new
      ]
      raise rows.DataError(
          f'{part.origin} stores images made for other settings'
          f' ({"; ".join(differ)}): prepare it for this stage, or without'
          ' --store_size.'
      )
