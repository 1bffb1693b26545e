# SPDX-License-Identifier: Apache-2.0
"""The plan's bytes against what a step takes: resident memory on the CPU.

On a GPU the same command compares with `peak_bytes_in_use`:

  python -m moellava_jax.train.plan --config=... --topology=local --measure
"""

import json
import os
import subprocess
import sys

import pytest


def _measured(tmp_path, width):
  """The plan of a step that runs on one device in a process of its own."""
  path = tmp_path / 'plan.json'
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  settings = {
      'width': width,
      'head_dim': width // 4,
      'mlp_width': 4 * width,
      'depth': 1,
  }
  done = subprocess.run(
      [
          sys.executable,
          '-m',
          'moellava_jax.train.plan',
          '--config=configs/shapes.py:moe',
          '--topology=local',
          '--measure',
          f'--json={path}',
          '--config.moe.row_length=256',
          '--config.moe.batch_size=2',
          *(f'--config.model.llm.{k}={v}' for k, v in settings.items()),
      ],
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads(path.read_text())
  return plan


def test_plan_agrees_with_resident_memory(tmp_path):
  plan = _measured(tmp_path, 768)
  measured = plan['xla']['measured']
  assert measured > 0.3 * 2**30
  assert plan['xla']['total'] == pytest.approx(measured, rel=0.2)


@pytest.mark.large
def test_plan_agrees_with_resident_memory_of_two_gigabytes(tmp_path):
  plan = _measured(tmp_path, 1792)
  measured = plan['xla']['measured']
  assert measured > 2 * 2**30
  assert plan['xla']['total'] == pytest.approx(measured, rel=0.2)
