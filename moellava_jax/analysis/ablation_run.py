# SPDX-License-Identifier: Apache-2.0
"""Trains and asks what is not finished yet of some cells."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import signal
from typing import Any

from moellava_jax import run_folder
from moellava_jax.analysis import (
    ablation_cell,
    ablation_commands,
    ablation_jobs,
    ablation_plan,
    ablation_progress,
)


def _jobs(
    cells: Sequence[ablation_plan.Cell],
    out: str,
    benchmark: ablation_commands.Benchmark,
    commands: ablation_commands.Commands,
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
              command=ablation_commands.train_command(part, out, commands),
              log=logs / f'{part.name}.log',
              needs=() if part.before is None else (part.before.name,),
              is_done=_Trained(part, out),
              finish=_nothing,
          ),
      )
    name = f'{cell.name}.{benchmark.name}'
    jobs[name] = ablation_jobs.Job(
        name=name,
        command=ablation_commands.eval_command(cell, out, benchmark, commands),
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
  benchmark: ablation_commands.Benchmark

  def __call__(self) -> bool:
    name = self.benchmark.name
    return ablation_cell.read(self.out, self.cell.name, name) is not None


@dataclasses.dataclass(frozen=True)
class _Finish:
  """Writes the JSON of a cell."""

  cell: ablation_plan.Cell
  out: str
  benchmark: ablation_commands.Benchmark

  def __call__(self) -> None:
    ablation_cell.write(self.cell, self.out, self.benchmark)


def run(
    cells: Sequence[ablation_plan.Cell],
    out: str,
    benchmark: ablation_commands.Benchmark,
    commands: ablation_commands.Commands,
    *,
    jobs: int,
    devices: Sequence[str],
) -> dict[str, ablation_jobs.Failure]:
  """Runs what is left of cells; returns the failures by cell.

  Args:
    cells: to be finished.
    out: absolute.
    benchmark: what they are asked.
    commands: that train and ask.
    jobs: commands at a time.
    devices: GPUs; if there are any, a command at a time on each instead.
  """
  todo_jobs = _jobs(cells, out, benchmark, commands)
  ends = {f'{cell.name}.{benchmark.name}': cell for cell in cells}
  todo = [job.name for job in todo_jobs if job.name in ends]
  if not todo:
    return {}
  with ablation_progress.Progress(len(cells), len(cells) - len(todo)) as bar:
    runner = ablation_jobs.Runner(
        _slots(out, jobs, devices),
        lambda name, state: bar.say(name, state, name in ends),
    )
    before = _on_signals(runner)
    try:
      failures = runner.run(todo_jobs)
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


def _slots(out: str, jobs: int, devices: Sequence[str]) -> list[dict[str, str]]:
  """Environments of the commands that run at the same time."""
  shared = {
      # Cells of a row compile the same programs.
      'JAX_COMPILATION_CACHE_DIR': os.path.join(out, 'jax_cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      'TOKENIZERS_PARALLELISM': 'false',
  }
  shared = {k: os.environ.get(k, v) for k, v in shared.items()}
  if devices:
    return [{**shared, 'CUDA_VISIBLE_DEVICES': d} for d in devices]
  return [shared] * jobs


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
