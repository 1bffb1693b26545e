# SPDX-License-Identifier: Apache-2.0
"""Generation with a key/value cache as pure functions: prefill and step.

Everything that generates is made from these two. Every row has its own
positions, and a padded position is neither seen by attention nor routed: what
a row answers does not depend on the batch it is computed in.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moellava_jax import config, sharding
from moellava_jax.infer import sampling
from moellava_jax.model import attention, llava, moe


class State(NamedTuple):
  """Rows that are being answered."""

  cache: tuple[attention.KVCache, ...]  # One per layer.
  token_B: jax.Array  # int32, the newest token; not in the cache yet.
  position_B: jax.Array  # int32, where it belongs.
  count_B: jax.Array  # int32, tokens chosen so far.
  given: sampling.Rows


class Routed(NamedTuple):
  """Where tokens went. M counts the sparse layers."""

  choice_MBTk: jax.Array  # int32.
  weight_MBTk: jax.Array  # float32, 0 where not kept.
  kept_MBTk: jax.Array  # bool.


def prefill(
    model: llava.Llava,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    images_BIHWC: jax.Array | None,
    given: sampling.Rows,
    *,
    size: int,
    mesh: jax.sharding.Mesh,
    trace: bool = False,
) -> tuple[State, Routed | None]:
  """Reads the prompts and chooses the first token of every row.

  Args:
    model: dense or sparse.
    params: its parameters.
    tokens_BT: int32, right-padded prompts.
    lengths_B: int32, their lengths, at least 1.
    images_BIHWC: uint8, or None where no row has one.
    given: how tokens are chosen.
    size: slots of the cache (S), at least T.
    mesh: where the cache is placed.
    trace: whether to return where the tokens went.
  """
  b, t = tokens_BT.shape
  dtype = llava.compute_dtype(model.cfg.compute_dtype)
  positions_BT = jnp.broadcast_to(jnp.arange(t), (b, t))
  out, routed = _forward(
      model,
      params,
      tokens_BT,
      (positions_BT < lengths_B[:, None]).astype(jnp.int32),
      positions_BT,
      images_BIHWC,
      llava.init_cache(model.cfg.llm, b, size, dtype),
      lengths_B - 1,
      trace,
      cache_is_empty=not _routes_padding(model.cfg),
  )
  count_B = jnp.zeros(b, jnp.int32)
  token_B = sampling.choose(given, out.logits_BTV[:, 0], count_B)
  state = State(out.cache, token_B, lengths_B, count_B + 1, given)
  return place(state, mesh), routed


def step(
    model: llava.Llava,
    params: Any,
    state: State,
    active_B: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    trace: bool = False,
) -> tuple[State, Routed | None]:
  """Chooses the next token of every active row; the others stay as they are.

  An active row must have a slot left: `position_B` < S. The routing returned
  is that of `state.token_B`, T = 1.
  """
  out, routed = _forward(
      model,
      params,
      state.token_B[:, None],
      active_B[:, None].astype(jnp.int32),
      state.position_B[:, None],
      None,
      state.cache,
      jnp.zeros_like(state.token_B),
      trace,
  )
  token_B = sampling.choose(state.given, out.logits_BTV[:, 0], state.count_B)
  more_B = active_B.astype(jnp.int32)
  new = State(
      out.cache,
      jnp.where(active_B, token_B, state.token_B),
      state.position_B + more_B,
      state.count_B + more_B,
      state.given,
  )
  return place(new, mesh), routed


def _routes_padding(cfg: config.ModelConfig) -> bool:
  """Whether padding may take the slots of tokens.

  Then what it attends to matters: the cache, as the original's does.
  """
  return cfg.moe is not None and cfg.moe.route_padding


def _forward(
    model,
    params,
    tokens,
    segments,
    positions,
    images,
    cache,
    at,
    trace,
    **options,
):
  """(`LlavaOutput`, `Routed` if `trace`); see `Llava.__call__`."""
  out, sown = model.apply(
      {'params': params},
      tokens,
      segments,
      positions,
      images,
      train=False,
      cache=cache,
      logits_at_B=at,
      **options,
      # Only a model that is told to sample its second expert in evaluation
      # (the original does) draws from this.
      rngs={'router': jax.random.key(0)},
      mutable=['diagnostics'] if trace else [],
  )
  return out, routed_of(sown, model.cfg) if trace else None


def routed_of(sown: Any, cfg: config.ModelConfig) -> Routed:
  """What the sparse layers have sown under 'diagnostics'."""
  assert cfg.moe is not None
  layers = sown['diagnostics']['llm']
  seen: list[moe.RoutingTrace] = [
      layers[f'layers_{n}']['moe']['routing'][0]
      for n in cfg.moe.layer_ids(cfg.llm.depth)
  ]
  return Routed(
      jnp.stack([layer.choice_BTk for layer in seen]),
      jnp.stack([layer.weight_BTk for layer in seen]),
      jnp.stack([layer.kept_BTk for layer in seen]),
  )


def rows_sharding(mesh: jax.sharding.Mesh, rows: int) -> NamedSharding:
  """Rows over the data axes if these divide them, else everywhere."""
  if rows % sharding.batch_divisor(mesh) == 0:
    return sharding.of_batch(mesh)
  return sharding.replicated(mesh)


def place(state: State, mesh: jax.sharding.Mesh) -> State:
  """Rows over the data axes, heads of the cache as their kernels' are.

  The same before and after a step, so that its buffers can be reused.
  """
  where = rows_sharding(mesh, len(state.token_B))
  axes = where.spec[0] if where.spec else None
  *rows, heads, _, _ = state.cache[0].k_BKSd.shape
  split = 'tensor' if heads % mesh.shape['tensor'] == 0 else None
  of_cache = NamedSharding(mesh, PartitionSpec(*[axes for _ in rows], split))
  constrain = jax.lax.with_sharding_constraint
  return State(
      jax.tree.map(lambda x: constrain(x, of_cache), state.cache),
      *jax.tree.map(lambda x: constrain(x, where), state[1:]),
  )
