# SPDX-License-Identifier: Apache-2.0
r"""Trains and compares variants: a grid of configs, each with several seeds.

  python -m moellava_jax.analysis.ablation --config=configs/shapes.py \
      --grid=table5 --seeds=5 --out=runs/ablations
  python -m moellava_jax.analysis.ablation ... --dry_run

Grids: see `grids.py`. The same --out serves all of them: what two rows have in
common is trained once. An interrupted grid goes on where it stopped when the
same command is run again; a cell that has failed is tried again. With all cells
finished it only writes the tables: OUT/GRID/table.md, .csv, .png, .svg and
results.json.

Real models are asked a benchmark of evals.main; --config.* go to every run:

  python -m moellava_jax.analysis.ablation --config=configs/qwen_1_8b.py \
      --config.init.lm=hf:Qwen/Qwen-1_8B \
      --config.init.tower=hf:openai/clip-vit-large-patch14-336 \
      --grid=table6c --seeds=3 --out=runs/qwen_top_k \
      --benchmark=gqa --questions=F --images=DIR

On several devices: --devices=0,1,2,3 runs a cell on each. As independent jobs,
with OUT on a disk that all of them see, one cell each; then the table:

  sbatch --array=0-14 ...  python -m moellava_jax.analysis.ablation ... \
      --cell=$SLURM_ARRAY_TASK_ID
  python -m moellava_jax.analysis.ablation ... --collect_only

--cell takes a number, as --dry_run lists them, or ROW:SEED. Jobs that need the
same stage wait for each other, where the disk knows locks; elsewhere run one
cell of each seed first.

Exit codes: 0 all cells are finished; 1 some have failed, or a mistake that the
message explains; 75 stopped by a signal.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import signal
import sys
from typing import Any

from absl import app, flags

from moellava_jax import config, run_folder
from moellava_jax.analysis import (
    ablation_cell,
    ablation_files,
    ablation_jobs,
    ablation_plan,
    ablation_progress,
    ablation_table,
    grids,
)

STOPPED = 75


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags."""

  config: str
  overrides: Mapping[str, Any]
  grid: str
  seeds: int | None  # None: as many as the grid says.
  out: str
  benchmark: ablation_plan.Benchmark
  jobs: int
  devices: tuple[str, ...]
  cell: str | None
  dry_run: bool
  collect_only: bool


def run(
    options: Options, commands: ablation_plan.Commands = ablation_plan.COMMANDS
) -> int:
  """Does what the flags ask for; returns the exit code.

  Raises:
    UserError: settings that do not fit, found before anything runs.
  """
  out = os.path.abspath(options.out)
  raw = ablation_plan.load(options.config, {})
  embedded = raw.data.shapes is not None
  grid = grids.get(options.grid, embedded)
  seeds = range(options.seeds or grid.seeds)
  cells = ablation_plan.cells(grid, options.config, seeds, options.overrides)
  for cell in cells:
    ablation_plan.sources(cell, out, options.benchmark)
  chosen = _chosen(cells, options.cell)
  if options.dry_run:
    _print_commands(cells, chosen, out, options.benchmark, commands)
    return 0
  stale = _stale(chosen, out)
  if stale and not options.collect_only:
    raise config.UserError(
        f'{stale[0]} was made with other settings of'
        f' {options.config}: use another --out, or delete it'
        f' ({len(stale)} such files).'
    )
  failed: dict[str, ablation_jobs.Failure] = {}
  if not options.collect_only:
    failed = _run_cells(chosen, out, options, commands)
  reasons = {name: f'{f.reason}\n{f.log}' for name, f in failed.items()}
  if options.cell is None:
    _show(grid, seeds, options, out, reasons)
  for name, failure in failed.items():
    if not failure.stopped:
      print(
          f'FAILED {name}: {failure.job}\n{failure.reason}\n'
          f'Log: {failure.log}',
          file=sys.stderr,
      )
  if any(failure.stopped for failure in failed.values()):
    print('Stopped. Run the same command again to go on.', file=sys.stderr)
    return STOPPED
  return 1 if failed else 0


def _chosen(
    cells: list[ablation_plan.Cell], which: str | None
) -> list[ablation_plan.Cell]:
  """All cells, or the one of --cell."""
  if which is None:
    return cells
  if which.isdigit() and int(which) < len(cells):
    return [cells[int(which)]]
  found = [c for c in cells if which == f'{c.row.key}:{c.seed}']
  if not found:
    raise config.UserError(
        f'--cell={which}: expected 0 to {len(cells) - 1} or one of'
        f' {", ".join(f"{c.row.key}:{c.seed}" for c in cells)}.'
    )
  return found


def _stale(cells: Sequence[ablation_plan.Cell], out: str) -> list[str]:
  """Files of cells that were made with other settings."""
  return [
      str(path)
      for cell in cells
      if (path := ablation_cell.path_of(out, cell.name)).exists()
      and ablation_cell.read_json(path)['digest'] != cell.digest
  ]


def _jobs(
    cells: Sequence[ablation_plan.Cell],
    out: str,
    benchmark: ablation_plan.Benchmark,
    commands: ablation_plan.Commands,
) -> list[ablation_jobs.Job]:
  """Trainings and evaluations; those that cells share are there once."""
  jobs: dict[str, ablation_jobs.Job] = {}
  logs = pathlib.Path(out) / 'logs'
  for cell in cells:
    if ablation_cell.read(out, cell.name, benchmark.name) is not None:
      continue
    for part in cell.run.chain:
      jobs.setdefault(
          part.name,
          ablation_jobs.Job(
              name=part.name,
              command=ablation_plan.train_command(part, out, commands),
              log=logs / f'{part.name}.log',
              needs=() if part.before is None else (part.before.name,),
              is_done=_Trained(part, out),
              finish=_nothing,
          ),
      )
    name = f'{cell.name}.{benchmark.name}'
    jobs[name] = ablation_jobs.Job(
        name=name,
        command=ablation_plan.eval_command(cell, out, benchmark, commands),
        log=logs / f'{name}.log',
        needs=(cell.run.name,),
        is_done=_Evaluated(cell, out, benchmark),
        finish=_Finish(cell, out, benchmark),
    )
  return list(jobs.values())


def _nothing() -> None:
  pass


@dataclasses.dataclass(frozen=True)
class _Trained:
  """Whether all stages of a run are finished, as it says itself."""

  part: ablation_plan.Run
  out: str

  def __call__(self) -> bool:
    path = pathlib.Path(self.part.folder(self.out)) / 'stages.json'
    if not path.exists():
      return False
    return set(self.part.stages) <= ablation_cell.read_json(path).keys()


@dataclasses.dataclass(frozen=True)
class _Evaluated:
  """Whether the JSON of a cell is there."""

  cell: ablation_plan.Cell
  out: str
  benchmark: ablation_plan.Benchmark

  def __call__(self) -> bool:
    name = self.benchmark.name
    return ablation_cell.read(self.out, self.cell.name, name) is not None


@dataclasses.dataclass(frozen=True)
class _Finish:
  """Writes the JSON of a cell."""

  cell: ablation_plan.Cell
  out: str
  benchmark: ablation_plan.Benchmark

  def __call__(self) -> None:
    ablation_cell.write(self.cell, self.out, self.benchmark)


def _run_cells(
    cells: Sequence[ablation_plan.Cell],
    out: str,
    options: Options,
    commands: ablation_plan.Commands,
) -> dict[str, ablation_jobs.Failure]:
  """Runs what is left; returns the failures by cell."""
  benchmark = options.benchmark
  jobs = _jobs(cells, out, benchmark, commands)
  ends = {f'{cell.name}.{benchmark.name}': cell for cell in cells}
  todo = [job.name for job in jobs if job.name in ends]
  if not todo:
    return {}
  with ablation_progress.Progress(len(cells), len(cells) - len(todo)) as bar:
    runner = ablation_jobs.Runner(
        _slots(out, options),
        lambda name, state: bar.say(name, state, name in ends),
    )
    before = _on_signals(runner)
    try:
      failures = runner.run(jobs)
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)
  failed = {
      ends[name].name: failure
      for name, failure in failures.items()
      if name in ends
  }
  _record(cells, failed, out)
  return failed


def _slots(out: str, options: Options) -> list[dict[str, str]]:
  """Environments of the commands that run at the same time."""
  shared = {
      # Cells of a row compile the same programs.
      'JAX_COMPILATION_CACHE_DIR': os.path.join(out, 'jax_cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      'TOKENIZERS_PARALLELISM': 'false',
  }
  shared = {k: os.environ.get(k, v) for k, v in shared.items()}
  if options.devices:
    return [
        {**shared, 'CUDA_VISIBLE_DEVICES': device} for device in options.devices
    ]
  return [shared] * options.jobs


def _on_signals(runner: ablation_jobs.Runner) -> dict[int, Any]:
  """The first Ctrl-C or SIGTERM stops the commands, the second this process."""

  def stop(number, frame):
    for other in (signal.SIGINT, signal.SIGTERM):
      signal.signal(other, signal.SIG_DFL)
    runner.stop()

  return {
      number: signal.signal(number, stop)
      for number in (signal.SIGINT, signal.SIGTERM)
  }


def _record(
    cells: Sequence[ablation_plan.Cell],
    failed: Mapping[str, ablation_jobs.Failure],
    out: str,
) -> None:
  """OUT/failed/CELL.json of those that failed; gone when they have not."""
  folder = pathlib.Path(out) / 'failed'
  for cell in cells:
    path = folder / f'{cell.name}.json'
    failure = failed.get(cell.name)
    if failure is None:
      path.unlink(missing_ok=True)
    elif not failure.stopped:
      folder.mkdir(exist_ok=True)
      content = {**dataclasses.asdict(failure), 'log': str(failure.log)}
      run_folder.write_json(path, content)


def _show(
    grid, seeds, options: Options, out: str, reasons: dict[str, str]
) -> None:
  """Writes the files of the table and prints it."""
  from rich import console, table

  folder = pathlib.Path(out) / 'failed'
  for path in folder.glob('*.json') if folder.exists() else ():
    known = ablation_cell.read_json(path)
    reasons.setdefault(path.stem, f'{known["reason"]}\n{known["log"]}')
  found = ablation_table.collect(
      grid, options.config, seeds, out, options.benchmark.name, reasons
  )
  written = ablation_files.write(found, out)
  header = ablation_files.header(found)
  shown = table.Table(
      title=found.title, title_justify='left', box=None, padding=(0, 2, 0, 0)
  )
  for i, column in enumerate(header):
    shown.add_column(column, justify='right' if i else 'left')
  for line in found.lines:
    shown.add_row(
        *(c.replace('**', '') for c in ablation_files.cells_of(line, found))
    )
  console.Console(highlight=False, markup=False, width=200).print(shown)
  print(f'Written: {written}/table.md, .csv, .png, .svg and results.json')


def _print_commands(cells, chosen, out, benchmark, commands) -> None:
  """Every command of the cells, each once, in an order that works."""
  printed = set()
  for number, cell in enumerate(cells):
    if cell not in chosen:
      continue
    state = ''
    if ablation_cell.read(out, cell.name, benchmark.name) is not None:
      state = ' (finished)'
    print(f'# {number}: {cell.row.key}:{cell.seed}, {cell.row.label}{state}')
    for part in cell.run.chain:
      if part.name not in printed:
        command = ablation_plan.train_command(part, out, commands)
        print(ablation_plan.shell(command))
      printed.add(part.name)
    command = ablation_plan.eval_command(cell, out, benchmark, commands)
    print(ablation_plan.shell(command))


def define_flags() -> None:
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
      'config', None, 'Config file of all stages.', lock_config=True
  )
  flags.DEFINE_enum('grid', None, grids.names(), 'Which rows.', required=True)
  flags.DEFINE_integer(
      'seeds', None, 'How many, from 0; unset: the grid says.', lower_bound=1
  )
  flags.DEFINE_string('out', None, 'Where all of it is kept.', required=True)
  flags.DEFINE_string('benchmark', 'shapes', 'One of evals.main.')
  flags.DEFINE_string('questions', None, 'Its question file; Shapes: none.')
  flags.DEFINE_string('images', None, 'Root of its image paths.')
  flags.DEFINE_string('annotations', None, 'Its labels, as for evals.main.')
  flags.DEFINE_integer('jobs', 1, 'Commands at a time.', lower_bound=1)
  flags.DEFINE_list('devices', [], 'GPUs; a command at a time on each.')
  flags.DEFINE_string('cell', None, 'Only this one: its number or ROW:SEED.')
  flags.DEFINE_bool('dry_run', False, 'Print every command, run none.')
  flags.DEFINE_bool('collect_only', False, 'Only write the table.')


def main(argv: Sequence[str]) -> int:
  from ml_collections import config_flags

  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  values = flags.FLAGS
  if values['config'].value is None:
    raise app.UsageError('--config=FILE is required.')
  options = Options(
      config=config_flags.get_config_filename(values['config']),
      overrides=config_flags.get_override_values(values['config']),
      grid=values.grid,
      seeds=values.seeds,
      out=values.out,
      benchmark=ablation_plan.Benchmark(
          values.benchmark,
          values.questions,
          values.images,
          values.annotations,
      ),
      jobs=values.jobs,
      devices=tuple(values.devices),
      cell=values.cell,
      dry_run=values.dry_run,
      collect_only=values.collect_only,
  )
  try:
    return run(options)
  except config.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  define_flags()
  app.run(main)
