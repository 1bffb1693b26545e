# SPDX-License-Identifier: Apache-2.0
"""Batched generation: prompts of any length in arrays of few shapes.

Lengths, numbers of images and of new tokens are padded to buckets; a program is
compiled for each bucket, and for nothing else.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import sharding
from moellava_jax.infer import decode, sampling
from moellava_jax.model import llava

_ENDS = 8  # Tokens that may end an answer.


class Prompt(NamedTuple):
  """One expanded prompt of L positions with I images."""

  tokens_L: np.ndarray  # int32, IMAGE_TOKEN per patch.
  images_IHWC: np.ndarray  # uint8.


class Padded(NamedTuple):
  tokens_BT: np.ndarray  # int32.
  lengths_B: np.ndarray  # int32.
  images_BIHWC: np.ndarray | None  # uint8; None: no row has an image.


class Run(NamedTuple):
  """A batch that is being answered, on the device."""

  state: decode.State
  answers_BN: jax.Array  # int32, `count` columns of which are chosen.
  done_B: jax.Array  # bool.
  count: jax.Array  # int32.
  routed: decode.Routed | None  # Of the answers' tokens, T = N.


def bucket(length: int) -> int:
  """The padded length: 16, 24, 32, 48, 64, 96, ... so that few are compiled."""
  size = 16
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def image_slots(images: int) -> int:
  """The padded number of images: 0, 1, 2, 4, 8, ..."""
  return 0 if images == 0 else 1 << (images - 1).bit_length()


def pad(
    prompts: Sequence[Prompt], rows: int, longest: int | None = None
) -> Padded:
  """Prompts in `rows` rows, as long as their bucket.

  Missing rows are one-token prompts that nobody reads.

  Args:
    prompts: at most `rows`.
    rows: of the result.
    longest: no row is padded beyond this length; None: no limit.
  """
  length = bucket(max(len(p.tokens_L) for p in prompts))
  if longest is not None:
    length = min(length, longest)
  tokens_BT = np.zeros((rows, length), np.int32)
  lengths_B = np.ones(rows, np.int32)
  slots = image_slots(max(len(p.images_IHWC) for p in prompts))
  images_BIHWC = None
  if slots:
    shape = next(p.images_IHWC.shape[1:] for p in prompts if len(p.images_IHWC))
    images_BIHWC = np.zeros((rows, slots, *shape), np.uint8)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt.tokens_L)] = prompt.tokens_L
    lengths_B[row] = len(prompt.tokens_L)
    if images_BIHWC is not None:
      images_BIHWC[row, : len(prompt.images_IHWC)] = prompt.images_IHWC
  return Padded(tokens_BT, lengths_B, images_BIHWC)


@functools.partial(jax.jit, static_argnames=('model', 'new', 'mesh', 'trace'))
def _start(
    model: llava.Llava,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    images_BIHWC: jax.Array | None,
    given: sampling.Rows,
    unused_B: jax.Array,
    ends_E: jax.Array,
    *,
    new: int,
    mesh: jax.sharding.Mesh,
    trace: bool,
) -> tuple[Run, decode.Routed | None]:
  """Prefill: a `Run` with one token, and the routing of the prompts."""
  state, routed = decode.prefill(
      model,
      params,
      tokens_BT,
      lengths_B,
      images_BIHWC,
      given,
      size=tokens_BT.shape[1] + new,
      mesh=mesh,
      trace=trace,
  )
  rows = len(lengths_B)
  answers_BN = jnp.zeros((rows, new), jnp.int32).at[:, 0].set(state.token_B)
  done_B = unused_B | jnp.isin(state.token_B, ends_E)
  buffers = None
  if routed is not None:
    buffers = jax.tree.map(
        lambda x: jnp.zeros((*x.shape[:2], new, *x.shape[3:]), x.dtype), routed
    )
  return Run(state, answers_BN, done_B, jnp.int32(1), buffers), routed


@functools.partial(
    jax.jit, static_argnames=('model', 'mesh'), donate_argnames='run'
)
def _advance(
    model: llava.Llava,
    params: Any,
    run: Run,
    done_B: jax.Array,
    ends_E: jax.Array,
    until: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
) -> Run:
  """Goes on until `until` tokens are chosen or all rows are done."""

  def unfinished(run):
    return (run.count < until) & ~jnp.all(run.done_B)

  def go_on(run):
    state, routed = decode.step(
        model,
        params,
        run.state,
        ~run.done_B,
        mesh=mesh,
        trace=run.routed is not None,
    )
    if routed is not None:
      routed = jax.tree.map(
          lambda old, new: old.at[:, :, run.count - 1].set(new[:, :, 0]),
          run.routed,
          routed,
      )
    return Run(
        state,
        run.answers_BN.at[:, run.count].set(state.token_B),
        run.done_B | jnp.isin(state.token_B, ends_E),
        run.count + 1,
        routed,
    )

  def with_cache(run, change):
    state = run.state
    if len(done_B) > 1:
      return run
    cache = jax.tree.map(change, state.cache)
    return run._replace(state=state._replace(cache=cache))

  run = run._replace(done_B=run.done_B | done_B)
  # See `attention.KVCache`.
  run = with_cache(run, lambda x_1KSd: x_1KSd[0])
  run = jax.lax.while_loop(unfinished, go_on, run)
  return with_cache(run, lambda x_KSd: x_KSd[None])


class Batch:
  """Prompts that are answered together.

  Attributes:
    rows: static batch size.
    count: tokens that every row has been given; those behind the end of a row
      mean nothing.
  """

  def __init__(
      self,
      model: llava.Llava,
      params: Any,
      prompts: Sequence[Prompt],
      options: Sequence[sampling.Options],
      *,
      max_new_tokens: int,
      ends: Sequence[int],
      rows: int,
      mesh: jax.sharding.Mesh,
      trace: bool = False,
  ):
    """Reads the prompts and chooses the first token of each.

    Args:
      model: dense or sparse.
      params: its parameters.
      prompts: at most `rows`.
      options: how tokens of each prompt are chosen.
      max_new_tokens: at most so many of a row.
      ends: tokens that end an answer, 8 of them at most.
      rows: static batch size; split over the devices if it is a multiple of
        the data axes of the mesh.
      mesh: where `params` are.
      trace: whether to record where tokens go; the model must be sparse.
    """
    assert len(prompts) <= rows and len(ends) <= _ENDS
    self.rows, self.count = rows, 1
    self._model, self._params, self._mesh = model, params, mesh
    self._most = max_new_tokens
    padded = pad(prompts, rows)
    unused_B = np.arange(rows) >= len(prompts)
    batch = (*padded, sampling.rows(options, rows), unused_B)
    self._where = decode.rows_sharding(mesh, rows)
    self._ends_E = np.full(_ENDS, -1, np.int32)
    self._ends_E[: len(ends)] = ends
    with sharding.use(mesh):
      self._run, self._routed = _start(
          model,
          params,
          *jax.device_put(batch, self._where),
          self._ends_E,
          new=bucket(max_new_tokens),
          mesh=mesh,
          trace=trace,
      )

  def tokens(self) -> np.ndarray:
    """The tokens chosen so far, int32 `[B, count]`, ends included."""
    # A copy: the next step writes into the same memory.
    return np.array(self._run.answers_BN)[:, : self.count]

  def advance(self, count: int, done_B: np.ndarray) -> bool:
    """Chooses up to `count` more tokens of every row that is not done.

    Args:
      count: fewer if all rows are done, or have `max_new_tokens`.
      done_B: bool, rows that need no more.

    Returns:
      Whether any row needs more.
    """
    until = min(self.count + count, self._most)
    with sharding.use(self._mesh):
      self._run = _advance(
          self._model,
          self._params,
          self._run,
          jax.device_put(done_B, self._where),
          self._ends_E,
          np.int32(until),
          mesh=self._mesh,
      )
    self.count = int(self._run.count)
    return self.count < self._most and not np.all(self._run.done_B)

  def routed(self) -> tuple[decode.Routed, decode.Routed]:
    """Where tokens went, on the host: those of prompts and those of answers."""
    assert self._routed is not None and self._run.routed is not None
    return jax.device_get((self._routed, self._run.routed))
