# SPDX-License-Identifier: Apache-2.0
"""Kills a training run again and again, and compares it with one left alone.

Started by `launch/chaos.sh`, whose --help says what is proved.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]
_STAGES = ('warmup', 'moe')  # All parameters and a part of them, with routing.
_STEPS = 24  # Of each.
_EVERY = 3  # Steps between checkpoints.
_GRACE = 5  # Seconds for the processes that are left.
_LONGEST = 600.0  # Seconds that an attempt may take.
_TERM = 30.0  # Seconds from SIGTERM to the end of all processes, at most.
_MISSES = 3  # Attempts one after the other that may end before they are hit.

History = dict[tuple[str, int], tuple[float, str]]  # (loss, samples) by step.


class Failure(Exception):
  """Something that a kill must not do."""


def command(args: argparse.Namespace, run: pathlib.Path) -> list[str]:
  return [
      *('bash', 'launch/local.sh', 'configs/shapes.py:smoke'),
      f'--processes={args.processes}',
      f'--cpu-devices={args.cpu_devices}',
      *(f'--grace={_GRACE}', '--'),
      f'--config.workdir={run}',
      f'--config.stages={_STAGES!r}',
      *(f'--config.{stage}.steps={_STEPS}' for stage in _STAGES),
      f'--config.checkpoint.every={_EVERY}',
      # It takes a while to compile, and changes nothing that is compared.
      *(f'--config.{stage}.eval_batches=0' for stage in _STAGES),
      '--config.model.llm.depth=2',
      '--config.model.vision.depth=2',
  ]


class Attempt:
  """One start of the run, until it ends or is ended."""

  def __init__(self, args: argparse.Namespace, run: pathlib.Path):
    self._count = args.processes
    self.run = run
    self.log = run.with_suffix('.log')
    self._deadline = time.monotonic() + _LONGEST
    with open(self.log, 'ab') as log:
      self._process = subprocess.Popen(
          command(args, run), cwd=_ROOT, stdout=log, stderr=log
      )

  def __enter__(self) -> 'Attempt':
    return self

  def __exit__(self, *_) -> None:
    for pid in (*self.workers(), self._process.pid):
      if self._process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
    self._process.wait()

  def workers(self) -> list[int]:
    """Process ids of training, in no order."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*'):
      try:
        parent = int((path / 'stat').read_text().rpartition(')')[2].split()[1])
        words = (path / 'cmdline').read_bytes().split(b'\0')
      except (FileNotFoundError, ProcessLookupError, IndexError):
        continue  # It has ended.
      ours = parent == self._process.pid
      if ours and b'moellava_jax.train.main' in words:
        found.append(int(path.name))
    return found

  def wait_until(self, happened: Callable[[], Any], poll: float) -> bool:
    """False if the attempt has ended before."""
    while not happened():
      if self._process.poll() is not None:
        return False
      self._check_time()
      time.sleep(poll)
    return True

  def wait(self) -> int:
    """Returns the exit code."""
    while self._process.poll() is None:
      self._check_time()
      time.sleep(0.05)
    return self._process.returncode

  def wait_for_workers(self) -> bool:
    return self.wait_until(lambda: len(self.workers()) == self._count, 0.02)

  def _check_time(self) -> None:
    if time.monotonic() > self._deadline:
      raise Failure(f'It hangs: {_LONGEST:.0f} s are over. {self.tail()}')

  def tail(self) -> str:
    lines = self.log.read_text(errors='replace').splitlines()[-30:]
    return '\n'.join([f'The end of {self.log}:', *lines])


def history(run: pathlib.Path, *, at_rest: bool) -> History:
  """The records of a run by stage and step.

  Args:
    run: its folder.
    at_rest: the run is complete; else the last line may be torn by a kill,
      until the next start.

  Raises:
    Failure: a step is there twice, is missing, or cannot be read.
  """
  path = run / 'metrics.jsonl'
  found: History = {}
  if not path.exists():
    return found
  lines = path.read_text().splitlines(keepends=True)
  if lines and not lines[-1].endswith('\n') and not at_rest:
    lines.pop()
  for line in lines:
    record = json.loads(line)
    stage, step = record['stage'], record['step']
    expected = 1 + max((s for name, s in found if name == stage), default=0)
    if step != expected:
      raise Failure(f'{path}: {stage} {step} where {expected} should be.')
    found[stage, step] = (record['loss'], record['samples'])
  return found


def check(run: pathlib.Path, reference: History) -> str:
  """Compares what a kill has left with the undisturbed run.

  Raises:
    Failure: the history or a checkpoint is not what it should be.
  """
  from moellava_jax import checkpoint

  found = history(run, at_rest=False)
  for (stage, step), record in found.items():
    if record != reference[stage, step]:
      raise Failure(
          f'{stage} {step}: (loss, samples) are {record}, undisturbed'
          f' {reference[stage, step]}.'
      )
  read = []
  for stage in _STAGES:
    for path in sorted((run / stage).glob('[0-9]*')):
      if not path.name.isdecimal():  # Incomplete, and not counted as one.
        continue
      if (stage, int(path.name)) not in found:
        raise Failure(f'{path} has no record in the history.')
      _read(path)
      read.append(f'{stage}/{path.name}')
    if (final := checkpoint.final_of(str(run), stage)) is not None:
      checkpoint.load(str(final))
      read.append(f'{stage}/final')
  return f'{len(found)} steps in the history; readable: {" ".join(read) or "-"}'


def _read(step: pathlib.Path) -> None:
  """Reads all that a step holds, or raises Failure."""
  from absl import logging
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  from moellava_jax import checkpoint

  logging.set_verbosity(logging.ERROR)  # Orbax misses metadata of its own.
  try:
    checkpoint.load(str(step))
    with ocp.PyTreeCheckpointer() as reader:
      tree = reader.metadata(step / 'optimizer').item_metadata.tree
      host = jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
      )
      reader.restore(step / 'optimizer', restore_args=host)
  except Exception as error:
    raise Failure(f'{step} is unreadable: {error!r}') from error


@dataclasses.dataclass
class Moments:
  """When to strike; `start` is how long the undisturbed run took to begin."""

  rng: random.Random
  start: float

  def starting(self, attempt: Attempt) -> bool:
    """Import, data, restoring, compilation."""
    if not attempt.wait_for_workers():
      return False
    moment = time.monotonic() + self.rng.uniform(0, self.start)
    return attempt.wait_until(lambda: time.monotonic() >= moment, 0.01)

  def step(self, attempt: Attempt) -> bool:
    """Some steps after those that are there, anywhere in one."""
    path = attempt.run / 'metrics.jsonl'
    wanted = self.rng.randint(1, 2 * _EVERY)

    def size() -> int:
      return path.stat().st_size if path.exists() else 0

    if not attempt.wait_for_workers():
      return False
    for _ in range(wanted):
      before = size()
      if not attempt.wait_until(lambda now=before: size() > now, 0.002):
        return False
    moment = time.monotonic() + self.rng.uniform(0, 0.3)
    return attempt.wait_until(lambda: time.monotonic() >= moment, 0.002)

  def told(self, attempt: Attempt) -> bool:
    """In a step, when every process has logged one of this stage.

    Before that nothing would be lost, and SIGTERM ends a process without a
    checkpoint. One that has logged step 3 knows what the others wish after
    step 2, which they say when they have logged step 1.
    """
    wanted = self.rng.randint(3, 2 * _EVERY)

    def newest() -> tuple[str, int]:
      return next(reversed(history(attempt.run, at_rest=False)), ('', 0))

    if not attempt.wait_for_workers():
      return False
    stage, step = newest()

    def reached() -> bool:
      now = newest()
      return now[1] >= wanted + (step if now[0] == stage else 0)

    if not attempt.wait_until(reached, 0.002):
      return False
    moment = time.monotonic() + self.rng.uniform(0, 0.3)
    return attempt.wait_until(lambda: time.monotonic() >= moment, 0.002)

  def save(self, attempt: Attempt) -> bool:
    """While a checkpoint is incomplete."""
    run = attempt.run

    def incomplete() -> set[pathlib.Path]:
      return {
          path
          for pattern in ('*/*tmp*', '*/*/*tmp*')
          for path in run.glob(pattern)
          if path.parts[len(run.parts)] in (*_STAGES, 'frozen')
      }

    if not attempt.wait_for_workers():
      return False
    stale = incomplete()
    if not attempt.wait_until(lambda: incomplete() - stale, 0.001):
      return False
    moment = time.monotonic() + self.rng.uniform(0, 0.05)
    return attempt.wait_until(lambda: time.monotonic() >= moment, 0.001)


Round = tuple[Callable[[Attempt], bool], signal.Signals]


def plan(moments: Moments, kills: int) -> list[Round]:
  """The moments of the kills in turn, and SIGTERM before every fourth."""
  kinds = (moments.save, moments.step, moments.starting)
  rounds: list[Round] = []
  for number in range(kills):
    if number % 4 == 0:
      rounds.append((moments.told, signal.SIGTERM))
    rounds.append((kinds[number % 3], signal.SIGKILL))
  return rounds


def _counts(kills: int) -> str:
  total = len(plan(Moments(random.Random(), 0), kills))
  return f'{kills} x kill -9, {total - kills} x SIGTERM'


def strike(args, run: pathlib.Path, moments: Moments, what: Round) -> str:
  """A start, and a kill or SIGTERM; '' if the run was over before.

  Raises:
    Failure: it ended by itself with an error, or does not heed SIGTERM.
  """
  happened, number = what
  with Attempt(args, run) as attempt:
    who = ''
    workers = sorted(attempt.workers()) if happened(attempt) else []
    if len(workers) == args.processes:  # Else it is about to end.
      victim = moments.rng.choice(workers)
      with contextlib.suppress(ProcessLookupError):
        os.kill(victim, number)
        who = f'{workers.index(victim) + 1} of {len(workers)}'
    began = time.monotonic()
    code = attempt.wait()
    seconds = time.monotonic() - began
    if not code:
      return ''
    if not who:
      raise Failure(f'It ended with {code} by itself. {attempt.tail()}')
    if number == signal.SIGTERM:
      if code != 75:
        raise Failure(f'SIGTERM, and it ended with {code}. {attempt.tail()}')
      if seconds >= _TERM:
        raise Failure(
            f'SIGTERM, and it ended after {seconds:.0f} s, not within'
            f' {_TERM:.0f} s. {attempt.tail()}'
        )
      _check_saved(attempt)
    name = 'SIGTERM to' if number == signal.SIGTERM else 'kill -9 of'
    return (
        f'{name} {who} ({happened.__name__}), ended with {code} after'
        f' {seconds:.1f} s'
    )


def _check_saved(attempt: Attempt) -> None:
  """Raises Failure if the newest step is only in the history.

  Whether it can be read is for `check`.
  """
  from moellava_jax import checkpoint

  run = attempt.run
  stage, step = next(reversed(history(run, at_rest=True)))
  final = checkpoint.final_of(str(run), stage) if step == _STEPS else None
  if final is None and not (run / stage / str(step)).is_dir():
    raise Failure(
        f'SIGTERM, and there is no checkpoint of {stage} {step}, the last step'
        f' that was done. {attempt.tail()}'
    )


def _finish(args, run: pathlib.Path) -> tuple[History, float]:
  """Runs to the end; (history, seconds until its first record)."""
  began = time.monotonic()
  with Attempt(args, run) as attempt:
    attempt.wait_until((run / 'metrics.jsonl').exists, 0.05)
    start = time.monotonic() - began
    if code := attempt.wait():
      raise Failure(f'It ended with {code}. {attempt.tail()}')
  found = history(run, at_rest=True)
  if len(found) != len(_STAGES) * _STEPS:
    raise Failure(f'{run} is finished after {len(found)} steps.')
  return found, start


def _same_weights(ours: pathlib.Path, theirs: pathlib.Path) -> None:
  import numpy as np

  from moellava_jax import checkpoint, trees

  for stage in _STAGES:
    a, b = (
        trees.flatten(checkpoint.load(str(run / stage / 'final')).params)
        for run in (ours, theirs)
    )
    for path in b:
      if not np.array_equal(a[path], b[path]):
        raise Failure(f'{stage}: {path} differs from the undisturbed run.')


def torment(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """All rounds; raises Failure."""
  whole = folder / 'undisturbed'
  reference, start = _finish(args, whole)
  print(
      f'undisturbed: {len(reference)} steps, the first after {start:.0f} s',
      flush=True,
  )
  moments = Moments(random.Random(args.seed), start)
  runs = misses = 0
  run = folder / 'killed-0'
  rounds = plan(moments, args.rounds)
  done = 0
  while done < len(rounds):
    if what := strike(args, run, moments, rounds[done]):
      done += 1
      misses = 0
      summary = check(run, reference)
      print(f'{done}/{len(rounds)}: {what}; {summary}', flush=True)
      continue
    # Finished before it was hit: another one.
    misses += 1
    if history(run, at_rest=True) != reference:
      raise Failure(f'{run} is finished and differs.')
    _same_weights(run, whole)
    if misses == _MISSES:
      name = rounds[done][0].__name__
      raise Failure(f'{misses} runs in a row were over before {name!r}.')
    shutil.rmtree(run)
    runs += 1
    run = folder / f'killed-{runs}'
  if _finish(args, run)[0] != reference:
    raise Failure(f'{run} is finished and differs.')
  _same_weights(run, whole)


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--cpu-devices', type=int, default=2)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--dir', type=pathlib.Path)
  parser.add_argument('--dry-run', action='store_true')
  args = parser.parse_args(argv)
  if args.dry_run:
    print(shlex.join(command(args, pathlib.Path('DIR/killed-0'))))
    print(f'{_counts(args.rounds)}, each of one process of {args.processes}')
    return 0
  folder = args.dir or pathlib.Path(tempfile.mkdtemp(prefix='chaos-'))
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.iterdir()):
    parser.error(f'--dir={folder} is not empty')
  try:
    torment(args, folder)
  except Failure as failure:
    print(f'error: {failure}\nEverything is in {folder}.', file=sys.stderr)
    return 1
  if args.dir is None:
    shutil.rmtree(folder)
  print(f'{_counts(args.rounds)}: the run equals the undisturbed one.')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
