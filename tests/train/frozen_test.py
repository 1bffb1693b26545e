# SPDX-License-Identifier: Apache-2.0
"""Frozen kernels lie in bf16 while a stage runs, and nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import checkpoint, sharding, trees
from moellava_jax.train import loop, placement, program
from tests import tiny


def _program(stage):
  cfg = tiny.train_config(model__compute_dtype='bfloat16', mesh__cpu_devices=8)
  moe = cfg.model.moe if stage == 'moe' else None
  tied = tiny.model_config(moe=moe, tied_head=stage == 'moe')
  model = dataclasses.replace(tied, compute_dtype='bfloat16')
  cfg = dataclasses.replace(cfg, model=model)
  return program.Program(cfg, stage, placement.mesh_for(cfg, stage), 10), cfg


@pytest.mark.parametrize('stage', ['pretrain', 'moe'])
def test_a_step_does_not_change(stage):
  made, cfg = _program(stage)
  data = tiny.batch(cfg.model, rows=16)

  def trained_with(freeze):
    drawn = tiny.params_of(made.model.cfg)
    with sharding.use(made._mesh):
      trained, frozen = made.split(jax.device_put(drawn, made.shardings))
      frozen = freeze(frozen)
      state = made.init_state(trained)
      rows = sharding.put_batch(data, made._mesh)
      state, metrics = made.train_step(state, frozen)(state, frozen, rows)
    return jax.device_get((state.trained, metrics['loss'])), frozen

  want, whole = trained_with(lambda frozen: frozen)
  have, rounded = trained_with(made.freeze)
  jax.tree.map(np.testing.assert_array_equal, have, want)
  small = {
      path
      for path, leaf in trees.flatten(rounded).items()
      if leaf.dtype == jnp.bfloat16
  }
  assert small and all(path.endswith('kernel') for path in small)
  assert {x.dtype for x in jax.tree.leaves(whole)} == {jnp.dtype('float32')}


def test_what_is_saved_is_what_was_there_before(tmp_path):
  run = tmp_path / 'run'
  loop.run(
      tiny.train_config(
          run,
          stages=('warmup', 'pretrain'),
          model__compute_dtype='bfloat16',
          warmup__steps=1,
          pretrain__steps=1,
      )
  )
  before, after = (
      trees.flatten(checkpoint.load(str(run / stage / 'final')).params)
      for stage in ('warmup', 'pretrain')
  )
  same = [p for p in after if not p.startswith('projector/')]
  assert len(same) < len(after)
  for path in same:
    assert after[path].dtype == np.float32
    np.testing.assert_array_equal(after[path], before[path], err_msg=path)
