# SPDX-License-Identifier: Apache-2.0
"""Which settings make a stage fit a device: tried, with `train.memory`."""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

from moellava_jax import config, sharding
from moellava_jax.train import memory

_MORE_DEVICES = (2, 4, 8, 16, 32)


class Advice(NamedTuple):
  """Settings that fit, and what they take.

  Attributes:
    changes: as on the command line, without `--config.`.
    devices: how many it takes.
    total: bytes per device.
  """

  changes: tuple[str, ...]
  devices: int
  total: int

  def __str__(self) -> str:
    words = [*self.changes]
    if self.devices:
      words.insert(0, f'{self.devices} devices')
    return ', '.join(words)


class _Try(NamedTuple):
  cfg: config.TrainConfig
  sizes: tuple[int, ...]


def find(
    cfg: config.TrainConfig,
    stage: str,
    sizes: tuple[int, ...],
    usable: int,
) -> Advice | None:
  """The first candidate that takes no more than `usable` bytes.

  In this order, each with the smallest number of micro-batches that fits: the
  mesh as it is; rematerialisation; everything split over fsdp; the experts over
  `expert`; products over `tensor`; last, more devices. None: not even those.

  Args:
    cfg: with `row_length` and `model.compute_dtype` given.
    stage: its name.
    sizes: of `sharding.AXES`, what the stage would run on.
    usable: bytes of a device.
  """
  start = _Try(cfg, sizes)
  for candidate in _candidates(cfg, stage, sizes):
    if not _divides(candidate, stage):
      continue
    for tried in _micro_batches(candidate, stage):
      total = memory.of_stage(tried.cfg, stage, tried.sizes).total
      if total <= usable:
        return Advice(
            _changes(start, tried, stage),
            _count(tried.sizes) if _count(tried.sizes) != _count(sizes) else 0,
            total,
        )
  return None


def _count(sizes: tuple[int, ...]) -> int:
  return functools.reduce(int.__mul__, sizes)


def _divides(candidate: _Try, stage: str) -> bool:
  """Whether the axes of the mesh divide what they split."""
  _, fsdp, expert, tensor = candidate.sizes
  model = candidate.cfg.stage_model(stage)
  llm, tower = model.llm, model.vision
  parts = [
      (fsdp, (llm.width, tower.width)),
      (tensor, (llm.num_heads, llm.num_kv_heads, llm.mlp_width)),
      (tensor, (llm.vocab_size, tower.num_heads, tower.mlp_width)),
      (expert, (model.moe.num_experts,) if model.moe is not None else ()),
  ]
  return all(size % ways == 0 for ways, sizes in parts for size in sizes)


def _candidates(cfg, stage, sizes) -> Iterator[_Try]:
  data, fsdp, expert, tensor = sizes
  lean = dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, remat='full')
  )
  yield _Try(cfg, sizes)
  yield _Try(lean, sizes)
  whole = (1, data * fsdp, expert, tensor)
  yield _Try(cfg, whole)
  yield _Try(lean, whole)
  moe = cfg.stage_model(stage).moe
  if moe is not None and expert == 1:
    for ways in (2, 4):
      if moe.num_experts % ways == 0 and whole[1] % ways == 0:
        yield _Try(lean, (1, whole[1] // ways, ways, tensor))
  for ways in (2, 4, 8):
    if whole[1] % ways == 0:
      yield _Try(lean, (1, whole[1] // ways, expert, tensor * ways))
  for times in _MORE_DEVICES:
    yield _Try(lean, (1, whole[1] * times, expert, tensor))


def _micro_batches(candidate: _Try, stage: str) -> Iterator[_Try]:
  """The candidate with its micro-batches halved, until they are one row."""
  cfg, sizes = candidate
  section = cfg.stage(stage)
  shards = sharding.batch_divisor(memory.abstract_mesh(sizes))
  accumulate = section.accumulate
  # More devices take fewer micro-batches of as many rows a device.
  while accumulate > 1 and section.batch_size % (shards * accumulate):
    accumulate //= 2
  while section.batch_size % (shards * accumulate) == 0:
    changed: dict[str, Any] = {
        stage: dataclasses.replace(section, accumulate=accumulate)
    }
    yield _Try(dataclasses.replace(cfg, **changed), sizes)
    accumulate *= 2


def _changes(start: _Try, end: _Try, stage: str) -> tuple[str, ...]:
  pairs = [('model.remat', start.cfg.model.remat, end.cfg.model.remat)]
  pairs += [
      (f'mesh.{axis}', before, after)
      for axis, before, after in zip(
          sharding.AXES, start.sizes, end.sizes, strict=True
      )
  ]
  pairs.append(
      (
          f'{stage}.accumulate',
          start.cfg.stage(stage).accumulate,
          end.cfg.stage(stage).accumulate,
      )
  )
  return tuple(f'{name}={new}' for name, old, new in pairs if old != new)
