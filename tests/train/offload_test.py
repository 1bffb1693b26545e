# SPDX-License-Identifier: Apache-2.0
"""The forms of a training state: in host memory, and with layers stacked."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moellava_jax import checkpoint, config, sharding, trees
from moellava_jax.train import program, stacking
from moellava_jax.train import state as state_lib
from tests import tiny


def _config(stage, scan, memory, **overrides):
  cfg = tiny.train_config(
      mesh__data=2,
      mesh__fsdp=2,
      mesh__expert=2,
      mesh__tensor=1,
      mesh__cpu_devices=8,
      mesh__optimizer_memory=memory,
      moe__accumulate=2,
      moe__projector_lr=1e-3,
      **overrides,
  )
  moe = cfg.model.moe if stage == 'moe' else None
  model = tiny.model_config(moe=moe, depth=4, residual_dropout=0.1)
  return dataclasses.replace(
      cfg, model=dataclasses.replace(model, scan_layers=scan)
  )


def _program(stage, scan=False, memory='device'):
  cfg = _config(stage, scan, memory)
  mesh = sharding.make_mesh(cfg.mesh)
  return program.Program(cfg, stage, mesh, 10), cfg, mesh


@functools.cache
def _after_two_steps(scan, memory):
  """Of `moe`.

  Returns:
    The program, the state, the memory kinds of the moments before and after,
    and the memory spaces of the sum of gradients between micro-batches.
  """
  made, cfg, mesh = _program('moe', scan, memory)
  data = sharding.put_batch(tiny.batch(cfg.model, rows=16), mesh)
  drawn = tiny.params_of(made.model.cfg)
  with sharding.use(mesh):
    params = jax.device_put(drawn, made.shardings)
    trained, frozen = made.stack(made.split(params))
    state = made.init_state(trained)
    step = made.train_step(state, frozen)
    sums = _memory_of_sums(step.trace(state, frozen, data).jaxpr, trained)
    kinds = [_memory_of_moments(state)]
    for _ in range(2):
      state, _ = step(state, frozen, data)
      kinds.append(_memory_of_moments(state))
  return made, state, kinds, sums


def _memory_of_moments(state):
  """Memory kinds of all optimizer state but the counters."""
  return {
      x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim
  }


def _memory_of_sums(jaxpr, trained):
  """Memory spaces of what the loop over micro-batches carries of `trained`."""
  (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'scan']
  carried = loop.outvars[: loop.params['num_carry']]
  leaves = jax.tree.leaves(trained)
  sums = [var.aval for var in carried[-len(leaves) :]]
  assert [x.shape for x in sums] == [x.shape for x in leaves]
  return {x.memory_space for x in sums}


def _assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_optimizer_state_and_gradients_wait_in_host_memory():
  _, there, kinds, sums = _after_two_steps(False, 'device')
  assert kinds == [{'device'}] * 3
  assert sums == {jax.memory.Space.Device}
  _, state, kinds, sums = _after_two_steps(False, 'pinned_host')
  assert kinds == [{'pinned_host'}] * 3
  assert sums == {jax.memory.Space.Host}
  _assert_equal(state, there)
  trained = jax.tree.leaves(state.trained)
  assert {x.sharding.memory_kind for x in trained} == {'device'}


def test_a_backend_without_host_memory_is_an_error(monkeypatch):
  monkeypatch.setattr(sharding, '_memories', lambda: ['device'])
  match = r"mesh.optimizer_memory='pinned_host' needs .*only \['device'\]"
  with pytest.raises(config.UserError, match=match):
    _program('finetune', memory='pinned_host')
  _, cfg, mesh = _program('finetune')
  cfg = dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, remat='offload_dots')
  )
  with pytest.raises(config.UserError, match='offload_dots.*needs pinned_host'):
    program.Program(cfg, 'finetune', mesh, 10)


def test_a_stacked_stage_trains_as_single_layers_do():
  _, want, *_ = _after_two_steps(False, 'device')
  made, state, kinds, sums = _after_two_steps(True, 'pinned_host')
  assert kinds == [{'pinned_host'}] * 3
  assert sums == {jax.memory.Space.Host}
  stacked = trees.flatten(state.trained)
  assert not [path for path in stacked if path.startswith('llm/layers_0/')]
  # The axis of the layers is whole: every device has its part of each layer.
  kernel = stacked['llm/layers_0_to_2_by_2/moe/experts/fc1/kernel']
  assert kernel.shape[0] == 2
  assert tuple(kernel.sharding.spec)[:2] == (None, 'expert')
  single = trees.flatten(made.to_save(state).trained)
  for path, leaf in trees.flatten(want.trained).items():
    np.testing.assert_allclose(
        single[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path
    )


@pytest.mark.parametrize('scan', [True, False])
def test_a_step_restores_in_the_other_form(tmp_path, scan):
  """Saved with a loop and restored without one, and the other way round."""
  made, state, *_ = _after_two_steps(scan, 'pinned_host' if scan else 'device')
  other, cfg, mesh = _program(
      'moe', not scan, 'device' if scan else 'pinned_host'
  )
  folder = checkpoint.Stage(str(tmp_path), 'moe', cfg.checkpoint)
  saved = made.to_save(state)
  folder.save(1, saved.trained, _beside(saved), {'frozen': ''})
  folder.wait()
  with sharding.use(mesh):
    abstract, _ = other.split(other.abstract_params())
    begun = other.abstract_state(abstract)
    trained, rest = folder.restore(1, abstract, _beside(other.unstack(begun)))
    restored = other.stack(state_lib.TrainState(trained=trained, **rest))
  folder.close()
  # It is what that form begins with, shardings and all.
  for have, want in zip(
      jax.tree.leaves(restored), jax.tree.leaves(begun), strict=True
  ):
    assert (have.shape, have.dtype) == (want.shape, want.dtype)
    assert have.sharding.is_equivalent_to(want.sharding, have.ndim)
    assert have.sharding.memory_kind == want.sharding.memory_kind
  _assert_equal(other.to_save(restored), saved)


def test_no_second_copy_of_a_model_is_held():
  cfg = _config('moe', True, 'device').model
  params = tiny.params_of(cfg)
  names = set(params['llm'])
  singles = [x for p, x in trees.flatten(params).items() if '/layers_' in p]
  want = jax.tree.map(np.array, params)
  stacked = stacking.stack(params, stacking.table(cfg), consume=True)
  assert all(x.is_deleted() for x in singles)
  many = [x for p, x in trees.flatten(stacked).items() if '_by_' in p]
  back = stacking.unstack(stacked, consume=True)
  assert many and all(x.is_deleted() for x in many)
  assert set(back['llm']) == names
  _assert_equal(back, want)


def _beside(state):
  return {
      'opt_state': state.opt_state,
      'step': state.step,
      'skipped': state.skipped,
      'streak': state.streak,
  }
