# SPDX-License-Identifier: Apache-2.0
"""What the commands left in a run directory.

  config.json, environment.json, stages.json, metrics.jsonl     train.main
  data/questions_{pope,exact}.jsonl, data/images/               train.main
  answers/STAGE[.CONTROL].{pope,exact}.jsonl                    evals.main
  routing/routing.json                                          analysis.main

Any of them may be absent: `Run.absent` says which, and what makes it.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import shlex
from typing import Any

from moellava_jax import config as config_lib
from moellava_jax.analysis import counts as counts_lib
from moellava_jax.evals import base, pope, shapes

FINAL = 'moe'
CONTROLS = ('blank_image', 'shuffled_image')


@dataclasses.dataclass(frozen=True)
class Run:
  """The files of a run; empty where a file is absent."""

  path: pathlib.Path
  config: dict[str, Any]
  environment: dict[str, Any]
  stages: dict[str, dict[str, Any]]
  metrics: dict[str, list[dict[str, Any]]]  # Stage -> rows by step.
  questions: dict[str, list[base.Question]]  # By benchmark.
  answers: dict[str, dict[str, list[base.Answer]]]  # Name -> by benchmark.
  routing: dict[str, Any]
  counts: counts_lib.Counts | None  # Of `routing`.
  absent: tuple[str, ...]

  @property
  def seed(self) -> int | None:
    return self.environment.get('seed', self.config.get('seed'))

  @property
  def moe_rows(self) -> list[dict[str, Any]]:
    """Rows of the final stage that hold routing statistics."""
    return [row for row in self.metrics.get(FINAL, ()) if row.get('moe')]

  @property
  def moe_layers(self) -> list[str]:
    """Numbers of the MoE layers as the metrics name them, in order."""
    return sorted(self.moe_rows[0]['moe'], key=int) if self.moe_rows else []


def read(path: pathlib.Path) -> Run:
  """Reads a run directory.

  Raises:
    ValueError: the directory holds neither config.json nor metrics.jsonl, or
      a file in it is malformed; the message names file and row.
  """
  if not any((path / n).is_file() for n in ('config.json', 'metrics.jsonl')):
    raise ValueError(
        f'{path} is no run directory: it has neither config.json nor'
        ' metrics.jsonl. Give the workdir of a training run.'
    )
  absent: list[str] = []
  parts = {
      name: _read_json(path / f'{name}.json', train_command(path), absent)
      for name in ('config', 'environment', 'stages')
  }
  metrics = read_metrics(path / 'metrics.jsonl')
  if not metrics:
    absent.append(
        f'metrics.jsonl is missing or empty: run `{train_command(path)}`.'
    )
  questions = _read_questions(path)
  if not questions:
    absent.append(
        'data/questions_pope.jsonl and data/questions_exact.jsonl are missing,'
        ' so nothing is scored. Only the embedded task brings its questions;'
        ' score a model on others with `python -m moellava_jax.evals.main`.'
    )
  stages = tuple(parts['config'].get('stages', config_lib.STAGES))
  answers = _read_answers(path, stages, questions, absent)
  routing, counts = (
      _read_routing(path, absent) if FINAL in stages else ({}, None)
  )
  return Run(
      path=path,
      metrics=metrics,
      questions=questions,
      answers=answers,
      routing=routing,
      counts=counts,
      absent=tuple(absent),
      **parts,
  )


def train_command(path: pathlib.Path) -> str:
  """The command that makes or continues the run, but for its config."""
  workdir = shlex.quote(str(path))
  return (
      'python -m moellava_jax.train.main --config=FILE'
      f' --config.workdir={workdir}'
  )


def eval_command(path: pathlib.Path, name: str) -> str:
  """The command that writes answers/NAME.*.jsonl."""
  stage, _, control = name.partition('.')
  run = shlex.quote(str(path))
  return (
      f'python -m moellava_jax.evals.main --model={run}/{stage}'
      f' --benchmark=shapes --questions={run}/data --images={run}/data'
      f' --out={run}/answers' + (f' --control={control}' if control else '')
  )


def routing_command(path: pathlib.Path) -> str:
  """The command that writes routing/routing.json."""
  run = shlex.quote(str(path))
  return (
      f'python -m moellava_jax.analysis.main --model={run}/{FINAL}'
      f' --questions={run}/data/questions_pope.jsonl --images={run}/data'
      f' --out={run}/routing'
  )


def commands(run: Run) -> tuple[str, ...]:
  """The commands that make the run, its answers and its report again."""
  environment, path = run.environment, run.path
  lines = []
  revision = environment.get('revision', 'unknown')
  if revision != 'unknown':
    changed = '  # With uncommitted changes.' if revision.endswith('+') else ''
    lines.append(f'git checkout {revision.removesuffix("+")}{changed}')
  lines.append(
      environment.get('command')
      or f'{train_command(path)}'
      + ('' if run.seed is None else f' --config.seed={run.seed}')
      + '  # The settings are under "Config".'
  )
  lines += [eval_command(path, name) for name in run.answers]
  if run.routing:
    lines.append(routing_command(path))
  lines.append(
      'python -m moellava_jax.analysis.report --runs ' + shlex.quote(str(path))
  )
  return tuple(lines)


def read_metrics(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Rows of metrics.jsonl by stage, in order of steps.

  A resumed run repeats the steps since its last checkpoint; the last row of a
  step counts. A killed run may leave half a last line, which is dropped.

  Raises:
    ValueError: a line is malformed; the message names file and line.
  """
  if not path.is_file():
    return {}
  lines = path.read_text(encoding='utf-8').split('\n')
  rows: dict[str, dict[int, dict[str, Any]]] = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      rows.setdefault(row['stage'], {})[row['step']] = row
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines):  # No newline: the writer was killed.
        break
      raise ValueError(
          f'{path}, line {number}: expected a JSON object with "stage" and'
          f' "step" ({type(error).__name__}: {error}).'
      ) from error
  order = [*config_lib.STAGES, *(s for s in rows if s not in config_lib.STAGES)]
  return {s: [rows[s][n] for n in sorted(rows[s])] for s in order if s in rows}


def _read_json(
    path: pathlib.Path, command: str, absent: list[str]
) -> dict[str, Any]:
  if not path.is_file():
    absent.append(f'{path.name} is missing: run `{command}`.')
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(
        f'{path}: not valid JSON ({error}). Remove it and run `{command}`.'
    ) from error


def _read_routing(
    path: pathlib.Path, absent: list[str]
) -> tuple[dict[str, Any], counts_lib.Counts | None]:
  file, command = path / 'routing' / 'routing.json', routing_command(path)
  routing = _read_json(file, command, absent)
  if not routing:
    return {}, None
  if 'counts' not in routing:
    absent.append(
        'routing/routing.json is from an earlier version and has no counts:'
        f' run `{command}`.'
    )
    return routing, None
  try:
    return routing, counts_lib.from_json(routing['counts'])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
        f'{file}: "counts" is not what analysis.main writes'
        f' ({type(error).__name__}: {error}). Remove it and run `{command}`.'
    ) from error


def _read_questions(path: pathlib.Path) -> dict[str, list[base.Question]]:
  folder = path / 'data'
  files = {key: folder / f'questions_{key}.jsonl' for key in shapes.FILES}
  files = {key: file for key, file in files.items() if file.is_file()}
  if len(files) == len(shapes.FILES):
    return shapes.load(str(folder), None)
  questions = {key: base.read_questions(file) for key, file in files.items()}
  if 'pope' in questions:
    pope.check_labels(questions['pope'], files['pope'])
  return questions


def _read_answers(
    path: pathlib.Path,
    stages: tuple[str, ...],
    questions: Mapping[str, list[base.Question]],
    absent: list[str],
) -> dict[str, dict[str, list[base.Answer]]]:
  names = [s for s in config_lib.STAGES if s in stages]
  if FINAL in names:
    names += [f'{FINAL}.{control}' for control in CONTROLS]
  answers: dict[str, dict[str, list[base.Answer]]] = {}
  for name in names:
    for benchmark in questions:
      file = path / 'answers' / f'{name}.{benchmark}.jsonl'
      if file.is_file():
        answers.setdefault(name, {})[benchmark] = base.read_answers(file)
      else:
        absent.append(
            f'answers/{file.name} is missing: run'
            f' `{eval_command(path, name)}`.'
        )
  return answers
