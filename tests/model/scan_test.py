# SPDX-License-Identifier: Apache-2.0
"""Layers in a loop, and what the backward pass computes again."""

import dataclasses
import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import init, stacking
from tests import tiny

# The programs are large, and run once at most.
_QUICKLY = {'xla_backend_optimization_level': '0'}
_POLICIES = typing.get_args(typing.get_type_hints(config.ModelConfig)['remat'])


def _config(*, layers='interval', depth=4, remat='none', top_k=2, **llm):
  """A scanned model that draws random numbers wherever a model can."""
  cfg = tiny.model_config(
      moe=tiny.moe_config(
          layers=layers,
          top_k=top_k,
          second_choice='sampled',
          random_token_selection=True,
          dispatch='einsum',  # The definition; its rounding sets the limits.
      ),
      depth=depth,
      residual_dropout=0.3,
      **llm,
  )
  return dataclasses.replace(cfg, scan_layers=True, remat=remat)


def _stack(params, cfg):
  return stacking.stack(params, stacking.table(cfg), consume=False)


def _texts(cfg, **sizes):
  """A batch without images, as the tower would only cost time."""
  data = tiny.batch(cfg, **sizes)
  return data._replace(
      tokens_BT=np.maximum(data.tokens_BT, 0), images_BIHWC=None
  )


def _objective(cfg, params, data, key):
  out = llava.forward(
      llava.Llava(cfg),
      params,
      data.tokens_BT,
      data.segment_ids_BT,
      data.positions_BT,
      data.images_BIHWC,
      train=True,
      rngs={'router': key, 'dropout': key},
  )
  loss = jnp.mean(out.logits_BTV**2)
  return loss + sum(aux.balance_loss for aux in out.moe), out.moe


@functools.partial(jax.jit, static_argnames='cfg', compiler_options=_QUICKLY)
def _gradient(cfg, params, data, key):
  function = jax.value_and_grad(_objective, argnums=1, has_aux=True)
  return function(cfg, params, data, key)


def _assert_close(ours, theirs):
  ours, theirs = trees.flatten(ours), trees.flatten(theirs)
  assert ours.keys() == theirs.keys()
  for path, want in theirs.items():
    if path.endswith('/k_bias'):
      # No softmax depends on it: its gradient is what rounding leaves of 0.
      assert float(jnp.linalg.norm(ours[path])) < 1e-5, path
      continue
    size = max(float(jnp.linalg.norm(want)), 1e-3)
    error = float(jnp.linalg.norm(ours[path] - want)) / size
    # What reaches the tower is small, and much of it cancels. How XLA rounds
    # depends on the processor.
    limit = 3e-6 if path.startswith('vision/') else 1e-6
    assert error < limit, f'{path}: {error}'


def _assert_same_routing(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    for name in ('tokens_M', 'assigned_ME', 'kept_ME'):
      np.testing.assert_array_equal(
          getattr(a.stats, name), getattr(b.stats, name)
      )


@pytest.mark.parametrize(
    'kinds, expected',
    [
        ('x-x-x-', [(0, 2, 3)]),
        ('x-x-x', [(0, 2, 2), (4, 1, 1)]),
        ('xxx---', [(0, 1, 3), (3, 1, 3)]),
        ('------', [(0, 1, 6)]),
        ('x--x--', [(0, 3, 2)]),
        ('x-', [(0, 1, 1), (1, 1, 1)]),
        ('', []),
    ],
)
def test_layers_are_cut_where_they_stop_repeating(kinds, expected):
  found = trees.segments(kinds)
  assert [tuple(segment) for segment in found] == expected
  assert [n for s in found for n in s.span] == list(range(len(kinds)))


@pytest.mark.parametrize(
    'layers, depth, top_k, names',
    [
        ('interval', 5, 2, ['layers_0_to_2_by_2', 'layers_1_to_3_by_2']),
        ('first_half', 4, 1, ['layers_0_to_1_by_1', 'layers_2_to_3_by_1']),
    ],
)
def test_a_loop_equals_layers_one_by_one(layers, depth, top_k, names):
  """With dropout and sampled routing: the random numbers are the same ones."""
  cfg = _config(layers=layers, depth=depth, top_k=top_k)
  params, data = tiny.params_of(cfg), tiny.batch(cfg)
  stacked = _stack(params, cfg)
  assert [name for name in stacked['llm'] if '_by_' in name] == names
  assert 'layers_0_to_1_by_1' in stacked['vision']
  key = jax.random.key(3)
  (loss, auxes), grads = _gradient(cfg, params, data, key)
  (looped, more), stacked_grads = _gradient(cfg, stacked, data, key)
  np.testing.assert_allclose(looped, loss, rtol=1e-6)
  _assert_same_routing(more, auxes)
  _assert_close(stacking.unstack(stacked_grads, consume=False), grads)
  # Each layer has numbers of its own, so an order of layers is one of many.
  swapped = dict(params['llm'])
  swapped['layers_0'], swapped['layers_2'] = (
      swapped['layers_2'],
      swapped['layers_0'],
  )
  if layers == 'interval':
    (other, _), _ = _gradient(cfg, {**params, 'llm': swapped}, data, key)
    assert abs(float(other - loss)) > 1e-4


def test_a_placement_without_a_period_is_an_error():
  with pytest.raises(
      config.UserError, match=r'no kind of layer repeats.*0,3,6'
  ):
    tiny.train_config(model__scan_layers=True, model__llm__depth=2)
  cfg = tiny.train_config(model__scan_layers=True, model__llm__depth=4)
  assert [s.repeats for s in cfg.model.segments()] == [2]


def test_a_cache_needs_single_layers():
  cfg = _config()
  params, data = _stack(tiny.params_of(cfg), cfg), tiny.batch(cfg)
  cache = llava.init_cache(cfg.llm, *data.tokens_BT.shape, jnp.float32)
  with pytest.raises(ValueError, match='not stacked'):
    tiny.forward(cfg, params, data, cache=cache)


@pytest.mark.parametrize(
    'stacked, policies',
    [(True, _POLICIES), (False, ('none', 'expert_io'))],
)
def test_gradients_do_not_depend_on_what_is_computed_again(stacked, policies):
  results = {}
  for remat in policies:
    cfg = _config(depth=4 if stacked else 2, remat=remat)
    params, data = tiny.params_of(cfg), _texts(cfg)
    if stacked:
      params = _stack(params, cfg)
    results[remat] = _gradient(cfg, params, data, jax.random.key(1))
  (loss, auxes), grads = results['none']
  for (other, more), others in results.values():
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    _assert_same_routing(more, auxes)
    _assert_close(others, grads)


@pytest.mark.slow
@pytest.mark.large
def test_what_is_kept_decides_the_memory():
  """Nothing < expert inputs; nothing < products with weights < products < all."""
  temporary = {}
  for remat in ('full', 'expert_io', 'dots_no_batch', 'dots', 'none'):
    cfg = _config(depth=8, remat=remat, width=64, mlp_width=128)
    params = _stack(tiny.params_of(cfg), cfg)
    data = _texts(cfg, rows=8, length=64)
    lowered = _gradient.lower(cfg, params, data, jax.random.key(0))
    compiled = lowered.compile()
    temporary[remat] = compiled.memory_analysis().temp_size_in_bytes
  order = ['full', 'dots_no_batch', 'dots', 'none']
  sizes = [temporary[name] for name in order]
  assert sizes == sorted(set(sizes)), temporary
  assert temporary['full'] < temporary['expert_io'] < temporary['none']


@pytest.mark.parametrize(
    'remat, expected', [('none', 4), ('full', 6), ('expert_io', 4)]
)
def test_all_to_all_is_not_repeated_if_its_results_are_kept(remat, expected):
  cfg = _config(remat=remat)
  mesh = sharding.make_mesh(
      config.MeshConfig(
          data=2,
          fsdp=1,
          expert=4,
          tensor=1,
          cpu_devices=8,
          print_table=False,
          optimizer_memory='device',
      )
  )
  model = llava.Llava(cfg)
  params = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      init.abstract(model),
      init.shardings(model, mesh),
  )
  data = sharding.put_batch(_texts(cfg, rows=8), mesh)

  def loss(params, data):
    return _objective(cfg, params, data, jax.random.key(0))[0]

  with sharding.use(mesh):
    lowered = jax.jit(jax.grad(loss)).lower(_stack(params, cfg), data)
    text = lowered.compile(_QUICKLY).as_text()
  # One sparse layer: a period of the loop.
  assert len(re.findall(r'\sall-to-all(?:-start)?\(', text)) == expected
