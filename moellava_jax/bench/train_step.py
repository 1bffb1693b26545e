# SPDX-License-Identifier: Apache-2.0
"""A training step by stage; stage III by dispatch, against a dense control.

The control (`sizes.dense`) is trained like stage III, and a token meets as many
weights in it. The ceiling of a sparse step is what arithmetic leaves of the
control's speed:

  ceiling = FLOPs of the control's step / FLOPs of the sparse step

with slots that stay empty, dispatch and rematerialisation in both where they
occur (`train.flops`). Beside it

  MFU = necessary FLOPs / (seconds x peak)

where necessary are forward, gradients of activations, and gradients of trained
weights alone: no empty slots, no dispatch, no rematerialisation. The peak is
the data sheet's if the device is known, and that of a large matrix product,
measured here. Rows are full, so that no FLOP goes into padding.

Memory is XLA's plan, split by what lies in it; the peak beside it is what the
device's allocator saw, where it counts.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config
from moellava_jax.bench import measure, sizes
from moellava_jax.model import llava
from moellava_jax.train import accelerators, compiled, flops, init, topology


class Way(NamedTuple):
  """How stage III gets tokens to experts."""

  dispatch: str
  group: int  # Tokens of a group, at most.
  capacity_factor: float


WAYS = {
    'einsum_256': Way('einsum', 256, sizes.CAPACITY_FACTOR),
    'index': Way('index', 2048, sizes.CAPACITY_FACTOR),
    'index_1.25': Way('index', 2048, 1.25),
    'ragged': Way('ragged', 2048, sizes.CAPACITY_FACTOR),
}


class Case(NamedTuple):
  """A stage of a model.

  Attributes:
    name: of the model.
    model: sparse.
    stage: whose step is measured.
    rows, length: of a batch.
    ways: of stage III, names of `WAYS`.
  """

  name: str
  model: config.ModelConfig
  stage: str
  rows: int
  length: int
  ways: tuple[str, ...] = tuple(WAYS)

  def configs(self) -> dict[str, config.TrainConfig]:
    """What to run, by name; the first is the control of the others."""
    made = {'dense': self._training(sizes.dense(self.model))}
    if self.stage != 'moe':
      plain = dataclasses.replace(self.model, moe=None)
      return {'dense': self._training(plain)}
    for name in self.ways:
      way = WAYS[name]
      moe = sizes.moe(way.dispatch, way.group, way.capacity_factor)
      sparse = dataclasses.replace(self.model, moe=moe)
      made[name] = self._training(sparse)
    return made

  def _training(self, model: config.ModelConfig) -> config.TrainConfig:
    return sizes.training(model, self.rows, self.length)


class Runner:
  """A compiled step on one device, its state, and what XLA says of it."""

  def __init__(self, cfg: config.TrainConfig, stage: str):
    """Compiles the step and draws weights and a batch.

    Raises:
      compiled.DoesNotFit: the device's memory is too small.
    """
    local = topology.local()
    one = local._replace(devices=local.devices[:1])
    self._step = compiled.Step(cfg, stage, one)
    self.report = self._step.report()
    self._state, self._frozen, self._batch = self._step.arguments()

  def memory(self) -> dict[str, int]:
    """Bytes by use; they add up to what XLA plans for."""
    trained, frozen, optimizer = (
        sum(x.nbytes for x in jax.tree.leaves(tree))
        for tree in (self._state.trained, self._frozen, self._state.opt_state)
    )
    known = {
        'weights': trained + frozen,
        'optimizer': optimizer,
        'gradients': trained,
    }
    # With the batch, and copies of weights that the compiler makes.
    rest = self.report.total - sum(known.values())
    return {**known, 'activations': max(rest, 0)}

  def __call__(self) -> dict[str, Any]:
    """A step; returns its metrics."""
    self._state, metrics = self._step(self._state, self._frozen, self._batch)
    return metrics


def run(case: Case, repeats: int, peak: float) -> dict[str, Any]:
  """Seconds, shares and waste of a step, by way.

  Ways are run in turns on a CPU, which other work may disturb; on a GPU one
  after the other, as their states would not fit together.

  Args:
    case: what to measure.
    repeats: steps of each, after the first.
    peak: FLOP/s of a large matrix product here (`measure.matmul_peak`).
  """
  found: dict[str, Any] = {}
  turns = jax.default_backend() == 'cpu'
  runners: dict[str, Callable[[], Any]] = {}
  times: dict[str, measure.Time] = {}
  for name, cfg in case.configs().items():
    before = _peak_in_use()
    try:
      runner = Runner(cfg, case.stage)
      found[name] = _entry(case, cfg, runner)
      runners[name] = runner
      if not turns:
        times |= measure.interleaved({name: runner}, repeats)
        # Of the whole process: a smaller one hides behind those before it.
        if (peak_bytes := _peak_in_use()) > before:
          found[name]['peak_bytes_in_use'] = peak_bytes
    except (compiled.DoesNotFit, jax.errors.JaxRuntimeError) as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      found[name] = {'error': str(error).splitlines()[0][:200]}
    if not turns:
      runners.clear()
      runner = None
  if turns:
    times = measure.interleaved(runners, repeats)
  for name, time in times.items():
    _add_time(found, name, time, peak)
  return found


def _entry(
    case: Case, cfg: config.TrainConfig, runner: Runner
) -> dict[str, Any]:
  """What does not depend on time; runs the first step."""
  step_flops = flops.of_step(cfg, case.stage, _paths(cfg, case.stage))
  report = runner.report
  sums = jax.device_get(runner()['sums'])
  kept = sum(float(np.sum(x.kept_ME)) for x in sums.stats)
  assigned = sum(float(np.sum(x.assigned_ME)) for x in sums.stats)
  return {
      'compile_seconds': report.seconds,
      'memory_bytes': report.total,
      'state_bytes': report.arguments,
      'memory_split': runner.memory(),
      'flops_necessary': step_flops.model,
      'flops': step_flops.total,
      'waste': {
          'padding': 1 - float(sums.tokens) / (case.rows * case.length),
          'capacity': step_flops.capacity / step_flops.total,
          'dispatch': step_flops.dispatch / step_flops.total,
          'remat': step_flops.recompute / step_flops.total,
          'dropped': 1 - kept / assigned if assigned else 0.0,
      },
      'tokens': case.rows * case.length,
  }


def _peak_in_use() -> int:
  """Bytes of the device so far; 0 where nobody counts (the CPU)."""
  stats = jax.devices()[0].memory_stats()
  return (stats or {}).get('peak_bytes_in_use', 0)


def _paths(cfg: config.TrainConfig, stage: str) -> Any:
  return init.abstract(llava.Llava(cfg.stage_model(stage)))


def _add_time(
    found: dict[str, Any], name: str, time: measure.Time, peak: float
) -> None:
  entry = found[name]
  entry['seconds'] = time._asdict()
  entry['tokens_a_second'] = entry['tokens'] / time.median
  entry['matmul_flops_a_second'] = peak
  entry['mfu_of_measured_peak'] = entry['flops_necessary'] / time.median / peak
  sheet = accelerators.of_device(jax.devices()[0])
  if sheet is not None:
    entry['mfu'] = entry['flops_necessary'] / time.median / sheet.peak
  dense = found['dense']
  if name != 'dense' and 'seconds' in dense:
    entry['speed'] = dense['seconds']['median'] / time.median
    entry['ceiling'] = dense['flops'] / entry['flops']


HEADER = (
    *('step', 'way', 'ms', 'speed', 'ceiling', 'share', 'MFU', 'of matmul'),
    *('compile s', 'memory', 'empty slots', 'dispatch', 'again', 'dropped'),
    'padding',
)
# Of the last columns, keys in JSON.
_WASTE = ('capacity', 'dispatch', 'remat', 'dropped', 'padding')
LEGEND = (
    'MFU = necessary FLOPs / (seconds x peak): forward, gradients of'
    ' activations and of trained weights; no empty slots, dispatch or remat.\n'
    'Its peak is that of the data sheet; "of matmul" has that of a large matrix'
    ' product, measured here.'
)


def table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows for people, as `HEADER` names their cells."""
  rows = []
  for name, entry in found.items():
    if 'error' in entry:
      rows.append((case, name, entry['error'][:60], *[''] * 12))
      continue
    seconds, waste = entry['seconds'], entry['waste']
    spread = (seconds['high'] - seconds['low']) / seconds['median'] / 2
    compared = ('', '', '')
    if 'speed' in entry:
      speed, ceiling = entry['speed'], entry['ceiling']
      compared = (f'{speed:.2f}', f'{ceiling:.2f}', f'{speed / ceiling:.2f}')
    mfu = f'{entry["mfu"]:.1%}' if 'mfu' in entry else '-'
    rows.append(
        (
            case,
            name,
            f'{1e3 * seconds["median"]:.0f} ± {spread:.0%}',
            *compared,
            mfu,
            f'{entry["mfu_of_measured_peak"]:.1%}',
            f'{entry["compile_seconds"]:.0f}',
            f'{entry["memory_bytes"] / 2**30:.2f} GiB',
            *(f'{waste[key]:.1%}' for key in _WASTE),
        )
    )
  return rows


MEMORY_HEADER = (
    *('step: GiB', 'way', 'weights', 'optimizer', 'gradients', 'activations'),
    *('all (XLA)', 'peak in use', 'matmul TFLOP/s'),
)


def memory_table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows for people, as `MEMORY_HEADER` names their cells."""
  rows = []
  for name, entry in found.items():
    if 'error' in entry:
      continue
    split = [*entry['memory_split'].values(), entry['memory_bytes']]
    peak = entry.get('peak_bytes_in_use')
    rows.append(
        (
            case,
            name,
            *(f'{bytes_ / 2**30:.2f}' for bytes_ in split),
            '-' if peak is None else f'{peak / 2**30:.2f}',
            f'{entry["matmul_flops_a_second"] / 1e12:.3g}',
        )
    )
  return rows
