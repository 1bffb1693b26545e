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

_SIZES = {
    'width': 1024,
    'num_heads': 8,
    'num_kv_heads': 8,
    'head_dim': 128,
    'mlp_width': 4096,
    'depth': 4,
}


def _plan(tmp_path, stage):
  """The plan of a step that runs on one device in a process of its own."""
  path = tmp_path / 'plan.json'
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  done = subprocess.run(
      [
          sys.executable,
          '-m',
          'moellava_jax.train.plan',
          f'--config=configs/shapes.py:{stage}',
          '--topology=local',
          '--measure',
          f'--json={path}',
          f'--config.{stage}.row_length=256',
          f'--config.{stage}.batch_size=4',
          *(f'--config.model.llm.{k}={v}' for k, v in _SIZES.items()),
      ],
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads(path.read_text())
  return plan


@pytest.mark.slow
def test_plan_agrees_with_resident_memory(tmp_path):
  plan = _plan(tmp_path, 'moe')
  measured = plan['xla']['measured']
  assert measured > 2 * 10**9
  assert plan['xla']['total'] == pytest.approx(measured, rel=0.2)
