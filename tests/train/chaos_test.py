# SPDX-License-Identifier: Apache-2.0
"""launch/chaos.sh with three kills, and that it notices what it looks for."""

import argparse
import json
import os
import random
import re
import signal
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
def test_a_run_survives_three_kills_and_sigterm(tmp_path):
  done = _chaos('--rounds=3', f'--dir={tmp_path / "runs"}')
  assert done.returncode == 0, done.stdout + done.stderr
  assert re.findall(r'/4: (kill -9|SIGTERM)', done.stdout) == [
      'SIGTERM',
      *3 * ['kill -9'],
  ]
  assert 'SIGTERM: the run equals the undisturbed one' in done.stdout


def test_help_and_dry_run_start_nothing(tmp_path):
  assert 'kill -9' in _chaos('--help').stdout
  done = _chaos('--dry-run', '--rounds=7', f'--dir={tmp_path / "runs"}')
  assert done.returncode == 0, done.stderr
  assert 'launch/local.sh configs/shapes.py:smoke' in done.stdout
  assert '7 x kill -9, 2 x SIGTERM' in done.stdout
  assert not (tmp_path / 'runs').exists()


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


@pytest.fixture
def strike(tmp_path, monkeypatch):
  """`chaos.strike` at an attempt that ends with `code`, and what it was sent."""
  sent = []

  class Attempt:
    code = 0

    def __init__(self, args, run):
      del args
      self.run = run

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def workers(self):
      return [7, 8]

    def wait(self):
      return self.code

    def tail(self):
      return ''

  def strike(code, number=signal.SIGTERM, happens=True):
    Attempt.code = code
    args = argparse.Namespace(processes=2)
    moments = chaos.Moments(random.Random(0), 0.0)

    def moment(attempt):
      del attempt
      return happens

    return chaos.strike(args, tmp_path, moments, (moment, number))

  monkeypatch.setattr(chaos, 'Attempt', Attempt)
  monkeypatch.setattr(chaos.os, 'kill', lambda *sender: sent.append(sender))
  return strike, sent


def test_sigterm_leaves_a_checkpoint_of_the_last_step(tmp_path, strike):
  strike, sent = strike
  _write(tmp_path, [1, 2])
  (tmp_path / 'warmup' / '1').mkdir(parents=True)
  with pytest.raises(chaos.Failure, match='no checkpoint of warmup 2'):
    strike(75)
  (tmp_path / 'warmup' / '2').mkdir()
  assert 'ended with 75' in strike(75)
  assert {number for _, number in sent} == {signal.SIGTERM}
  with pytest.raises(chaos.Failure, match='ended with 1'):
    strike(1)


def test_sigterm_is_heeded_in_time(tmp_path, strike, monkeypatch):
  _write(tmp_path, [1])
  (tmp_path / 'warmup' / '1').mkdir(parents=True)
  monkeypatch.setattr(chaos, '_TERM', 0.0)
  with pytest.raises(chaos.Failure, match='not within'):
    strike[0](75)
  assert 'kill -9' in strike[0](137, signal.SIGKILL)


def test_what_comes_too_late_does_not_count(strike):
  strike, sent = strike
  assert not strike(0, signal.SIGKILL) and not strike(0) and len(sent) == 2
  assert not strike(0, signal.SIGKILL, happens=False) and len(sent) == 2
  with pytest.raises(chaos.Failure, match='by itself'):
    strike(1, signal.SIGKILL, happens=False)


def test_kills_are_as_many_as_asked_for_and_end(tmp_path, monkeypatch):
  struck = []
  answers = iter(['', 'hit', 'hit', '', '', 'hit', 'hit', '', '', ''])

  def strike(args, run, moments, what):
    del args, moments
    run.mkdir(parents=True, exist_ok=True)
    struck.append((what[0].__name__, what[1].name, run.name[-1]))
    return next(answers)

  monkeypatch.setattr(chaos, 'strike', strike)
  monkeypatch.setattr(chaos, '_finish', lambda *_: ({}, 0.0))
  monkeypatch.setattr(chaos, '_same_weights', lambda *_: None)
  args = argparse.Namespace(rounds=3, seed=0)
  chaos.torment(args, tmp_path)
  assert struck == [
      ('told', 'SIGTERM', '0'),
      ('told', 'SIGTERM', '1'),
      ('save', 'SIGKILL', '1'),
      ('step', 'SIGKILL', '1'),
      ('step', 'SIGKILL', '2'),
      ('step', 'SIGKILL', '3'),
      ('starting', 'SIGKILL', '3'),
  ]
  with pytest.raises(chaos.Failure, match="3 runs in a row.*'told'"):
    chaos.torment(args, tmp_path / 'again')
