# SPDX-License-Identifier: Apache-2.0
"""The sparse layer: router, dispatch to experts, losses and counts.

Where tokens go is decided in `routing.py`, how they get there in `dispatch.py`;
the module at the end holds parameters. Letters of this file: G groups, S tokens
per group, E experts, C slots of an expert (capacity), k choices per token, D
width.

The load balancing loss counts first choices before dropping, as DeepSpeed 0.9.5
does.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax import config
from moellava_jax.model import dispatch, layers, ragged
from moellava_jax.model import experts as experts_lib
from moellava_jax.model import routing as routing_lib


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


def balance_loss(
    routing: routing_lib.Routing, is_token_GS: jax.Array
) -> jax.Array:
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
    routing: routing_lib.Routing, is_token_GS: jax.Array, is_image_GS: jax.Array
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
    plan = routing_lib.grouping(cfg, *x_BTD.shape[:2])
    x_GSD = plan.split(x_BTD, 0)
    if cfg.route_padding:
      is_token_BT = jnp.ones_like(is_token_BT)
    is_token_GS = plan.split(is_token_BT, False)
    logits_GSE = Router(cfg.num_experts, name='router')(x_GSD)
    factor = cfg.capacity_factor if train else cfg.eval_capacity_factor
    slots = plan.size  # A token takes at most one slot of an expert.
    if factor is not None and cfg.dispatch != 'ragged':
      slots = routing_lib.capacity(
          plan.size, cfg.num_experts, cfg.top_k, factor, cfg.min_capacity
      )
    noise_GSE, priority_GSE = self._noise(logits_GSE.shape, plan, train, key)
    routing = routing_lib.route(
        logits_GSE,
        is_token_GS,
        top_k=cfg.top_k,
        capacity=slots,
        noise_GSE=noise_GSE,
        priority_GSE=priority_GSE,
        replay_GSk=self._given('choice', plan),
    )
    weights = experts_lib.Experts(
        self.kind, self.width, self.use_bias, cfg.num_experts, name='experts'
    )(x_BTD.shape[-1])
    if train or slots < plan.size:
      y_GSD = self._carried(x_GSD, routing, min(slots, plan.size), weights)
    else:
      y_GSD = self._where_they_are(x_GSD, routing, weights)
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

  def _carried(self, x_GSD, routing, slots, weights):
    """By way of the slots of the experts, or of rows sorted by expert."""
    # Parameters may be made elsewhere than where they will be used.
    how = dispatch.resolve(
        self.cfg.dispatch, layers.platform(), quiet=self.is_initializing()
    )
    if how == 'ragged':
      return ragged.ragged(x_GSD, routing, weights, self.kind, self.dtype)
    carry = {'einsum': dispatch.einsum, 'index': dispatch.index}
    experts = functools.partial(
        experts_lib.buckets, weights, self.kind, dtype=self.dtype
    )
    return carry[how](x_GSD, routing, slots, experts, self.dtype)

  def _where_they_are(self, x_GSD, routing, weights):
    """The same where nothing can be dropped, without slots.

    It is so when an answer is generated: a token takes at most one slot of an
    expert.
    """
    x_ND = x_GSD.reshape(-1, x_GSD.shape[-1])
    cfg = self.cfg
    if ragged.beats_every(weights, len(x_ND), cfg.top_k):
      return ragged.ragged(x_GSD, routing, weights, self.kind, self.dtype)
    choice_Nk, weight_Nk = (
        x.reshape(-1, cfg.top_k)
        for x in (routing.choice_GSk, routing.weight_GSk)
    )
    which = (weights, self.kind, x_ND)
    if experts_lib.reads_less(len(x_ND), cfg.top_k, cfg.num_experts):
      y_ND = experts_lib.chosen(*which, choice_Nk, weight_Nk, self.dtype)
    else:
      chosen_NkE = choice_Nk[..., None] == jnp.arange(cfg.num_experts)
      weight_NE = jnp.sum(chosen_NkE * weight_Nk[..., None], axis=1)
      y_ND = experts_lib.every(*which, weight_NE, self.dtype)
    return y_ND.reshape(*x_GSD.shape)

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

  def _given(self, name: str, plan: routing_lib.Grouping) -> jax.Array | None:
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
