# SPDX-License-Identifier: Apache-2.0
"""Which experts and slots a token gets: pure functions on arrays.

Letters: G groups, S tokens per group, E experts, k choices per token.

The semantics are those of DeepSpeed 0.9.5 `top2gating`, which the original
trains with, where a config switch does not say otherwise:

  1. The first choice is the argmax of the softmax of the logits. The second is
     the argmax of logits + Gumbel noise among the others ('sampled'), or of
     the logits ('argmax').
  2. All first choices outrank all second choices; within a choice, earlier
     tokens win. A choice whose slot number reaches the capacity is dropped.
  3. Top-2 weights are the two probabilities, renormalised over what was kept;
     a top-1 weight is the raw probability.
  4. With `random_token_selection`, a top-1 expert that overflows keeps random
     tokens instead of the first ones; their slots are in token order.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config


class Routing(NamedTuple):
  """Where every token of a group goes. What every dispatch is made from."""

  probs_GSE: jax.Array  # float32, the softmax of the logits.
  choice_GSk: jax.Array  # int32, expert of each choice.
  slot_GSk: jax.Array  # int32, place in that expert's queue, from 0.
  kept_GSk: jax.Array  # bool, a real token within the capacity.
  weight_GSk: jax.Array  # float32, 0 where not kept.


def capacity(
    tokens: int, experts: int, top_k: int, factor: float, minimum: int
) -> int:
  """Slots per expert: max(ceil(S / E * k * factor), minimum).

  The product is taken in fp32, as DeepSpeed does.
  """
  slots = np.float32(tokens / experts) * np.float32(top_k * factor)
  return max(math.ceil(slots), minimum)


def route(
    logits_GSE: jax.Array,
    is_token_GS: jax.Array,
    *,
    top_k: int,
    capacity: int,
    noise_GSE: jax.Array | None = None,
    priority_GSE: jax.Array | None = None,
    replay_GSk: jax.Array | None = None,
) -> Routing:
  """Chooses experts and slots.

  Args:
    logits_GSE: float32.
    is_token_GS: bool; other positions take no slot.
    top_k: choices per token, at most E.
    capacity: slots per expert.
    noise_GSE: added to the logits for all choices but the first.
    priority_GSE: of top-1 only: each expert keeps its tokens of the highest
      priority; None: its first tokens.
    replay_GSk: int32, choices made elsewhere, taken instead of new ones.

  Repeated argmax instead of `jax.lax.top_k`: it is the original's algorithm,
  and the partitioner replicates `top_k`.
  """
  experts = logits_GSE.shape[-1]
  if not 1 <= top_k <= experts:
    raise ValueError(f'top_k={top_k} must lie between 1 and {experts} experts.')
  probs_GSE = jax.nn.softmax(logits_GSE, axis=-1)
  noisy_GSE = logits_GSE if noise_GSE is None else logits_GSE + noise_GSE
  free_GSE = jnp.ones(logits_GSE.shape, bool)
  taken_G1E = jnp.zeros((logits_GSE.shape[0], 1, experts), jnp.int32)
  choices, slots, weights = [], [], []
  for n in range(top_k):
    scores_GSE = probs_GSE if n == 0 else noisy_GSE
    choice_GS = jnp.argmax(jnp.where(free_GSE, scores_GSE, -jnp.inf), axis=-1)
    if replay_GSk is not None:
      choice_GS = replay_GSk[..., n]
    chosen_GSE = choice_GS[..., None] == jnp.arange(experts)
    free_GSE &= ~chosen_GSE
    counted_GSE = (chosen_GSE & is_token_GS[..., None]).astype(jnp.int32)
    queue_GSE = jnp.cumsum(counted_GSE, axis=1) - 1 + taken_G1E
    slots.append(jnp.sum(queue_GSE * chosen_GSE, axis=-1))
    taken_G1E += jnp.sum(counted_GSE, axis=1, keepdims=True)
    choices.append(choice_GS)
    weights.append(jnp.sum(probs_GSE * chosen_GSE, axis=-1))
  slot_GSk = jnp.stack(slots, axis=-1)
  kept_GSk = (slot_GSk < capacity) & is_token_GS[..., None]
  if priority_GSE is not None:
    if top_k != 1:
      raise ValueError(f'Priorities are for top-1 routing, not top-{top_k}.')
    slot_GSk, kept_GSk = _keep_by_priority(
        choices[0], is_token_GS, priority_GSE, capacity
    )
  weight_GSk = jnp.stack(weights, axis=-1) * kept_GSk
  if top_k > 1:
    total_GS1 = jnp.sum(weight_GSk, axis=-1, keepdims=True)
    weight_GSk /= jnp.maximum(total_GS1, jnp.finfo(jnp.float32).eps)
  choice_GSk = jnp.stack(choices, axis=-1).astype(jnp.int32)
  return Routing(probs_GSE, choice_GSk, slot_GSk, kept_GSk, weight_GSk)


def _keep_by_priority(choice_GS, is_token_GS, priority_GSE, capacity):
  """DeepSpeed's random token selection: (slot_GS1, kept_GS1)."""
  experts = priority_GSE.shape[-1]
  chosen_GSE = (choice_GS[..., None] == jnp.arange(experts)) & is_token_GS[
      ..., None
  ]
  order_GSE = jnp.argsort(jnp.where(chosen_GSE, -priority_GSE, jnp.inf), axis=1)
  rank_GSE = jnp.argsort(order_GSE, axis=1)
  kept_GSE = chosen_GSE & (rank_GSE < capacity)
  queue_GSE = jnp.cumsum(kept_GSE.astype(jnp.int32), axis=1) - 1
  slot_GS1 = jnp.sum(queue_GSE * chosen_GSE, axis=-1, keepdims=True)
  return slot_GS1, jnp.any(kept_GSE, axis=-1, keepdims=True)


class Grouping(NamedTuple):
  """How B rows of T positions become G groups of S tokens, and back."""

  groups: int
  size: int
  rows: int
  length: int

  def split(self, x: jax.Array, fill) -> jax.Array:
    """`[B, T, ...] -> [G, S, ...]`, padded with `fill` where S G > B T."""
    rest = x.shape[2:]
    if self.groups == 1:
      return x.reshape(1, self.size, *rest)
    per_row = self.groups // self.rows
    short = per_row * self.size - self.length
    if short:
      pad = ((0, 0), (0, short)) + ((0, 0),) * len(rest)
      x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(self.groups, self.size, *rest)

  def join(self, x: jax.Array) -> jax.Array:
    """The inverse of `split`."""
    rest = x.shape[2:]
    return x.reshape(self.rows, -1, *rest)[:, : self.length]


def grouping(cfg: config.MoeConfig, rows: int, length: int) -> Grouping:
  """One group a row, split evenly so that none exceeds `max_group_size`.

  `group='batch'` makes a single group of all positions, as the original does
  with the micro-batch of a GPU.
  """
  if cfg.group == 'batch':
    return Grouping(1, rows * length, rows, length)
  per_row = math.ceil(length / cfg.max_group_size)
  return Grouping(rows * per_row, math.ceil(length / per_row), rows, length)
