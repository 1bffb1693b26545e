# SPDX-License-Identifier: Apache-2.0
"""What the paper's tables say, and whether our cells say it too."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from moellava_jax.analysis import (
    ablation_files,
    ablation_paper,
    ablation_table,
    grids,
)

_VERDICTS = {
    1: 'reproduced',
    0: 'not to be told apart',
    -1: '**the other way round**',
}

# With fewer, an interval says little of what another seed would do.
_MIN_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Source:
  """Where cells are, and of which config and benchmark."""

  config: str
  cells: str
  benchmark: str
  overrides: Mapping[str, Any]  # That the grids were run with.


def text(grid: grids.Grid, table: ablation_table.Table, source: Source) -> str:
  if grid.name == 'table7':
    return _table7(grid, table, source)
  if grid.name not in ablation_paper.TABLES:
    return 'The paper has no numbers for this.\n'
  paper = ablation_paper.TABLES[grid.name]
  labels = {line.row: line.label for line in table.lines}
  rows = [
      ['paper', *paper.columns],
      ['---', *('---:' for _ in paper.columns)],
      *(
          [
              labels[key],
              *(
                  _cell(name, v)
                  for name, v in zip(paper.columns, values, strict=True)
              ),
          ]
          for key, values in paper.rows.items()
      ),
  ]
  lines = [f'| {" | ".join(row)} |\n' for row in rows]
  claims = []
  for better, worse in paper.claims:
    above, equal, below = ablation_paper.wins(
        ablation_paper.scores(grid.name, better),
        ablation_paper.scores(grid.name, worse),
    )
    said = f'"{labels[better]}" above "{labels[worse]}" on {above}'
    said += f' of {above + equal + below} benchmarks'
    said += f', equal on {equal}' if equal else ''
    claims.append(
        f'- Paper: {said}. Here: {_here(grid, source, better, worse)}.\n'
    )
  return ''.join([*lines, '\n', *claims])


def _cell(column: str, value: float | None) -> str:
  if value is None:
    return '-'
  return f'{value:.0f}' if column == ablation_paper.HOURS else f'{value:.1f}'


def _table7(
    grid: grids.Grid, table: ablation_table.Table, source: Source
) -> str:
  """The paper's models are others; the claim is the same for every size."""
  columns = ablation_paper.TABLE_7_COLUMNS
  rows = [['paper', *columns], ['---', *('---:' for _ in columns)]]
  counts = []
  for name, (dense, sparse) in ablation_paper.TABLE_7.items():
    for kind, values in (('dense', dense), ('MoE', sparse)):
      cells = [_cell(c, v) for c, v in zip(columns, values, strict=True)]
      rows.append([f'{name}, {kind}', *cells])
    above, equal, below = ablation_paper.wins(sparse, dense)
    counts.append(f'{name} on {above} of {above + equal + below}')
  lines = [f'| {" | ".join(row)} |\n' for row in rows]
  labels = {line.row: line.label for line in table.lines}
  claims = [f'- Paper: MoE above dense, {", ".join(counts)} benchmarks.\n']
  claims += [
      f'- Here, {labels[sparse]} against {labels[dense]}:'
      f' {_here(grid, source, sparse, dense)}.\n'
      for sparse, dense in grid.against.items()
  ]
  return ''.join([*lines, '\n', *claims])


def _here(
    grid: grids.Grid,
    source: Source,
    better: str,
    worse: str,
) -> str:
  """What our cells say about `better` being above `worse`, by metric."""
  pair = tuple(row for row in grid.rows if row.key in (better, worse))
  between = ablation_table.collect(
      dataclasses.replace(grid, rows=pair, against={better: worse}),
      source.config,
      range(grid.seeds),
      source.cells,
      source.benchmark,
      {},
  )
  (line,) = (line for line in between.lines if line.row == better)
  common = set.intersection(*(set(line.seeds) for line in between.lines))

  def verdict(interval) -> str:
    if len(common) < _MIN_SEEDS:
      return f'not judged by {len(common)} of {grid.seeds} seeds'
    return _VERDICTS[interval.verdict]

  said = [
      f'{metric} {ablation_files.difference(value.interval)}:'
      f' {verdict(value.interval)}'
      for metric, value in line.metrics.items()
      if value.interval is not None
  ]
  return '; '.join(said) or 'not finished'
