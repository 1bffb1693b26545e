# SPDX-License-Identifier: Apache-2.0
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.model import experts, layers, moe
from tests import tiny

WIDTH, HIDDEN, EXPERTS, TOKENS = 8, 12, 4, 2
F32 = jnp.dtype('float32')
CHOICE_Nk = np.array([[3, 1], [1, 3]], np.int32)
WEIGHT_Nk = np.array([[0.7, 0.3], [1.0, 0.0]], np.float32)


def _weights(kind):
  module = experts.Experts(kind, HIDDEN, True, EXPERTS)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), WIDTH))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  return module.apply(jax.tree.map(np.float32, params), WIDTH)


def _x_ND():
  x_ND = np.random.default_rng(1).normal(size=(TOKENS, WIDTH))
  return x_ND.astype(np.float32)


def _every(weights, kind):
  weight_NE = np.zeros((TOKENS, EXPERTS), np.float32)
  np.put_along_axis(weight_NE, CHOICE_Nk, WEIGHT_Nk, axis=1)
  run = functools.partial(experts.every, kind=kind, dtype=F32)
  return jax.jit(run)(weights, x_ND=_x_ND(), weight_NE=weight_NE)


def _chosen(weights, kind):
  run = functools.partial(experts.chosen, kind=kind, dtype=F32)
  return jax.jit(run)(
      weights, x_ND=_x_ND(), choice_Nk=CHOICE_Nk, weight_Nk=WEIGHT_Nk
  )


@pytest.mark.parametrize('kind', ['gelu_tanh', 'swiglu'])
def test_chosen_experts_give_what_all_of_them_give(kind):
  weights = _weights(kind)
  np.testing.assert_allclose(
      _chosen(weights, kind), _every(weights, kind), atol=1e-5
  )


def test_experts_that_were_not_chosen_are_not_read():
  weights = _weights('swiglu')
  spoilt = jax.tree.map(
      lambda leaf: jnp.asarray(leaf).at[0].set(np.nan), weights
  )
  assert np.isnan(_every(spoilt, 'swiglu')).all()
  np.testing.assert_array_equal(
      _chosen(spoilt, 'swiglu'), _chosen(weights, 'swiglu')
  )


@pytest.mark.parametrize('tokens', [1, 2])
def test_accelerators_read_only_what_one_or_two_tokens_chose(
    tokens, monkeypatch
):
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  cfg = tiny.moe_config(num_experts=4, top_k=2, eval_capacity_factor=None)
  layer = moe.Moe(cfg, 'swiglu', HIDDEN, True, F32)
  x_BTD = np.tile(_x_ND()[:1], (tokens, 1, 1))  # All choose the same two.
  real_BT = np.ones((tokens, 1), bool)

  @jax.jit
  def run(params):
    y_and_aux, sown = layer.apply(
        {'params': params},
        x_BTD,
        real_BT,
        real_BT,
        train=False,
        mutable=['diagnostics'],
    )
    (trace,) = sown['diagnostics']['routing']
    return y_and_aux[0], trace.choice_BTk

  shapes = jax.eval_shape(
      lambda: layer.init(
          jax.random.key(0), x_BTD, real_BT, real_BT, train=False
      )
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32),
      nn.unbox(shapes['params']),
  )
  y_BTD, choice_BTk = run(params)
  others = np.setdiff1d(np.arange(4), choice_BTk)
  assert len(others) == 2
  for leaf in jax.tree.leaves(params['experts']):
    leaf[others] = np.nan
  np.testing.assert_array_equal(run(params)[0], y_BTD)


def test_chosen_experts_are_used_where_they_are_fewer_bytes():
  # A CPU reads, writes and reads again what it takes out of an array.
  assert not experts.reads_less(1, 2, 4)
  assert experts.reads_less(1, 2, 8)
  assert not experts.reads_less(2, 2, 8)
