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

On several devices: --devices=0,1,2,3 runs a command on each. Through a launch
script, which trains on all devices of a machine or on several machines:

  --launch='bash launch/local.sh'
  --launch='sbatch --wait --nodes=2 launch/slurm.sbatch' --jobs=4

As independent jobs, with OUT on a disk that all of them see, one cell each,
numbered as --dry_run lists them; then the table:

  python -m moellava_jax.analysis.ablation ... --cell=$SLURM_ARRAY_TASK_ID
  python -m moellava_jax.analysis.ablation ... --collect_only

--cell takes ROW:SEED too. Jobs that need the same stage wait for each other,
where the disk knows locks; elsewhere run one cell of each seed first.

Exit codes: 0 all cells are finished; 1 some have failed, or a mistake that the
message explains; 75 stopped by a signal.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import shlex
import sys
from typing import Any

from absl import app, flags

from moellava_jax import config
from moellava_jax.analysis import (
    ablation_cell,
    ablation_commands,
    ablation_files,
    ablation_jobs,
    ablation_plan,
    ablation_run,
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
  benchmark: ablation_commands.Benchmark
  jobs: int
  devices: tuple[str, ...]
  cell: str | None
  dry_run: bool
  collect_only: bool


def run(
    options: Options,
    commands: ablation_commands.Commands = ablation_commands.COMMANDS,
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
    ablation_commands.sources(cell, out, options.benchmark)
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
    failed = ablation_run.run(
        chosen,
        out,
        options.benchmark,
        commands,
        jobs=options.jobs,
        devices=options.devices,
    )
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
        command = ablation_commands.train_command(part, out, commands)
        print(ablation_commands.shell(command))
      printed.add(part.name)
    command = ablation_commands.eval_command(cell, out, benchmark, commands)
    print(ablation_commands.shell(command))


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
  flags.DEFINE_string(
      'launch', '', 'Trains with this, which takes CONFIG -- FLAGS.'
  )
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
      benchmark=ablation_commands.Benchmark(
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
    launch = tuple(shlex.split(values.launch))
    commands = dataclasses.replace(ablation_commands.COMMANDS, launch=launch)
    return run(options, commands)
  except config.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1


if __name__ == '__main__':
  define_flags()
  app.run(main)
