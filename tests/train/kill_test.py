# SPDX-License-Identifier: Apache-2.0
"""Real processes, killed, told to stop or hanging, and started again."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

_ROOT = pathlib.Path(__file__).parents[2]
_TIMES = ('seconds', 'tokens_per_s', 'save_seconds')


_MAIN = ('-m', 'moellava_jax.train.main')

# Training whose third batch never comes.
_HANGS = """
import sys, threading
from absl import app
from moellava_jax.data import pipeline
from moellava_jax.train import main

real = pipeline.train_batches

def two_batches(*args, **kwargs):
  batches = real(*args, **kwargs)
  yield next(batches)
  yield next(batches)
  threading.Event().wait()

pipeline.train_batches = two_batches
app.run(main.main)
"""


def _start(run: pathlib.Path, program=_MAIN, *flags: str) -> subprocess.Popen:
  # The devices that the config simulates, not those of the other tests.
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  with open(run.with_suffix('.log'), 'ab') as log:
    return subprocess.Popen(
        [
            *(sys.executable, *program),
            '--config=configs/shapes.py:smoke',
            f'--config.workdir={run}',
            "--config.stages=('warmup', 'pretrain')",
            '--config.warmup.steps=6',
            *flags,
        ],
        cwd=_ROOT,
        env=env,
        stdout=log,
        stderr=log,
    )


def _records(run: pathlib.Path) -> list[dict]:
  path = run / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n')]


def _finish(run: pathlib.Path) -> list[dict]:
  assert _start(run).wait(timeout=600) == 0, run.with_suffix('.log').read_text()
  return [
      {k: v for k, v in record.items() if k not in _TIMES}
      for record in _records(run)
  ]


def _end_after(
    run: pathlib.Path, stage: str, step: int, number: signal.Signals
) -> int:
  """Sends a signal when a step is in the history; returns the exit code."""
  process = _start(run)
  try:
    while not any(
        r['stage'] == stage and r['step'] >= step for r in _records(run)
    ):
      assert process.poll() is None, run.with_suffix('.log').read_text()
      time.sleep(0.02)
    process.send_signal(number)
    return process.wait(timeout=30)
  finally:
    process.kill()
    process.wait()


def test_a_run_that_hangs_is_stopped_and_killed_equals_one_left_alone(tmp_path):
  whole = _finish(tmp_path / 'whole')
  assert [(r['stage'], r['step']) for r in whole] == [
      *(('warmup', step) for step in range(1, 7)),
      *(('pretrain', step) for step in range(1, 5)),
  ]
  run = tmp_path / 'run'
  _hang(run)
  assert _end_after(run, 'warmup', 3, signal.SIGTERM) == 75
  newest = _records(run)[-1]['step']
  assert (run / 'warmup' / str(newest) / 'trained').exists()
  assert _end_after(run, 'pretrain', 3, signal.SIGKILL) == -signal.SIGKILL
  assert _finish(run) == whole
  assert 'checkpoints held training up' in run.with_suffix('.log').read_text()


def _hang(run: pathlib.Path) -> None:
  """Step 3 does not return: the run ends, with the checkpoint of step 2."""
  process = _start(run, ('-c', _HANGS), '--config.watchdog.step_minutes=0.1')
  try:
    code = process.wait(timeout=600)
  finally:
    process.kill()
    process.wait()
  log = run.with_suffix('.log').read_text()
  assert code == 76, log
  assert 'warmup: step 3 has not returned within 0.1 minutes' in log
  assert 'two_batches' in (run / 'stacks-0.txt').read_text()
  assert (run / 'warmup' / '2' / 'trained').exists()
