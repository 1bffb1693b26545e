# SPDX-License-Identifier: Apache-2.0
"""Self-attention of the tower and the decoder, and its key/value cache."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax.model import dot_product, flash, layers


class KVCache(NamedTuple):
  """Keys (rotated) and values of one layer; slot n holds position n.

  Heads come before positions, as the products read them: the other way round,
  every step would transpose the whole cache. One row may come without its axis,
  `[K, S, d]`: with it, XLA's CPU copies the cache six times a step.
  """

  k_BKSd: jax.Array
  v_BKSd: jax.Array


def _attend_causally(q_BTHd, k_BTKd, v_BTKd, seen: dot_product.Causal):
  """Attention to the keys of these rows, not to a cache."""
  by = flash.attend if seen.by == 'flash' else dot_product.attend_causal
  return by(q_BTHd, k_BTKd, v_BTKd, seen.segment_ids_BT)


def _write(
    old_BKSd: jax.Array, new_BTKd: jax.Array, positions_BT: jax.Array
) -> jax.Array:
  new_BTKd = new_BTKd.astype(old_BKSd.dtype)
  if old_BKSd.ndim == 3:  # At consecutive positions.
    assert len(new_BTKd) == 1, new_BTKd.shape
    new_KTd = new_BTKd[0].transpose(1, 0, 2)
    where = (0, positions_BT[0, 0], 0)
    return jax.lax.dynamic_update_slice(old_BKSd, new_KTd, where)
  rows = jnp.arange(len(new_BTKd))[:, None]
  return old_BKSd.at[rows, :, positions_BT].set(
      new_BTKd, unique_indices=True, indices_are_sorted=True
  )


class Attention(nn.Module):
  """Multi-head attention with grouped keys and values (K <= H heads).

  Softmax in fp32. With `cache`, keys and values are first written at the
  slots `positions_BT`. Attention then runs over all S slots of the cache,
  unless `seen` is a `dot_product.Causal`: that is for rows which are all that
  the cache holds.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool
  out_bias: bool
  qk_norm_eps: float | None  # None: queries and keys are not normalised.
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self,
      x_BTD: jax.Array,
      positions_BT: jax.Array,
      rotation: layers.Rotation | None,
      seen: dot_product.Causal | jax.Array | None,
      cache: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    """Heads are turned by `rotation`, None: not.

    `positions_BT` are slots of the cache. `seen` says which keys a query sees;
    an array is bool `[B, T, S]`; None is all.
    """
    q_BTHd = self._project(x_BTD, 'q', self.num_heads, 'heads')
    k_BTKd = self._project(x_BTD, 'k', self.num_kv_heads, 'kv_heads')
    v_BTKd = self._project(x_BTD, 'v', self.num_kv_heads, 'kv_heads')
    if self.qk_norm_eps is not None:
      norm = (self.qk_norm_eps, jnp.float32)
      q_BTHd = layers.norm('rmsnorm', *norm, 'q_norm')(q_BTHd)
      k_BTKd = layers.norm('rmsnorm', *norm, 'k_norm')(k_BTKd)
    q_BTHd = layers.rotate(q_BTHd, rotation)
    k_BTKd = layers.rotate(k_BTKd, rotation)
    q_BTHd, k_BTKd, v_BTKd = (
        x.astype(self.dtype) for x in (q_BTHd, k_BTKd, v_BTKd)
    )
    if cache is None:
      if isinstance(seen, dot_product.Causal):
        out_BTHd = _attend_causally(q_BTHd, k_BTKd, v_BTKd, seen)
      else:
        out_BTHd = dot_product.attend(q_BTHd, k_BTKd, v_BTKd, seen)
      return self._output(out_BTHd, x_BTD.shape[-1]), None
    cache = KVCache(
        _write(cache.k_BKSd, k_BTKd, positions_BT),
        _write(cache.v_BKSd, v_BTKd, positions_BT),
    )
    if isinstance(seen, dot_product.Causal):
      out_BTHd = _attend_causally(q_BTHd, k_BTKd, v_BTKd, seen)
    else:
      k_BKSd, v_BKSd = (x.astype(self.dtype) for x in cache)
      out_BTHd = dot_product.attend(
          q_BTHd, k_BKSd, v_BKSd, seen, keys='BKSd'[-k_BKSd.ndim :]
      )
    return self._output(out_BTHd, x_BTD.shape[-1]), cache

  def _project(self, x_BTD, name, heads, axis):
    width = x_BTD.shape[-1]
    kernel_DHd = self.param(
        f'{name}_kernel',
        layers.partitioned(
            layers.kernel_init(width), ('embed', axis, 'head_dim')
        ),
        (width, heads, self.head_dim),
    )
    y_BTHd = layers.product('BTD,DHd->BTHd', x_BTD, kernel_DHd, self.dtype)
    if self.qkv_bias:
      y_BTHd += self.param(
          f'{name}_bias',
          layers.partitioned(nn.initializers.zeros, (axis, 'head_dim')),
          (heads, self.head_dim),
      ).astype(jnp.float32)
    return y_BTHd

  def _output(self, x_BTHd, width):
    heads, d = x_BTHd.shape[-2:]
    kernel_HdD = self.param(
        'o_kernel',
        layers.partitioned(
            layers.kernel_init(heads * d), ('heads', 'head_dim', 'embed')
        ),
        (heads, d, width),
    )
    y_BTD = layers.product('BTHd,HdD->BTD', x_BTHd, kernel_HdD, self.dtype)
    if self.out_bias:
      y_BTD += self.param(
          'o_bias',
          layers.partitioned(nn.initializers.zeros, ('norm',)),
          (width,),
      ).astype(jnp.float32)
    return y_BTD
