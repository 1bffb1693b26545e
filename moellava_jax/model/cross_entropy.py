# SPDX-License-Identifier: Apache-2.0
"""The loss of next tokens, from hidden states rather than from logits.

Logits of 150,000 columns take more memory than all else that a step keeps. Here
the head is multiplied a chunk of columns at a time, forward and again backward:
what exists at once is `[B, T, chunk]`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moellava_jax.model import layers

# Of columns that are no token. Its exponential is 0, and it is not infinite.
_LOWEST = -1e30


class _Kept(NamedTuple):
  """What the forward pass keeps for the backward pass."""

  hidden_BTD: jax.Array
  kernel_DV: jax.Array
  bias_V: jax.Array
  targets_BT: jax.Array
  log_sum_BT: jax.Array  # Of the exponentials of all logits.
  trained: tuple[()] | None  # None: the head's gradient is not asked for.


def token_losses(
    hidden_BTD: jax.Array,
    kernel_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    *,
    chunk: int,
    dtype: Any,
) -> jax.Array:
  """-log softmax(h W + b) at the targets, fp32 `[B, T]`.

  Args:
    hidden_BTD: what enters the head.
    kernel_DV: its kernel W.
    bias_V: its bias b, if it has one.
    targets_BT: int32, in `[0, V)`.
    chunk: columns of the logits that exist at once, at most.
    dtype: factors of the products are rounded to it, see `layers.product`.
  """
  if bias_V is None:
    bias_V = jnp.zeros(kernel_DV.shape[1], jnp.float32)
  count = -(-kernel_DV.shape[1] // chunk)
  return _losses(
      count, jnp.dtype(dtype), hidden_BTD, kernel_DV, bias_V, targets_BT
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(count, dtype, hidden_BTD, kernel_DV, bias_V, targets_BT):
  return _scan(count, dtype, hidden_BTD, kernel_DV, bias_V, targets_BT)[0]


def _forward(count, dtype, hidden_BTD, kernel_DV, bias_V, targets_BT):
  trained = () if kernel_DV.perturbed or bias_V.perturbed else None
  hidden_BTD, kernel_DV, bias_V, targets_BT = (
      x.value for x in (hidden_BTD, kernel_DV, bias_V, targets_BT)
  )
  given = (hidden_BTD, kernel_DV, bias_V, targets_BT)
  losses_BT, log_sum_BT = _scan(count, dtype, *given)
  return losses_BT, _Kept(*given, log_sum_BT, trained)


def _backward(count, dtype, kept, gradient_BT):
  hidden_BTD, kernel_DV, bias_V, targets_BT = kept[:4]

  def add(total_BTD, chunk):
    index, kernel_DC, bias_C = chunk
    logits_BTC = _logits(dtype, hidden_BTD, kernel_DC, bias_C)
    probs_BTC = jnp.exp(logits_BTC - kept.log_sum_BT[..., None])
    target_BTC = _is_target(targets_BT, index, count, bias_C.size)
    d_BTC = gradient_BT[..., None] * (probs_BTC - target_BTC)
    total_BTD += layers.product('BTC,DC->BTD', d_BTC, kernel_DC, dtype)
    if kept.trained is None:
      return total_BTD, None
    of_kernel_DC = layers.product('BTD,BTC->DC', hidden_BTD, d_BTC, dtype)
    return total_BTD, (of_kernel_DC, jnp.sum(d_BTC, axis=(0, 1)))

  zeros_BTD = jnp.zeros(hidden_BTD.shape, jnp.float32)
  total_BTD, of_head = jax.lax.scan(
      add, zeros_BTD, _chunks(kernel_DV.astype(dtype), bias_V, count)
  )
  of_hidden_BTD = total_BTD.astype(hidden_BTD.dtype)
  if of_head is None:
    return of_hidden_BTD, None, None, None
  of_kernel_DV, of_bias_V = (
      jnp.moveaxis(x, 0, -1).reshape(*x.shape[1:-1], -1)[..., : bias_V.size]
      for x in of_head
  )
  return (
      of_hidden_BTD,
      of_kernel_DV.astype(kernel_DV.dtype),
      of_bias_V.astype(bias_V.dtype),
      None,
  )


_losses.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(count, dtype, hidden_BTD, kernel_DV, bias_V, targets_BT):
  """(losses, log-sum of all exponentials), both fp32 `[B, T]`."""

  def add(carry, chunk):
    highest_BT, sum_BT, at_target_BT = carry
    index, kernel_DC, bias_C = chunk
    logits_BTC = _logits(dtype, hidden_BTD, kernel_DC, bias_C)
    new_BT = jnp.maximum(highest_BT, jnp.max(logits_BTC, axis=-1))
    sum_BT *= jnp.exp(highest_BT - new_BT)
    sum_BT += jnp.sum(jnp.exp(logits_BTC - new_BT[..., None]), axis=-1)
    target_BTC = _is_target(targets_BT, index, count, bias_C.size)
    at_target_BT += jnp.sum(logits_BTC * target_BTC, axis=-1)
    return (new_BT, sum_BT, at_target_BT), None

  zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
  (highest_BT, sum_BT, at_target_BT), _ = jax.lax.scan(
      add,
      (zeros_BT + _LOWEST, zeros_BT, zeros_BT),
      _chunks(kernel_DV.astype(dtype), bias_V, count),
  )
  log_sum_BT = highest_BT + jnp.log(sum_BT)
  return log_sum_BT - at_target_BT, log_sum_BT


def _chunks(kernel_DV, bias_V, count):
  """(index, kernel, bias) of each chunk, stacked.

  Column v is in chunk v mod `count`: a kernel whose columns are divided over
  devices stays divided in the same way.
  """
  short = -bias_V.size % count
  kernel_DV = jnp.pad(kernel_DV, ((0, 0), (0, short)))
  bias_V = jnp.pad(
      bias_V.astype(jnp.float32), (0, short), constant_values=_LOWEST
  )
  kernel_DCN = kernel_DV.reshape(kernel_DV.shape[0], -1, count)
  return (
      jnp.arange(count),
      jnp.moveaxis(kernel_DCN, -1, 0),
      bias_V.reshape(-1, count).T,
  )


def _logits(dtype, hidden_BTD, kernel_DC, bias_C):
  logits_BTC = layers.product('BTD,DC->BTC', hidden_BTD, kernel_DC, dtype)
  return logits_BTC + bias_C


def _is_target(targets_BT, index, count, size):
  """1.0 at the target's column of chunk `index`, `[B, T, size]`."""
  in_chunk_BT = targets_BT % count == index
  at_BTC = (targets_BT // count)[..., None] == jnp.arange(size)
  return (in_chunk_BT[..., None] & at_BTC).astype(jnp.float32)
