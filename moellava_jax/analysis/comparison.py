# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: a page, and a table for other programs."""

from collections.abc import Iterator, Mapping, Sequence
import csv
import io
import math
import os
import pathlib
import shlex
from typing import Any

from moellava_jax.analysis import html, look, plots_compare, run_files
from moellava_jax.analysis import results as results_lib

_LONGEST = 28  # Letters of a setting; of paths and revisions the end tells.


def names(runs: Sequence[run_files.Run]) -> list[str]:
  """What tells the runs apart: their folders' names, longer where needed."""
  paths = [run.path.resolve() for run in runs]
  for parts in range(1, max(len(path.parts) for path in paths) + 1):
    short = ['/'.join(path.parts[-parts:]) for path in paths]
    if len(set(short)) == len(short):
      return short
  return [str(path) for path in paths]


def table(
    called: Sequence[str], compared: Mapping[str, results_lib.Spread]
) -> html.Table:
  """A row per metric: every run, mean and sample standard deviation.

  Args:
    called: names of the runs; none to leave the values of the runs out.
    compared: what `results.compare` says.
  """
  rows = []
  for name, spread in compared.items():
    unit = results_lib.unit(name)
    rows.append(
        (
            name,
            unit,
            *(_text(value, unit) for value in spread.values[: len(called)]),
            _text(spread.mean, unit),
            _text(spread.deviation, unit),
            str(spread.count),
        )
    )
  return html.Table(
      'Each run, mean and sample standard deviation over the runs that have'
      ' the metric.',
      ('metric', 'unit', *called, 'mean', '+-', 'runs'),
      tuple(rows),
  )


def differences(
    called: Sequence[str], runs: Sequence[run_files.Run]
) -> html.Table:
  """Settings and parts of the environment that are not the same everywhere."""
  flat = [
      dict(
          [
              *_flat(run.config, 'config'),
              *_flat(run.environment, 'environment'),
          ]
      )
      for run in runs
  ]
  keys = list(dict.fromkeys(key for one in flat for key in one))
  rows = []
  for key in keys:
    values = [
        _short(one.get(key, '–'), run)
        for one, run in zip(flat, runs, strict=True)
    ]
    if len(set(values)) > 1:
      rows.append((key, *values))
  return html.Table(
      'Settings and environment that differ between the runs.'
      + ('' if rows else ' There are none.'),
      ('setting', *called),
      tuple(rows),
  )


def page(
    runs: Sequence[run_files.Run], many: Sequence[Mapping[str, Any]]
) -> html.Page:
  """The comparison of at least two runs.

  Args:
    runs: the files of the runs.
    many: as many; their `results.collect`.
  """
  called = names(runs)
  compared = results_lib.compare(many)
  figures = []
  if any(run.metrics for run in runs):
    figures.append(
        html.Figure(
            'Loss of every stage',
            'Running means of the training loss; lower is better. Curves of one'
            ' setting that lie apart show how much the seed matters, and how'
            ' small a difference between settings means nothing.',
            look.png(
                plots_compare.losses(called, [run.metrics for run in runs])
            ),
        )
    )
  sparse = []
  if any(run.moe_rows for run in runs):
    sparse.append(
        html.Figure(
            'Load balancing during stage moe',
            'Means over the MoE layers, as running means. A loss of 1 is even'
            ' use of the experts.'
            + (
                ''
                if all(run.moe_rows for run in runs)
                else ' Runs without a sparse stage have no curve.'
            ),
            look.png(
                plots_compare.balance(called, [run.moe_rows for run in runs])
            ),
        )
    )
  scores = ()
  if any(results_lib.unit(name) == '%' for name in compared):
    scores = (
        html.Figure(
            'Scores',
            'Every run, the mean (upright line) and one sample standard'
            ' deviation to both sides of it (bar). A difference that is smaller'
            ' than the bars is no finding.',
            look.png(plots_compare.scores(called, compared)),
        ),
    )
  return html.Page(
      title=f'Comparison of {len(runs)} runs',
      subtitle=', '.join(called),
      absent=tuple(
          f'{name}: {line}'
          for name, run in zip(called, runs, strict=True)
          for line in run.absent
      ),
      results=(table(called, compared),),
      scores=scores,
      training=(differences(called, runs),),
      losses=tuple(figures),
      routing=(),
      experts=tuple(sparse),
      samples=(),
      images=pathlib.Path(),
      commands=(
          shlex.join(
              [
                  'python',
                  '-m',
                  'moellava_jax.analysis.report',
                  '--runs',
                  *(str(run.path) for run in runs),
              ]
          ),
      ),
      details=(),
  )


def write(
    runs: Sequence[run_files.Run],
    many: Sequence[Mapping[str, Any]],
    out: pathlib.Path,
) -> None:
  """Writes OUT/comparison.html and OUT/comparison.csv."""
  called = names(runs)
  compared = results_lib.compare(many)
  text = io.StringIO(newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(('metric', *called, 'mean', 'deviation', 'runs'))
  for name, spread in compared.items():
    deviation = '' if math.isnan(spread.deviation) else spread.deviation
    writer.writerow(
        (name, *spread.values, spread.mean, deviation, spread.count)
    )
  out.mkdir(parents=True, exist_ok=True)
  (out / 'comparison.csv').write_text(text.getvalue(), encoding='utf-8')
  (out / 'comparison.html').write_text(
      html.render(page(runs, many)), encoding='utf-8'
  )


def folder(paths: Sequence[pathlib.Path]) -> pathlib.Path:
  """Where a comparison goes by default: what the runs have in common."""
  return pathlib.Path(os.path.commonpath([path.resolve() for path in paths]))


def _text(value: float | None, unit: str) -> str:
  if value is None or math.isnan(value):
    return '–'
  if unit == '%':
    return f'{100 * value:.1f}'
  return f'{value:.3f}' if unit == 'nats' else f'{value:,.0f}'


def _short(value: str, run: run_files.Run) -> str:
  """A path within the run says nothing more than that it lies there."""
  text = value.replace(str(run.config.get('workdir', run.path)), 'RUN')
  return text if len(text) <= _LONGEST else f'…{text[-_LONGEST:]}'


def _flat(tree: Any, path: str) -> Iterator[tuple[str, str]]:
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _flat(value, f'{path}.{key}')
  else:
    yield path, str(tree)
