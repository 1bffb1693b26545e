# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come and go while others are answered.

In JetStream's idiom: `prefill` reads a prompt alone, `insert` puts it into a
free slot, and every `step` gives all slots their next token.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config, sharding
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import decode, generate, sampling
from moellava_jax.model import llava


class Prefix(NamedTuple):
  """A prompt that has been read."""

  token: int  # The first of the answer.
  length: int  # Positions of the prompt.
  room: int  # Tokens that an answer can have in a slot, `token` included.
  state: decode.State  # One row.


_prefill = jax.jit(
    decode.prefill, static_argnames=('model', 'size', 'mesh', 'trace')
)
_step = jax.jit(
    decode.step,
    static_argnames=('model', 'mesh', 'trace'),
    donate_argnames='state',
)


@functools.partial(jax.jit, static_argnames='mesh', donate_argnames='state')
def _insert(
    state: decode.State,
    prefix: decode.State,
    slot: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
) -> decode.State:

  def put(old, new):
    start = (slot, *[0] * (old.ndim - 1))
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)

  return decode.place(jax.tree.map(put, state, prefix), mesh)


@functools.partial(
    jax.jit, static_argnames=('cfg', 'slots', 'context', 'dtype', 'mesh')
)
def _empty(
    cfg: config.DecoderConfig, slots: int, context: int, dtype, mesh
) -> decode.State:
  zeros_B = jnp.zeros(slots, jnp.int32)
  given = jax.tree.map(jnp.asarray, sampling.rows([], slots))
  cache = llava.init_cache(cfg, slots, context, dtype)
  state = decode.State(cache, zeros_B, zeros_B, zeros_B, given)
  return decode.place(state, mesh)


class Engine:
  """Slots that are answered together; not thread-safe, one thread owns it.

  A slot's tokens do not depend on what the other slots hold.

  Attributes:
    slots: how many are answered together.
    context: positions of a slot, prompt and answer.
  """

  def __init__(self, chat: chat_lib.Chat, *, slots: int, context: int):
    """Raises UserError for a context that the model was not made for."""
    if slots < 1 or context < 2:
      raise config.UserError(
          f'slots={slots}, context={context}: expected at least 1 slot of 2'
          ' positions.'
      )
    chat.check_positions(context, 'context')
    self.slots, self.context = slots, context
    self._chat = chat
    self._lengths = np.zeros(slots, np.int64)  # Of prompt and answer.
    self._active_B = np.zeros(slots, bool)
    cfg = chat.model.cfg
    with sharding.use(chat.mesh):
      self._state = _empty(
          cfg.llm,
          slots,
          context,
          llava.compute_dtype(cfg.compute_dtype),
          chat.mesh,
      )

  def prefill(
      self, prompt: generate.Prompt, options: sampling.Options
  ) -> Prefix:
    """Reads a prompt and chooses the first token of its answer.

    One program is compiled per length bucket and number of images.

    Raises:
      UserError: the prompt leaves no room for an answer in a slot, or an option
        is outside its range.
    """
    length = len(prompt.tokens_L)
    if length >= self.context:
      raise config.UserError(
          f'The prompt has {length} positions with its images, but a slot has'
          f' {self.context} for prompt and answer. Shorten the conversation, or'
          ' start with a larger context.'
      )
    padded = generate.pad([prompt], 1, longest=self.context)
    mesh = self._chat.mesh
    batch = jax.device_put(
        (*padded, sampling.rows([options], 1)), decode.rows_sharding(mesh, 1)
    )
    with sharding.use(mesh):
      state, _ = _prefill(
          self._chat.model,
          self._chat.params,
          *batch,
          size=padded.tokens_BT.shape[1],
          mesh=mesh,
      )
    token = int(state.token_B[0])
    return Prefix(token, length, self.context - length, state)

  def insert(self, prefix: Prefix, slot: int) -> None:
    """Gives a slot to a prompt; whatever it held is gone."""
    with sharding.use(self._chat.mesh):
      self._state = _insert(
          self._state, prefix.state, np.int32(slot), mesh=self._chat.mesh
      )
    self._lengths[slot] = prefix.length + 1
    self._active_B[slot] = True

  def step(self) -> np.ndarray:
    """The next token of every slot, int32 `[slots]`.

    Those of slots that are free mean nothing.

    Raises:
      ValueError: a slot has no room left (`Prefix.room`) and was not freed.
    """
    full = np.flatnonzero(self._active_B & (self._lengths > self.context))
    if len(full):
      raise ValueError(
          f'Slots {full.tolist()} have used all {self.context} positions; free'
          ' them after `Prefix.room` tokens.'
      )
    with sharding.use(self._chat.mesh):
      self._state, _ = _step(
          self._chat.model,
          self._chat.params,
          self._state,
          self._active_B.copy(),
          mesh=self._chat.mesh,
      )
    self._lengths[self._active_B] += 1
    # A copy: the next step writes into the same memory.
    return np.array(self._state.token_B)

  def free(self, slot: int) -> None:
    """Ends a slot's answer; its tokens mean nothing from now on."""
    self._active_B[slot] = False

  def warm_up(
      self, lengths: Sequence[int] = (), images: Sequence[int] = (0, 1)
  ) -> None:
    """Compiles everything for prompts of these lengths; empties all slots.

    Args:
      lengths: positions of prompts; none: those of all buckets.
      images: numbers of images in a prompt.
    """
    vision = self._chat.model.cfg.vision
    most = self.context - 1
    wanted = {min(generate.bucket(min(n, most)), most) for n in lengths}
    if not lengths:
      wanted = {min(generate.bucket(n), most) for n in range(1, self.context)}
    for length in sorted(wanted):
      for count in images:
        marks = count * vision.num_tokens
        if marks >= length:
          continue
        tokens_L = np.full(length, self._chat.tokenizer.eos_id, np.int32)
        tokens_L[:marks] = config.IMAGE_TOKEN
        size = vision.image_size
        pixels = np.zeros((count, size, size, 3), np.uint8)
        prompt = generate.Prompt(tokens_L, pixels)
        self.insert(self.prefill(prompt, sampling.Options()), 0)
    if wanted:
      self.step()
    self._active_B[:] = False
