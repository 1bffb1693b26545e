# SPDX-License-Identifier: Apache-2.0
"""Grids: what is trained, how often, and what is left when something breaks."""

import contextlib
import csv
import json
import pathlib
import subprocess
import sys
import threading

from matplotlib import figure as mpl_figure
import pytest

from moellava_jax import config
from moellava_jax.analysis import (
    ablation,
    ablation_claims,
    ablation_commands,
    ablation_figure,
    ablation_files,
    ablation_jobs,
    ablation_page,
    ablation_plan,
    grids,
)

FAKE = pathlib.Path(__file__).parent / 'fake_commands.py'
ROOT = FAKE.parents[2]
SHAPES, QWEN = 'configs/shapes.py', 'configs/qwen_1_8b.py'
BENCHMARK = ablation_commands.Benchmark('shapes', None, None, None)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)  # Where configs/ is.


@pytest.fixture
def no_figures(monkeypatch):
  """Drawing takes most of the time of a grid of fake commands."""
  monkeypatch.setattr(
      ablation_figure, 'draw', lambda table: mpl_figure.Figure((1, 1))
  )


@pytest.fixture
def start(tmp_path):
  """Runs a grid with the fake commands; returns the exit code."""

  def run(grid='table6c', seeds=2, overrides=None, jobs=2, **more):
    options = ablation.Options(
        config=SHAPES,
        overrides=overrides or {},
        grid=grid,
        seeds=seeds,
        out=str(tmp_path / 'out'),
        benchmark=BENCHMARK,
        jobs=jobs,
        devices=(),
        **{'cell': None, 'dry_run': False, 'collect_only': False, **more},
    )
    call = (sys.executable, str(FAKE), str(tmp_path / 'calls'))
    commands = ablation_commands.Commands((*call, 'train'), (*call, 'evaluate'))
    return ablation.run(options, commands)

  return run


def _calls(tmp_path):
  """(stages or 'evaluate', flags) of every command that ran."""
  lines = (tmp_path / 'calls').read_text().splitlines()
  return [
      (flags.get('config.stages', kind), flags)
      for kind, flags in map(json.loads, lines)
  ]


def _count(tmp_path, what):
  return [name for name, _ in _calls(tmp_path)].count(what)


def _plan(tmp_path, **plan):
  (tmp_path / 'calls.plan').write_text(json.dumps(plan))


@pytest.mark.parametrize('path', [SHAPES, QWEN])
@pytest.mark.parametrize('name', grids.names())
def test_every_grid_fits_both_configs(name, path):
  grid = grids.get(name, path == SHAPES)
  cells = ablation_plan.cells(grid, path, [0], {})
  runs = [cell.run.name for cell in cells]
  assert len(set(runs)) == len(grid.rows) >= 2
  keys = {row.key for row in grid.rows}
  assert grid.against and keys >= {*grid.against, *grid.against.values()}


def test_a_key_is_one_row_in_all_grids():
  for embedded in (True, False):
    seen = {}
    for grid in grids.grids(embedded).values():
      for row in grid.rows:
        what = (row.stages, row.overrides, row.all_data)
        assert seen.setdefault(row.key, what) == what


def test_an_override_of_an_unknown_field_is_an_error():
  row = grids.Row('x', 'x', overrides=(('model.moe.num_expertz', 2),))
  grid = grids.Grid('x', 'x', (row,), {})
  with pytest.raises(config.UserError, match='num_expertz.*num_experts'):
    ablation_plan.cells(grid, SHAPES, [0], {})
  with pytest.raises(config.UserError, match='workdir is set by the grid'):
    ablation_plan.cells(
        grids.get('table5', True), SHAPES, [0], {'workdir': 'x'}
    )


def test_rows_differ_from_the_baseline_in_what_they_say():
  cells = {}
  for grid in grids.grids(True).values():
    for cell in ablation_plan.cells(grid, SHAPES, [3], {}):
      cells[cell.row.key] = cell
  base = cells['moe'].run
  assert [run.last for run in base.chain] == ['pretrain', 'finetune', 'moe']
  assert base.overrides == ()
  # Other settings of stage III share all that comes before it.
  for key in ('experts_8', 'top_1', 'all_layers', 'all_trained', 'argmax'):
    assert cells[key].run.before == base.before
  assert dict(cells['all_trained'].run.overrides) == {'moe.whole_lm': True}
  # (a) and (c) share stage I; another width shares nothing.
  assert cells['no_stage_2'].run.before == base.chain[0]
  assert cells['dense'].run.before == base.chain[0]
  assert cells['width_32_moe'].run.chain[0] != base.chain[0]
  other = ablation_plan.cells(grids.get('table5', True), SHAPES, [4], {})
  assert not {r.name for c in other for r in c.run.chain} & {
      r.name for c in cells.values() for r in c.run.chain
  }


def test_all_data_is_that_of_both_stages_and_as_long():
  def last(path, key):
    grid = grids.get('table5', path == SHAPES)
    (cell,) = (
        c for c in ablation_plan.cells(grid, path, [0], {}) if c.row.key == key
    )
    return dict(cell.run.overrides)

  for key, stage in (('no_stage_2', 'moe'), ('dense', 'finetune')):
    assert last(SHAPES, key) == {
        f'{stage}.data.json': 'RUN/data/finetune.json,RUN/data/moe.json',
        f'{stage}.data.weights': (2600.0, 600.0),
        f'{stage}.steps': 2600 + 600,
        f'{stage}.lr': 1.5e-3,
    }
    files = last(QWEN, key)
    assert files.keys() == {f'{stage}.data.json', f'{stage}.lr'}  # One epoch.
    assert len(files[f'{stage}.data.json'].split(',')) == 5 + 2


def test_a_new_switch_that_is_off_changes_no_digest(monkeypatch):
  def digest():
    grid = grids.get('table6c', True)
    return ablation_plan.cells(grid, SHAPES, [0], {})[0].digest

  known, settings = digest(), config.settings
  for value, same in ((False, True), (None, True), (0, False)):
    monkeypatch.setattr(
        config, 'settings', lambda *a, v=value: {**settings(*a), 'new': v}
    )
    assert (digest() == known) is same


@pytest.mark.usefixtures('no_figures')
def test_shared_stages_are_trained_once_a_seed(tmp_path, start):
  assert start('table5', seeds=2) == 0
  assert _count(tmp_path, "('warmup', 'pretrain')") == 2
  assert _count(tmp_path, "('finetune',)") == 2 * 2  # Of (b), and (c).
  assert _count(tmp_path, "('moe',)") == 2 * 2  # Of (a), and (b).
  assert _count(tmp_path, 'evaluate') == 2 * 3
  seeds = {flags.get('config.seed') for _, flags in _calls(tmp_path)}
  assert seeds == {'0', '1', None}
  # Another grid: the baseline is there, and all that its rows start from.
  before = len(_calls(tmp_path))
  assert start('table6c', seeds=2) == 0
  new = [name for name, _ in _calls(tmp_path)[before:]]
  assert sorted(new) == ["('moe',)"] * 2 + ['evaluate'] * 2
  # Nothing is left to do.
  assert start('table6c', seeds=2) == 0
  assert len(_calls(tmp_path)) == before + 4


def test_tables_say_what_the_cells_say(tmp_path, start, capsys):
  assert start(seeds=2) == 0
  assert 'top-1' in capsys.readouterr().out
  folder = tmp_path / 'out' / 'table6c'
  results = json.loads((folder / 'results.json').read_text())
  top_1, baseline = results['lines']
  assert (top_1['row'], top_1['against']) == ('top_1', 'moe')
  assert top_1['seeds'] == [0, 1] and baseline['against'] is None
  # Position: one of two wrong; the mean is over three categories.
  match = top_1['metrics']['exact match']
  assert match['by_seed'] == pytest.approx([5 / 6, 5 / 6])
  assert match['deviation'] == 0
  assert match['interval']['difference'] == pytest.approx(-1 / 6)
  assert match['interval']['low'] < -1 / 6 < match['interval']['high'] <= 0
  # 3 hits and a false alarm.
  f1 = top_1['metrics']['POPE-style F1']['by_seed']
  assert f1 == pytest.approx([6 / 7] * 2)
  assert baseline['metrics']['exact match']['interval'] is None
  assert (top_1['activated'], top_1['total']) == (150_000, 200_000)
  assert (top_1['seconds'], top_1['seconds_before']) == (4.5, 1.5 + 2.5 + 3.5)
  rows = list(csv.DictReader((folder / 'table.csv').read_text().splitlines()))
  (mean,) = (
      row
      for row in rows
      if (row['row'], row['metric'], row['seed'])
      == ('top_1', 'exact match', 'mean')
  )
  assert float(mean['value']) == pytest.approx(5 / 6)
  assert '| top-1 | 85.7 ± 0.0 |' in (folder / 'table.md').read_text()
  for name in ('table.png', 'table.svg'):
    assert (folder / name).stat().st_size > 10_000


@pytest.mark.usefixtures('no_figures')
def test_cells_are_small_and_name_no_folder(tmp_path, start):
  assert start(seeds=1) == 0
  for path in (tmp_path / 'out' / 'cells').iterdir():
    text = path.read_text()
    assert len(text) < 4000 and str(tmp_path) not in text


@pytest.mark.usefixtures('no_figures')
def test_a_failed_cell_is_marked_and_the_rest_goes_on(tmp_path, start, capsys):
  _plan(tmp_path, fail='--config.model.moe.top_k=1')
  assert start(seeds=2) == 1
  error = capsys.readouterr().err
  assert 'FAILED top_1.seed0' in error and 'no such thing' in error
  out = tmp_path / 'out'
  assert (out / 'cells' / 'moe.seed1.json').exists()
  record = json.loads((out / 'failed' / 'top_1.seed1.json').read_text())
  assert record['reason'].startswith('exit code 1\n')
  assert record['reason'].endswith('first line\nno such thing')
  assert 'no such thing' in pathlib.Path(record['log']).read_text()
  assert '| top-1 | failed |' in (out / 'table6c' / 'table.md').read_text()
  # A table alone still knows; the next run tries again, and only that.
  assert start(seeds=2, collect_only=True) == 0
  assert '| top-1 | failed |' in (out / 'table6c' / 'table.md').read_text()
  before = len(_calls(tmp_path))
  _plan(tmp_path)
  assert start(seeds=2) == 0
  assert len(_calls(tmp_path)) == before + 2 * 2  # Stage III and questions.
  assert not list((out / 'failed').iterdir())


@pytest.mark.usefixtures('no_figures')
def test_a_failed_shared_stage_fails_its_cells_once(tmp_path, start, capsys):
  _plan(tmp_path, fail="--config.stages=('finetune',)")
  assert start('table5', seeds=1) == 1
  assert _count(tmp_path, "('finetune',)") == 2
  assert (tmp_path / 'out' / 'cells' / 'no_stage_2.seed0.json').exists()
  error = capsys.readouterr().err
  assert 'FAILED moe.seed0' in error and error.count('no such thing') == 2
  assert _count(tmp_path, 'evaluate') == 1  # Of the row without stage II.


@pytest.mark.usefixtures('no_figures')
def test_an_interrupted_grid_goes_on_where_it_stopped(tmp_path, start, capsys):
  _plan(tmp_path, stop='--config.model.moe.top_k=1')
  assert start(seeds=2, jobs=1) == ablation.STOPPED == 75
  assert 'Run the same command again' in capsys.readouterr().err
  stopped = _calls(tmp_path)
  assert stopped[-1][1]['config.model.moe.top_k'] == '1'
  assert not (tmp_path / 'out' / 'failed').exists()
  _plan(tmp_path)
  assert start(seeds=2, jobs=1) == 0
  new = [name for name, _ in _calls(tmp_path)[len(stopped) :]]
  # The first seed has its stages I and II already.
  assert new.count("('warmup', 'pretrain')") == 1
  assert new.count("('moe',)") == 2 * 2


@pytest.mark.usefixtures('no_figures')
def test_other_settings_do_not_touch_finished_cells(tmp_path, start):
  assert start(seeds=1) == 0
  with pytest.raises(config.UserError, match='top_1.seed0.*other settings'):
    start(seeds=1, overrides={'moe.lr': 1e-4})
  assert start(seeds=1, overrides={'mesh.cpu_devices': 1}) == 0


@pytest.mark.usefixtures('no_figures')
def test_one_cell_at_a_time_for_job_arrays(tmp_path, start, capsys):
  assert start(seeds=1, dry_run=True) == 0
  text = capsys.readouterr().out
  assert '# 0: top_1:0' in text and '# 1: moe:0' in text
  commands = [line for line in text.splitlines() if line[0] != '#']
  assert (
      len(commands) == len(set(commands)) == 6
      and not (tmp_path / 'calls').exists()
  )
  assert start(seeds=1, cell='1') == 0
  assert not (tmp_path / 'out' / 'cells' / 'top_1.seed0.json').exists()
  assert start(seeds=1, cell='top_1:0') == 0
  assert _count(tmp_path, 'evaluate') == 2
  with pytest.raises(config.UserError, match='0 to 1 or one of top_1:0, moe:0'):
    start(seeds=1, cell='top_2:0')


def test_of_two_that_want_the_same_job_one_runs_it(tmp_path):
  # Without a lock both would ask at the same time whether it is done.
  done, both = tmp_path / 'done', threading.Barrier(2)

  def is_done():
    with contextlib.suppress(threading.BrokenBarrierError):
      both.wait(timeout=2)
    return done.exists()

  code = (
      'import pathlib, sys\n'
      'with open(sys.argv[1], "a") as f: f.write("ran\\n")\n'
      'pathlib.Path(sys.argv[2]).touch()\n'
  )
  ran = tmp_path / 'ran'
  job = ablation_jobs.Job(
      'job',
      (sys.executable, '-c', code, str(ran), str(done)),
      tmp_path / 'job.log',
      (),
      is_done,
      lambda: None,
  )
  failures = []

  def work():
    runner = ablation_jobs.Runner([{}], lambda *_: None)
    failures.append(runner.run([job]))

  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert failures == [{}, {}]
  assert ran.read_text() == 'ran\n'


@pytest.mark.parametrize('told', [None, 'glibc.malloc.hugetlb=0'])
def test_jobs_have_huge_pages_unless_told_otherwise(
    tmp_path, monkeypatch, told
):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  if told:
    monkeypatch.setenv('GLIBC_TUNABLES', told)
  log = tmp_path / 'job.log'
  command = ('printenv', 'GLIBC_TUNABLES')
  job = ablation_jobs.Job('a', command, log, (), log.exists, lambda: None)
  assert ablation_jobs.Runner([{}], lambda *_: None).run([job]) == {}
  assert log.read_text().split()[-1] == (told or 'glibc.malloc.hugetlb=1')


def test_launch_scripts_take_the_flags_of_training():
  cell, *_ = ablation_plan.cells(grids.get('table5', True), SHAPES, [0], {})
  launch = ('bash', 'launch/local.sh')
  commands = ablation_commands.Commands((), (), launch)
  command = ablation_commands.train_command(cell.run, '/out', commands)
  assert command[:4] == ['bash', 'launch/local.sh', SHAPES, '--']
  done = subprocess.run(
      [*command[:3], '--dry-run', *command[3:]],
      capture_output=True,
      text=True,
      check=True,
  )
  assert '-m moellava_jax.train.main --config=' in done.stdout
  assert '--config.moe.steps=3200' in done.stdout


def test_real_models_need_questions():
  grid = grids.get('table6c', False)
  cell, *_ = ablation_plan.cells(grid, QWEN, [0], {'init.lm': 'hf:a/b'})
  with pytest.raises(config.UserError, match='--questions=FILE'):
    ablation_commands.sources(cell, 'OUT', BENCHMARK)
  gqa = ablation_commands.Benchmark('gqa', 'q.jsonl', 'images', 'labels.json')
  command = ablation_commands.eval_command(
      cell, 'OUT', gqa, ablation_commands.COMMANDS
  )
  flags = ('--benchmark=gqa', '--questions=q.jsonl', '--images=images')
  assert {*flags, '--annotations=labels.json'} <= set(command)
  # Weights of others go to the first run; those after it start from ours.
  first, *_, last = (
      ablation_commands.train_command(run, 'OUT', ablation_commands.COMMANDS)
      for run in cell.run.chain
  )
  assert '--config.init.lm=hf:a/b' in first
  assert not any('init.lm' in flag for flag in last)
  assert any('init.checkpoint=OUT/runs/finetune-' in flag for flag in last)


@pytest.mark.usefixtures('no_figures')
def test_the_page_compares_with_the_paper(tmp_path, start):
  assert start(seeds=2) == 0
  out = tmp_path / 'page'
  source = ablation_claims.Source(SHAPES, str(tmp_path / 'out'), 'shapes', {})
  text = ablation_page.write(source, str(out)).read_text()
  assert '## Table 6c' in text and '## Table 5' not in text
  assert 'Not run yet: table5, table6a' in text
  assert '| top-1 | 74.5 | 58.4 | 58.0 | 44.0 | 85.7 | 19 |' in text
  (claim,) = (line for line in text.splitlines() if line.startswith('- Paper'))
  assert '"top-2" above "top-1" on 5 of 5 benchmarks. Here:' in claim
  assert 'exact match +16.7 [' in claim
  assert 'not judged by 2 of 5 seeds' in claim
  assert (out / 'table6c.png').exists()
  assert len(list((out / 'cells').glob('*.seed*.json'))) == 4
  # From what was kept alone it is the same page.
  again = ablation_claims.Source(SHAPES, str(out), 'shapes', {})
  assert ablation_page.write(again, str(out)).read_text() == text


@pytest.mark.usefixtures('no_figures')
def test_samples_are_chosen_by_rule(tmp_path, start):
  assert start('table5', seeds=1) == 0
  out = tmp_path / 'page'
  source = ablation_claims.Source(SHAPES, str(tmp_path / 'out'), 'shapes', {})
  text = ablation_page.write(source, str(out)).read_text()
  assert '## Questions and answers (seed 0)' in text
  content = json.loads((out / 'samples' / 'samples.json').read_text())
  images = [sample['image'] for sample in content['samples']]
  assert len(images) == len(set(images)) == 3
  assert {(out / 'samples' / image).exists() for image in images} == {True}


def test_units_of_the_table():
  table = ablation_files
  assert table.count(2_242_725_888) == '2.24 B'
  assert [table.duration(s) for s in (5, 600, 8000, None)] == [
      '5 s',
      '10.0 min',
      '2.2 h',
      '-',
  ]


@pytest.mark.large
def test_a_real_grid(tmp_path):
  command = (
      sys.executable,
      '-m',
      'moellava_jax.analysis.ablation',
      '--config=configs/shapes.py:smoke',
      '--config.model.llm.depth=2',
      '--config.model.vision.depth=2',
      '--grid=table6a',
      '--seeds=1',
      f'--out={tmp_path}',
  )
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  results = json.loads((tmp_path / 'table6a' / 'results.json').read_text())
  ffn, whole = results['lines']
  assert ffn['seeds'] == whole['seeds'] == [0]
  assert ffn['total'] == whole['total']
  trained = {
      name: json.loads((tmp_path / 'cells' / f'{name}.seed0.json').read_text())[
          'parameters'
      ]['trained_parameters']
      for name in ('moe', 'all_trained')
  }
  assert trained['all_trained'] > trained['moe'] > 0
