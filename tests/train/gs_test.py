# SPDX-License-Identifier: Apache-2.0
"""Training in gs://: gcsfs, Orbax and TensorStore with a store in memory."""

import dataclasses
import importlib.util
import json
import re

from etils import epath
import jax
import numpy as np
import pytest

from moellava_jax import checkpoint, config, run_folder, trees
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.train import about, loop, metrics, preflight
from tests import object_store, tiny

_find = importlib.util.find_spec

RUN = 'gs://bucket/run'


class _Killed(Exception):
  pass


@pytest.fixture(scope='module')
def server():
  """For the whole module: gcsfs and TensorStore read the address only once."""
  found = object_store.Store('bucket')
  with (
      pytest.MonkeyPatch.context() as patch,
      object_store.serving(found) as address,
  ):
    patch.setenv('STORAGE_EMULATOR_HOST', address)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', address)
    patch.setenv('GOOGLE_CLOUD_PROJECT', 'project')
    # No look for credentials, by gcsfs and google-auth.
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    patch.setenv('NO_GCE_CHECK', 'true')
    # TensorBoard has its own way to gs://, which goes on after the test.
    patch.setattr(
        importlib.util,
        'find_spec',
        lambda name, *a: None if name == 'tensorboardX' else _find(name, *a),
    )
    run_folder.check(RUN)  # As everything does first.
    yield found


@pytest.fixture
def store(server):
  server.objects.clear()
  server.names.clear()
  server.refuse.clear()
  return server


def _config(run, data):
  return tiny.train_config(
      run,
      stages=('warmup',),
      data__shapes__dir=str(data),
      checkpoint__every=2,
      checkpoint__keep=1,
      warmup__steps=6,
  )


def _steps(store, stage):
  """Those of which anything is there."""
  prefix = f'run/{stage}/'
  return {n.split('/')[2] for n in store.objects if n.startswith(prefix)}


def _arrays(seed):
  mesh = jax.make_mesh((8,), ('data',), (jax.sharding.AxisType.Auto,))
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  drawn = np.random.default_rng(seed).normal(size=(8, 4))
  return {'w': jax.device_put(drawn.astype(np.float32), where)}


def _save(cfg, steps):
  """A stage whose step N holds the arrays of seed N, frozen ones those of 0."""
  stage = checkpoint.Stage(cfg.workdir, 'finetune', cfg.checkpoint)
  meta = {
      'stage': 'finetune',
      'config': dataclasses.asdict(cfg),
      'frozen': stage.save_frozen({'vision': _arrays(0)}),
  }
  for step in steps:
    stage.save(step, {'llm': _arrays(step)}, _arrays(10 + step), meta)
  return stage


def test_what_is_saved_is_read_again(store):
  cfg = _config(RUN, 'shapes')
  preflight._files(RUN)
  about.write_run(cfg)
  tok = tokenizer_lib.train(['one two', 'two three'], 300)
  tok.save(f'{RUN}/tokenizer')
  assert checkpoint.latest_meta(RUN, 'finetune') is None
  _save(cfg, (1, 2, 3)).close()
  assert _steps(store, 'finetune') == {'3'}  # keep=1.

  # A step without its last files, as a kill would leave it.
  for name in [n for n in store.objects if n.startswith('run/finetune/3/')]:
    if name != 'run/finetune/3/commit_success.txt':
      generation, content = store.objects[name]
      content = re.sub(rb'(commit_timestamp_nsecs": )\d+', rb'\1null', content)
      store.objects[name.replace('/3/', '/4/')] = (generation, content)
  with pytest.raises(checkpoint.CheckpointError, match='no finished'):
    checkpoint.find(f'{RUN}/finetune/4')
  found = checkpoint.latest_meta(RUN, 'finetune')
  assert found is not None and found[0] == f'{RUN}/finetune/3'
  model = checkpoint.load(f'{RUN}/finetune')
  assert model.path == f'{RUN}/finetune/3' and model.config == cfg
  np.testing.assert_array_equal(model.params['llm']['w'], _arrays(3)['w'])
  np.testing.assert_array_equal(model.params['vision']['w'], _arrays(0)['w'])
  again = tokenizer_lib.load(model.tokenizer_dir)
  assert again.backend.to_str() == tok.backend.to_str()

  stage = _save(cfg, (4,))  # In the place of that half.
  optimizer = stage.restore(4, {'llm': _arrays(1)}, _arrays(1))[1]
  np.testing.assert_array_equal(optimizer['w'], _arrays(14)['w'])
  for name in [n for n in store.objects if n.startswith('run/frozen/')]:
    del store.objects[name]
  meta = {'stage': 'finetune', **stage.read_meta(4)}
  with pytest.raises(checkpoint.CheckpointError, match='has vanished'):
    stage.save(5, {'llm': _arrays(1)}, _arrays(1), meta)
  stage.save_final(_arrays(5), cfg, {}, tok.save)
  stage.close()
  model = checkpoint.load(RUN)
  assert model.path == f'{RUN}/finetune/final'
  np.testing.assert_array_equal(model.params['w'], _arrays(5)['w'])
  assert not [n for n in store.objects if 'tmp' in n or 'preflight' in n]


def test_a_copy_from_a_disk_is_not_taken_for_the_rest_of_a_kill(store):
  cfg = _config(RUN, 'shapes')
  stage = _save(cfg, (1,))
  stage.save_final(_arrays(1), cfg, {}, lambda _: None)
  stage.close()
  for marks, path in (
      ('final/params/commit', f'{RUN}/finetune/final/params'),
      ('1/commit', f'{RUN}/finetune/1'),
  ):
    mark = next(n for n in store.objects if f'finetune/{marks}' in n)
    marked = store.objects.pop(mark)
    with pytest.raises(checkpoint.CheckpointError, match=f'{path} seems to be'):
      checkpoint.latest_meta(RUN, 'finetune')
    store.objects[mark] = marked
  assert checkpoint.latest_meta(RUN, 'finetune') is not None
  store.objects.pop('run/finetune/final/params/commit_success.txt')
  with pytest.raises(checkpoint.CheckpointError, match='empty one there'):
    checkpoint.load(f'{RUN}/finetune/final')


def test_what_other_processes_write_is_seen(store):
  folder = epath.Path(RUN)
  (folder / 'old').write_text('old')
  (folder / 'longer').write_text('1')
  assert [p.name for p in folder.iterdir()] == ['longer', 'old']
  store.objects['run/new'] = store.objects.pop('run/old')
  store.objects['run/longer'] = (1000, b'12345')
  assert [p.name for p in folder.iterdir()] == ['longer', 'new']
  assert (folder / 'longer').read_text() == '12345'


def test_a_store_that_refuses_is_explained(store):
  with pytest.raises(config.UserError, match='gs://other/run cannot be wri'):
    preflight._files('gs://other/run')
  store.refuse = {'.preflight', 'metrics', '/d/'}
  denied = 'cannot be written: OSError: Forbidden'
  with pytest.raises(config.UserError, match=f'folder {RUN} {denied}'):
    preflight._files(RUN)
  with pytest.raises(config.UserError, match=f'{RUN}/metrics.jsonl {denied}'):
    metrics.Writer(RUN, 'finetune', 0)
  with pytest.raises(checkpoint.CheckpointError, match='saved before is untou'):
    _save(_config(RUN, 'shapes'), (1,))


def _history(lines):
  return [(r['step'], r['loss'], r['samples']) for r in map(json.loads, lines)]


def _of(store):
  return _history(store.objects['run/metrics.jsonl'][1].splitlines())


@pytest.mark.large
def test_a_run_is_killed_and_goes_on(store, tmp_path, monkeypatch):
  data = tmp_path / 'shapes'
  loop.run(_config(tmp_path / 'run', data))
  undisturbed = _history(
      (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  )
  cfg = _config(RUN, data)
  real = loop._StageRun._log

  def dies(self, display, pending, *args):
    if pending.step == 5:
      # As little is done as after a kill.
      monkeypatch.setattr(self._writer, 'close', lambda: None)
      raise _Killed
    return real(self, display, pending, *args)

  monkeypatch.setattr(loop._StageRun, '_log', dies)
  with pytest.raises(_Killed):
    loop.run(cfg)
  monkeypatch.undo()
  assert _of(store) == undisturbed[:4]
  assert _steps(store, 'warmup') == {'4'}
  loop.run(cfg)
  assert _of(store) == undisturbed
  ours, theirs = checkpoint.load(RUN), checkpoint.load(str(tmp_path / 'run'))
  assert ours.config.workdir == RUN and ours.path == f'{RUN}/warmup/final'
  for path, leaf in trees.flatten(theirs.params).items():
    np.testing.assert_array_equal(trees.flatten(ours.params)[path], leaf)
  assert {f'run/{n}.json' for n in ('config', 'environment', 'stages')} <= set(
      store.objects
  )
