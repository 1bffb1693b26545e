# SPDX-License-Identifier: Apache-2.0
"""The loss by chunks of columns equals that of whole logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from moellava_jax import sharding
from moellava_jax.model import cross_entropy, llava
from tests import tiny

B, T, D = 2, 5, 8


def _inputs(vocab, bias=True):
  keys = jax.random.split(jax.random.key(0), 4)
  return (
      3 * jax.random.normal(keys[0], (B, T, D)),
      jax.random.normal(keys[1], (D, vocab)),
      jax.random.normal(keys[2], (vocab,)) if bias else None,
      jax.random.randint(keys[3], (B, T), 0, vocab),
  )


def _whole(hidden_BTD, kernel_DV, bias_V, targets_BT):
  logits_BTV = hidden_BTD @ kernel_DV
  if bias_V is not None:
    logits_BTV += bias_V
  return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def _chunked(*inputs, chunk):
  return cross_entropy.token_losses(*inputs, chunk=chunk, dtype=jnp.float32)


@pytest.mark.parametrize(
    'vocab, chunk, bias', [(24, 8, True), (23, 8, True), (5, 1, False)]
)
def test_losses_and_gradients_equal_those_of_whole_logits(vocab, chunk, bias):
  *inputs, targets_BT = _inputs(vocab, bias)
  # Both ends of the vocabulary are targets, too.
  targets_BT = targets_BT.at[0, :2].set(jnp.array([0, vocab - 1]))
  weight_BT = jax.random.uniform(jax.random.key(1), (B, T))
  trained = (0, 1, 2) if bias else (0, 1)

  def both(fn):
    def loss(*inputs):
      losses_BT = fn(*inputs, targets_BT)
      return jnp.sum(losses_BT * weight_BT), losses_BT

    (_, losses_BT), grads = jax.value_and_grad(loss, trained, has_aux=True)(
        *inputs
    )
    return losses_BT, grads

  want = both(_whole)
  have = both(lambda *x: _chunked(*x, chunk=chunk))
  for ours, theirs in zip(
      jax.tree.leaves(have), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_large_logits_stay_finite():
  hidden_BTD, kernel_DV, bias_V, targets_BT = _inputs(24)
  inputs = (hidden_BTD * 1e4, kernel_DV, bias_V, targets_BT)
  want, have = _whole(*inputs), _chunked(*inputs, chunk=8)
  assert float(jnp.max(want)) > 1e4
  np.testing.assert_allclose(have, want, rtol=1e-5, atol=0.1)


def test_a_frozen_head_costs_no_gradient_of_its_kernel():
  *inputs, targets_BT = _inputs(24)

  def products(trained):
    def loss(*given):
      return jnp.sum(_chunked(*given, targets_BT, chunk=8))

    text = str(jax.make_jaxpr(jax.grad(loss, trained))(*inputs))
    return text.count('dot_general[')

  # Logits forward and again backward, and the hidden states' gradient.
  assert products(0) == 3
  assert products((0, 1)) == 4


@pytest.mark.parametrize('trained', [0, (0, 1)])
def test_whole_logits_never_exist(trained):
  vocab, chunk = 4096, 256
  inputs = [
      jax.ShapeDtypeStruct(shape, dtype)
      for shape, dtype in (
          ((8, 64, 16), jnp.float32),
          ((16, vocab), jnp.float32),
          ((vocab,), jnp.float32),
          ((8, 64), jnp.int32),
      )
  ]

  def temporaries(fn):
    def loss(*inputs):
      return jnp.sum(fn(*inputs))

    compiled = jax.jit(jax.grad(loss, trained)).lower(*inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 8 * 64 * vocab * 4
  assert temporaries(_whole) > logits
  # A few chunks, and the kernel cut into them.
  assert temporaries(lambda *x: _chunked(*x, chunk=chunk)) < logits / 3


def test_columns_divided_over_devices_stay_where_they_are():
  mesh = jax.make_mesh(
      (2, 1, 1, 4), sharding.AXES, (jax.sharding.AxisType.Auto,) * 4
  )
  *inputs, targets_BT = _inputs(4096)

  def loss(*inputs):
    return jnp.sum(_chunked(*inputs, chunk=1024))

  def put(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

  with sharding.use(mesh):
    given = (
        put(inputs[0], 'data'),
        put(inputs[1], None, 'tensor'),
        put(inputs[2], 'tensor'),
        put(targets_BT, 'data'),
    )
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*given).compile()
    have = compiled(*given)
  want = jax.grad(loss, (0, 1))(*inputs, targets_BT)
  for ours, theirs in zip(have, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
  text = compiled.as_text()
  assert 'all-gather' not in text and 'all-reduce' in text


@pytest.mark.parametrize(
    'switches',
    [{}, {'tied_head': True, 'head_scale': 0.5}, {'head_bias': True}],
)
def test_a_model_gives_losses_in_place_of_logits(switches):
  cfg = tiny.model_config(**switches)
  params, batch = tiny.params_of(cfg), tiny.batch(cfg)

  def losses(chunk):
    model = llava.Llava(dataclasses.replace(cfg, loss_chunk=chunk))
    out = llava.forward(
        model,
        params,
        batch.tokens_BT,
        batch.segment_ids_BT,
        batch.positions_BT,
        batch.images_BIHWC,
        train=False,
        targets_BT=batch.targets_BT,
    )
    assert out.logits_BTV is None
    return out.losses_BT

  np.testing.assert_allclose(losses(10), losses(16384), rtol=1e-5, atol=1e-5)
