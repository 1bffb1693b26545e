# SPDX-License-Identifier: Apache-2.0
"""Attention by products, and which keys a query sees."""

import jax
import jax.numpy as jnp

from moellava_jax.model import layers


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
  the mean of all values, not NaN.
  """
  b, t, h, d = q_BTHd.shape
  kv_heads = k_BSKd.shape[keys.index('K')]
  q_BTKGd = q_BTHd.reshape(b, t, kv_heads, h // kv_heads, d)
  dtype = v_BSKd.dtype
  logits_BKGTS = layers.product(
      f'BTKGd,{keys}->BKGTS', q_BTKGd, k_BSKd, dtype
  ) * (d**-0.5)
  if mask_BTS is not None:
    lowest = jnp.finfo(jnp.float32).min
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, lowest)
  probs_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1)
  out_BTKGd = layers.product(f'BKGTS,{keys}->BTKGd', probs_BKGTS, v_BSKd, dtype)
  return out_BTKGd.reshape(b, t, h, d)
