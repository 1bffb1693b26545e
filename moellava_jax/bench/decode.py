# SPDX-License-Identifier: Apache-2.0
"""Generation by batch size, dense and sparse, with random weights.

Text prompts, so that the tower plays no part. What is timed is the whole of a
batch with `NEW` tokens a row less that with half of them: the steps alone, as
the compiled loop runs them. The rate of a batch of 1 is the measure of the
others.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config, sharding
from moellava_jax.bench import measure
from moellava_jax.infer import generate, sampling
from moellava_jax.model import llava
from moellava_jax.train import init

NEW = 64  # Tokens a row.
PROMPT = 48  # Positions.


class Case(NamedTuple):
  """A model, by its config, and what it is called."""

  name: str
  model: config.ModelConfig


def run(case: Case, batches: tuple[int, ...], repeats: int) -> dict[str, Any]:
  """By batch size: seconds a step, tokens a second, and times those of 1.

  What depends on the time of a step is None where noise hid it: where a whole
  batch took no longer than one with half of the tokens.
  """
  assert batches[0] == 1, batches
  mesh = sharding.data_mesh()
  model = llava.Llava(case.model)
  with sharding.use(mesh):
    params = init.fresh(model, 0, mesh)
  rng = np.random.default_rng(0)
  image_HWC = (case.model.vision.image_size,) * 2 + (3,)
  prompt = generate.Prompt(
      rng.integers(0, case.model.llm.vocab_size, PROMPT).astype(np.int32),
      np.zeros((0, *image_HWC), np.uint8),
  )

  def answer(rows: int, new: int):
    batch = generate.Batch(
        model,
        params,
        [prompt] * rows,
        [sampling.Options()] * rows,
        max_new_tokens=NEW,
        ends=(),
        rows=rows,
        mesh=mesh,
    )
    while batch.count < new:
      batch.advance(new - batch.count, np.zeros(rows, bool))
    return batch.tokens()

  runs = {
      f'{rows} {new}': lambda rows=rows, new=new: answer(rows, new)
      for rows in batches
      for new in (NEW // 2, NEW)
  }
  times = measure.interleaved(runs, repeats)
  found: dict[str, Any] = {
      'parameters': sum(x.size for x in jax.tree.leaves(params['llm']))
  }
  for rows in batches:
    steps = times[f'{rows} {NEW}'].median - times[f'{rows} {NEW // 2}'].median
    whole = times[f'{rows} {NEW}'].median
    found[str(rows)] = {
        'seconds_a_step': steps / (NEW - NEW // 2) if steps > 0 else None,
        'tokens_a_second': rows * NEW / whole,
    }
  for rows in batches:
    entry, one = found[str(rows)], found['1']
    entry['rate_over_1'] = entry['tokens_a_second'] / one['tokens_a_second']
    known = one['seconds_a_step'] and entry['seconds_a_step']
    entry['steps_over_1'] = (
        rows * one['seconds_a_step'] / entry['seconds_a_step']
        if known
        else None
    )
  return found


def table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows for people: case, batch, ms a step, tokens/s, times those of 1."""
  return [
      (
          case,
          rows,
          _number(entry['seconds_a_step'], 1e3, '.2f'),
          f'{entry["tokens_a_second"]:.0f}',
          f'{entry["rate_over_1"]:.1f}',
          _number(entry['steps_over_1'], 1, '.1f'),
      )
      for rows, entry in found.items()
      if rows != 'parameters'
  ]


def _number(value: float | None, scale: float, form: str) -> str:
  return 'lost in noise' if value is None else f'{scale * value:{form}}'
