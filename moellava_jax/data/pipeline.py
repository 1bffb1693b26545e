# SPDX-License-Identifier: Apache-2.0
"""Rows -> static batches, in an order that only the seed decides.

Everything up to the batch is random access, so batch n is the same whatever
the number of threads, workers or processes, and the whole state of the
pipeline is the integer n.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import sys
from typing import Any

import numpy as np

from moellava_jax.data import batch as batch_lib
from moellava_jax.data import counts, encode, examples, order, processes

# For those who only need to read batches.
Examples = examples.Examples
Format = encode.Format


def stack(rows: Sequence[Any]) -> batch_lib.Batch:
  """Rows (each a `Batch` without its leading axis) -> batch."""
  return batch_lib.Batch(
      *(np.stack(field) for field in zip(*rows, strict=True))
  )


def steps(data: Examples, batch_size: int, seed: int, epochs: float) -> int:
  """Batches of so many epochs, the last one rounded up."""
  return math.ceil(data.layout(seed, batch_size).rows(epochs) / batch_size)


@dataclasses.dataclass(frozen=True)
class _Batches:
  """step -> this process's part of that batch; what workers are sent."""

  data: Examples
  layout: order.Layout
  batch_size: int
  share: np.ndarray

  def __call__(self, step: int) -> tuple[batch_lib.Batch, list[counts.Note]]:
    first = step * self.batch_size
    found = [
        self.data.read(self.layout[first + int(row)]) for row in self.share
    ]
    notes = [note for _, notes in found for note in notes]
    return stack([row for row, _ in found]), notes


def train_batches(
    data: Examples,
    batch_size: int,
    seed: int,
    start: int,
    *,
    share: np.ndarray,
) -> Iterator[batch_lib.Batch]:
  """Endless batches from step `start` on.

  Args:
    data: the conversations of the stage.
    batch_size: rows of a global batch.
    seed: decides the order; every epoch has its own.
    start: batches to skip, without reading them.
    share: which rows of a global batch this process reads, in order. Whatever
      the number of processes, a global batch is the same.

  What was dropped or repaired on the way is in `data.counts` once its batch is
  handed out, whichever process read it.

  Raises:
    UserError: settings of the order that do not fit the data.
  """
  import grain

  settings = data.format.data
  workers = settings.num_workers
  make = _Batches(data, data.layout(seed, batch_size), batch_size, share)
  # Starting there, and not a restored state: that of worker processes cannot
  # be read by another number of them.
  numbers = grain.MapDataset.range(start, sys.maxsize // batch_size)
  dataset = numbers.map(make).to_iter_dataset(
      grain.ReadOptions(
          num_threads=settings.num_threads,
          prefetch_buffer_size=-(-settings.prefetch // max(workers, 1)),
      )
  )
  if workers:
    _parse_flags()
    dataset = dataset.mp_prefetch(
        grain.multiprocessing.MultiprocessingOptions(num_workers=workers),
        worker_init_fn=_start_worker,
    )
  return _counted(iter(dataset), data.counts)


def _start_worker(number: int, count: int) -> None:
  del number, count
  processes.end_with_parent()


def _parse_flags() -> None:
  """Grain asks absl for its flags, which a notebook has not parsed."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _counted(iterator: Any, tally: counts.Counts) -> Iterator[batch_lib.Batch]:
  """Ends threads and worker processes as soon as nobody wants more."""
  try:
    for batch, notes in iterator:
      tally.add(notes)
      yield batch
  finally:
    iterator.close()


def eval_batches(
    data: Examples, batch_size: int, count: int, *, share: np.ndarray
) -> list[batch_lib.Batch]:
  """The first `count` batches in order; the last one is filled with empties.

  Of each batch, the rows `share`.
  """
  plan = data.in_order()
  total = len(plan.ends_R)
  batches = []
  for n in range(min(count, -(-total // batch_size))):
    numbers = [n * batch_size + int(row) for row in share]
    found = [data.read(plan.row(i) if i < total else ()) for i in numbers]
    for _, notes in found:
      data.counts.add(notes)
    batches.append(stack([row for row, _ in found]))
  return batches
