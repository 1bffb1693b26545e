# SPDX-License-Identifier: Apache-2.0
"""A conversation, wherever it is kept, and what can be wrong with it.

`Rows` is what the pipeline reads: random access, so that the order of training
is a matter of indices alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from moellava_jax import config
from moellava_jax.data import templates


class DataError(config.UserError):
  """A row that cannot be used; the message names file, row and remedy."""


class BadRowError(DataError):
  """A row that no rule repairs; `reason` is what it is counted under."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Stored:
  """An image that lies in a record, not in a folder.

  Attributes:
    key: names the image, in messages and caches; equal keys, equal images.
    fetch: reads the bytes of the image file (`images.examine` takes them);
      raises DataError. Nothing is read before, so a Stored costs nothing to
      keep, and it can be pickled.
  """

  key: str
  fetch: Callable[[], bytes] = dataclasses.field(compare=False, repr=False)


class StoredAs(NamedTuple):
  """How images were made before they were stored: `images.preprocess`."""

  size: int  # Pixels a side.
  aspect: str
  resize: str
  mean: tuple[float, float, float]
  encoding: str  # jpeg (quality 95, 4:4:4) | raw (PPM: the very pixels).


class Row(NamedTuple):
  """One conversation."""

  where: str  # 'FILE row 12 (id ...)', for messages.
  id: str
  images: tuple[str | Stored, ...]  # Strings are relative to the image root.
  turns: tuple[templates.Turn, ...]
  # Warm-up of the embedded task: P x A class numbers of the image's patches.
  # Such an image is looked at by the tower alone and has no `<image>` mark.
  attributes: list[list[int]] | None


def check_left(
    where: str,
    rows: tuple[int, int],
    with_images: tuple[int, int],
    dropped: Mapping[str, int],
) -> None:
  """Stops where `on_bad=skip` would hide that a source is not found or read.

  Args:
    where: the source.
    rows: how many are left, of how many.
    with_images: how many of those with images are.
    dropped: how many are not, by reason.

  Raises:
    DataError: more than half of the rows are dropped, or all with images.
  """
  (left, count), (seen, images) = rows, with_images
  if 2 * left >= count and (seen or not images):
    return
  raise DataError(
      f'{where}: {count - left} of {count} rows cannot be used, and'
      f' {images - seen} of the {images} with images: {dict(dropped)}. That is'
      ' too many to drop them (--config.data.on_bad=skip). Check'
      " --config.data.images and the stage's row_length and max_images;"
      ' --config.data.on_bad=error names the first of these rows.'
  )


class Rows(Sequence[Row]):
  """Random access to conversations; picklable, safe to read from threads.

  Attributes:
    origin: where they come from, for messages.
    dropped: how many rows were left out, by reason (`check`).
    repaired: how many were repaired, by rule (`check`).
    stored_as: the form of images that lie in records; None: as they were
      found, or in folders.
    parts: what the rows are a concatenation of; of one source, itself.
  """

  origin: str
  dropped: Counter[str]
  repaired: Counter[str]
  stored_as: StoredAs | None

  @property
  def parts(self) -> Sequence['Rows']:
    return (self,)

  @property
  def directory(self) -> str | None:
    """Where things known about the rows (`lengths`) may be kept."""
    return None

  @property
  def digest(self) -> str | None:
    """Changes when the rows do; None for rows without a `directory`."""
    return None

  def _index(self, index: Any) -> int:
    """`index` from the front; raises IndexError, or TypeError for a slice."""
    number = index.__index__()
    number += len(self) if number < 0 else 0
    if not 0 <= number < len(self):
      raise IndexError(f'row {index} of {len(self)} in {self.origin}')
    return number
