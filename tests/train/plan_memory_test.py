# SPDX-License-Identifier: Apache-2.0
"""The plan's bytes against what a step takes: resident memory on the CPU.

On a GPU the same command compares with `peak_bytes_in_use`:

  python -m moellava_jax.train.plan --config=... --topology=local --measure
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

_README = pathlib.Path(__file__).parents[2] / 'README.md'
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


def _documented():
  """(arguments of the README's plan of Phi-2, numbers of the printed one)."""
  text = _README.read_text(encoding='utf-8')
  match = re.search(
      r'(?ms)^python -m (moellava_jax\.train\.plan --config=configs/phi2\.py:moe'
      r' [^`]*)```.*?^```text',
      text,
  )
  assert match is not None
  printed = text[match.end() : text.index('```', match.end())]
  rows = re.findall(r'(?m)^ (\S.*?) {2,}([\d.,e+]+)$', printed)
  return shlex.split(match[1].replace('\\\n', ' ')), [
      (name, float(number.replace(',', ''))) for name, number in rows
  ]


@pytest.mark.large
def test_stage_iii_of_phi2_is_planned_without_its_weights(tmp_path):
  arguments, printed = _documented()
  path = tmp_path / 'plan.json'
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  with open(tmp_path / 'log', 'w+', encoding='utf-8') as log:
    process = subprocess.Popen(
        [sys.executable, '-m', *arguments, f'--json={path}'],
        env=env,
        stdout=log,
        stderr=log,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    log.seek(0)
    assert process.returncode == 0, log.read()
  assert usage.ru_maxrss * 1024 < 24e9
  (plan,) = json.loads(path.read_text())
  assert plan['devices'] == 8
  gib, flops = 2**30, 1e12
  estimate, model = plan['memory'], plan['flops']
  # In this order: two of the rows have the same name.
  expected = [
      ('trained parameters (fp32)', estimate['trained'] / gib),
      ('optimizer', estimate['optimizer'] / gib),
      ('total (estimate)', estimate['total'] / gib),
      ('total', plan['xla']['total'] / gib),
      ('model', model['model'] / flops),
      ('computed again (remat)', model['recompute'] / flops),
      ('all that runs', model['total'] / flops),
  ]
  names = [name for name, _ in expected]
  shown = [row for row in printed if row[0] in names]
  assert [name for name, _ in shown] == names
  assert [x for _, x in shown] == pytest.approx([x for _, x in expected], 0.1)
