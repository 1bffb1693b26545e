# SPDX-License-Identifier: Apache-2.0
"""Every stage computes the same on every mesh.

What is compared runs through `train.program`, as in a run: micro-batches,
ZeRO-2 shards, sampled second choices, capacities that overflow, and rows
without an image.
"""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moellava_jax import config, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import program
from tests import tiny

MESHES = {
    '1': dict(),
    '8x1': dict(data=8),
    '2x4': dict(data=2, expert=4),
    '2x2x2': dict(fsdp=2, expert=2, tensor=2),
}
STEPS = 5
# Compiles in half the time; the partitioner's part is the same.
FAST = {'xla_backend_optimization_level': 0}


def _mesh(name):
  sizes = dict(data=1, fsdp=1, expert=1, tensor=1) | MESHES[name]
  cfg = config.MeshConfig(
      **sizes, cpu_devices=1, print_table=False, optimizer_memory='device'
  )
  return sharding.make_mesh(cfg, jax.devices()[: 1 if name == '1' else 8])


def _config(stage, dispatch='einsum'):
  cfg = tiny.train_config(
      optimizer__eps=1e-3,
      optimizer__warmup_ratio=0.0,
      optimizer__weight_decay=0.1,
      **{f'{stage}__accumulate': 2, f'{stage}__lr': 1e-2},
  )
  moe = tiny.moe_config(
      capacity_factor=0.6, second_choice='sampled', dispatch=dispatch
  )
  model = tiny.model_config(moe=moe)
  tower = dataclasses.replace(model.vision, depth=2)  # One layer is computed.
  model = dataclasses.replace(model, vision=tower)
  return dataclasses.replace(cfg, model=model)


def _batch(cfg, seed):
  """16 rows, so that a micro-batch has one for each of 8 devices."""
  batch = tiny.batch(cfg.model, rows=16, seed=seed)
  shape = (
      16,
      1,
      cfg.model.vision.num_patches,
      len(program.probe_sizes('warmup') or ()),
  )
  rng = np.random.default_rng(seed)
  return batch._replace(
      attributes_BIPA=rng.integers(0, 2, shape).astype(np.int32)
  )


def _recorder():
  """Keeps the gradient that it is given as its state."""
  return optax.GradientTransformation(
      lambda params: jax.tree.map(jnp.zeros_like, params),
      lambda grads, _, __: (grads, grads),
  )


@functools.cache
def _compiled(stage, name, dispatch='einsum'):
  """(mesh, program, jitted step, sharded parameters) of a stage on a mesh."""
  cfg = _config(stage, dispatch)
  mesh = _mesh(name)
  with sharding.use(mesh):
    what = program.Program(cfg, stage, mesh, 100)
    what.tx = optax.chain(_recorder(), what.tx)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
      scale = min(leaf.shape[-2:][0] ** -0.5, 0.5)
      noise = rng.normal(size=leaf.shape) * scale + path.endswith('scale')
      return jax.device_put(np.asarray(noise, leaf.dtype), leaf.sharding)

    params = trees.map_paths(draw, what.abstract_params())
    trained, frozen = what.split(params)
    state = what.init_state(trained)
    rows = sharding.put_batch(_batch(cfg, 0), mesh)
    step = what.train_step(state, frozen).lower(state, frozen, rows)
  return mesh, what, step.compile(compiler_options=FAST), params


def _train(stage, name, dispatch='einsum', change=lambda params: params):
  """Runs five steps; returns what the comparison looks at, on the host."""
  cfg = _config(stage, dispatch)
  mesh, what, step, params = _compiled(stage, name, dispatch)
  seen = []
  with sharding.use(mesh):
    # A copy: the state is donated.
    params = jax.tree.map(lambda x: jax.device_put(x + 0, x.sharding), params)
    trained, frozen = what.split(change(params))
    state = what.init_state(trained)
    for n in range(STEPS):
      batch = sharding.put_batch(_batch(cfg, n), mesh)
      state, metrics = step(state, frozen, batch)
      seen.append(jax.device_get((metrics['loss'], metrics['sums'].stats)))
      if n == 0:
        grads = jax.device_get(trees.flatten(state.opt_state[0]))
    trained = jax.device_get(trees.flatten(state.trained))
    assert int(state.skipped) == 0
  return seen, grads, trained


_result = functools.cache(_train)


def _compare(one, other):
  (seen, grads, trained), (seen2, grads2, trained2) = one, other
  np.testing.assert_allclose(seen2[0][0], seen[0][0], rtol=1e-5)
  for stats, stats2 in zip(seen[0][1], seen2[0][1], strict=True):
    for name, value in stats._asdict().items():
      # A sum of entropies is rounded; all others are counts.
      rtol = 1e-6 if 'entropy' in name else 0
      np.testing.assert_allclose(getattr(stats2, name), value, rtol=rtol)
  whole = np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))
  for path, grad in grads.items():
    norm = np.linalg.norm(grad)
    if path.startswith('vision/') and path.endswith('/k_bias'):
      # Without rotary positions a softmax does not see it: only rounding.
      assert norm < 1e-6 * whole
      continue
    off = np.linalg.norm(grads2[path] - grad) / norm
    assert off < 1e-5, f'{path}: gradient off by {off}'
  for n in range(STEPS):
    np.testing.assert_allclose(seen2[n][0], seen[n][0], rtol=1e-4)
  for path, leaf in trained.items():
    np.testing.assert_allclose(trained2[path], leaf, atol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    'stage, name',
    [
        *itertools.product(
            ('pretrain', 'finetune', 'moe'), ('8x1', '2x4', '2x2x2')
        ),
        ('warmup', '2x2x2'),  # On all it would take half a minute more.
    ],
)
def test_mesh_does_not_change_what_a_stage_learns(stage, name):
  _compare(_result(stage, '1'), _result(stage, name))


def test_mesh_and_index_do_not_change_what_products_learn():
  _compare(_result('moe', '1'), _result('moe', '2x2x2', 'index'))


def test_mesh_comparison_has_drops_and_parameters_that_move():
  seen, grads, trained = _result('moe', '1')
  (stats,) = seen[0][1]
  assert np.all(stats.tokens_M > 0)
  assert stats.kept_ME.sum() < 0.8 * stats.assigned_ME.sum()
  assert {'llm/layers_0/moe/router/kernel', 'projector/linear_0/bias'} <= set(
      grads
  )
  _, _, _, params = _compiled('moe', '1')
  before = trees.flatten(params)
  for path, leaf in trained.items():
    assert np.abs(leaf - before[path]).max() > 1e-3, path


def test_mesh_comparison_fails_when_experts_change_places():
  def swap(params):
    def roll(path, leaf):
      if '/experts/' not in path:
        return leaf
      return jax.device_put(jnp.roll(leaf, 1, axis=0), leaf.sharding)

    return trees.map_paths(roll, params)

  with pytest.raises(AssertionError):
    _compare(_result('moe', '1'), _train('moe', '2x4', change=swap))


def test_mesh_divides_optimizer_state_and_gradients():
  mesh, what, step, params = _compiled('moe', '2x4')
  with sharding.use(mesh):
    trained, _ = what.split(params)
    state = what.init_state(trained)
  grads, adam = state.opt_state[0], optax.tree.get(state.opt_state, 'mu')
  for moment in (grads, adam):
    flat = trees.flatten(moment)
    dense = flat['llm/layers_1/mlp/fc1/kernel']
    experts = flat['llm/layers_0/moe/experts/fc1/kernel']
    assert dense.addressable_shards[0].data.size == dense.size // 8
    assert experts.addressable_shards[0].data.size == experts.size // 8
    assert experts.addressable_shards[0].data.shape[0] == 1
  # So is the sum of gradients while it waits for the next micro-batch: that
  # loop carries, beside parameters as they are used, arrays of the shards.
  (loop,) = re.findall(
      r'= \((.*?)\) while\(.*op_name="jit\(step\)/while"', step.as_text()
  )
  carried = collections.Counter(re.findall(r'f32\[[\d,]+\]', loop))
  shards = collections.Counter(
      f'f32[{",".join(map(str, leaf.addressable_shards[0].data.shape))}]'
      for leaf in jax.tree.leaves(grads)
  )
  assert shards <= carried


@functools.cache
def _routing(name):
  """Experts, slots and what is kept on a mesh, `[B, T, k]` each."""
  cfg = _config('moe').model
  params = tiny.params_of(cfg)
  mesh = _mesh(name)
  with sharding.use(mesh):
    model = llava.Llava(cfg)

    def route(params, batch):
      _, sown = model.apply(
          {'params': params},
          batch.tokens_BT,
          batch.segment_ids_BT,
          batch.positions_BT,
          batch.images_BIHWC,
          train=True,
          rngs={'router': jax.random.key(1), 'dropout': jax.random.key(2)},
          mutable=['diagnostics'],
      )
      (trace,) = sown['diagnostics']['llm']['layers_0']['moe']['routing']
      return trace.choice_BTk, trace.slot_BTk, trace.kept_BTk

    where = program.Program(_config('moe'), 'moe', mesh, 1).shardings
    params = jax.device_put(params, where)
    rows = sharding.put_batch(tiny.batch(cfg, rows=8), mesh)
    compiled = jax.jit(route).lower(params, rows).compile(compiler_options=FAST)
    return jax.device_get(compiled(params, rows))


@pytest.mark.parametrize('name', ['8x1', '2x4', '2x2x2'])
def test_mesh_does_not_change_where_a_token_goes(name):
  for one, other in zip(_routing('1'), _routing(name), strict=True):
    np.testing.assert_array_equal(one, other)
