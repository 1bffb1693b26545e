# SPDX-License-Identifier: Apache-2.0
"""The mesh of a stage.

What the config leaves open is chosen here, where model, devices and memory are
known; what does not divide is found here, before anything is compiled.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import multihost_utils
import numpy as np

from moellava_jax import config, devices, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import init, program, stages

# Parameters, gradients and optimizer may take this share of a device's memory;
# activations and copies in another precision need the rest.
STATE_SHARE = 0.5

_EXPERT_SIZES = (4, 2, 1)


def mesh_for(
    cfg: config.TrainConfig,
    stage: str,
    given: Sequence[Any] | None = None,
    memory: int | None = None,
) -> jax.sharding.Mesh:
  """The mesh of a stage: sizes of the config, or chosen where it has None.

  `expert`: 4, 2 or 1, the largest that divides the experts and the devices of a
  slice or node; 1 where the model is dense. `fsdp`: the smallest that leaves
  1 - `STATE_SHARE` of the memory free, 1 where the memory is not known (CPU).
  If no `fsdp` does, a smaller `expert` leaves more devices to it.

  Args:
    cfg: the run.
    stage: one of its stages.
    given: devices, also simulated or described ones; None: all there are.
    memory: bytes of a device; None: what the devices say.

  Raises:
    UserError: sizes that do not fit devices, model or batch.
  """
  given = jax.devices() if given is None else list(given)
  if memory is None:
    memory = _memory(given)
  measure = None
  chosen = None
  for sizes in _candidates(cfg, stage, given):
    try:
      mesh = sharding.make_mesh(sizes, given)
    except config.UserError:
      continue
    chosen = mesh
    if memory is None or cfg.mesh.fsdp is not None:
      break
    measure = measure or _StateBytes(cfg, stage)
    if measure.on(mesh) <= STATE_SHARE * memory:
      break
  if chosen is None:  # Says what is wrong.
    chosen = sharding.make_mesh(cfg.mesh, given)
  check(cfg, stage, chosen)
  return chosen


def _candidates(cfg: config.TrainConfig, stage: str, given):
  """Mesh sizes to try, the best first, the one that takes least memory last."""
  mesh = cfg.mesh
  near = min(len(group) for group in devices.slices(given))
  room = max(near // max(mesh.tensor, 1), 1)
  moe = cfg.stage_model(stage).moe
  experts = [mesh.expert] if mesh.expert is not None else [1]
  if mesh.expert is None and moe is not None and moe.dispatch != 'ragged':
    experts = [
        n for n in _EXPERT_SIZES if moe.num_experts % n == 0 and room % n == 0
    ]
  for expert in experts:
    fsdps = [mesh.fsdp]
    if mesh.fsdp is None:
      most = max(room // max(expert, 1), 1)
      fsdps = [n for n in range(1, most + 1) if most % n == 0]
    for fsdp in fsdps:
      yield dataclasses.replace(mesh, expert=expert, fsdp=fsdp)


def _memory(given) -> int | None:
  """Bytes of the smallest device, agreed on by all processes."""
  here = [d for d in given if d.process_index == jax.process_index()]
  stats = [d.memory_stats() for d in here if d.platform != 'cpu']
  limits = [s['bytes_limit'] for s in stats if s and 'bytes_limit' in s]
  if not limits:
    return None
  if jax.process_count() == 1:
    return min(limits)
  mib = multihost_utils.process_allgather(np.int32(min(limits) >> 20))
  return int(np.min(mib)) << 20


class _StateBytes:
  """Parameters, gradients and Adam's moments on one device, in bytes."""

  def __init__(self, cfg: config.TrainConfig, stage: str):
    probe = program.probe_sizes(stage)
    self._model = cfg.model
    self._boxed = init.boxed(llava.Llava(cfg.stage_model(stage)), probe)
    leaves = trees.flatten(nn.get_partition_spec(self._boxed))
    self._trained = trees.flatten(
        stages.mask(trees.unflatten(leaves), stage, cfg.stage(stage).whole_lm)
    )

  def on(self, mesh) -> int:
    places = trees.flatten(sharding.of_parameters(self._boxed, mesh))
    total = 0
    for path, box in trees.flatten(self._boxed).items():
      where, shape = places[path], box.value.shape
      if self._trained[path]:
        total += 4 * _elements(where, shape)
        total += 12 * _elements(sharding.zero(where, shape), shape)
      else:
        size = llava.stored_dtype(path, self._model).itemsize
        total += size * _elements(where, shape)
    return total


def _elements(where, shape) -> int:
  return math.prod(where.shard_shape(shape))


def check(cfg: config.TrainConfig, stage: str, mesh) -> None:
  """Finds what would not divide, before anything is compiled.

  Heads of keys and values, the vocabulary and the tower stay whole where an
  axis does not divide them (`sharding.of_parameters`).

  Raises:
    UserError: experts, heads, widths or batch that the mesh does not divide.
  """
  model = cfg.stage_model(stage)
  parts = [
      ('fsdp', 'model.llm.width', model.llm.width),
      ('tensor', 'model.llm.num_heads', model.llm.num_heads),
      ('tensor', 'model.llm.mlp_width', model.llm.mlp_width),
  ]
  if model.moe is not None:
    parts.append(('expert', 'model.moe.num_experts', model.moe.num_experts))
  for axis, field, size in parts:
    if size % mesh.shape[axis]:
      raise config.UserError(
          f'Stage {stage!r}: {field}={size} is not a multiple of the mesh axis'
          f' {axis!r}, which has size {mesh.shape[axis]}. Set'
          f' --config.mesh.{axis} to a divisor of {size}.'
      )
  section = cfg.stage(stage)
  rows = sharding.batch_divisor(mesh)
  need = rows * section.accumulate
  if section.batch_size % need:
    raise config.UserError(
        f'Stage {stage!r}: batch_size={section.batch_size} is not a multiple of'
        f' {need} (accumulate={section.accumulate} micro-batches times'
        f' {rows} data-parallel devices). Set --config.{stage}.batch_size or'
        f' .accumulate.'
    )
