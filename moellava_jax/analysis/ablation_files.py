# SPDX-License-Identifier: Apache-2.0
"""A table of an ablation as text, CSV, JSON and figure.

  OUT/GRID/results.json, table.csv, table.md, table.png, table.svg

results.json and table.csv have shares; what is for people has percent.
"""

import csv
import dataclasses
import io
import pathlib

from moellava_jax import run_folder
from moellava_jax.analysis import (
    ablation_figure,
    ablation_stats,
    ablation_table,
    look,
)


def header(table: ablation_table.Table) -> list[str]:
  """Columns of `cells_of`."""
  names = ['']
  for metric in table.metrics:
    names += [f'{metric} (%)', 'difference, 95 %']
  return [*names, 'seeds', 'act. / total', 'own time', 'before it']


def cells_of(
    line: ablation_table.Line, table: ablation_table.Table
) -> list[str]:
  """A line of the table as text for people."""
  cells = [line.label]
  for metric in table.metrics:
    value = line.metrics.get(metric)
    if value is None:
      cells += ['failed' if line.failed else '-', '-']
      continue
    cells += [percent(value), difference(value.interval)]
  cells.append(str(len(line.seeds)) + (' (failed)' if line.failed else ''))
  cells.append(
      '-'
      if line.activated is None or line.total is None
      else f'{count(line.activated)} / {count(line.total)}'
  )
  return [*cells, duration(line.seconds), duration(line.seconds_before)]


def percent(value: ablation_table.Value) -> str:
  spread = '' if value.deviation is None else f' ± {100 * value.deviation:.1f}'
  return f'{100 * value.mean:.1f}{spread}'


def difference(interval: ablation_stats.Interval | None) -> str:
  """`+1.2 [+0.3, +2.0]`; in bold type where 0 is outside."""
  if interval is None:
    return '-'
  text = (
      f'{100 * interval.difference:+.1f} [{100 * interval.low:+.1f},'
      f' {100 * interval.high:+.1f}]'
  )
  return f'**{text}**' if interval.verdict else text


def count(number: int) -> str:
  """`0.13 M`, `2.24 B`."""
  power = 9 if number >= 1e9 else 6
  return f'{number / 10**power:.2f} {"B" if power == 9 else "M"}'


def duration(seconds: float | None) -> str:
  if seconds is None:
    return '-'
  if seconds < 120:
    return f'{seconds:.0f} s'
  return (
      f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'
  )


def markdown(table: ablation_table.Table) -> str:
  """The table, without a heading."""
  rows = [header(table), *(cells_of(line, table) for line in table.lines)]
  marks = ['---', *('---:' for _ in rows[0][1:])]
  lines = [rows[0], marks, *rows[1:]]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def to_csv(table: ablation_table.Table) -> str:
  """One line for each row, metric and seed, and one for their means."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(
      (
          'grid',
          'row',
          'label',
          'metric',
          'seed',
          'value',
          'deviation',
          'against',
          'difference',
          'low',
          'high',
          'activated_parameters',
          'total_parameters',
          'seconds',
          'seconds_before',
      )
  )
  for line in table.lines:
    for name, value in line.metrics.items():
      start = (table.grid, line.row, line.label, name)
      gap = value.interval
      writer.writerow(
          (
              *start,
              'mean',
              value.mean,
              value.deviation,
              line.against,
              *((gap.difference, gap.low, gap.high) if gap else ('', '', '')),
              line.activated,
              line.total,
              line.seconds,
              line.seconds_before,
          )
      )
      for seed, one in zip(line.seeds, value.by_seed, strict=True):
        writer.writerow((*start, seed, one, *[''] * 9))
  return text.getvalue()


def write(table: ablation_table.Table, out: str) -> pathlib.Path:
  """Writes all files; returns their folder."""
  folder = pathlib.Path(out) / table.grid
  folder.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(folder / 'results.json', dataclasses.asdict(table))
  (folder / 'table.csv').write_text(to_csv(table), encoding='utf-8')
  (folder / 'table.md').write_text(
      f'# {table.title}\n\n{markdown(table)}', encoding='utf-8'
  )
  if table.metrics:
    figure = ablation_figure.draw(table)
    (folder / 'table.png').write_bytes(look.png(figure))
    figure.savefig(folder / 'table.svg', format='svg')
  return folder
