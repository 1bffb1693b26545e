# SPDX-License-Identifier: Apache-2.0
"""What `prepare` found: tables for people, JSON for programs, a histogram."""

from typing import Any

import numpy as np

from moellava_jax.data import census as census_lib
from moellava_jax.data import published

_EXAMPLES = 20  # Rows named for each reason.


def to_json(census: census_lib.Census, unit: str) -> dict[str, Any]:
  """The content of report.json."""
  lengths_N = np.array(census.lengths or [0])
  examples: dict[str, list[str]] = {}
  for drop in census.dropped:
    named = examples.setdefault(drop.reason, [])
    if len(named) < _EXAMPLES:
      named.append(drop.message)
  return {
      'rows': census.total('rows'),
      'kept': census.total('kept'),
      'images': census.total('images'),
      'text_only': census.total('text only'),
      'sources': {
          source: {**counts, 'published': _published(source, counts['rows'])}
          for source, counts in sorted(census.sources.items())
      },
      'dropped': dict(census.reasons),
      'dropped_examples': examples,
      'repaired': dict(census.repaired),
      'length': {
          'unit': unit,
          'mean': float(lengths_N.mean()),
          'percentiles': {
              str(q): int(np.percentile(lengths_N, q))
              for q in (5, 25, 50, 75, 95, 99, 100)
          },
      },
  }


def _published(source: str, rows: int) -> dict[str, Any] | None:
  if source not in published.COUNTS:
    return None
  count = published.COUNTS[source]
  return {
      'rows': count.rows,
      'exact': count.exact,
      'group': count.group,
      'difference': published.difference(source, rows),
  }


def show(census: census_lib.Census) -> None:
  """Prints the tables."""
  from rich import console, table

  screen = console.Console()
  columns = ('rows', 'kept', 'images', 'text only', 'repaired', 'dropped')
  titles = ('rows', 'kept', 'images', 'text', 'fixed', 'dropped')
  sources = table.Table('source', *titles, 'published', 'differs', padding=0)
  for source, counts in sorted(census.sources.items()):
    known = published.COUNTS.get(source)
    sources.add_row(
        source,
        *(str(counts[c]) for c in columns),
        '' if known is None else known.text,
        published.difference(source, counts['rows']) or '',
    )
  sources.add_section()
  sources.add_row('all', *(str(census.total(c)) for c in columns), '', '')
  screen.print(sources)
  for title, counts in (
      ('dropped', census.reasons),
      ('repaired', census.repaired),
  ):
    if counts:
      why = table.Table(title, 'rows')
      for reason, number in counts.most_common():
        why.add_row(reason, str(number))
      screen.print(why)
  shown = set()
  for drop in census.dropped:
    if drop.reason not in shown:
      shown.add(drop.reason)
      screen.print(
          f'first dropped ({drop.reason}): {drop.message}',
          markup=False,
          highlight=False,
          soft_wrap=True,
      )


def histogram(
    census: census_lib.Census, path: str, unit: str, row_length: int | None
) -> None:
  """Writes a PNG: how many rows have which length."""
  from matplotlib import figure

  lengths_N = np.array(census.lengths or [0])
  panel = figure.Figure(figsize=(8, 4.5), layout='constrained')
  axes = panel.subplots()
  limit = max(int(np.percentile(lengths_N, 99.5)) + 1, row_length or 0, 16)
  axes.hist(np.minimum(lengths_N, limit), bins=80, range=(0, limit))
  axes.set_yscale('log')
  beyond = int(np.sum(lengths_N > limit))
  axes.set_xlabel(f'{unit} of a row' + (f' ({beyond} longer)' * bool(beyond)))
  axes.set_ylabel('rows')
  axes.set_title(
      f'{len(census.lengths)} rows, mean {lengths_N.mean():.0f}, median'
      f' {np.median(lengths_N):.0f}, longest {lengths_N.max()}'
  )
  if row_length is not None:
    axes.axvline(row_length, color='tab:red', linestyle='--')
    cut = float(np.mean(lengths_N > row_length))
    axes.annotate(
        f' row_length {row_length}: {cut:.2%} are longer ',
        (row_length, 1),
        xycoords=('data', 'axes fraction'),
        va='top',
        ha='right' if row_length > limit / 2 else 'left',
        color='tab:red',
    )
  panel.savefig(path, dpi=120)
