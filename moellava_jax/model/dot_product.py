# SPDX-License-Identifier: Apache-2.0
"""Attention by products, and which keys a query sees."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from moellava_jax.model import layers

_SMALLEST_BLOCK = 128  # Queries.


@flax.struct.dataclass
class Causal:
  """Queries see what `causal_mask` of the segment ids, int32 `[B, T]`, says.

  `by` is 'einsum' (`attend_causal`) or 'flash' (`flash.attend`).
  """

  segment_ids_BT: jax.Array
  by: str = flax.struct.field(pytree_node=False)


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
  largest_BKGT1 = jnp.max(logits_BKGTS, axis=-1, keepdims=True)
  weights_BKGTS = jnp.exp(logits_BKGTS - jax.lax.stop_gradient(largest_BKGT1))
  sum_BTKG = jnp.einsum('BKGTS->BTKG', weights_BKGTS)
  out_BTKGd = layers.product(
      f'BKGTS,{keys}->BTKGd', weights_BKGTS, v_BSKd, dtype
  )
  # Divided last: there are fewer results than weights.
  out_BTKGd /= sum_BTKG[..., None]
  return out_BTKGd.reshape(b, t, h, d)


def attend_causal(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
  """`attend` with `causal_mask`, by blocks of queries and the keys up to them.

  Returns fp32 `[B, T, H, d]`, for any T. The scores of a block are computed
  again in the backward pass, so that those of a whole row are never kept.
  """
  length = q_BTHd.shape[1]
  # A fourth of the row, in multiples of the smallest: 5/8 of all scores are left.
  block = _SMALLEST_BLOCK * -(-length // (4 * _SMALLEST_BLOCK))
  mask_BTS = causal_mask(segment_ids_BT)
  if length <= block:
    return attend(q_BTHd, k_BTKd, v_BTKd, mask_BTS)
  # As the products read them: otherwise every block would transpose its keys.
  k_BKTd, v_BKTd = (x.transpose(0, 2, 1, 3) for x in (k_BTKd, v_BTKd))

  # Whole arrays are kept for all blocks once; slices would be kept for each.
  @functools.partial(jax.checkpoint, static_argnums=(4, 5))
  def attend_block(q_BTHd, k_BKTd, v_BKTd, mask_BTS, start, end):
    return attend(
        q_BTHd[:, start:end],
        k_BKTd[:, :, :end],
        v_BKTd[:, :, :end],
        mask_BTS[:, start:end, :end],
        keys='BKSd',
    )

  blocks = [
      attend_block(
          q_BTHd, k_BKTd, v_BKTd, mask_BTS, start, min(start + block, length)
      )
      for start in range(0, length, block)
  ]
  y_BTHd = jnp.concatenate(blocks, axis=1)
  # `attend` gives padding before all tokens the mean of all values.
  mean_B1Kd = jnp.mean(v_BTKd.astype(jnp.float32), axis=1, keepdims=True)
  groups = q_BTHd.shape[2] // v_BTKd.shape[2]
  sees_BT = jnp.cumsum(segment_ids_BT > 0, axis=1) > 0
  return jnp.where(
      sees_BT[..., None, None], y_BTHd, jnp.repeat(mean_B1Kd, groups, axis=2)
  )
