# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.model import experts

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


def test_chosen_experts_are_used_where_they_are_fewer_bytes():
  # A CPU reads, writes and reads again what it takes out of an array.
  assert not experts.reads_less(1, 2, 4)
  assert experts.reads_less(1, 2, 8)
  assert not experts.reads_less(2, 2, 8)
