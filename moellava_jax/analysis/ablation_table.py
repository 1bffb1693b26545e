# SPDX-License-Identifier: Apache-2.0
"""Cells to tables: mean, deviation and interval of every row.

Values are shares, seconds and counts.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from moellava_jax import config
from moellava_jax.analysis import (
    ablation_cell,
    ablation_stats,
    grids,
)

_SCORE = 'score'  # The metric of benchmarks that are not scored by question.
_COUNTS = ('llm_activated_parameters', 'llm_total_parameters')


@dataclasses.dataclass(frozen=True)
class Value:
  """A metric of a row over its seeds."""

  mean: float
  deviation: float | None  # None: one seed.
  by_seed: tuple[float, ...]
  interval: ablation_stats.Interval | None  # None: of the baseline itself.


@dataclasses.dataclass(frozen=True)
class Line:
  """A row of a table; without seeds nothing of it is finished.

  Attributes:
    row: its key.
    label: for people.
    against: the key of the row it is compared with; None: of no other.
    seeds: those that are finished.
    metrics: by the name of the metric.
    activated: parameters of the decoder that a token uses, in one number.
    total: parameters of the decoder.
    seconds: mean time of the last stage.
    seconds_before: mean time of the stages before it, which rows share.
    failed: seed -> why, and where the log is.
  """

  row: str
  label: str
  against: str | None
  seeds: tuple[int, ...]
  metrics: Mapping[str, Value]
  activated: int | None
  total: int | None
  seconds: float | None
  seconds_before: float | None
  failed: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class Table:
  grid: str
  title: str
  benchmark: str
  config: str
  lines: tuple[Line, ...]

  @property
  def metrics(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(m for line in self.lines for m in line.metrics))


@dataclasses.dataclass(frozen=True)
class _Counted:
  """A metric of one cell: its kind and counts, or with them None its value."""

  kind: str
  counts: Any
  value: float


def collect(
    grid: grids.Grid,
    config_path: str,
    seeds: Sequence[int],
    out: str,
    benchmark: str,
    failed: Mapping[str, str],
    draws: int = ablation_stats.DRAWS,
) -> Table:
  """Reads the finished cells of a grid.

  Args:
    grid: whose rows.
    config_path: what the table says it is of.
    seeds: those that belong to it.
    out: the folder with cells/.
    benchmark: whose scores.
    failed: ROW.seedN -> why it is not there.
    draws: of the bootstrap.

  Raises:
    UserError: a file is malformed.
  """
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for row in grid.rows:
    for seed in seeds:
      content = ablation_cell.read(out, f'{row.key}.seed{seed}', benchmark)
      if content is not None:
        found.setdefault(row.key, {})[seed] = content
  counted = {
      key: {seed: _counted(out, c, benchmark) for seed, c in by_seed.items()}
      for key, by_seed in found.items()
  }
  lines = tuple(
      _line(row, grid, found, counted, seeds, failed, draws)
      for row in grid.rows
  )
  return Table(grid.name, grid.title, benchmark, config_path, lines)


def _counted(out: str, content: Any, benchmark: str) -> dict[str, _Counted]:
  parts = ablation_cell.read_parts(out, content, benchmark)
  if not parts:
    value = ablation_cell.headline(content, benchmark)
    return {_SCORE: _Counted(_SCORE, None, value)}
  return {
      ablation_stats.name(name, part): _Counted(
          part.kind,
          ablation_stats.counts(part),
          ablation_stats.of_part(part),
      )
      for name, part in parts.items()
  }


def _line(row, grid, found, counted, seeds, failed, draws) -> Line:
  mine = counted.get(row.key, {})
  against = grid.against.get(row.key)
  theirs = counted.get(against, {})
  both = sorted(mine.keys() & theirs.keys())
  metrics = {}
  # F1 first, as the paper's one number.
  for name in sorted({m for cell in mine.values() for m in cell}):
    values = tuple(mine[seed][name].value for seed in sorted(mine))
    mean, deviation = ablation_stats.mean_and_deviation(values)
    interval = None
    if against is not None and both:
      interval = _interval(
          [mine[s][name] for s in both], [theirs[s][name] for s in both], draws
      )
    metrics[name] = Value(mean, deviation, values, interval)
  contents = list(found.get(row.key, {}).values())
  seconds = [[*seconds_by_stage(c).values()] for c in contents]
  return Line(
      row=row.key,
      label=row.label,
      against=against,
      seeds=tuple(sorted(mine)),
      metrics=metrics,
      activated=_same(contents, _COUNTS[0]),
      total=_same(contents, _COUNTS[1]),
      seconds=_mean([s[-1] for s in seconds]),
      seconds_before=_mean([sum(s[:-1]) for s in seconds]),
      failed={
          seed: failed[name]
          for seed in seeds
          if (name := f'{row.key}.seed{seed}') in failed and seed not in mine
      },
  )


def _interval(ours, theirs, draws: int) -> ablation_stats.Interval:
  if ours[0].counts is None:
    return ablation_stats.paired_by_seed(
        [c.value for c in ours], [c.value for c in theirs], draws
    )
  return ablation_stats.paired(
      ours[0].kind, [c.counts for c in ours], [c.counts for c in theirs], draws
  )


def seconds_by_stage(content: Mapping[str, Any]) -> dict[str, float]:
  """Of a cell's JSON, in the order of the stages."""
  stages = content['stages']
  return {s: stages[s]['seconds'] for s in config.STAGES if s in stages}


def _mean(values: Sequence[float]) -> float | None:
  return sum(values) / len(values) if values else None


def _same(contents: Sequence[Mapping[str, Any]], key: str) -> int | None:
  return contents[0]['parameters'].get(key) if contents else None
