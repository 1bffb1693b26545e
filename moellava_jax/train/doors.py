# SPDX-License-Identifier: Apache-2.0
"""Where weights of others enter a run: `--config.init.*`.

A run starts from a base language model and a vision tower (and the projector
of a stage I), or from a LLaVA or MoE-LLaVA checkpoint.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from moellava_jax import config, trees
from moellava_jax.interop import files, hf, hub, load, towers

# What a run may choose whatever the weights were trained with.
_FREE = ('name', 'residual_dropout', 'embed_scale_at')
# The tower itself knows nothing of how LLaVA uses it.
_SELECT = ('select_layer', 'select_feature')


def named(cfg: config.InitConfig) -> bool:
  """Whether the run starts from a language model and a tower of others.

  Raises:
    UserError: one of them is given without the other.
  """
  given = {'lm': cfg.lm, 'tower': cfg.tower, 'projector': cfg.projector}
  if not any(given.values()):
    return False
  for name in ('lm', 'tower'):
    if given[name] is None:
      there = [f'init.{n}' for n, value in given.items() if value is not None]
      raise config.UserError(
          f'{" and ".join(there)} without init.{name}: a run starts from a'
          ' language model and a vision tower. Add'
          f' --config.init.{name}=DIR (or hf:org/name).'
      )
  return True


def open_weights(cfg: config.TrainConfig, stage: str) -> load.Source:
  """The weights that `stage` starts from, compared with the run's config.

  Only headers are read.

  Raises:
    UserError: weights of another kind, or sizes that contradict the config;
      the message lists the fields.
    WeightsError: files that are not complete, see `rules.check`.
  """
  tower = None if cfg.init.tower is None else hub.local(cfg.init.tower)
  if tower is not None:
    read = towers.read(tower, towers.SELECT)
    _compare(tower, 'vision', read, cfg.model.vision, _SELECT)
  if cfg.init.checkpoint is not None:
    return _open_checkpoint(cfg, stage, tower)
  assert cfg.init.lm is not None and tower is not None
  lm = hub.local(cfg.init.lm)
  described = hf.describe(lm)
  if described.kind != 'lm':
    raise config.UserError(
        f'--config.init.lm={cfg.init.lm} is a {described.raw["model_type"]};'
        ' expected a language model'
        + (
            ': name it with --config.init.checkpoint.'
            if described.kind == 'llava'
            else '.'
        )
    )
  _compare(lm, 'llm', described.llm, cfg.model.llm)
  parts = load.open_tower(tower, cfg.model.vision).parts
  if cfg.init.projector is not None:
    parts += load.open_projector(
        hub.local(cfg.init.projector),
        cfg.model.projector,
        cfg.model.vision.width,
        cfg.model.llm.width,
    ).parts
  family = described.family
  assert family is not None
  return load.Source(parts + load.open_lm(lm, family, cfg.model.llm).parts)


def _open_checkpoint(
    cfg: config.TrainConfig, stage: str, tower: str | None
) -> load.Source:
  assert cfg.init.checkpoint is not None
  for name, value in (
      ('lm', cfg.init.lm),
      ('projector', cfg.init.projector),
  ):
    if value is not None:
      raise config.UserError(
          f'init.checkpoint={cfg.init.checkpoint} has a {name} of its own;'
          f' drop --config.init.{name}={value}.'
      )
  path = hub.local(cfg.init.checkpoint)
  described = hf.describe(path)
  if described.llm is None or described.projector is None:
    raise config.UserError(
        f'init.checkpoint={cfg.init.checkpoint} is a'
        f' {described.raw["model_type"]}, no LLaVA; name it with'
        f' --config.init.{described.kind}.'
    )
  if described.moe is not None and stage != 'moe':
    raise config.UserError(
        f'init.checkpoint={cfg.init.checkpoint} is sparse, but stage {stage!r}'
        ' trains a dense model; train the stage moe alone (--config=...:moe).'
    )
  ours = cfg.model
  _compare(path, 'llm', described.llm, ours.llm)
  if tower is None:
    inside = _inside(described, path)
    if inside is not None:
      _compare(path, 'vision', inside, ours.vision, (*_SELECT, 'mean', 'std'))
  theirs: dict[str, Any] = {
      'projector': described.projector,
      'vision.select_layer': described.select.layer,
      'vision.select_feature': described.select.feature,
  }
  present: dict[str, Any] = {
      'projector': ours.projector,
      'vision.select_layer': ours.vision.select_layer,
      'vision.select_feature': ours.vision.select_feature,
  }
  sparse = None
  if described.moe is not None:
    assert ours.moe is not None
    sparse = dataclasses.replace(ours.moe, **described.moe)
    theirs |= _of_experts(sparse, ours.llm.depth)
    present |= _of_experts(ours.moe, ours.llm.depth)
  _refuse(path, theirs, present)
  replaced = tower is not None and files.has_weights(tower)
  model = dataclasses.replace(ours, moe=sparse)
  return load.open_llava(described, model, tower if replaced else None)


def _inside(described: hf.Described, path: str) -> config.VisionConfig | None:
  """The tower a LLaVA was trained with, where its sizes are known."""
  if described.vision is None:
    return towers.published(described.tower or '')
  return towers.vision(
      described.vision, path, name='inside', select=described.select
  )


def _of_experts(moe: config.MoeConfig, depth: int) -> dict[str, Any]:
  """The settings that decide shapes; the others are the run's to choose."""
  return {
      'moe.layers': ','.join(map(str, moe.layer_ids(depth))),
      'moe.num_experts': moe.num_experts,
      'moe.use_residual': moe.use_residual,
  }


def _compare(where: str, section: str, theirs, ours, free=()) -> None:
  skip = (*_FREE, *free)
  fields = [f.name for f in dataclasses.fields(ours) if f.name not in skip]
  _refuse(
      where,
      {f'{section}.{f}': getattr(theirs, f) for f in fields},
      {f'{section}.{f}': getattr(ours, f) for f in fields},
  )


def _same(a: Any, b: Any) -> bool:
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-9)
  return a == b


def _refuse(where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
  """Raises UserError if the two differ; lists the fields and the remedy."""
  wrong = [name for name in theirs if not _same(theirs[name], ours[name])]
  if wrong:
    listed = '; '.join(
        f'model.{name} is {ours[name]!r}, there it is {theirs[name]!r}'
        for name in wrong
    )
    flags = ' '.join(f'--config.model.{n}={theirs[n]}' for n in wrong)
    raise config.UserError(
        f'{where} holds another model than the config describes: {listed}. Use'
        f' the config of that model, or set {flags}'
    )


def read(source: load.Source, shardings: dict[str, Any]) -> Any:
  """Parameters in fp32, each put into its shards as soon as it is read.

  The host holds one parameter, as it is in the files, and one fp32 copy of
  what its own devices hold of it, however many of them hold the same.

  Args:
    source: see `open_weights`.
    shardings: parameter path -> sharding.
  """
  flat = {}
  for path, array in source.read():

    # A slice of an array is no key before Python 3.12.
    pieces: dict[str, np.ndarray] = {}

    def shard(index, array=array, pieces=pieces):
      if (key := str(index)) not in pieces:
        pieces[key] = np.asarray(array[index], np.float32)
      return pieces[key]

    flat[path] = jax.make_array_from_callback(
        array.shape, shardings[path], shard
    )
    del array, pieces, shard  # Before the next one is read.
  return trees.unflatten(flat)
