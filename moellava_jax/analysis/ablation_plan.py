# SPDX-License-Identifier: Apache-2.0
"""From rows and seeds to runs: what trains what.

A cell (a row and a seed) is a chain of runs: the stages up to I in one, then
one for each stage that follows. A run is called by a digest of all settings
that decide its parameters, those of the runs before it included, so that cells
which agree up to a stage have that stage in common.

  OUT/runs/NAME-DIGEST/   a run folder of train.main; answers/ beside its stages
  OUT/cells/ROW.seedN.json
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import importlib.util
import json
import os
from typing import Any

from moellava_jax import config
from moellava_jax.analysis import grids

_OWN = ('workdir', 'stages', 'seed', 'init.checkpoint')
PLACE = 'RUN'  # Stands for the folder while settings are compared.


@dataclasses.dataclass(frozen=True)
class Run:
  """One call of train.main."""

  name: str  # Of its folder in OUT/runs.
  stages: tuple[str, ...]
  config: str
  seed: int
  overrides: tuple[tuple[str, Any], ...]
  before: 'Run | None'  # Trains what it starts from.
  embedded: bool  # Its data are Shapes, in the folder of the first run.

  @property
  def last(self) -> str:
    return self.stages[-1]

  @property
  def chain(self) -> tuple['Run', ...]:
    """From the first run to this one."""
    before = () if self.before is None else self.before.chain
    return (*before, self)

  def folder(self, out: str) -> str:
    return os.path.join(out, 'runs', self.name)

  def data(self, out: str) -> str:
    """Of Shapes: the images and questions of the seed."""
    return os.path.join(self.chain[0].folder(out), 'data')


@dataclasses.dataclass(frozen=True)
class Cell:
  """A row and a seed."""

  row: grids.Row
  seed: int
  config: str
  run: Run
  devices: int  # To simulate in evaluation, as in training.

  @property
  def name(self) -> str:
    return f'{self.row.key}.seed{self.seed}'

  @property
  def digest(self) -> str:
    return self.run.name.rsplit('-', 1)[1]


def load(path: str, overrides: Mapping[str, Any]) -> Any:
  """The ConfigDict of a config file (`FILE` or `FILE:ARGUMENT`), changed.

  Raises:
    UserError: no such file, or an override of a field that is not there.
  """
  file, *argument = path.split(':', 1)
  spec = importlib.util.spec_from_file_location('ablation_config', file)
  if spec is None or spec.loader is None or not os.path.isfile(file):
    raise config.UserError(
        f'--config={path}: no such file; run the command in the folder that'
        ' has configs/.'
    )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  raw = module.get_config(*argument)
  for name, value in overrides.items():
    *parents, last = name.split('.')
    section = raw
    for parent in parents:
      if parent not in section:
        raise _unknown(path, name, section)
      section = section[parent]
    if last not in section:
      raise _unknown(path, name, section)
    try:
      section[last] = value
    except TypeError as error:
      raise config.UserError(f'{path}: {name}={value!r}: {error}.') from error
  return raw


def _unknown(path: str, name: str, section: Any) -> config.UserError:
  return config.UserError(
      f'{path} has no field {name!r}; there are {sorted(section)}.'
  )


def cells(
    grid: grids.Grid,
    config_path: str,
    seeds: Sequence[int],
    common: Mapping[str, Any],
) -> list[Cell]:
  """The cells of a grid, seed by seed, so that early tables are whole.

  Args:
    grid: whose rows.
    config_path: of rows that name no other.
    seeds: of data, initialisation and training.
    common: overrides of all rows; a row's own win.

  Raises:
    UserError: an override that does not fit the config, or that is not for the
      user to set.
  """
  if wrong := [name for name in common if name in _OWN]:
    raise config.UserError(
        f'--config.{wrong[0]} is set by the grid; drop it. Folders go by --out,'
        ' seeds by --seeds.'
    )
  return [
      _cell(row, row.config or config_path, seed, common)
      for seed in seeds
      for row in grid.rows
  ]


def _cell(
    row: grids.Row, path: str, seed: int, common: Mapping[str, Any]
) -> Cell:
  base = load(path, {})
  changes = {**common, **dict(row.overrides)}
  if row.all_data:
    whole = load(path, {**common, 'workdir': PLACE})
    changes |= _all_data(whole, row.stages[-1])
  raw = load(path, {**changes, 'seed': seed, 'workdir': PLACE})
  cfg = config.from_dict(raw)
  run = None
  for stages in _parts(base.stages, row, path):
    run = _run(path, seed, stages, changes, cfg, run)
  assert run is not None
  return Cell(row, seed, path, run, cfg.mesh.cpu_devices)


def _parts(
    known: Sequence[str], row: grids.Row, path: str
) -> tuple[tuple[str, ...], ...]:
  """The stages of each run of a row."""
  head = tuple(s for s in known if s not in ('finetune', 'moe'))
  if not head or not {'finetune', 'moe'} <= set(known):
    raise config.UserError(
        f'--config={path} has the stages {tuple(known)}, but ablations begin'
        ' with stage I and go on to finetune and moe; name the config of all'
        ' stages.'
    )
  return (head, *((stage,) for stage in row.stages))


def _all_data(raw: Any, stage: str) -> dict[str, Any]:
  """Overrides that give `stage` the data and the length of stages II and III.

  Raises:
    UserError: one of them counts steps and the other epochs.
  """
  second, third = raw.finetune, raw.moe
  changes: dict[str, Any] = {f'{stage}.lr': second.lr}
  if raw.data.json is None:
    changes[f'{stage}.data.json'] = f'{second.data.json},{third.data.json}'
  if (second.steps is None) != (third.steps is None):
    raise config.UserError(
        f'finetune.steps is {second.steps} and moe.steps is {third.steps}: set'
        ' both or none, so that it is known how long a stage with the data of'
        ' both is.'
    )
  if second.steps is None:
    if second.epochs != third.epochs or second.batch_size != third.batch_size:
      raise config.UserError(
          'finetune and moe have other epochs or another batch_size than each'
          ' other; a stage with the data of both needs them equal.'
      )
    return changes
  changes[f'{stage}.steps'] = second.steps + third.steps
  if raw.data.json is None:
    files = [len(s.data.json.split(',')) for s in (second, third)]
    changes[f'{stage}.data.weights'] = tuple(
        float(s.steps) / n
        for s, n in zip((second, third), files, strict=True)
        for _ in range(n)
    )
  return changes


def _run(path, seed, stages, changes, cfg, before) -> Run:
  decisive = {
      name: value
      for name, value in config.settings(cfg, stages[-1]).items()
      # A switch that is off might as well not exist: one that is added to the
      # config later leaves the digests of older runs as they are.
      if value is not None and value is not False
  }
  text = json.dumps(
      [before.name if before else '', stages, decisive], sort_keys=True
  )
  digest = hashlib.sha256(text.encode()).hexdigest()[:12]
  # Of the overrides only those that reach this run, so that cells which share
  # it agree on its command; the beginning of a run is that of the first one.
  mine = {
      name: value
      for name, value in changes.items()
      if _concerns(name, stages) and (before is None or _later(name))
  }
  return Run(
      name=f'{stages[-1]}-{digest}',
      stages=tuple(stages),
      config=path,
      seed=seed,
      overrides=tuple(sorted(mine.items())),
      before=before,
      embedded=cfg.data.shapes is not None,
  )


def _concerns(name: str, stages: Sequence[str]) -> bool:
  """Whether an override decides anything in a run of these stages."""
  first = name.split('.')[0]
  if name.startswith('model.moe.'):
    return 'moe' in stages
  return first not in config.STAGES or first in stages


def _later(name: str) -> bool:
  return not name.startswith('init.')
