# SPDX-License-Identifier: Apache-2.0
import functools
import json
import os
import resource
import shutil
from typing import Any

from etils import epath
import jax
import numpy as np
import pytest

from moellava_jax import checkpoint, config, sharding, trees
from tests import tiny

_EVERY_STEP = config.CheckpointConfig(
    every=1, minutes=None, keep=2, keep_every=None
)
_META = {'stage': 'finetune', 'frozen': '', 'data': {'next_index': 7}}


def _mesh(**sizes):
  count = int(np.prod(list(sizes.values())))
  shape = [sizes.get(axis, 1) for axis in sharding.AXES]
  devices = np.array(jax.devices()[:count]).reshape(shape)
  return jax.sharding.Mesh(devices, sharding.AXES)


def _abstract(mesh) -> tuple[Any, Any]:
  """A matrix for each mesh axis and a counter: (trained, optimizer)."""

  def leaf(shape, *spec, dtype: Any = np.float32):
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  trained = {
      'experts': leaf((4, 64, 64), 'expert', 'fsdp', 'tensor'),
      'head': leaf((64, 32), 'fsdp'),
  }
  optimizer = {'mu': trained, 'step': leaf((), dtype=np.int32)}
  return trained, optimizer


def _arrays(mesh, seed=0) -> tuple[Any, Any]:
  rng = np.random.default_rng(seed)

  def draw(leaf):
    values = rng.normal(size=leaf.shape) * 100
    return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

  return jax.tree.map(draw, _abstract(mesh))


def _assert_same(ours, theirs):
  for path, leaf in trees.flatten(theirs).items():
    np.testing.assert_array_equal(trees.flatten(ours)[path], leaf, err_msg=path)


def _stage(run, **changes):
  cfg = config.build(
      config.CheckpointConfig, {**vars(_EVERY_STEP), **changes}, 'checkpoint'
  )
  return checkpoint.Stage(str(run), 'finetune', cfg)


def _saved(run, steps, **changes):
  """A closed stage whose step N holds the arrays of seed N."""
  stage = _stage(run, **changes)
  for step in steps:
    stage.save(step, *_arrays(_mesh(fsdp=2), step), _META)
  stage.close()


def test_a_step_restores_bit_by_bit_on_other_meshes(tmp_path):
  meshes = [
      _mesh(data=2, fsdp=1, expert=4),
      _mesh(fsdp=2, expert=2, tensor=2),
      _mesh(expert=2),
      _mesh(data=1),
      _mesh(fsdp=4),
  ]
  arrays = _arrays(meshes[0])
  stage = _stage(tmp_path)
  stage.save(1, *arrays, _META)
  stage.close()
  for step, mesh in enumerate(meshes[1:], start=1):
    stage = _stage(tmp_path)
    assert stage.latest_step() == step
    assert stage.read_meta(step)['data'] == {'next_index': 7}
    abstract = _abstract(mesh)
    restored = stage.restore(step, *abstract)
    for ours, theirs, like in zip(restored, arrays, abstract, strict=True):
      _assert_same(ours, theirs)
      for path, leaf in trees.flatten(like).items():
        assert trees.flatten(ours)[path].sharding == leaf.sharding
    stage.save(step + 1, *restored, _META)  # The next mesh reads this one's.
    stage.close()


def test_the_state_of_an_optimizer_may_hold_tuples(tmp_path):
  trained, optimizer = _arrays(_mesh(fsdp=2))
  optimizer = {'opt_state': ((optimizer['mu'], ()), optimizer['step'])}
  stage = _stage(tmp_path)
  stage.save(1, trained, optimizer, _META)
  like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      optimizer,
  )
  restored = stage.restore(1, _abstract(_mesh(fsdp=2))[0], like)[1]
  stage.close()
  assert jax.tree.structure(restored) == jax.tree.structure(optimizer)
  jax.tree.map(np.testing.assert_array_equal, restored, optimizer)


def test_the_newest_stay_and_some_for_good(tmp_path):
  _saved(tmp_path, range(1, 12), keep=2, keep_every=4)
  steps = {p.name for p in (tmp_path / 'finetune').iterdir()}
  assert steps == {'4', '8', '10', '11'}


def test_training_may_go_on_where_an_error_is_handled(tmp_path):
  stage = _stage(tmp_path)
  try:
    raise ValueError
  except ValueError:
    stage.save(1, *_arrays(_mesh(fsdp=2)), _META)
    stage.check()
  stage.close()
  assert _stage(tmp_path).latest_step() == 1


# TensorStore reports to an event loop that Orbax has closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_is_an_error_and_earlier_steps_stay(tmp_path):
  _saved(tmp_path, [1], keep=1)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  stage = _stage(tmp_path, keep=1)
  try:
    # No file may grow beyond this: writing fails in the thread that does it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    stage.save(2, *_arrays(_mesh(fsdp=2), 2), _META)
    with pytest.raises(checkpoint.CheckpointError, match='Make room'):
      while True:
        stage.check()  # As training does after each step.
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  stage.close()
  stage = _stage(tmp_path, keep=1)
  assert stage.latest_step() == 1
  restored = stage.restore(1, *_abstract(_mesh(fsdp=2)))
  _assert_same(restored[0], _arrays(_mesh(fsdp=2), 1)[0])
  stage.save(2, *_arrays(_mesh(fsdp=2), 2), _META)
  stage.close()
  # Nothing is left of the attempt, nor of the step that had to give way.
  assert os.listdir(tmp_path / 'finetune') == ['2']


def test_a_run_that_vanishes_is_an_error_and_is_not_begun_anew(tmp_path):
  run = tmp_path / 'run'
  stage = _stage(run)
  frozen = stage.save_frozen({'tower': np.ones((4, 4), np.float32)})
  meta = {**_META, 'frozen': frozen}
  stage.save(1, *_arrays(_mesh(fsdp=2)), meta)
  stage.wait()
  shutil.rmtree(run / 'frozen')
  with pytest.raises(checkpoint.CheckpointError, match='frozen.*has vanished'):
    stage.save(2, *_arrays(_mesh(fsdp=2)), meta)
  shutil.rmtree(run)
  with pytest.raises(checkpoint.CheckpointError, match='has vanished'):
    stage.save(2, *_arrays(_mesh(fsdp=2)), meta)
  stage.close()
  assert not run.exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
  # Root may write to read-only folders, but not below a file.
  (tmp_path / 'file').write_text('')
  with pytest.raises(checkpoint.CheckpointError, match='Use another --config'):
    _stage(tmp_path / 'file' / 'run')


def _truncate(folder):
  """Halves every file of a checkpoint's item."""
  files = [p for p in folder.rglob('*') if p.is_file()]
  assert files
  for path in files:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize('item', ['trained', 'optimizer', 'meta'])
def test_a_damaged_newest_step_is_an_error_that_says_what_to_delete(
    tmp_path, item
):
  _saved(tmp_path, [1, 2])
  newest = tmp_path / 'finetune' / '2'
  _truncate(newest / item)

  def resume():
    path, _ = checkpoint.latest_meta(str(tmp_path), 'finetune') or ('', None)
    stage = _stage(tmp_path)
    latest = stage.latest_step()
    assert latest is not None
    try:
      restored = stage.restore(latest, *_abstract(_mesh(fsdp=2)))
    finally:
      stage.close()
    return path, restored

  with pytest.raises(checkpoint.CheckpointError) as error:
    resume()
  assert f'Checkpoint {newest} cannot be read' in str(error.value)
  assert f'delete or move {newest}' in str(error.value)
  assert 'goes on after step 1' in str(error.value)
  shutil.rmtree(newest)
  path, restored = resume()
  assert path == str(tmp_path / 'finetune' / '1')
  _assert_same(restored[0], _arrays(_mesh(fsdp=2), 1)[0])


def test_what_a_kill_leaves_is_no_step_and_goes_away(tmp_path):
  _saved(tmp_path, [1])
  folder = tmp_path / 'finetune'
  shutil.copytree(folder / '1', folder / '3.orbax-checkpoint-tmp')
  _truncate(folder / '3.orbax-checkpoint-tmp')
  found = checkpoint.latest_meta(str(tmp_path), 'finetune')
  assert found is not None and found[0].endswith('/1')
  assert str(checkpoint.find(str(folder))).endswith('/1')
  _saved(tmp_path, [2])
  assert sorted(os.listdir(folder)) == ['1', '2']


def test_what_is_read_part_by_part_must_all_be_there(tmp_path):
  tree = {'a': {'kernel': np.ones((4, 4), np.float32)}}
  path = epath.Path(tmp_path / 'final')
  cfg = tiny.train_config()
  checkpoint.write_final(path, tree, cfg, 'moe', {}, os.mkdir)
  read = functools.partial(checkpoint.load, str(path), each=lambda _, x: x + 1)
  np.testing.assert_array_equal(read().params['a']['kernel'], 2)
  about = json.loads((path / 'stage.json').read_text())
  about['params']['b'] = about['params']['a/kernel']
  (path / 'stage.json').write_text(json.dumps(about))
  with pytest.raises(checkpoint.CheckpointError, match='has no array b'):
    read()


def test_what_does_not_fit_the_devices_is_not_called_damaged():
  with (
      pytest.raises(checkpoint.CheckpointError, match='DIR.*--mesh=fsdp=N'),
      checkpoint._explained('DIR cannot be read', checkpoint._DAMAGED),
  ):
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory')
