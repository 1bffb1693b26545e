# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.model import decoder, dot_product
from tests import tiny


def _with_dropout(rate, *, remat='none', moe=None, **llm):
  cfg = tiny.model_config(moe=moe, residual_dropout=rate, **llm)
  return dataclasses.replace(cfg, remat=remat)


@functools.partial(jax.jit, static_argnames='cfg')
def _gradient(cfg, params, data, key):
  def loss(params):
    out = tiny.forward(cfg, params, data, train=True, rng=key)
    return jnp.mean(out.logits_BTV**2)

  return jax.value_and_grad(loss)(params)


def test_recomputation_drops_and_samples_the_same():
  moe = tiny.moe_config(second_choice='sampled')
  kept = _with_dropout(0.5, moe=moe, depth=1)
  params, data = tiny.params_of(kept), tiny.batch(kept)
  data = data._replace(images_BIHWC=None)
  key = jax.random.key(1)
  loss, grads = _gradient(kept, params, data, key)
  again, recomputed = _gradient(
      _with_dropout(0.5, remat='full', moe=moe, depth=1), params, data, key
  )
  np.testing.assert_allclose(again, loss, rtol=1e-6)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      recomputed,
      grads,
  )
  # Another key drops others: the comparison above is not one of zeros.
  other, _ = _gradient(kept, params, data, jax.random.key(2))
  assert abs(other - loss) > 1e-4


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_evaluation_does_not_drop(remat):
  cfg = _with_dropout(0.5, remat=remat)
  params, data = tiny.params_of(cfg), tiny.batch(cfg)
  without = tiny.forward(_with_dropout(0.0), params, data).logits_BTV
  np.testing.assert_array_equal(
      tiny.forward(cfg, params, data).logits_BTV, without
  )


@pytest.mark.parametrize('parallel', [False, True])
@pytest.mark.parametrize('branch', ['attn', 'mlp'])
def test_dropout_acts_on_both_branches(branch, parallel):
  """As torch's: an element is 0, or the branch's output over 1 - rate."""
  cfg = _with_dropout(0.25, parallel_block=parallel)
  params = tiny.params_of(cfg)['llm']['layers_0']
  other = {'attn': ('mlp', 'fc2', 'kernel'), 'mlp': ('attn', 'o_kernel')}
  node = params
  for key in other[branch][:-1]:
    node = node[key]
  node[other[branch][-1]] = jnp.zeros_like(node[other[branch][-1]])
  x_BTD = jax.random.normal(jax.random.key(0), (4, 16, cfg.llm.width))
  real_BT = jnp.ones((4, 16), bool)

  def branch_of(train):
    block = decoder.Block(cfg.llm, None, jnp.dtype('float32'), train)
    out_BTD, _, _ = block.apply(
        {'params': params},
        x_BTD,
        jnp.broadcast_to(jnp.arange(16), (4, 16)),
        None,
        dot_product.causal_mask(real_BT.astype(jnp.int32)),
        real_BT,
        ~real_BT,
        None,
        rngs={'dropout': jax.random.key(1)},
    )
    return np.asarray(out_BTD - x_BTD)

  whole, dropped = branch_of(False), branch_of(True)
  gone = np.abs(dropped) < 1e-6
  assert 0.2 < gone.mean() < 0.3
  np.testing.assert_allclose(
      dropped[~gone], (whole / 0.75)[~gone], rtol=1e-4, atol=1e-5
  )
