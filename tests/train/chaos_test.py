# SPDX-License-Identifier: Apache-2.0
"""Three rounds of launch/chaos.sh, and that it notices what it looks for."""

import json
import os
import subprocess
import sys

import pytest

from tests import chaos
from tests.launch import shell


def _environment():
  # The devices that the launcher names, not those of the other tests.
  kept = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return kept | {'VENV_PYTHON': sys.executable}


def _chaos(*arguments):
  return subprocess.run(
      ['bash', str(shell.LAUNCH / 'chaos.sh'), *arguments],
      env=_environment(),
      capture_output=True,
      text=True,
      timeout=1200,
  )


@pytest.mark.slow
def test_a_run_survives_three_kills(tmp_path):
  done = _chaos('--rounds=3', f'--dir={tmp_path / "runs"}')
  assert done.returncode == 0, done.stdout + done.stderr
  assert '3 rounds: the run equals the undisturbed one' in done.stdout


def test_help_and_dry_run_start_nothing(tmp_path):
  assert 'kill -9' in _chaos('--help').stdout
  done = _chaos('--dry-run', '--rounds=7', f'--dir={tmp_path / "runs"}')
  assert done.returncode == 0, done.stderr
  assert 'launch/local.sh configs/shapes.py:smoke' in done.stdout
  assert '7 rounds' in done.stdout and not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(
    'arguments', [['--rounds=many'], ['--round=3'], ['--dir=.']]
)
def test_arguments_that_make_no_sense_are_refused(arguments):
  done = _chaos(*arguments)
  assert done.returncode and done.stderr


def _write(run, steps, torn=''):
  run.mkdir(exist_ok=True)
  lines = [
      json.dumps({'stage': 'warmup', 'step': s, 'loss': s / 7, 'samples': 'ab'})
      for s in steps
  ]
  (run / 'metrics.jsonl').write_text('\n'.join([*lines, torn]))


def test_a_history_has_each_step_once_in_order(tmp_path):
  _write(tmp_path, [1, 2, 3], torn='{"stage": "warm')
  found = chaos.history(tmp_path, at_rest=False)
  assert found == {('warmup', s): (s / 7, 'ab') for s in (1, 2, 3)}
  with pytest.raises(json.JSONDecodeError):
    chaos.history(tmp_path, at_rest=True)
  for steps in ([1, 2, 2], [1, 3], [2]):
    _write(tmp_path, steps)
    with pytest.raises(chaos.Failure, match='should be'):
      chaos.history(tmp_path, at_rest=False)


def test_other_losses_and_broken_checkpoints_are_noticed(tmp_path):
  _write(tmp_path, [1, 2])
  reference = chaos.history(tmp_path, at_rest=True)
  assert '2 steps' in chaos.check(tmp_path, reference)
  reference['warmup', 2] = (0.5, 'ab')
  with pytest.raises(chaos.Failure, match='undisturbed'):
    chaos.check(tmp_path, reference)
  reference['warmup', 2] = (2 / 7, 'ab')
  (tmp_path / 'warmup' / '3').mkdir(parents=True)
  with pytest.raises(chaos.Failure, match='no record'):
    chaos.check(tmp_path, reference)
  (tmp_path / 'warmup' / '3').rename(tmp_path / 'warmup' / '2')
  with pytest.raises(chaos.Failure, match='unreadable'):
    chaos.check(tmp_path, reference)
