# SPDX-License-Identifier: Apache-2.0
"""Packed training from end to end: killed, resumed, and read by workers."""

import contextlib
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from configs import shapes as shapes_config
from moellava_jax import config
from moellava_jax.train import loop

_ROOT = pathlib.Path(__file__).parents[2]
_STAGES = ('pretrain', 'finetune', 'moe')
_CONFIG = """
from tests.train import packed_run_test

def get_config(run):
  return packed_run_test.settings(run, packed_run_test._STAGES, 2)
"""


def settings(run, stages, workers: int) -> Any:
  """Three steps a stage, about three conversations a row."""
  c: Any = shapes_config.get_config('smoke')
  c.workdir, c.stages = str(run), stages
  c.model.compute_dtype = 'float32'
  c.data.arrangement = 'packed'
  c.data.num_workers = workers
  c.data.shapes.train_scenes, c.data.shapes.heldout_scenes = 60, 16
  c.warmup.steps = 1
  for stage in ('warmup', *_STAGES):
    # A held-out loss would be as much again to compile.
    c[stage].data.eval_json = None
  for stage in _STAGES:
    c[stage].row_length, c[stage].max_images = 192, 3
    c[stage].batch_size, c[stage].steps = 8, 3
  return c


def _run(run, stages, workers=0):
  loop.run(config.from_dict(settings(run, stages, workers)))


def _history(run: pathlib.Path) -> list[tuple]:
  if not (path := run / 'metrics.jsonl').exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  records = [json.loads(line) for line in lines if line.endswith('\n')]
  return [(r['stage'], r['step'], r['loss'], r['samples']) for r in records]


def _children(pid: int) -> list[int]:
  """The processes that any of its threads has started."""
  found = []
  for task in pathlib.Path(f'/proc/{pid}/task').iterdir():
    with contextlib.suppress(FileNotFoundError):  # A thread that has ended.
      found += (task / 'children').read_text().split()
  return [int(child) for child in found]


def _is_alive(pid: int) -> bool:
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1]
  except FileNotFoundError:
    return False
  return state.split()[0] != 'Z'


def _kill_after(run: pathlib.Path, stage: str, step: int) -> list[int]:
  """Kills the command after a step; returns its processes that read."""
  log, file = run.with_suffix('.log'), run.with_suffix('.py')
  file.write_text(_CONFIG)
  with open(log, 'wb') as output:
    process = subprocess.Popen(
        [
            *(sys.executable, '-m', 'moellava_jax.train.main'),
            f'--config={file}:{run}',
        ],
        cwd=_ROOT,
        stdout=output,
        stderr=output,
    )
  workers = []
  try:
    while (stage, step) not in [record[:2] for record in _history(run)]:
      assert process.poll() is None, log.read_text()
      workers = _children(process.pid) or workers
      time.sleep(0.02)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  return workers


@pytest.mark.slow
@pytest.mark.large
def test_a_packed_run_that_is_killed_equals_one_left_alone(tmp_path, capsys):
  whole, run = tmp_path / 'whole', tmp_path / 'run'
  _run(whole, ('warmup',))
  shutil.copytree(whole, run)
  _run(whole, _STAGES)
  history = _history(whole)
  assert [record[:2] for record in history[1:]] == [
      (stage, step) for stage in _STAGES for step in (1, 2, 3)
  ]
  said = capsys.readouterr().out
  assert re.search(r'moe: packed into about \d\d rows, [89]\d\.', said)

  workers = _kill_after(run, 'finetune', 2)
  assert len(workers) >= 2
  assert len(_history(run)) < len(history)
  _run(run, _STAGES, workers=2)
  assert _history(run) == history
  # Nor do its readers outlive a process that is killed.
  assert not any(map(_is_alive, workers))
