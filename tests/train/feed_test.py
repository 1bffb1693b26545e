# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from moellava_jax import sharding
from moellava_jax.train import feed
from tests import tiny


def _feed(count=3):
  read = []

  def batches():
    for n in range(count):
      read.append(n)
      yield tiny.batch(tiny.model_config(), rows=8, seed=n)

  return (
      feed.Feed(batches(), sharding.make_mesh(tiny.train_config().mesh)),
      read,
  )


def test_batches_lie_on_the_devices_in_order():
  found, _ = _feed()
  for seed in range(3):
    rows = next(found)
    expected = tiny.batch(tiny.model_config(), rows=8, seed=seed)
    assert isinstance(rows.tokens_BT, jax.Array)
    for ours, theirs in zip(rows, expected, strict=True):
      np.testing.assert_array_equal(np.asarray(ours), theirs)
    if seed < 2:
      found.ahead()
  with pytest.raises(StopIteration):
    next(found)


def test_ahead_reads_one_batch_and_no_more():
  found, read = _feed()
  next(found)
  assert read == [0]
  found.ahead()
  found.ahead()
  assert read == [0, 1]
  next(found)
  assert read == [0, 1]
