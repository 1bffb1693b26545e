# SPDX-License-Identifier: Apache-2.0
"""The loop keeps the device busy: no step waits for the host."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.train import loop, program
from tests import tiny


def test_a_step_is_read_and_logged_while_the_next_one_runs(
    trained, tmp_path, monkeypatch
):
  events, metrics = [], []
  make, read = program.Program.train_step, jax.device_get
  write = loop.metrics_lib.Writer.write

  def noting(self, *args):
    step = make(self, *args)

    def noted(state, frozen, batch):
      with pytest.raises(Exception, match='Disallowed host-to-device'):
        jnp.negative(np.ones(1))
      events.append(('dispatch', len(metrics) + 1))
      new, found = step(state, frozen, batch)
      metrics.append(found)
      # The old state gives its memory to the new one.
      assert all(x.is_deleted() for x in jax.tree.leaves(state))
      assert not any(x.is_deleted() for x in jax.tree.leaves((frozen, batch)))
      return new, found

    return noted

  def noted_read(x):
    for n, found in enumerate(metrics, 1):
      if x is found:
        events.append(('read', n))
    return read(x)

  def noted_write(self, record):
    events.append(('log', record['step']))
    return write(self, record)

  monkeypatch.setattr(program.Program, 'train_step', noting)
  monkeypatch.setattr(jax, 'device_get', noted_read)
  monkeypatch.setattr(loop.metrics_lib.Writer, 'write', noted_write)
  run = tmp_path / 'run'
  shutil.copytree(trained[0], run)
  shutil.rmtree(run / 'moe')
  # Without a checkpoint or an evaluation on the way, which do wait.
  loop.run(tiny.train_config(run, checkpoint__every=100, moe__eval_every=100))
  expected = [('dispatch', 1)]
  for n in (1, 2, 3):
    expected += [('dispatch', n + 1), ('read', n), ('log', n)]
  assert events == [*expected, ('read', 4), ('log', 4)]
