# SPDX-License-Identifier: Apache-2.0
"""Bytes that a stage takes on each device, without compiling anything.

What lies there from step to step is exact: it is read from the shardings. What
a step adds is estimated from the program as traced: the values that its
forward pass keeps for its backward pass, and the largest that it works on.
"""

import collections
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import program, residuals

_HOST_MEMORY = ('pinned_host', 'unpinned_host')


class Memory(NamedTuple):
  """Bytes per device; all but `host` are of the device's own memory."""

  trained: int  # fp32 master weights.
  frozen: int
  optimizer: int
  gradients: int
  accumulator: int  # The sum over micro-batches, if there are several.
  saved: int  # Activations from the forward pass for the backward pass.
  working: int  # The largest layer (or the loss) while it is differentiated.
  gathered: int  # Whole weights of the layers at work, where fsdp splits them.
  host: int  # Of the state, what waits in the host's memory.

  @property
  def state(self) -> int:
    """What lies on the device between two steps."""
    return self.trained + self.frozen + self.optimizer

  @property
  def total(self) -> int:
    return sum(self) - self.host


def abstract_mesh(sizes: tuple[int, ...]) -> Any:
  """A mesh of sizes `sharding.AXES` without devices."""
  auto = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
  return jax.sharding.AbstractMesh(sizes, sharding.AXES, axis_types=auto)


def of_stage(
    cfg: config.TrainConfig, stage: str, sizes: tuple[int, ...]
) -> Memory:
  """Estimates what a step of the stage takes on a mesh of `sizes`.

  Args:
    cfg: with `row_length` of the stage and `model.compute_dtype` given.
    stage: its name.
    sizes: of `sharding.AXES`.
  """
  section = cfg.stage(stage)
  shards = sharding.batch_divisor(abstract_mesh(sizes))
  rows = section.batch_size // (shards * section.accumulate)
  alike = _one_row(cfg, stage)
  state = _state(alike, stage, sizes)
  tensor = sizes[sharding.AXES.index('tensor')]
  saved, working = _activations(alike, stage, rows, tensor)
  several = section.accumulate > 1
  away = state.host > 0  # Then the sum over micro-batches waits there too.
  return state._replace(
      accumulator=state.gradients if several and not away else 0,
      saved=saved,
      working=working,
      host=state.host + (state.gradients if several and away else 0),
  )


def _one_row(cfg: config.TrainConfig, stage: str) -> config.TrainConfig:
  """`cfg` without what changes neither the state nor what a row keeps."""
  section: Any = dataclasses.replace(
      cfg.stage(stage), batch_size=1, accumulate=1
  )
  changed: dict[str, Any] = {stage: section}
  return dataclasses.replace(cfg, **changed)


@functools.lru_cache(maxsize=64)
def _state(
    cfg: config.TrainConfig, stage: str, sizes: tuple[int, ...]
) -> Memory:
  """The part that no batch decides."""
  mesh = abstract_mesh(sizes)
  runner = program.Program(cfg, stage, mesh, 1)
  trained, frozen = runner.split(runner.abstract_params())
  frozen = runner.freeze(frozen)
  here, away = _bytes_of(runner.abstract_state(trained).opt_state)
  gathered = 0
  if mesh.shape['fsdp'] > 1:
    gathered = _gathered(cfg, trees.merge(trained, frozen), mesh.shape)
  return Memory(
      trained=_bytes_of(trained)[0],
      frozen=_bytes_of(frozen)[0],
      optimizer=here,
      # Adam keeps two numbers where each gradient lies (and is summed up).
      gradients=(here + away) // 2,
      accumulator=0,
      saved=0,
      working=0,
      gathered=gathered,
      host=away,
  )


def _bytes_of(tree: Any) -> tuple[int, int]:
  """Bytes of a device's shards: (in its own memory, in the host's)."""
  here = away = 0
  for leaf in jax.tree.leaves(tree):
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    if leaf.sharding.memory_kind in _HOST_MEMORY:
      away += shard * leaf.dtype.itemsize
    else:
      here += shard * leaf.dtype.itemsize
  return here, away


def _gathered(cfg: config.TrainConfig, params: Any, mesh: Any) -> int:
  """Two layers' weights, since one is fetched while another is at work.

  And of one the gradient: whole, in fp32, until it is cut into its shards.
  """
  width = np.dtype(llava.compute_dtype(cfg.model.compute_dtype)).itemsize
  layers: collections.Counter[str] = collections.Counter()
  for path, leaf in trees.flatten(params).items():
    if path.startswith(('llm/layers_', 'vision/layers_')):
      share = mesh['expert'] if '/moe/experts/' in path else 1
      layers['/'.join(path.split('/')[:2])] += math.prod(leaf.shape) // share
  head = cfg.model.llm.vocab_size * cfg.model.llm.width
  most = max(layers.values())
  return (most * (2 * width + 4) + head * width) // mesh['tensor']


def _activations(
    cfg: config.TrainConfig, stage: str, rows: int, tensor: int
) -> tuple[int, int]:
  """(saved, working) bytes of a micro-batch of `rows` rows on one device."""
  model, section = cfg.stage_model(stage), cfg.stage(stage)
  assert section.row_length is not None
  vocab = model.llm.vocab_size
  sparse = () if model.moe is None else model.moe.layer_ids(model.llm.depth)
  counts = {True: len(sparse), False: model.llm.depth - len(sparse)}
  # Rows are alike, unless all of them together are one group of tokens.
  together = model.moe is not None and model.moe.group == 'batch'
  traced = rows if together else 2
  saved = shared = working = loss = 0
  for kind in [kind for kind, count in counts.items() if count]:
    one, layer = residuals.of_layer(cfg, stage, traced, kind, model.remat)
    rest = one - layer
    logits = rest.having(vocab)
    loss = logits.bytes(model.llm, tensor)
    shared = (rest - logits).bytes(model.llm, tensor)
    _, products = residuals.of_layer(
        cfg, stage, traced, kind, residuals.PRODUCTS
    )
    _, every = residuals.of_layer(cfg, stage, traced, kind, 'none')
    whole = min(
        products.bytes(model.llm, tensor), every.bytes(model.llm, tensor)
    )
    # While a layer is differentiated: cotangents of the largest result of a
    # product, and what it needs, unless that was kept anyway.
    work = 2 * products.largest() // tensor
    kept = layer.bytes(model.llm, tensor)
    if model.scan_layers:
      # What a loop keeps cannot be made again by its compiler. On the CPU about
      # four arrays of the scores of a block of queries are at work.
      whole = every.bytes(model.llm, tensor)
      work = 4 * products.largest() // tensor
    elif model.remat == 'none':
      # XLA makes some of what could be kept again, where that is cheap. On the
      # CPU it ends half-way between all and the results of products alone.
      kept = (kept + whole) // 2
    if model.remat != 'none':
      work += whole
    saved += counts[kind] * kept
    working = max(working, work)
  # Two cotangents of the logits, beside what the loss keeps of them.
  loss += 2 * 4 * traced * section.row_length * vocab // tensor
  working = max(working, loss)
  return (saved + shared) * rows // traced, working * rows // traced
