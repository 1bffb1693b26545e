# SPDX-License-Identifier: Apache-2.0
"""The sparse layer: router, capacity buckets, experts, combination.

Routing is pure functions on arrays; the module at the end only holds
parameters. Letters of this file: G groups, S tokens per group, E experts,
C slots of an expert (capacity), k choices per token, D width.

The semantics are those of DeepSpeed 0.9.5 `top2gating`, which the original
trains with, where a config switch does not say otherwise:

  1. The first choice is the argmax of the softmax of the logits. The second is
     the argmax of logits + Gumbel noise among the others ('sampled'), or of
     the logits ('argmax').
  2. All first choices outrank all second choices; within a choice, earlier
     tokens win. A choice whose slot number reaches the capacity is dropped.
  3. Top-2 weights are the two probabilities, renormalised over what was kept;
     a top-1 weight is the raw probability.
  4. The load balancing loss counts first choices before dropping.
  5. With `random_token_selection`, a top-1 expert that overflows keeps random
     tokens instead of the first ones; their slots are in token order.
"""

import math
from typing import NamedTuple

import flax.linen as nn
from flax.linen import spmd
import jax
from jax import ad_checkpoint
import jax.numpy as jnp
import numpy as np

from moellava_jax import config
from moellava_jax.model import layers

# Name, for rematerialisation, of what experts receive and what they return.
EXPERT_IO = 'expert_io'


class Routing(NamedTuple):
  """Where every token of a group goes. What every dispatch is made from."""

  probs_GSE: jax.Array  # float32, the softmax of the logits.
  choice_GSk: jax.Array  # int32, expert of each choice.
  slot_GSk: jax.Array  # int32, place in that expert's queue, from 0.
  kept_GSk: jax.Array  # bool, a real token within the capacity.
  weight_GSk: jax.Array  # float32, 0 where not kept.


class MoeStats(NamedTuple):
  """Sums over tokens, so that batches and layers can be added up.

  The leading axis M is the modality: 0 text, 1 image.
  """

  tokens_M: jax.Array  # Real tokens.
  assigned_ME: jax.Array  # Choices (all k) that fell on each expert.
  kept_ME: jax.Array  # Choices that were kept.
  entropy_M: jax.Array  # Sum of the router's entropy, nats.


class MoeAux(NamedTuple):
  """What a sparse layer returns beside its output; scalars are fp32."""

  balance_loss: jax.Array  # 1 when uniform, E when collapsed.
  z_loss: jax.Array
  stats: MoeStats


class RoutingTrace(NamedTuple):
  """Diagnostics of one layer, sown under 'diagnostics' on request."""

  logits_BTE: jax.Array
  choice_BTk: jax.Array
  slot_BTk: jax.Array
  weight_BTk: jax.Array  # 0 where not kept.
  kept_BTk: jax.Array


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


def one_hot(routing: Routing, slots: int, dtype) -> tuple[jax.Array, jax.Array]:
  """The routing as (dispatch_GSEC, combine_GSEC) for `slots` buckets.

  A token that fills no slot has an all-zero row: its output is 0 and only the
  residual connection carries it on.
  """
  experts = routing.probs_GSE.shape[-1]
  shape = (*routing.probs_GSE.shape, slots)
  dispatch_GSEC = jnp.zeros(shape, dtype)
  combine_GSEC = jnp.zeros(shape, dtype)
  for n in range(routing.choice_GSk.shape[-1]):
    kept_GS1 = routing.kept_GSk[..., n, None]
    expert_GSE = jax.nn.one_hot(routing.choice_GSk[..., n], experts) * kept_GS1
    slot_GSC = jax.nn.one_hot(routing.slot_GSk[..., n], slots)
    place_GSEC = expert_GSE[..., :, None] * slot_GSC[..., None, :]
    weight_GS11 = routing.weight_GSk[..., n, None, None]
    dispatch_GSEC += place_GSEC.astype(dtype)
    combine_GSEC += (weight_GS11 * place_GSEC).astype(dtype)
  return dispatch_GSEC, combine_GSEC


def balance_loss(routing: Routing, is_token_GS: jax.Array) -> jax.Array:
  """E * sum_e F_e P_e (paper, eq. 10), over all real tokens of all groups.

  F is the share of first choices before dropping, P the mean probability;
  only P carries a gradient.
  """
  experts = routing.probs_GSE.shape[-1]
  real_GS1 = is_token_GS[..., None].astype(jnp.float32)
  count = jnp.maximum(jnp.sum(real_GS1), 1.0)
  first_GSE = jax.nn.one_hot(routing.choice_GSk[..., 0], experts)
  share_E = jnp.sum(first_GSE * real_GS1, axis=(0, 1)) / count
  prob_E = jnp.sum(routing.probs_GSE * real_GS1, axis=(0, 1)) / count
  return experts * jnp.sum(share_E * prob_E)


def z_loss(logits_GSE: jax.Array, is_token_GS: jax.Array) -> jax.Array:
  """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906)."""
  real_GS = is_token_GS.astype(jnp.float32)
  log_z_GS = jax.nn.logsumexp(logits_GSE, axis=-1)
  return jnp.sum(log_z_GS**2 * real_GS) / jnp.maximum(jnp.sum(real_GS), 1.0)


def statistics(
    routing: Routing, is_token_GS: jax.Array, is_image_GS: jax.Array
) -> MoeStats:
  """Counts by modality; see `MoeStats`."""
  real_GS = is_token_GS.astype(jnp.float32)
  image_GS = is_image_GS.astype(jnp.float32)
  member_MGS = jnp.stack([real_GS * (1 - image_GS), real_GS * image_GS])
  expert_GSkE = jax.nn.one_hot(routing.choice_GSk, routing.probs_GSE.shape[-1])
  kept_GSkE = expert_GSkE * routing.kept_GSk[..., None]
  log_GSE = jnp.log(jnp.maximum(routing.probs_GSE, 1e-30))
  entropy_GS = -jnp.sum(routing.probs_GSE * log_GSE, axis=-1)
  return jax.lax.stop_gradient(
      MoeStats(
          tokens_M=jnp.sum(member_MGS, axis=(1, 2)),
          assigned_ME=jnp.einsum('MGS,GSkE->ME', member_MGS, expert_GSkE),
          kept_ME=jnp.einsum('MGS,GSkE->ME', member_MGS, kept_GSkE),
          entropy_M=jnp.einsum('MGS,GS->M', member_MGS, entropy_GS),
      )
  )


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


class Router(nn.Module):
  """Bias-free linear map to expert logits, in fp32 whatever the model's dtype.

  Initialised as the original's `torch.nn.Linear`: uniform +-1/sqrt(D).
  """

  num_experts: int

  @nn.compact
  def __call__(self, x_GSD: jax.Array) -> jax.Array:
    width = x_GSD.shape[-1]

    def init(key, shape, dtype=jnp.float32):
      return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

    kernel_DE = self.param(
        'kernel',
        layers.partitioned(init, ('embed', 'router')),
        (width, self.num_experts),
    )
    return jnp.einsum(
        'GSD,DE->GSE',
        x_GSD.astype(jnp.float32),
        kernel_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


class Moe(nn.Module):
  """Replaces the FFN of a block by E copies of it behind a router."""

  cfg: config.MoeConfig
  kind: str  # Of the FFN; see `layers.Mlp`.
  width: int
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(
      self,
      x_BTD: jax.Array,
      is_token_BT: jax.Array,
      is_image_BT: jax.Array,
      *,
      train: bool,
      key: jax.Array | None = None,
  ) -> tuple[jax.Array, MoeAux]:
    """`key` replaces the 'router' stream of random numbers."""
    cfg = self.cfg
    plan = grouping(cfg, *x_BTD.shape[:2])
    x_GSD = plan.split(x_BTD, 0)
    if cfg.route_padding:
      is_token_BT = jnp.ones_like(is_token_BT)
    is_token_GS = plan.split(is_token_BT, False)
    logits_GSE = Router(cfg.num_experts, name='router')(x_GSD)
    factor = cfg.capacity_factor if train else cfg.eval_capacity_factor
    slots = plan.size  # A token takes at most one slot of an expert.
    if factor is not None:
      slots = capacity(
          plan.size, cfg.num_experts, cfg.top_k, factor, cfg.min_capacity
      )
    noise_GSE, priority_GSE = self._noise(logits_GSE.shape, plan, train, key)
    routing = route(
        logits_GSE,
        is_token_GS,
        top_k=cfg.top_k,
        capacity=slots,
        noise_GSE=noise_GSE,
        priority_GSE=priority_GSE,
        replay_GSk=self._given('choice', plan),
    )
    experts = layers.Mlp(
        self.kind,
        self.width,
        self.use_bias,
        self.dtype,
        experts=cfg.num_experts,
        name='experts',
    )
    y_GSD = self._einsum(x_GSD, routing, min(slots, plan.size), experts)
    y_BTD = plan.join(y_GSD)
    if cfg.use_residual:
      y_BTD = self._add_residual(x_BTD, y_BTD)
    aux = MoeAux(
        balance_loss(routing, is_token_GS),
        z_loss(logits_GSE, is_token_GS),
        statistics(routing, is_token_GS, plan.split(is_image_BT, False)),
    )
    self.sow(
        'diagnostics',
        'routing',
        RoutingTrace(
            plan.join(logits_GSE),
            plan.join(routing.choice_GSk),
            plan.join(routing.slot_GSk),
            plan.join(routing.weight_GSk),
            plan.join(routing.kept_GSk),
        ),
    )
    return y_BTD, aux

  def _noise(self, shape, plan, train, key):
    """(noise_GSE, priority_GSE) of this pass; None where none is asked for.

    Given from outside (see `llava.forward`), or drawn.
    """
    cfg = self.cfg
    second = cfg.second_choice if train else cfg.eval_second_choice
    sampled = cfg.top_k > 1 and second == 'sampled'
    random_tokens = cfg.top_k == 1 and cfg.random_token_selection
    if not (sampled or random_tokens):
      return None, None
    noise_GSE = self._given('noise', plan)
    if noise_GSE is None:
      draw = jax.random.gumbel if sampled else jax.random.uniform
      if key is None:
        key = self.make_rng('router')
      noise_GSE = draw(key, shape)
    return (noise_GSE, None) if sampled else (None, noise_GSE)

  def _given(self, name: str, plan: Grouping) -> jax.Array | None:
    if not self.has_variable('routing', name):
      return None
    return plan.split(self.get_variable('routing', name), 0)

  def _add_residual(self, x_BTD, y_BTD):
    """Experts and dense FFN, mixed by a learned softmax (PR-MoE)."""
    dense = layers.Mlp(
        self.kind, self.width, self.use_bias, self.dtype, name='residual'
    )
    share_BT2 = jax.nn.softmax(
        layers.Dense(
            2, ('embed', 'router'), True, self.dtype, name='coefficient'
        )(x_BTD),
        axis=-1,
    )
    return y_BTD * share_BT2[..., :1] + dense(x_BTD) * share_BT2[..., 1:]

  def _einsum(self, x_GSD, routing, slots, experts):
    """Dispatch by one-hot products (GShard, arXiv 2006.16668).

    The two constraints on each side make the partitioner exchange tokens
    (all-to-all) instead of gathering the experts' weights.
    """
    lone = x_GSD.shape[0] == 1
    batch, spread = (None, None) if lone else ('batch', 'expert_batch')
    dispatch_GSEC, combine_GSEC = one_hot(routing, slots, self.dtype)
    x_GECD = jnp.einsum('GSEC,GSD->GECD', dispatch_GSEC, x_GSD)
    x_GECD = spmd.with_logical_constraint(x_GECD, (batch, None, None, None))
    x_GECD = spmd.with_logical_constraint(
        x_GECD, (spread, 'expert', None, None)
    )
    x_GECD = ad_checkpoint.checkpoint_name(x_GECD, EXPERT_IO)
    y_GECD = experts(x_GECD).astype(self.dtype)
    y_GECD = spmd.with_logical_constraint(
        y_GECD, (spread, 'expert', None, None)
    )
    y_GECD = spmd.with_logical_constraint(y_GECD, (batch, None, None, None))
    y_GECD = ad_checkpoint.checkpoint_name(y_GECD, EXPERT_IO)
    return layers.product('GECD,GSEC->GSD', y_GECD, combine_GSEC, self.dtype)
