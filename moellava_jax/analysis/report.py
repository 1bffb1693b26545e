# SPDX-License-Identifier: Apache-2.0
"""Reports a training run as results.json and one HTML file; compares runs.

  python -m moellava_jax.analysis.report --runs RUN [RUN2 ...]

reads only files (`run_files` lists them), needs no accelerator and takes
seconds. Several runs are also compared: mean and sample standard deviation are
printed, and OUT/comparison.html shows their curves and how they differ.
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

from absl import app, flags

from moellava_jax.analysis import comparison, html, page, run_files
from moellava_jax.analysis import results as results_lib


def write(path: pathlib.Path) -> tuple[run_files.Run, dict[str, Any]]:
  """Writes results.json and report.html into a run; returns run and results.

  Raises:
    ValueError: see `run_files.read` and `results.scores`.
  """
  run = run_files.read(path)
  results = results_lib.collect(run)
  text = json.dumps(results, indent=1, ensure_ascii=False) + '\n'
  (path / 'results.json').write_text(text, encoding='utf-8')
  text = html.render(page.build(run, results))
  (path / 'report.html').write_text(text, encoding='utf-8')
  return run, results


def main(argv: Sequence[str]) -> int:
  given = [*flags.FLAGS.runs, *argv[1:]]
  if not given or any(name.startswith('-') for name in given):
    raise app.UsageError(
        f'--runs takes run directories, as in `--runs A B`; got {given}.'
    )
  paths = [pathlib.Path(name) for name in given]
  if len({path.resolve() for path in paths}) < len(paths):
    raise app.UsageError(f'--runs names a directory twice: {given}.')
  runs, many = [], []
  for path in paths:
    try:
      run, results = write(path)
    except (ValueError, OSError) as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    _show(f'{path}: scores in %', page.score_table(results))
    for line in run.absent:
      print(f'absent: {line}')
    print(f'results: {path / "results.json"}\nreport: {path / "report.html"}')
    runs.append(run)
    many.append(results)
  if len(many) > 1:
    seeds = ', '.join(str(results.get('seed', '?')) for results in many)
    out = pathlib.Path(flags.FLAGS.out or comparison.folder(paths))
    comparison.write(runs, many, out)
    compared = results_lib.compare(many)
    # On a terminal there is no room for a column per run.
    _show(f'{len(many)} runs, seeds {seeds}', comparison.table([], compared))
    print(f'comparison: {out / "comparison.html"}')
  return 0


def _show(title: str, table: html.Table) -> None:
  """Prints a table, unless it has no rows."""
  from rich import console
  from rich import table as rich_table

  if not table.rows:
    return
  grid = rich_table.Table(
      title=title, title_justify='left', box=None, padding=(0, 2, 0, 0)
  )
  for i, column in enumerate(table.columns):
    grid.add_column(column, justify='right' if i else 'left')
  for row in table.rows:
    grid.add_row(*row)
  console.Console(highlight=False, markup=False).print(grid)


def define_flags() -> None:
  flags.DEFINE_string(
      'out',
      None,
      'Directory of the comparison of several runs. Unset: the one that they'
      ' all lie in.',
  )
  flags.DEFINE_multi_string(
      'runs', [], 'Run directories: `--runs A B` or `--runs=A --runs=B`.'
  )


if __name__ == '__main__':
  define_flags()
  app.run(main)
