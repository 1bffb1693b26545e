# SPDX-License-Identifier: Apache-2.0
"""Logits -> next token, as pure functions. V is the vocabulary.

How tokens are chosen is data, a value per row: requests that ask for different
things share a program, and nothing is compiled again for another temperature.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config


class Options(NamedTuple):
  """How the tokens of an answer are chosen.

  The logits are divided by the temperature; of them the `top_k` largest stay,
  and of those the smallest set of mass `top_p` (arXiv 1904.09751).
  """

  temperature: float = 0.0  # 0: greedy; the others then mean nothing.
  top_p: float = 1.0  # In (0, 1]; 1 keeps every token.
  top_k: int = 0  # 0 keeps every token.
  seed: int = 0  # Of the random numbers; its lowest 32 bits count.

  def check(self) -> None:
    """Raises UserError for values outside their ranges."""
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise config.UserError(
          f'temperature={self.temperature}: expected 0 (greedy) or more.'
      )
    if not 0 < self.top_p <= 1:
      raise config.UserError(
          f'top_p={self.top_p}: expected more than 0 and at most 1, which'
          ' keeps every token.'
      )
    if self.top_k < 0:
      raise config.UserError(
          f'top_k={self.top_k}: expected at least 0, which keeps every token.'
      )


class Rows(NamedTuple):
  """`Options` of every row of a batch, as arrays."""

  temperature_B: jax.Array | np.ndarray  # float32.
  top_p_B: jax.Array | np.ndarray  # float32.
  top_k_B: jax.Array | np.ndarray  # int32.
  seed_B: jax.Array | np.ndarray  # uint32.


def rows(options: Sequence[Options], count: int) -> Rows:
  """`options` as arrays of `count` rows; rows without options are greedy.

  Raises:
    UserError: a value outside its range.
  """
  for one in options:
    one.check()
  padded = [*options, *[Options()] * (count - len(options))]
  temperature, top_p, top_k, seed = zip(*padded, strict=True)
  return Rows(
      np.array(temperature, np.float32),
      np.array(top_p, np.float32),
      np.array([min(k, 2**31 - 1) for k in top_k], np.int32),
      np.array([s % 2**32 for s in seed], np.uint32),
  )


def choose(given: Rows, logits_BV: jax.Array, count_B: jax.Array) -> jax.Array:
  """The next token of every row, int32 `[B]`.

  Args:
    given: see `Rows`.
    logits_BV: fp32.
    count_B: int32, the tokens that the row has had. With the row's seed it
      decides the random numbers, so that a row does not depend on its place
      and its neighbours.
  """
  greedy_B = _argmax(logits_BV)

  def draw():
    return jnp.where(
        given.temperature_B > 0, _sample(given, logits_BV, count_B), greedy_B
    )

  # Sorting the vocabulary takes longer than a small model does.
  return jax.lax.cond(jnp.any(given.temperature_B > 0), draw, lambda: greedy_B)


def _argmax(logits_BV: jax.Array) -> jax.Array:
  """`jnp.argmax`, int32, as two plain reductions: 5 times as fast on the CPU.

  Of a row with NaN it is 0.
  """
  vocab = logits_BV.shape[-1]
  largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  where_BV = jnp.where(logits_BV == largest_B1, jnp.arange(vocab), vocab)
  first_B = jnp.min(where_BV, axis=-1)
  return jnp.where(first_B < vocab, first_B, 0).astype(jnp.int32)


def _sample(given: Rows, logits_BV, count_B) -> jax.Array:
  vocab = logits_BV.shape[-1]
  cold_B = given.temperature_B <= 0  # Their result is not used.
  scaled_BV = logits_BV / jnp.where(cold_B, 1.0, given.temperature_B)[:, None]
  sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
  top_k_B = jnp.where(given.top_k_B == 0, vocab, given.top_k_B)
  allowed_BV = jnp.arange(vocab) < top_k_B[:, None]
  probs_BV = jax.nn.softmax(jnp.where(allowed_BV, sorted_BV, -jnp.inf), axis=-1)
  # Tokens whose predecessors already hold the mass fall away.
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  inside_BV = allowed_BV & (before_BV < given.top_p_B[:, None])
  last_B1 = jnp.min(
      jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
  )
  nucleus_BV = jnp.where(scaled_BV >= last_B1, scaled_BV, -jnp.inf)

  def draw(seed, count, logits_V):
    key = jax.random.fold_in(jax.random.key(seed), count)
    return jax.random.categorical(key, logits_V)

  drawn_B = jax.vmap(draw)(given.seed_B, count_B, nucleus_BV)
  return drawn_B.astype(jnp.int32)
