# SPDX-License-Identifier: Apache-2.0
"""Which conversations stand in which row of training: a matter of the seed.

Every epoch is laid out from its number and the seed, by arithmetic on indices
alone, so any row can be asked for at any time and nothing has to be saved.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import threading
from typing import Literal, NamedTuple

import numpy as np

from moellava_jax import config
from moellava_jax.data import grouping, packing, shuffling

# What a stream of random bits is for; each use has its own.
_SHUFFLE, _MIX, _ROWS, _GROUPS = range(4)


class Known(NamedTuple):
  """What is known of each of N conversations before it is read."""

  sources: tuple[str, ...]  # Names, for messages.
  source_N: np.ndarray  # int, which source it comes from.
  lengths_N: np.ndarray | None  # int, positions; 0: not to be used.
  images_N: np.ndarray | None  # int.
  words_N: np.ndarray | None  # int, the original's length, see `grouping`.


@dataclasses.dataclass(frozen=True)
class Plan:
  """How an epoch is laid out.

  Attributes:
    arrangement: 'shuffled'; 'packed' (several conversations a row); 'grouped'
      (the original's sampler).
    weights: of the sources; None: each conversation once an epoch.
    batch_size: rows of a batch, which 'grouped' makes alike.
    world: devices times micro-batches among which 'grouped' divides a batch.
    row_length: positions of a row.
    max_images: image slots of a row.
  """

  arrangement: Literal['shuffled', 'packed', 'grouped']
  weights: tuple[float, ...] | None
  batch_size: int
  world: int
  row_length: int
  max_images: int


class Layout:
  """The endless sequence of rows of a stage; row g is the same at any time."""

  def __init__(self, plan: Plan, known: Known, seed: int):
    """Raises UserError for weights that do not fit the sources, and a batch
    that cannot be divided.
    """
    if plan.arrangement == 'grouped' and plan.batch_size % plan.world:
      raise config.UserError(
          f'batch_size={plan.batch_size} is not a multiple of grouped_world='
          f'{plan.world}, among which it is divided.'
      )
    self._plan, self._known, self._seed = plan, known, seed
    usable_N = np.arange(len(known.source_N), dtype=np.int32)
    if known.lengths_N is not None:
      usable_N = usable_N[known.lengths_N > 0]
    self._parts = _by_source(usable_N, known, plan.weights)
    self._ends: list[int] = []  # Rows up to the end of each epoch.
    self._epochs: dict[int, packing.Plan] = {}  # The last ones asked for.
    self._lock = threading.Lock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state):
    self.__dict__.update(state, _lock=threading.Lock())

  def __getitem__(self, row: int) -> np.ndarray:
    """The conversations of row `row`, counted from the start of training."""
    with self._lock:
      while not self._ends or row >= self._ends[-1]:
        self._end(len(self._ends))
      epoch = bisect.bisect_right(self._ends, row)
      before = self._ends[epoch - 1] if epoch else 0
      return self._epoch(epoch).row(row - before)

  def rows(self, epochs: float) -> int:
    """Rows of so many epochs, the last of which may be a part of one."""
    whole = int(epochs)
    with self._lock:
      before = self._end(whole - 1) if whole else 0
      part = epochs - whole
      return before + (round(part * self._rows_of(whole)) if part else 0)

  def _rows_of(self, epoch: int) -> int:
    return self._end(epoch) - (self._end(epoch - 1) if epoch else 0)

  def _end(self, epoch: int) -> int:
    while len(self._ends) <= epoch:
      rows = len(self._epoch(len(self._ends)).ends_R)
      self._ends.append(rows + (self._ends[-1] if self._ends else 0))
    return self._ends[epoch]

  def _epoch(self, epoch: int) -> packing.Plan:
    if epoch not in self._epochs:
      # A batch may reach from one epoch into the next: two are in use.
      for old in sorted(self._epochs)[:-1]:
        del self._epochs[old]
      self._epochs[epoch] = self._arrange(epoch)
    return self._epochs[epoch]

  def _arrange(self, epoch: int) -> packing.Plan:
    plan, known, key = self._plan, self._known, (self._seed, epoch)
    items_N = _items(self._parts, plan.weights, self._seed, epoch)
    if plan.arrangement == 'shuffled':
      return packing.alone(items_N)
    assert known.images_N is not None
    if plan.arrangement == 'grouped':
      assert known.words_N is not None
      return grouping.batches(
          items_N,
          known.words_N[items_N],
          known.images_N[items_N] > 0,
          batch_size=plan.batch_size,
          world=plan.world,
          key=(*key, _GROUPS),
      )
    assert known.lengths_N is not None
    packed = packing.pack(
        items_N,
        known.lengths_N[items_N],
        known.images_N[items_N],
        row_length=plan.row_length,
        max_images=plan.max_images,
    )
    return packing.shuffle(
        packed, shuffling.permutation(len(packed.ends_R), *key, _ROWS)
    )


def _by_source(
    usable_N: np.ndarray,
    known: Known,
    weights: tuple[float, ...] | None,
) -> list[np.ndarray]:
  """The usable conversations of each source; all together without weights."""
  if weights is None:
    return [usable_N]
  if len(weights) != len(known.sources):
    raise config.UserError(
        f'weights={weights}: expected one for each of the sources'
        f' {known.sources}.'
    )
  parts = []
  for number, (name, weight) in enumerate(
      zip(known.sources, weights, strict=True)
  ):
    part = usable_N[known.source_N[usable_N] == number]
    if weight > 0 and not len(part):
      raise config.UserError(f'{name} has weight {weight}, but no usable row.')
    parts.append(part)
  return parts


def _items(
    parts: Sequence[np.ndarray],
    weights: tuple[float, ...] | None,
    seed: int,
    epoch: int,
) -> np.ndarray:
  """The conversations of an epoch, shuffled.

  With weights, an epoch has as many as there are, and of each source its
  share. A source goes on in its own shuffled order from epoch to epoch, so
  none of its rows comes a third time before all have come twice.
  """
  if weights is None:
    return parts[0][shuffling.permutation(len(parts[0]), seed, epoch, _SHUFFLE)]
  total = sum(len(part) for part in parts)
  # Shares that add up to `total`, whatever is rounded.
  bounds = np.rint(total * np.cumsum(weights) / np.sum(weights)).astype(int)
  drawn = []
  for number, part in enumerate(parts):
    count = int(bounds[number] - (bounds[number - 1] if number else 0))
    if not count:
      continue
    first = epoch * count
    for turn in range(first // len(part), -(-(first + count) // len(part))):
      order = shuffling.permutation(len(part), seed, turn, _MIX, number)
      begin = max(first - turn * len(part), 0)
      drawn.append(part[order[begin : first + count - turn * len(part)]])
  items_N = np.concatenate(drawn)
  return items_N[shuffling.permutation(len(items_N), seed, epoch, _SHUFFLE)]
