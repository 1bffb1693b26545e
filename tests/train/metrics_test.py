# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import sys
import types

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


def _fake_wandb(monkeypatch, init):
  find = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util,
      'find_spec',
      lambda name, *rest: name if name == 'wandb' else find(name, *rest),
  )
  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))


def test_weights_and_biases_gets_every_step(tmp_path, monkeypatch):
  begun, logged = [], []

  def init(**given):
    begun.append(given)
    return types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append('finished'),
    )

  _fake_wandb(monkeypatch, init)
  (tmp_path / 'config.json').write_text('{"seed": 3}')
  # Without a project it is not asked, whether or not it is installed.
  monkeypatch.delenv('WANDB_PROJECT', raising=False)
  metrics.Writer(str(tmp_path), 'moe', 0).close()
  assert not begun
  monkeypatch.setenv('WANDB_PROJECT', 'sparse')
  for step in (1, 2):  # A stage that is killed goes on as the same run.
    writer = metrics.Writer(str(tmp_path), 'moe', step - 1)
    writer.write({**_record('moe', step), 'moe': {'1': {'load': [0.25, 0.75]}}})
    writer.close()
  first, second = begun
  assert first == second
  assert first['project'] == 'sparse' and first['resume'] == 'allow'
  assert first['name'] == f'{tmp_path.name}/moe'
  assert first['config'] == {'seed': 3}
  values = {'loss': 0.5, 'moe/1/load/0': 0.25, 'moe/1/load/1': 0.75}
  assert logged == [(1, values), 'finished', (2, values), 'finished']
  metrics.Writer(str(tmp_path), 'finetune', 0).close()
  assert begun[-1]['id'] != first['id']


def test_training_goes_on_where_weights_and_biases_does_not(
    tmp_path, monkeypatch, capsys
):
  def init(**given):
    raise RuntimeError('api_key not configured')

  _fake_wandb(monkeypatch, init)
  monkeypatch.setenv('WANDB_PROJECT', 'sparse')
  writer = metrics.Writer(str(tmp_path), 'moe', 0)
  writer.write(_record('moe', 1))
  writer.close()
  assert _steps(tmp_path) == [('moe', 1)]
  assert 'not logged to Weights & Biases: api_key' in capsys.readouterr().out
