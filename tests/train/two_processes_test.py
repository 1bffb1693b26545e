# SPDX-License-Identifier: Apache-2.0
"""Training by two processes with four devices each, and by one with eight."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_STAGES = ('warmup', 'moe')  # All parameters, and a part of them with routing.
# The devices are the launcher's to choose; compiling takes most of the time.
_ENV = {
    **os.environ,
    'VENV_PYTHON': sys.executable,
    'PYTHONPATH': str(_ROOT),
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
}


def _flags(run: pathlib.Path) -> list[str]:
  return [
      f'--config.workdir={run}',
      f'--config.stages={_STAGES!r}',
      '--config.mesh.expert=4',
      '--config.model.llm.depth=2',
      '--config.data.shapes.train_scenes=32',
      '--config.data.shapes.heldout_scenes=8',
      '--config.moe.steps=3',
      *(f'--config.{stage}.steps=2' for stage in _STAGES[:-1]),
      *(f'--config.{stage}.eval_batches=1' for stage in _STAGES),
  ]


def _launch(run: pathlib.Path, processes: int, devices: int, *more: str) -> str:
  """Trains through the launcher; returns what it prints."""
  done = subprocess.run(
      [
          *('bash', 'launch/local.sh', 'configs/shapes.py:smoke'),
          f'--processes={processes}',
          f'--cpu-devices={devices}',
          '--',
          *_flags(run),
          *more,
      ],
      cwd=_ROOT,
      env=_ENV,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=1200,
      check=False,
  )
  assert done.returncode == 0, done.stdout
  return done.stdout


def _records(run: pathlib.Path) -> list[dict]:
  return [
      json.loads(x) for x in (run / 'metrics.jsonl').read_text().splitlines()
  ]


def _assert_same(run: pathlib.Path, other: pathlib.Path) -> None:
  records, others = _records(run), _records(other)
  names = ('stage', 'step', 'samples', 'tokens', 'targets', 'skipped')
  assert [[r[n] for n in names] for r in records] == [
      [r[n] for n in names] for r in others
  ]
  for name in ('loss', 'eval_loss', 'aux_loss', 'grad_norm'):
    wanted = [r.get(name, 0.0) for r in others]
    assert [r.get(name, 0.0) for r in records] == pytest.approx(
        wanted, rel=1e-5
    )


@pytest.mark.slow
def test_two_processes_train_as_one_and_each_goes_on_where_others_stopped(
    tmp_path,
):
  two, one = tmp_path / 'two', tmp_path / 'one'
  said = _launch(two, 2, 4, '--profile_steps=2')
  assert '[0] preflight: 4 x cpu in 2 processes' in said
  assert '[1] preflight' not in said  # Process 0 speaks for all.
  traces = list(two.glob('profile/moe/*/**/perfetto_trace.json.gz'))
  assert {p.relative_to(two).parts[2] for p in traces} == {
      'process-0',
      'process-1',
  }
  _launch(one, processes=1, devices=8)
  assert [(r['stage'], r['step']) for r in _records(one)] == [
      *((stage, step) for stage in _STAGES[:-1] for step in (1, 2)),
      *(('moe', step) for step in (1, 2, 3)),
  ]
  _assert_same(two, one)
  for name in ('config.json', 'environment.json', 'stages.json'):
    assert (two / name).exists()
  # The last stage stopped after step 2, where they had saved.
  shutil.rmtree(two / 'moe' / 'final')
  said = _launch(two, processes=1, devices=8)
  assert 'moe: going on after step 2' in said
  _assert_same(two, one)
  # And the other way round: what one process has saved.
  shutil.rmtree(one / 'moe' / 'final')
  said = _launch(one, processes=2, devices=4)
  assert 'moe: going on after step 2' in said
  _assert_same(one, two)


def _pair(flags: list[list[str]], folders: list[pathlib.Path]) -> list[str]:
  """What two processes print that train with different flags, or elsewhere."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  processes = [
      subprocess.Popen(
          [
              *(sys.executable, '-m', 'moellava_jax.train.main'),
              f'--config={_ROOT}/configs/shapes.py:smoke',
              '--config.mesh.cpu_devices=1',
              f'--coordinator_address={address}',
              '--num_processes=2',
              f'--process_id={n}',
              *flags[n],
          ],
          cwd=folders[n],
          env=_ENV,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
      )
      for n in range(2)
  ]
  began = time.monotonic()
  try:
    outputs = [p.communicate(timeout=300)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert [p.returncode for p in processes] == [1, 1], outputs
  assert time.monotonic() - began < 120  # Seconds, where there are cores.
  assert not any('Traceback' in output for output in outputs), outputs
  return outputs


def test_processes_with_different_configs_say_what_differs(tmp_path):
  flags = [f'--config.workdir={tmp_path / "run"}']
  for output in _pair(
      [flags, [*flags, '--config.moe.lr=0.5']], [tmp_path, tmp_path]
  ):
    assert 'error: The processes do not agree on config and code' in output
    assert 'config.moe.lr: 0.0007 on process 0' in output
    assert '0.5 on process 1' in output
  assert not (tmp_path / 'run').exists()


def test_processes_that_do_not_share_the_run_folder_say_so(tmp_path):
  folders = [tmp_path / 'a', tmp_path / 'b']
  for folder in folders:
    folder.mkdir()
  flags = ['--config.workdir=run']
  for output in _pair([flags, flags], folders):
    assert 'error: process 1 (' in output
    assert 'does not see what process 0 (' in output
  assert not [x for folder in folders for x in (folder / 'run').iterdir()]
