# SPDX-License-Identifier: Apache-2.0
"""What `dispatch='ragged'` multiplies, by platform."""

from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from moellava_jax.model import experts, layers, ragged, routing

E, D, F, TOKENS, K = 4, 8, 16, 64, 2
FAST: Any = {'xla_backend_optimization_level': 0}


def _layer():
  rng = np.random.default_rng(0)

  def linear(*shape):
    kernel_EDF, bias_EF = rng.normal(size=shape), rng.normal(size=shape[::2])
    return experts.Linear(*map(jnp.float32, (kernel_EDF, bias_EF)))

  weights = experts.Weights((linear(E, D, F),), linear(E, F, D))
  x_GSD = jnp.float32(rng.normal(size=(2, TOKENS // 2, D)))
  chosen = routing.route(
      jnp.float32(rng.normal(size=(2, TOKENS // 2, E))),
      jnp.ones((2, TOKENS // 2), bool),
      top_k=K,
      capacity=TOKENS,
  )
  return weights, x_GSD, chosen


def _loss(weights, x_GSD, chosen):
  y_GSD = ragged.ragged(x_GSD, chosen, weights, 'gelu', jnp.dtype('float32'))
  return jnp.sum(jnp.sin(y_GSD)), y_GSD


_gradients = jax.value_and_grad(_loss, (0, 1), has_aux=True)


# By new functions: what was traced for another platform is kept.
def _forward(*layer):
  return jax.make_jaxpr(lambda *given: _loss(*given))(*layer)


def _backward(*layer):
  return jax.make_jaxpr(lambda *given: _gradients(*given))(*layer)


def _products(jaxpr):
  """(size of the result, terms of a sum, products at once) of all of them."""
  found = []
  for eqn in jaxpr.eqns:
    assert 'ragged' not in eqn.primitive.name
    if eqn.primitive.name == 'dot_general':
      (summed, _), (at_once, _) = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      found.append(
          (
              eqn.outvars[0].aval.size,
              np.prod([shape[n] for n in summed]),
              [shape[n] for n in at_once],
          )
      )
    for inner in core.jaxprs_in_params(eqn.params):
      found += _products(inner)
  return found


def test_gpus_multiply_no_token_with_experts_it_did_not_choose(monkeypatch):
  """Where XLA makes a dense product of `ragged_dot`."""
  monkeypatch.setattr(ragged, '_BLOCK', 1)
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  weights, x_GSD, chosen = _layer()
  block = ragged.block_rows(TOKENS * K, E)
  _, _, size_E = ragged.sort(chosen, block)
  assert np.sum(size_E) < 1.2 * TOKENS * K  # Dense: 2 times.
  for program, count in ((_forward, 2), (_backward, 6)):
    products = _products(program(weights, x_GSD, chosen).jaxpr)
    assert len(products) == count
    for size, terms, at_once in products:
      assert not at_once
      assert size * terms == block * D * F  # Once for each block.


def test_gpus_compute_what_the_cpu_does(monkeypatch):
  monkeypatch.setattr(ragged, '_BLOCK', 2)  # Of a GPU 8.

  def run():
    program = jax.jit(lambda *given: _gradients(*given)).lower(*_layer())
    return program.compile(compiler_options=FAST)(*_layer())

  expected = run()
  monkeypatch.setattr(layers, 'platform', lambda: 'gpu')
  found = run()
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5),
      found,
      expected,
  )


def test_tpus_have_grouped_products(monkeypatch):
  monkeypatch.setattr(layers, 'platform', lambda: 'tpu')
  assert 'ragged_dot' in str(_forward(*_layer()))
