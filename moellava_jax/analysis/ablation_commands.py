# SPDX-License-Identifier: Apache-2.0
"""The commands of runs and cells.

Training and evaluation are other programs: nothing here imports them.
"""

from collections.abc import Sequence
import dataclasses
import os
import shlex
import sys
from typing import Any

from moellava_jax import config
from moellava_jax.analysis import ablation_plan


@dataclasses.dataclass(frozen=True)
class Commands:
  """How the two programs are called; tests put others in their place."""

  train: tuple[str, ...]
  evaluate: tuple[str, ...]
  # A launch script in place of `train`: it takes CONFIG -- FLAGS.
  launch: tuple[str, ...] = ()


COMMANDS = Commands(
    train=(sys.executable, '-m', 'moellava_jax.train.main'),
    evaluate=(sys.executable, '-m', 'moellava_jax.evals.main'),
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What the cells are asked; the flags of evals.main of the same names.

  `questions` and `images` are None for Shapes, which writes its own by seed.
  """

  name: str
  questions: str | None
  images: str | None
  annotations: str | None


def train_command(
    run: ablation_plan.Run, out: str, commands: Commands
) -> list[str]:
  """The command that trains a run, or goes on with it."""
  settings: dict[str, Any] = {
      'workdir': run.folder(out),
      'stages': run.stages,
      'seed': run.seed,
  }
  if run.before is not None:
    settings['init.checkpoint'] = os.path.join(
        run.before.folder(out), run.before.last, 'final'
    )
  if run.embedded:
    settings['data.shapes.dir'] = run.data(out)
  # Paths of Shapes are relative to its folder in the config.
  own = {
      name: value.replace(f'{ablation_plan.PLACE}/data', run.data(out))
      if isinstance(value, str)
      else value
      for name, value in run.overrides
  }
  flags = [
      f'--config.{name}={value}' for name, value in {**own, **settings}.items()
  ]
  if commands.launch:
    return [*commands.launch, run.config, '--', *flags]
  return [*commands.train, f'--config={run.config}', *flags]


def eval_command(
    cell: ablation_plan.Cell, out: str, benchmark: Benchmark, commands: Commands
) -> list[str]:
  """The command that asks a cell's model the questions."""
  questions, images = sources(cell, out, benchmark)
  command = [
      *commands.evaluate,
      f'--model={os.path.join(cell.run.folder(out), cell.run.last)}',
      f'--benchmark={benchmark.name}',
      f'--questions={questions}',
      f'--out={answers(cell, out)}',
      f'--cpu_devices={cell.devices}',
  ]
  if images is not None:
    command.append(f'--images={images}')
  if benchmark.annotations is not None:
    command.append(f'--annotations={benchmark.annotations}')
  return command


def sources(
    cell: ablation_plan.Cell, out: str, benchmark: Benchmark
) -> tuple[str, str | None]:
  """Where the questions and the images of a cell are.

  Raises:
    UserError: no questions are named for data other than Shapes.
  """
  if benchmark.questions is not None:
    return benchmark.questions, benchmark.images
  if not cell.run.embedded or benchmark.name != 'shapes':
    raise config.UserError(
        f'--benchmark={benchmark.name} with --config={cell.config}: name the'
        ' questions with --questions=FILE and --images=DIR. Only Shapes brings'
        ' its own.'
    )
  data = cell.run.data(out)
  return data, data


def answers(cell: ablation_plan.Cell, out: str) -> str:
  """The folder of a cell's answers and scores.json."""
  return os.path.join(cell.run.folder(out), 'answers')


def shell(command: Sequence[str]) -> str:
  return shlex.join(command)
