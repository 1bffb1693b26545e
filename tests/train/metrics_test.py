# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

from moellava_jax import config
from moellava_jax.train import metrics


def _record(stage, step):
  return {'stage': stage, 'step': step, 'loss': 0.5}


def _steps(tmp_path):
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  return [(r['stage'], r['step']) for r in map(json.loads, lines)]


@pytest.mark.parametrize(
    'torn', ['', '{"stage": "moe", "st', '{"stage": "moe"']
)
def test_a_line_that_a_kill_has_torn_does_not_harm_the_history(tmp_path, torn):
  writer = metrics.Writer(str(tmp_path), 'warmup', 0)
  writer.write(_record('warmup', 1))
  writer.close()
  writer = metrics.Writer(str(tmp_path), 'moe', 0)
  for step in (1, 2, 3):
    writer.write(_record('moe', step))
  writer.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write(torn)
  writer = metrics.Writer(str(tmp_path), 'moe', 2)  # On after a checkpoint.
  writer.write(_record('moe', 3))
  writer.close()
  assert _steps(tmp_path) == [
      ('warmup', 1),
      ('moe', 1),
      ('moe', 2),
      ('moe', 3),
  ]


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path):
  writer = metrics.Writer(str(tmp_path), 'warmup', 0)
  full = os.open('/dev/full', os.O_WRONLY)
  os.dup2(full, writer._lines._file.fileno())  # pyright: ignore
  os.close(full)
  with pytest.raises(config.UserError, match='No space left.*Make room'):
    writer.write(_record('warmup', 1))
  writer.close()  # The message is not replaced by another one.
