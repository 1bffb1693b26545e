# SPDX-License-Identifier: Apache-2.0
"""Products in bf16: what is rounded, forward and backward."""

import jax
from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.model import layers

_CASES = [
    ('...D,DF->...F', (2, 3, 8), (8, 5)),
    ('GECD,EDF->GECF', (2, 3, 4, 8), (3, 8, 5)),
    ('GECD,GSEC->GSD', (2, 3, 4, 8), (2, 6, 3, 4)),
    ('BTHd,HdD->BTD', (2, 3, 4, 5), (4, 5, 8)),
]


def _grads(equation, x, y, dtype):
  def loss(x, y):
    return jnp.sum(jnp.sin(layers.product(equation, x, y, dtype)))

  return jax.grad(loss, (0, 1))(x, y)


def _factors(shapes, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0))
  return [
      jax.random.normal(k, s).astype(dtype)
      for k, s in zip(keys, shapes, strict=True)
  ]


@pytest.mark.parametrize('equation, x, y', _CASES)
def test_gradients_of_bf16_products_are_those_of_fp32_but_for_rounding(
    equation, x, y
):
  # Factors that bf16 holds: all that is left is the rounding of what comes in.
  x, y = _factors((x, y), jnp.bfloat16)
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  have = _grads(equation, x, y, jnp.bfloat16)
  want = _grads(equation, x, y, jnp.float32)
  for ours, theirs in zip(have, want, strict=True):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=0.01 * np.abs(theirs).max())


@pytest.mark.parametrize('equation, x, y', _CASES)
def test_backward_products_of_accelerators_have_bf16_factors(
    equation, x, y, monkeypatch
):
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  jaxpr = jax.make_jaxpr(lambda x, y: _grads(equation, x, y, jnp.bfloat16))(
      *_factors((x, y))
  )

  def products(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == 'dot_general':
        yield eqn
      for sub in jex_core.jaxprs_in_params(eqn.params):
        yield from products(sub)

  found = list(products(jaxpr.jaxpr))
  assert len(found) == 3
  for eqn in found:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
    assert eqn.outvars[0].aval.dtype == jnp.float32
