# SPDX-License-Identifier: Apache-2.0
"""Batches on the devices, one ahead of the step that runs."""

from collections.abc import Iterator
from typing import Any

from moellava_jax import sharding
from moellava_jax.data import batch as batch_lib


class Feed:
  """Copies the next batch to the devices while a step runs on the last one.

  Call `ahead` once the step has been dispatched: until something of it is
  asked for, the host is free, and so is the way to the devices.
  """

  def __init__(self, batches: Iterator[batch_lib.Batch], mesh):
    self._batches, self._mesh = batches, mesh
    self._next: Any = None

  def __next__(self) -> Any:
    """The next batch, on the devices."""
    if self._next is None:
      self.ahead()
    rows, self._next = self._next, None
    return rows

  def ahead(self) -> None:
    """Begins to copy the next batch, unless that has been done."""
    if self._next is None:
      self._next = sharding.put_batch(next(self._batches), self._mesh)
