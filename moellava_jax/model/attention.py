# SPDX-License-Identifier: Apache-2.0
"""Self-attention of the tower and the decoder, and its key/value cache."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax.model import layers


class KVCache(NamedTuple):
  """Keys (rotated) and values of one layer; slot n holds position n.

  Heads come before positions, as the products read them: the other way round,
  every step would transpose the whole cache.
  """

  k_BKSd: jax.Array
  v_BKSd: jax.Array


def causal_mask(segment_ids_BT: jax.Array) -> jax.Array:
  """Which key (S) a query (T) sees: bool `[B, T, S]`.

  A query sees earlier keys, and itself, of its own segment. A padding query
  (segment 0) sees all real keys before it, as in the original; nothing sees
  padding keys.
  """
  length = segment_ids_BT.shape[1]
  query_BT1, key_B1S = segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]
  earlier_TS = jnp.tril(jnp.ones((length, length), bool))
  same_BTS = (query_BT1 == key_B1S) | (query_BT1 == 0)
  return earlier_TS[None] & same_BTS & (key_B1S > 0)


def cache_mask(positions_BT: jax.Array, slots: int) -> jax.Array:
  """Which cache slot a query sees: those up to its position, `[B, T, S]`."""
  return jnp.arange(slots)[None, None, :] <= positions_BT[:, :, None]


def attend(
    q_BTHd: jax.Array,
    k_BSKd: jax.Array,
    v_BSKd: jax.Array,
    mask_BTS: jax.Array | None,
    *,
    keys: str = 'BSKd',
) -> jax.Array:
  """softmax(q k / sqrt(d)) v, `[B, T, H, d]`; the softmax is in fp32.

  `keys` names the axes of keys and values: 'BKSd' for those of a cache.

  Query head n uses key head n // (H / K). A query without visible keys gets
  the mean of all values, not NaN. On the CPU this takes two thirds of the time
  of `jax.nn.dot_product_attention`, forward and backward.
  """
  b, t, h, d = q_BTHd.shape
  kv_heads = k_BSKd.shape[keys.index('K')]
  q_BTKGd = q_BTHd.reshape(b, t, kv_heads, h // kv_heads, d)
  logits_BKGTS = jnp.einsum(
      f'BTKGd,{keys}->BKGTS',
      q_BTKGd,
      k_BSKd,
      preferred_element_type=jnp.float32,
  ) * (d**-0.5)
  if mask_BTS is not None:
    lowest = jnp.finfo(jnp.float32).min
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, lowest)
  probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKd.dtype)
  out_BTKGd = jnp.einsum(f'BKGTS,{keys}->BTKGd', probs_BKGTS, v_BSKd)
  return out_BTKGd.reshape(b, t, h, d)


class Attention(nn.Module):
  """Multi-head attention with grouped keys and values (K <= H heads).

  Softmax in fp32. With `cache`, keys and values are first written at the
  slots `positions_BT` and attention runs over all S slots of the cache.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  qkv_bias: bool
  out_bias: bool
  rotary_fraction: float
  rotary_base: float
  qk_norm_eps: float | None  # None: queries and keys are not normalised.
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self,
      x_BTD: jax.Array,
      positions_BT: jax.Array,
      mask_BTS: jax.Array | None,
      cache: KVCache | None = None,
  ) -> tuple[jax.Array, KVCache | None]:
    q_BTHd = self._project(x_BTD, 'q', self.num_heads, 'heads')
    k_BTKd = self._project(x_BTD, 'k', self.num_kv_heads, 'kv_heads')
    v_BTKd = self._project(x_BTD, 'v', self.num_kv_heads, 'kv_heads')
    if self.qk_norm_eps is not None:
      norm = (self.qk_norm_eps, jnp.float32)
      q_BTHd = layers.norm('rmsnorm', *norm, 'q_norm')(q_BTHd)
      k_BTKd = layers.norm('rmsnorm', *norm, 'k_norm')(k_BTKd)
    turn = (positions_BT, self.rotary_fraction, self.rotary_base)
    q_BTHd = layers.rotate(q_BTHd, *turn)
    k_BTKd = layers.rotate(k_BTKd, *turn)
    q_BTHd, k_BTKd, v_BTKd = (
        x.astype(self.dtype) for x in (q_BTHd, k_BTKd, v_BTKd)
    )
    if cache is None:
      out_BTHd = attend(q_BTHd, k_BTKd, v_BTKd, mask_BTS)
      return self._output(out_BTHd, x_BTD.shape[-1]), None
    rows = jnp.arange(x_BTD.shape[0])[:, None]

    def write(old, new_BTKd):
      return old.at[rows, :, positions_BT].set(
          new_BTKd.astype(old.dtype),
          unique_indices=True,
          indices_are_sorted=True,
      )

    cache = KVCache(write(cache.k_BKSd, k_BTKd), write(cache.v_BKSd, v_BTKd))
    k_BKSd, v_BKSd = (x.astype(self.dtype) for x in cache)
    out_BTHd = attend(q_BTHd, k_BKSd, v_BKSd, mask_BTS, keys='BKSd')
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
