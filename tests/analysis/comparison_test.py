# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: every run has its place, and so has what differs."""

import csv
import json
import re

import numpy as np
import pytest

from moellava_jax.analysis import (
    comparison,
    plots_compare,
    results,
    run_files,
)
from tests.analysis import boxes, report_test


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two seeds of one setting, and a dense run that was never evaluated."""
  folder = tmp_path_factory.mktemp('runs')
  paths = [
      report_test.make_run(folder / name, seed)
      for name, seed in (('a', 1), ('b', 2))
  ]
  report_test.answer(paths[1], 'moe', report_test.GOOD, ('2', '3', 'red', 'no'))
  dense = folder / 'dense'
  dense.mkdir()
  config = {'seed': 3, 'stages': ['finetune'], 'workdir': str(dense)}
  config['data'] = {'json': f'{dense}/data/a.json'}
  (dense / 'config.json').write_text(json.dumps(config))
  rows = [report_test.metrics('finetune', n) for n in range(1, 6)]
  (dense / 'metrics.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows)
  )
  return [run_files.read(path) for path in (*paths, dense)]


def test_page_and_table_of_runs(runs, tmp_path):
  many = [results.collect(run) for run in runs]
  comparison.write(runs, many, tmp_path)
  page = (tmp_path / 'comparison.html').read_text()
  assert page.count('<figure>') == 3
  assert not re.search(r'(src|href)=(?!"data:)', page)
  assert 'Runs without a sparse stage have no curve' in page
  assert 'dense: stages.json is missing' in page
  with (tmp_path / 'comparison.csv').open() as file:
    rows = {row['metric']: row for row in csv.DictReader(file)}
  exact = rows['exact_match.mean']
  assert [float(exact[name]) for name in 'ab'] == pytest.approx([1, 2 / 3])
  assert (exact['dense'], exact['runs']) == ('', '2')
  assert float(exact['mean']) == pytest.approx(5 / 6)
  assert float(exact['deviation']) == pytest.approx(np.std([1, 2 / 3], ddof=1))
  assert float(rows['tokens_per_s.finetune']['dense']) == 1200
  assert rows['tokens_per_s.finetune']['runs'] == '3'


def test_differences_are_settings_and_not_places(runs):
  table = comparison.differences(comparison.names(runs), runs)
  found = {row[0]: row[1:] for row in table.rows}
  assert found['environment.seed'] == ('1', '2', '–')
  assert found['config.data.json'] == ('–', '–', 'RUN/data/a.json')
  same = comparison.differences(['a', 'a2'], [runs[0], runs[0]])
  assert not same.rows
  assert same.caption.endswith('There are none.')


def test_names_are_as_long_as_needed(runs, tmp_path):
  assert comparison.names(runs) == ['a', 'b', 'dense']
  twins = [report_test.make_run(tmp_path / name / 'run') for name in ('x', 'y')]
  named = comparison.names([run_files.read(path) for path in twins])
  assert named == ['x/run', 'y/run']
  assert comparison.folder(twins) == tmp_path.resolve()


def test_curves_of_runs_are_legible_and_theirs(runs):
  called = comparison.names(runs)
  losses = plots_compare.losses(called, [run.metrics for run in runs])
  titles = [ax.get_title('left') for ax in losses.axes if ax.axison]
  assert titles == list(report_test.STAGES)
  drawn = [len(ax.get_lines()) for ax in losses.axes]
  assert drawn == [2, 2, 3, 2]
  balance = plots_compare.balance(called, [run.moe_rows for run in runs])
  aux, drops = balance.axes[:2]
  np.testing.assert_allclose(aux.get_lines()[1].get_ydata(), 1.1)
  np.testing.assert_allclose(drops.get_lines()[1].get_ydata(), 10)
  compared = results.compare([results.collect(run) for run in runs])
  scores = plots_compare.scores(called, compared)
  for figure in (losses, balance, scores):
    boxes.check(figure)
  (ax,) = scores.axes
  shown = [tick.get_text() for tick in ax.get_yticklabels()]
  y = shown.index('exact_match.mean')
  # The bar, the mean, the runs that have it.
  of_metric = [
      line for line in ax.get_lines() if abs(line.get_ydata()[0] - y) < 0.5
  ]
  x = [line.get_xdata()[0] for line in of_metric[1:]]
  assert x == pytest.approx([500 / 6, 100, 200 / 3])
