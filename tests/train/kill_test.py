# SPDX-License-Identifier: Apache-2.0
"""A real process that hangs, and is started again; chaos_test kills some."""

import json
import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]
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
  env = os.environ | {'XLA_FLAGS': '--xla_backend_optimization_level=0'}
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


def test_a_run_that_hangs_is_stopped_and_goes_on(tmp_path):
  """Step 3 does not return: the run ends, with the checkpoint of step 2."""
  run = tmp_path / 'run'
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
  assert _start(run).wait(timeout=600) == 0, run.with_suffix('.log').read_text()
  assert [(r['stage'], r['step']) for r in _records(run)] == [
      *(('warmup', step) for step in range(1, 7)),
      *(('pretrain', step) for step in range(1, 5)),
  ]
  assert 'checkpoints held training up' in run.with_suffix('.log').read_text()
