# SPDX-License-Identifier: Apache-2.0
"""Generation by batch size, dense and sparse, with random weights.

Text prompts, so that the tower plays no part. What is timed is the whole of a
batch with `NEW` tokens a row less that with half of them: the steps alone, as
the compiled loop runs them. The rate of a batch of 1 is the measure of the
others. The floor of a step is what it must read, at the bandwidth of the data
sheet:

  bound = rows x bandwidth / (bytes of weights + bytes of cache)  tokens/s

Weights are those of the language model in the dtype in which they lie, without
the embedding (of which rows are read) unless it is the head too. Of E experts
k a row count, at most all: those a batch may have chosen. The cache counts as
far as it is filled. Nothing is known of the bandwidth of a CPU.
"""

from collections.abc import Sequence
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config, sharding, trees
from moellava_jax.bench import measure
from moellava_jax.infer import generate, sampling
from moellava_jax.model import llava
from moellava_jax.train import accelerators, init

NEW = 64  # Tokens a row.
PROMPT = 48  # Positions.
# At least this share of the bound, by batch size; of GPUs, where it is known.
GOALS = {1: 0.70, 32: 0.60}
HEADER = (
    *('case', 'batch', 'ms a step', 'tokens/s', 'x batch 1', 'steps x'),
    *('bound, tokens/s', 'share of it', 'goal', 'first call'),
)


class Case(NamedTuple):
  """A model, by its config, and what it is called."""

  name: str
  model: config.ModelConfig


def as_answered(model: llava.Llava, mesh: jax.sharding.Mesh) -> Any:
  """Random parameters as `chat.load` has them.

  By one program, so that none of what is rounded lies in fp32.
  """
  return jax.jit(lambda: llava.rounded(init.fresh(model, 0, mesh), model.cfg))()


def answer(
    model: llava.Llava,
    params: Any,
    prompts: Sequence[generate.Prompt],
    new: int,
    most: int,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
  """`new` greedy tokens of each prompt, in a cache that has room for `most`."""
  rows = len(prompts)
  batch = generate.Batch(
      model,
      params,
      prompts,
      [sampling.Options()] * rows,
      max_new_tokens=most,
      ends=(),
      rows=rows,
      mesh=mesh,
  )
  while batch.count < new:
    batch.advance(new - batch.count, np.zeros(rows, bool))
  return batch.tokens()


def run(case: Case, batches: tuple[int, ...], repeats: int) -> dict[str, Any]:
  """By batch size: seconds a step, tokens a second, times those of 1, bound.

  What depends on the time of a step is None where noise hid it: where a whole
  batch took no longer than one with half of the tokens. `bound` is None where
  the bandwidth is not known. `first_seconds` are those of the first call,
  which compiles prefill and step.
  """
  assert batches[0] == 1, batches
  mesh = sharding.data_mesh()
  model = llava.Llava(case.model)
  with sharding.use(mesh):
    params = as_answered(model, mesh)
  rng = np.random.default_rng(0)
  image_HWC = (case.model.vision.image_size,) * 2 + (3,)
  prompt = generate.Prompt(
      rng.integers(0, case.model.llm.vocab_size, PROMPT).astype(np.int32),
      np.zeros((0, *image_HWC), np.uint8),
  )

  first: dict[int, float] = {}

  def timed(rows: int, new: int):
    began = time.perf_counter()
    tokens = answer(model, params, [prompt] * rows, new, NEW, mesh)
    first.setdefault(rows, time.perf_counter() - began)
    return tokens

  runs = {
      f'{rows} {new}': lambda rows=rows, new=new: timed(rows, new)
      for rows in batches
      for new in (NEW // 2, NEW)
  }
  times = measure.interleaved(runs, repeats)
  found: dict[str, Any] = {
      'parameters': sum(x.size for x in jax.tree.leaves(params['llm']))
  }
  sheet = accelerators.of_device(jax.devices()[0])
  for rows in batches:
    steps = times[f'{rows} {NEW}'].median - times[f'{rows} {NEW // 2}'].median
    whole = times[f'{rows} {NEW}'].median
    seconds = steps / (NEW - NEW // 2) if steps > 0 else None
    read = bytes_of_step(params, case.model, rows)
    bound = rows * sheet.bandwidth / sum(read.values()) if sheet else None
    found[str(rows)] = {
        'seconds_a_step': seconds,
        'tokens_a_second': rows * NEW / whole,
        'bytes_a_step': read,
        'bound': bound,
        'share_of_bound': rows / seconds / bound if seconds and bound else None,
        'first_seconds': first.get(rows),
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


def bytes_of_step(
    params: Any, model: config.ModelConfig, rows: int
) -> dict[str, float]:
  """What a step has to read, see the head of this file."""
  llm, moe = model.llm, model.moe
  share = 1.0
  if moe is not None:
    share = min(1.0, rows * moe.top_k / moe.num_experts)
  weights = 0.0
  for path, leaf in trees.flatten(params['llm']).items():
    if path == 'embedding' and not llm.tied_head:
      weights += rows * leaf.nbytes / llm.vocab_size
    else:
      weights += leaf.nbytes * (share if '/experts/' in path else 1)
  filled = PROMPT + 3 * NEW / 4  # The steps that are timed are the second half.
  each = 2 * llm.depth * llm.num_kv_heads * llm.head_dim
  size = llava.compute_dtype(model.compute_dtype).itemsize
  return {'weights': weights, 'cache': rows * filled * each * size}


def table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows for people, as `HEADER` names their cells."""
  return [
      (
          case,
          rows,
          _number(entry['seconds_a_step'], 1e3, '.2f'),
          f'{entry["tokens_a_second"]:.0f}',
          f'{entry["rate_over_1"]:.1f}',
          _number(entry['steps_over_1'], 1, '.1f'),
          *_bound(int(rows), entry),
      )
      for rows, entry in found.items()
      if rows != 'parameters'
  ]


def _bound(rows: int, entry: dict[str, Any]) -> tuple[str, ...]:
  first = entry['first_seconds']
  compiled = '' if first is None else f'{first:.1f} s'
  if entry['bound'] is None:
    return ('not known', '', '', compiled)
  goal = f'>= {GOALS[rows]:.0%}' if rows in GOALS else ''
  share = _number(entry['share_of_bound'], 1, '.0%')
  return (f'{entry["bound"]:.0f}', share, goal, compiled)


def _number(value: float | None, scale: float, form: str) -> str:
  return 'lost in noise' if value is None else f'{scale * value:{form}}'
