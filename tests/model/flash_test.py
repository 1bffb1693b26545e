# SPDX-License-Identifier: Apache-2.0
"""Kernels against products: results, gradients, and who uses which."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, sharding
from moellava_jax.model import dot_product, flash, llava
from tests import tiny

# Two conversations and padding; the second row is one conversation.
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 1]], [60, 62, 8], axis=1)
# cuDNN's entry point runs on the CPU in XLA's implementation of it.
BY_XLA = functools.partial(flash.cudnn, implementation='xla')
KERNELS = {
    'cudnn': BY_XLA,
    'splash': functools.partial(flash.splash, interpret=True),
}


def _inputs(kv_heads, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  length = SEGMENTS.shape[1]
  return tuple(
      jax.random.normal(key, (2, length, heads, 16)).astype(dtype)
      for key, heads in zip(keys, (4, kv_heads, kv_heads), strict=True)
  )


def _with_gradients(run, inputs):
  real_BT11 = (SEGMENTS > 0)[..., None, None]
  weight = np.random.default_rng(0).normal(size=(*SEGMENTS.shape, 4, 16))

  def loss(inputs):
    y = jnp.where(real_BT11, run(*inputs).astype(jnp.float32), 0)
    return jnp.sum(y * weight), y

  (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
  return y, *gradients


@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('kv_heads', [2, 4])
def test_kernels_give_what_products_give(kernel, kv_heads):
  assert SEGMENTS.shape[1] % 128  # An odd number of tiles.
  inputs = _inputs(kv_heads)
  mask_BTS = dot_product.causal_mask(jnp.asarray(SEGMENTS))
  expected = _with_gradients(
      lambda *x: dot_product.attend(*x, mask_BTS), inputs
  )
  found = _with_gradients(lambda *x: KERNELS[kernel](*x, SEGMENTS), inputs)
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.fixture
def on_cpu(monkeypatch):
  """The CPU has a kernel, used in rows of any length."""

  def use(kernel):
    monkeypatch.setattr(flash, '_KERNELS', {'cpu': kernel})
    monkeypatch.setattr(flash, 'SHORTEST', 1)

  flash._fails.cache_clear()
  yield use
  flash._fails.cache_clear()


def test_a_model_trains_alike_on_a_mesh(on_cpu):
  cfg = tiny.model_config(num_heads=4, num_kv_heads=2, head_dim=8)
  params, data = tiny.params_of(cfg), tiny.batch(cfg, rows=4, length=16)
  mesh = sharding.make_mesh(tiny.train_config().mesh, jax.devices()[:4])
  calls = []

  def kernel(q, k, v, segments):
    calls.append(q.shape)
    return BY_XLA(q, k, v, segments)

  def losses(setting):
    model = llava.Llava(dataclasses.replace(cfg, attention=setting))

    def total(params):
      out = llava.forward(
          model,
          params,
          data.tokens_BT,
          data.segment_ids_BT,
          data.positions_BT,
          data.images_BIHWC,
          train=False,
          targets_BT=data.targets_BT,
      )
      return jnp.sum(out.losses_BT * data.loss_weight_BT)

    with sharding.use(mesh):
      return jax.jit(jax.value_and_grad(total))(params)

  expected = losses('einsum')
  assert not calls
  on_cpu(kernel)
  found = losses('flash')
  # The small case that is compared first, then each device its own rows.
  assert {shape[0] for shape in calls} == {2, 4 // mesh.size}
  for a, b in zip(
      jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
  ):
    largest = np.max(np.abs(a))  # Sums over positions: up to 43.
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(largest, 1))


@jax.custom_vjp
def _no_gradient(x):
  return x


_no_gradient.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))


@pytest.mark.parametrize(
    ('kernel', 'why'),
    [
        (lambda q, k, v, s: 1 / 0, 'ZeroDivisionError'),
        (lambda q, k, v, s: 2 * BY_XLA(q, k, v, s), 'results differ'),
        (lambda q, k, v, s: BY_XLA(q, _no_gradient(k), v, s), 'by nan'),
    ],
)
def test_a_kernel_that_fails_is_not_used(on_cpu, capsys, kernel, why):
  on_cpu(kernel)
  flash._announce.cache_clear()
  wanted = ('cpu', jnp.float32, 16, 512)
  assert flash.choose('auto', *wanted) == 'einsum'
  assert why in capsys.readouterr().out
  with pytest.raises(config.UserError, match=why):
    flash.choose('flash', *wanted)
  on_cpu(BY_XLA)
  flash._fails.cache_clear()
  assert flash.choose('auto', *wanted) == 'flash'


def test_who_uses_which():
  half, single = jnp.bfloat16, jnp.float32
  assert flash.choose('auto', 'cpu', single, 64, 2048) == 'einsum'
  assert flash.choose('auto', 'gpu', half, 64, 2048) == 'flash'
  assert flash.choose('auto', 'tpu', single, 80, 2048) == 'flash'
  assert flash.choose('auto', 'gpu', half, 64, 64) == 'einsum'
  assert flash.choose('auto', 'gpu', single, 64, 2048) == 'einsum'
  assert flash.choose('auto', 'gpu', half, 20, 2048) == 'einsum'
  with pytest.raises(config.UserError, match='cannot be had on cpu'):
    flash.choose('flash', 'cpu', single, 64, 2048)


def test_padding_that_is_routed_is_attended_as_in_the_original(on_cpu):
  on_cpu(lambda *_: 1 / 0)
  moe = tiny.moe_config(route_padding=True)
  cfg = dataclasses.replace(tiny.model_config(moe), attention='flash')
  tiny.forward(cfg, tiny.params_of(cfg), tiny.batch(cfg))
