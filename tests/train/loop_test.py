# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import os
import pathlib
import re
import shutil
import time
import types

import jax
import numpy as np
import pytest

from moellava_jax import checkpoint, config, trees
from moellava_jax.data import assemble, counts, sources
from moellava_jax.train import agree, loop
from moellava_jax.train import step as step_lib
from tests import tiny


def _records(run):
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _history(run):
  """What has to be the same whatever was interrupted."""
  return [
      (r['stage'], r['step'], r['loss'], r['samples']) for r in _records(run)
  ]


@pytest.fixture
def finished(trained):
  return trained[0]


def _copy(finished, tmp_path, *, without=()):
  """The run moved elsewhere, where the config calls it its own."""
  run = tmp_path / 'run'
  shutil.copytree(finished, run)
  for stage in without:
    shutil.rmtree(run / stage)
  return run


class _Killed(Exception):
  pass


def _noting(calls, function):
  def noted(*args, **kwargs):
    calls.append(function.__name__)
    return function(*args, **kwargs)

  return noted


def test_every_stage_compiles_its_step_once(trained):
  _, compiled = trained
  assert compiled == [1, 1, 1, 1]


def test_the_steps_asked_for_are_in_a_trace(finished):
  for stage in config.STAGES:
    (path,) = (finished / 'profile' / stage).rglob('perfetto_trace.json.gz')
    events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
    steps = [e['args']['step_num'] for e in events if e.get('name') == stage]
    assert steps == ['2']


def test_all_stages_are_complete_and_logged(finished):
  history = _history(finished)
  assert [h[:2] for h in history] == [
      (stage, step)
      for stage in ('warmup', 'pretrain', 'finetune', 'moe')
      for step in (1, 2, 3, 4)
  ]
  assert all(np.isfinite(h[2]) for h in history)
  last = _records(finished)[-1]
  assert {'eval_loss', 'lr', 'grad_norm', 'tokens_per_s', 'aux_loss'} <= set(
      last
  )
  layer = last['moe']['0']
  for key in ('load', 'load_image', 'load_text'):
    assert sum(layer[key]) == pytest.approx(1, abs=1e-4)
  assert 0 <= layer['drop_rate'] < 1 and layer['entropy'] > 0
  for stage in ('warmup', 'pretrain', 'finetune', 'moe'):
    final = finished / stage / 'final'
    assert (final / 'tokenizer' / 'tokenizer.json').exists()
    assert (final / 'config.json').exists() and (final / 'params').exists()


@pytest.mark.parametrize('stage, killed_at', [('finetune', 3), ('moe', 4)])
def test_restart_equals_an_uninterrupted_run(
    finished, tmp_path, monkeypatch, stage, killed_at
):
  later = {'finetune': ('finetune', 'moe'), 'moe': ('moe',)}[stage]
  run = _copy(finished, tmp_path, without=later)
  cfg = tiny.train_config(run)

  real = loop._StageRun._log

  def dies(self, display, pending, *args):
    if self._stage == stage and pending.step == killed_at:
      raise _Killed
    return real(self, display, pending, *args)

  calls = []
  for where, name in (
      (loop.metrics_lib.Writer, 'publish'),
      (checkpoint.Stage, 'save'),
  ):
    monkeypatch.setattr(where, name, _noting(calls, getattr(where, name)))
  monkeypatch.setattr(loop._StageRun, '_log', dies)
  with pytest.raises(_Killed):
    loop.run(cfg)
  monkeypatch.undo()
  assert calls == ['publish', 'save']  # A history never lacks saved steps.
  first = []
  start = loop.pipeline.train_batches
  monkeypatch.setattr(
      loop.pipeline,
      'train_batches',
      lambda *a, **k: first.append(a[3]) or start(*a, **k),
  )
  loop.run(cfg)
  assert first[0] == 2  # It went on after the checkpoint of step 2.
  assert _history(run) == _history(finished)
  for done in later:
    ours = trees.flatten(checkpoint.load(str(run / done)).params)
    theirs = trees.flatten(checkpoint.load(str(finished / done)).params)
    for path in theirs:
      np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_a_batch_without_targets_is_an_error(finished, tmp_path, monkeypatch):
  stack = loop.pipeline.stack

  def without_targets(rows):
    batch = stack(rows)
    return batch._replace(loss_weight_BT=0 * batch.loss_weight_BT)

  monkeypatch.setattr(loop.pipeline, 'stack', without_targets)
  run = _copy(finished, tmp_path, without=('moe',))
  with pytest.raises(sources.DataError, match='step 1 has no target token'):
    loop.run(tiny.train_config(run))


def test_a_batch_of_dropped_rows_names_what_was_dropped(
    finished, tmp_path, monkeypatch
):
  def drop_all(self, items):
    notes = [
        counts.Note(int(n), 'dropped', 'unreadable image', 'own.json row 7')
        for n in items
    ]
    return assemble.fill_row([], self.format), notes

  monkeypatch.setattr(loop.pipeline.Examples, 'read', drop_all)
  run = _copy(finished, tmp_path, without=('moe',))
  with pytest.raises(sources.DataError) as error:
    loop.run(tiny.train_config(run))
  said = str(error.value)
  assert 'has no target token: all of its 16 rows are empty' in said
  assert re.search(
      r'dropped \d+ rows: unreadable image; .*: own.json row 7', said
  )
  assert 'row_length' not in said


class _Together(agree.Poll):
  """Answers late, as where several processes agree."""

  def __init__(self, mesh):
    super().__init__(mesh)
    self._alone = False


def _late(monkeypatch, where, name, clock):
  """Makes a method take another 100 s, by the clock of the loop."""
  real = getattr(where, name)

  def slow(*args):
    clock.append(100)
    return real(*args)

  monkeypatch.setattr(where, name, slow)


def test_a_checkpoint_that_is_due_by_its_age_is_saved_once(
    finished, tmp_path, monkeypatch, capsys
):
  run = _copy(finished, tmp_path, without=('moe',))
  steps = []
  late = []
  monkeypatch.setattr(
      loop,
      'time',
      types.SimpleNamespace(monotonic=lambda: time.monotonic() + sum(late)),
  )
  save = checkpoint.Stage.save
  monkeypatch.setattr(
      checkpoint.Stage,
      'save',
      lambda self, step, *args: steps.append(step) or save(self, step, *args),
  )
  monkeypatch.setattr(agree, 'Poll', _Together)
  _late(monkeypatch, loop.metrics_lib.Writer, 'publish', late)
  _late(monkeypatch, loop.program.Program, 'to_save', late)
  _late(monkeypatch, _Together, 'saved', late)
  # Due at every step: what is asked after one is answered after the next.
  loop.run(
      tiny.train_config(
          run, moe__steps=7, checkpoint__every=100, checkpoint__minutes=1e-9
      )
  )
  assert steps == [2, 4, 6]
  # All that holds training up is counted, and no step is blamed for it.
  moe = [r for r in _records(run) if r['stage'] == 'moe']
  saves = {r['step']: r['save_seconds'] for r in moe if 'save_seconds' in r}
  assert list(saves) == [3, 5, 7]
  assert all(300 <= seconds < 400 for seconds in saves.values())
  assert all(r['seconds'] < 100 for r in moe)
  said = capsys.readouterr().out
  found = re.search(r'moe: 3 checkpoints held .* up for (.*) s, (.*)% of', said)
  assert found, said
  assert float(found[1]) == pytest.approx(sum(saves.values()), abs=0.01)
  assert 50 < float(found[2]) < 100


def test_a_save_leaves_a_request_to_stop_pending():
  poll = _Together(jax.make_mesh((8,), ('data',)))
  assert poll.after_step(agree.SAVE) == agree.CONTINUE
  assert poll.after_step(agree.STOP) == agree.SAVE
  poll.saved()
  assert poll.after_step(agree.CONTINUE) == agree.STOP


def test_running_again_does_nothing(finished, capsys):
  before = _history(finished)
  loop.run(tiny.train_config(finished))
  assert 'are finished' in capsys.readouterr().out
  assert _history(finished) == before


def test_another_config_is_refused_with_the_difference(finished):
  cfg = tiny.train_config(finished, finetune__lr=0.5)
  with pytest.raises(
      checkpoint.CheckpointError, match=r'finetune\.lr: .* 0\.5 now'
  ):
    loop.run(cfg)
  # What only a later stage uses does not concern the finished ones.
  with pytest.raises(checkpoint.CheckpointError, match='moe.top_k'):
    loop.run(tiny.train_config(finished, model__moe__top_k=1))


def test_a_stage_without_its_predecessor_is_an_error(finished, tmp_path):
  run = _copy(finished, tmp_path, without=('finetune', 'moe'))
  cfg = tiny.train_config(run, stages=('moe',))
  with pytest.raises(checkpoint.CheckpointError, match='finetune/final'):
    loop.run(cfg)


def test_one_stage_from_a_named_checkpoint(finished, tmp_path, capsys):
  moved = tmp_path / 'elsewhere'
  shutil.copytree(finished / 'finetune' / 'final', moved)
  run = tmp_path / 'run'
  cfg = tiny.train_config(
      run,
      stages=('moe',),
      init__checkpoint=str(moved),
      mesh__print_table=True,
  )
  loop.run(cfg)
  assert [h[0] for h in _history(run)] == ['moe'] * 4
  said = capsys.readouterr().out
  held = re.search(r'each device holds (.*?) of', said)
  assert held and re.search(rf'^total +{held[1]} ', said, re.M), said
  assert re.search(r'^vision/layers_\*/mlp/fc1/kernel .* frozen ', said, re.M)


def test_checkpoints_hold_the_trained_part_and_name_the_frozen(
    finished, tmp_path
):
  run = _copy(finished, tmp_path)
  step = run / 'pretrain' / '2'
  model = checkpoint.load(str(step))
  assert set(model.params) == {'vision', 'projector', 'llm'}
  meta = checkpoint.Stage(
      str(run), 'pretrain', tiny.train_config(run).checkpoint
  ).read_meta(2)
  assert all(path.startswith('projector/') for path in meta['trained'])
  assert meta['data'] == {'next_index': 2}
  shutil.rmtree(run / 'frozen')
  with pytest.raises(checkpoint.CheckpointError, match='frozen'):
    checkpoint.load(str(step))


def test_what_a_model_path_may_be(finished, tmp_path):
  for path, stage in (
      (finished, 'moe'),
      (finished / 'finetune', 'finetune'),
      (finished / 'finetune' / 'final', 'finetune'),
      (finished / 'finetune' / '2', 'finetune'),
  ):
    assert checkpoint.load(str(path)).stage == stage
  with pytest.raises(checkpoint.CheckpointError, match='does not exist'):
    checkpoint.load(str(tmp_path / 'nothing'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(checkpoint.CheckpointError, match='holds no finished'):
    checkpoint.load(str(tmp_path / 'empty'))


def test_ten_steps_that_are_not_finite_end_the_run(
    finished, tmp_path, monkeypatch
):
  run = _copy(finished, tmp_path, without=('finetune', 'moe'))
  real = step_lib.loss_sums

  def without_value(*args, **kwargs):
    sums = real(*args, **kwargs)
    return sums._replace(ce_loss=sums.ce_loss * np.nan)

  monkeypatch.setattr(step_lib, 'loss_sums', without_value)
  cfg = tiny.train_config(
      run, stages=('warmup', 'pretrain', 'finetune'), finetune__steps=20
  )
  with pytest.raises(FloatingPointError, match='10 steps in a row.*gradient'):
    loop.run(cfg)
  assert _records(run)[-1]['step'] == 10


def test_batches_that_do_not_divide_are_refused(tmp_path):
  cfg = tiny.train_config(tmp_path / 'run', moe__accumulate=3)
  with pytest.raises(ValueError, match="Stage 'moe': batch_size=16"):
    loop.run(cfg)


@pytest.mark.slow
@pytest.mark.large
def test_own_data_through_the_same_config(tmp_path):
  """Photographs that ship with scikit-image, of unlike sizes and modes."""
  import skimage.data

  names = ('astronaut.png', 'camera.png', 'coffee.png')
  folder = pathlib.Path(skimage.data.__file__).parent
  rows = [
      {
          'id': name,
          'image': name,
          'conversations': [
              {'from': 'human', 'value': '<image>\nWhat is this?'},
              {'from': 'gpt', 'value': f'A picture: {name[:-4]}.'},
              {'from': 'human', 'value': 'Schön?'},
              {'from': 'gpt', 'value': 'Ja, sehr schön. 好'},
          ],
      }
      for name in names
      if (folder / name).exists()
  ]
  assert rows, os.listdir(folder)
  path = tmp_path / 'own.json'
  path.write_text(json.dumps(rows), encoding='utf-8')
  run = tmp_path / 'run'
  cfg = tiny.train_config(run, data__json=str(path), data__images=str(folder))
  loop.run(cfg)
  assert {h[0] for h in _history(run)} == set(cfg.stages)
  bad = [dict(rows[0], image='missing.png')]
  path.write_text(json.dumps(bad), encoding='utf-8')
  with pytest.raises(sources.DataError, match=r'own.json row 0 .*missing.png'):
    loop.run(
        tiny.train_config(
            tmp_path / 'other', data__json=str(path), data__images=str(folder)
        )
    )
