# SPDX-License-Identifier: Apache-2.0
"""Prompts -> texts, whole or piece by piece."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.infer import generate, sampling, streaming, tracing
from moellava_jax.model import llava

# Tokens between two looks for stop strings, which the device cannot find.
_LOOK_EVERY = 16


class Answer(NamedTuple):
  """What a model answers."""

  text: str  # Without white space at its ends.
  finish_reason: Literal['stop', 'length']
  new_tokens: int
  routing: tracing.Routing | None  # If it was asked for.


class Writer(NamedTuple):
  """Everything about a model that writing takes."""

  model: llava.Llava
  params: Any
  tokenizer: tokenizer_lib.Tokenizer
  mesh: jax.sharding.Mesh
  stop: tuple[str, ...]  # Strings that end every answer.
  max_new_tokens: int

  def answers(
      self,
      prompts: Sequence[generate.Prompt],
      options: Sequence[sampling.Options],
      *,
      rows: int,
      trace: bool,
  ) -> list[Answer]:
    """Answers prompts together.

    Args:
      prompts: at most `rows`.
      options: of each prompt.
      rows: static batch size.
      trace: whether to record where the tokens go. The last token of an answer
        is not routed, as nothing follows it.
    """
    found: dict[int, Answer] = {}
    # Prompts without images go apart. They are far shorter, and MiniCPM embeds
    # their text otherwise (`config.DecoderConfig.embed_scale_at`).
    for shown in (True, False):
      group = [
          n for n, p in enumerate(prompts) if shown == bool(len(p.images_IHWC))
      ]
      if group:
        part = self._together(
            [prompts[n] for n in group],
            [options[n] for n in group],
            rows,
            trace,
        )
        found.update(zip(group, part, strict=True))
    return [found[n] for n in range(len(prompts))]

  def _together(self, prompts, options, rows, trace) -> list[Answer]:
    batch = self._begin(prompts, options, rows, trace)
    streams = [self._stream() for _ in prompts]
    texts = [''] * len(prompts)
    ends = streaming.end_tokens(self.tokenizer, self.stop)
    # All stop strings may be tokens; then there is nothing to look for.
    searched = len(self.stop) > len(ends) - 1
    count = _LOOK_EVERY if searched else self.max_new_tokens
    read, more = 0, self.max_new_tokens > 1
    while True:
      tokens_BN = batch.tokens()
      for row, stream in enumerate(streams):
        for token in tokens_BN[row, read:]:
          texts[row] += stream.push(int(token))
      read = batch.count
      done_B = np.ones(rows, bool)
      done_B[: len(streams)] = [s.finish_reason is not None for s in streams]
      if done_B.all() or not more:
        break
      more = batch.advance(count, done_B)
    routings = [None] * len(prompts)
    if trace:
      routings = self._routings(batch, prompts, streams)
    return [
        Answer(text, stream.finish_reason or 'length', stream.new_tokens, where)
        for text, stream, where in zip(texts, streams, routings, strict=True)
    ]

  def pieces(
      self, prompt: generate.Prompt, options: sampling.Options
  ) -> Iterator[str]:
    """The text of an answer as it is written."""
    batch = self._begin([prompt], [options], 1, False)
    stream, more = self._stream(), True
    while True:
      if piece := stream.push(int(batch.tokens()[0, -1])):
        yield piece
      if stream.finish_reason is not None or not more:
        return
      more = batch.advance(1, np.zeros(1, bool))

  def _stream(self) -> streaming.TextStream:
    return streaming.TextStream(
        self.tokenizer, stop=self.stop, max_new_tokens=self.max_new_tokens
    )

  def _begin(self, prompts, options, rows, trace) -> generate.Batch:
    return generate.Batch(
        self.model,
        self.params,
        prompts,
        options,
        max_new_tokens=self.max_new_tokens,
        ends=streaming.end_tokens(self.tokenizer, self.stop),
        rows=rows,
        mesh=self.mesh,
        trace=trace,
    )

  def _routings(self, batch, prompts, streams) -> list[tracing.Routing]:
    of_prompts, of_answers = batch.routed()
    tokens_BN, found = batch.tokens(), []
    for row, prompt in enumerate(prompts):
      length = len(prompt.tokens_L)
      new = min(streams[row].new_tokens, batch.count - 1)
      found.append(
          tracing.routing(
              self.model.cfg,
              np.concatenate([prompt.tokens_L, tokens_BN[row, :new]]),
              length,
              jax.tree.map(
                  lambda a, b, row=row, length=length, new=new: np.concatenate(
                      [a[:, row, :length], b[:, row, :new]], axis=1
                  ),
                  of_prompts,
                  of_answers,
              ),
          )
      )
    return found
