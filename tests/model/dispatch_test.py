# SPDX-License-Identifier: Apache-2.0
"""Every way to the experts computes what the one-hot products compute."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, sharding
from moellava_jax.model import dispatch, experts, layers, moe, ragged
from moellava_jax.model import routing as routing_lib
from tests import tiny

ROWS, LENGTH, WIDTH = 8, 11, 8
# Rows of uneven length, and one without any token.
REAL_BT = np.arange(LENGTH) < np.array([11, 9, 0, 4, 11, 3, 8, 10])[:, None]
# Compiles in half the time; the partitioner's part is the same.
FAST = {'xla_backend_optimization_level': 0}


def _config(dispatch='einsum', **changes):
  return tiny.moe_config(dispatch=dispatch, second_choice='argmax', **changes)


def _layer(cfg, kind='gelu_tanh'):
  return moe.Moe(cfg, kind, 12, True, jnp.dtype('float32'))


@functools.cache
def _boxed(cfg, kind):
  x_BTD = jnp.zeros((ROWS, LENGTH, WIDTH))
  return jax.eval_shape(
      lambda: _layer(cfg, kind).init(
          {'params': jax.random.key(0), 'router': jax.random.key(0)},
          x_BTD,
          REAL_BT,
          REAL_BT,
          train=False,
      )
  )['params']


def _params(cfg, kind):
  boxed = _boxed(cfg, kind)
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.5,
      nn.unbox(boxed),
  )


def _program(cfg, kind='gelu_tanh', train=True):
  """(parameters, input) -> output, counts, and the gradients of both."""
  wanted_BTD = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH))

  def loss(params, x_BTD):
    y_BTD, aux = _layer(cfg, kind).apply(
        {'params': params},
        x_BTD,
        REAL_BT,
        REAL_BT,
        train=train,
        rngs={'router': jax.random.key(2)},
    )
    loss = jnp.sum(y_BTD * wanted_BTD) + aux.balance_loss
    return loss, (y_BTD, aux.stats)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def _input():
  rng = np.random.default_rng(2)
  return rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


@functools.cache
def _run(cfg, kind='gelu_tanh', train=True):
  """Output, counts of what was kept, gradients of parameters and input."""
  params = _params(dataclasses.replace(cfg, dispatch='einsum'), kind)
  program = jax.jit(_program(cfg, kind, train)).lower(params, _input())
  found = program.compile(compiler_options=FAST)(params, _input())
  (_, (y_BTD, stats)), grads = jax.device_get(found)
  return y_BTD, stats, grads


def _close(found, expected):
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
      found,
      expected,
  )


CASES = {
    'top-2 with drops': _config(capacity_factor=0.6),
    'top-2 without drops': _config(capacity_factor=4.0),
    'top-1': _config(top_k=1, capacity_factor=0.8),
    'top-1 that keeps random tokens': _config(
        top_k=1,
        capacity_factor=0.8,
        random_token_selection=True,
    ),
    'top-3': _config(top_k=3, capacity_factor=0.7),
    'one group': _config(group='batch', capacity_factor=0.3),
    'split rows': _config(max_group_size=4, capacity_factor=0.8),
    'padding takes slots': _config(route_padding=True, capacity_factor=0.6),
}


@pytest.mark.parametrize('name', CASES)
def test_index_equals_the_products(name):
  cfg = CASES[name]
  kind = 'swiglu' if name == 'split rows' else 'gelu_tanh'
  expected = _run(cfg, kind)
  found = _run(dataclasses.replace(cfg, dispatch='index'), kind)
  stats = expected[1]
  dropped = np.sum(stats.kept_ME) < np.sum(stats.assigned_ME)
  assert dropped == (name != 'top-2 without drops')
  _close(found, expected)


def test_index_of_accelerators_has_the_same_gradients(monkeypatch):
  cfg = _config(capacity_factor=0.7)  # Not traced elsewhere for the CPU.
  expected = _run(cfg)
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  _close(_run(dataclasses.replace(cfg, dispatch='index')), expected)


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_index_scatters_integers_only(platform, monkeypatch):
  """Forward and backward; what autodiff makes of a gather adds up floats."""
  monkeypatch.setattr(layers, 'platform', lambda: platform)
  cfg = dataclasses.replace(CASES['top-2 with drops'], dispatch='index')
  params = _params(dataclasses.replace(cfg, dispatch='einsum'), 'gelu_tanh')
  text = str(jax.make_jaxpr(_program(cfg))(params, _input()))
  scattered = re.findall(r'(\w+)\[[\d,]*\] = scatter', text)
  assert scattered and set(scattered) == {'i32'}


def test_index_adds_up_in_fp32():
  """Experts that return what they get: the weights of a token sum to 1."""
  rng = np.random.default_rng(0)
  routing = routing_lib.route(
      rng.normal(size=(2, 16, 4)).astype(np.float32),
      np.ones((2, 16), bool),
      top_k=3,
      capacity=16,
  )
  x_GSD = rng.normal(size=(2, 16, WIDTH)).astype(jnp.bfloat16)
  y_GSD = dispatch.index(x_GSD, routing, 16, lambda x: x, jnp.bfloat16)
  assert y_GSD.dtype == jnp.float32
  np.testing.assert_allclose(y_GSD, x_GSD.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize('kind, top_k', [('gelu_tanh', 2), ('swiglu', 1)])
def test_ragged_equals_the_products_that_drop_nothing(kind, top_k, monkeypatch):
  monkeypatch.setattr(ragged, '_BLOCK', 4)  # Several for some of the experts.
  ample = _config(top_k=top_k, capacity_factor=4.0)
  tight = _config(top_k=top_k, capacity_factor=0.5, dispatch='ragged')
  found, expected = _run(tight, kind), _run(ample, kind)
  np.testing.assert_array_equal(found[1].kept_ME, found[1].assigned_ME)
  _close(found, expected)


def test_large_experts_answer_by_blocks_of_rows(monkeypatch):
  """As all experts on all tokens would, for less: nothing is dropped."""
  layer = moe.Moe(
      _config(eval_capacity_factor=None, group='batch'),
      'gelu_tanh',
      2048,
      True,
      jnp.dtype('float32'),
  )
  x_BTD = jax.random.normal(jax.random.key(0), (4, 128, 64))
  is_token_BT = jnp.arange(512).reshape(4, 128) % 7 > 0
  params = layer.init(
      jax.random.key(1), x_BTD, is_token_BT, is_token_BT, train=False
  )

  def compiled():
    def run(params, x_BTD):
      return layer.apply(params, x_BTD, is_token_BT, is_token_BT, train=False)[
          0
      ]

    return jax.jit(run).lower(params, x_BTD).compile()

  blocks = compiled()
  monkeypatch.setattr(ragged, 'beats_every', lambda *_: False)
  every = compiled()
  assert 'while' in blocks.as_text() and 'while' not in every.as_text()
  np.testing.assert_allclose(
      blocks(params, x_BTD), every(params, x_BTD), atol=1e-5
  )


def test_blocks_are_for_many_tokens_and_large_experts_of_one_device():
  def weights(width, mlp_width):
    up = experts.Linear(jnp.zeros((4, width, mlp_width)), None)
    return experts.Weights((up,), up)

  assert ragged.beats_every(weights(256, 512), 512, 2)
  assert not ragged.beats_every(weights(256, 512), 256, 2)
  assert not ragged.beats_every(weights(64, 128), 4096, 2)
  for axis in ('data', 'expert'):
    with jax.set_mesh(jax.make_mesh((2,), (axis,))):
      assert not ragged.beats_every(weights(256, 512), 512, 2)


@pytest.mark.parametrize('kind', ['gelu_tanh', 'swiglu'])
def test_blocks_equal_grouped_products(kind):
  rng = np.random.default_rng(0)
  module = experts.Experts(kind, 12, True, 3)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), WIDTH))
  params = jax.tree.map(lambda x: rng.normal(size=x.shape), nn.unbox(shapes))
  weights = module.apply(jax.tree.map(np.float32, params), WIDTH)
  # The second has no row, and behind the third there are rows of nobody.
  block = 16
  size_E = jnp.array([2, 0, 1], jnp.int32) * block
  x_RD = rng.normal(size=(4 * block, WIDTH)).astype(np.float32)
  mine_R1 = np.arange(len(x_RD))[:, None] < 3 * block

  def run(which):
    def loss(weights, x_RD):
      y_RD = which(weights, x_RD, size_E, kind, jnp.dtype('float32'))
      return jnp.sum(jnp.where(mine_R1, y_RD, 0) ** 2) / len(x_RD)

    value_and_grad = jax.value_and_grad(loss, argnums=(0, 1))
    return jax.jit(value_and_grad)(weights, x_RD)

  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
      run(functools.partial(ragged.blocks, block=block)),
      run(ragged.grouped),
  )


MESHES = {
    '8x1': dict(data=8),
    '2x4': dict(data=2, expert=4),
    '2x2x2': dict(fsdp=2, expert=2, tensor=2),
    'fsdp and tensor': dict(data=2, fsdp=2, tensor=2),
}


@pytest.mark.parametrize(
    'name, case',
    [
        ('8x1', 'top-2 with drops'),
        ('2x4', 'top-2 with drops'),
        ('2x4', 'top-1'),
        ('2x4', 'one group'),
        ('2x2x2', 'top-2 with drops'),
        ('fsdp and tensor', 'padding takes slots'),
    ],
)
def test_index_is_the_same_on_every_mesh(name, case):
  _, stats, _ = _compare(CASES[case], 'index', name)
  assert np.sum(stats.kept_ME) < np.sum(stats.assigned_ME)


def test_ragged_is_the_same_with_rows_on_several_devices():
  _compare(_config(capacity_factor=4.0), 'ragged', 'fsdp and tensor')


def _compare(cfg, dispatch, name):
  """Asserts that a mesh gives what one device does by products."""
  expected = _run(cfg)
  sizes = dict(data=1, fsdp=1, expert=1, tensor=1) | MESHES[name]
  mesh = sharding.make_mesh(
      config.MeshConfig(
          **sizes, cpu_devices=1, print_table=False, optimizer_memory='device'
      )
  )
  boxed, params = _boxed(cfg, 'gelu_tanh'), _params(cfg, 'gelu_tanh')
  with sharding.use(mesh):
    params = jax.device_put(params, sharding.of_parameters(boxed, mesh))
    x_BTD = jax.device_put(_input(), sharding.of_batch(mesh))
    cfg = dataclasses.replace(cfg, dispatch=dispatch)
    program = jax.jit(_program(cfg)).lower(params, x_BTD)
    found = program.compile(compiler_options=FAST)(params, x_BTD)
    (_, (y_BTD, stats)), grads = jax.device_get(found)
  _close((y_BTD, stats, grads), expected)
  return expected


def test_auto_is_not_announced_by_making_parameters(capsys):
  dispatch._announce.cache_clear()
  cfg = dataclasses.replace(CASES['top-2 with drops'], dispatch='auto')
  layer, rngs = _layer(cfg, 'gelu_tanh'), jax.random.key(0)
  jax.eval_shape(
      lambda: layer.init(rngs, _input(), REAL_BT, REAL_BT, train=True)
  )
  assert 'auto' not in capsys.readouterr().out


def test_auto_says_what_it_is_and_keeps_the_results(capsys):
  cfg = CASES['top-2 with drops']
  dispatch._announce.cache_clear()
  auto = _run(dataclasses.replace(cfg, dispatch='auto'))
  _run(dataclasses.replace(cfg, dispatch='auto', capacity_factor=0.7))
  said = capsys.readouterr().out
  assert said.count("dispatch='auto' is 'index' on cpu: ") == 1
  _close(auto, _run(dataclasses.replace(cfg, dispatch='index')))
