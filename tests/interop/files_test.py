# SPDX-License-Identifier: Apache-2.0
import builtins
import json
import pwd

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from moellava_jax.interop import files, shards


def _planned(**arrays):
  return [
      shards.Planned(name, x.shape, x.dtype, lambda x=x: x)
      for name, x in arrays.items()
  ]


def _arrays():
  rng = np.random.default_rng(0)
  return {
      'a.weight': rng.normal(size=(3, 5)).astype(np.float32),
      'b': rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
      'c': rng.normal(size=(2, 2, 2)).astype(np.float16),
      'd': np.float32(2.5) * np.ones(()),
  }


def test_what_is_written_can_be_read_by_others_and_by_us(tmp_path):
  arrays = _arrays()
  arrays['d'] = arrays['d'].astype(np.float32)
  shards.write(str(tmp_path), _planned(**arrays), shard_bytes=1 << 30)
  theirs = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  ours = files.open_weights(str(tmp_path))
  assert set(theirs) == set(ours.infos) == set(arrays)
  for name, array in arrays.items():
    for found in (theirs[name], ours.read(name)):
      assert found.dtype == array.dtype and found.shape == array.shape
      np.testing.assert_array_equal(found, array)


def test_files_of_others_are_read(tmp_path):
  arrays = {k: v for k, v in _arrays().items() if k != 'd'}
  safetensors.numpy.save_file(arrays, tmp_path / 'x.safetensors')
  weights = files.open_weights(str(tmp_path / 'x.safetensors'))
  for name, array in arrays.items():
    np.testing.assert_array_equal(weights.read(name), array)


def test_the_owner_of_a_file_needs_no_name(tmp_path, monkeypatch):
  def nobody(uid):
    raise KeyError(f'getpwuid(): uid not found: {uid}')

  kernel_DF = np.ones((2, 3), np.float32)
  safetensors.numpy.save_file({'a': kernel_DF}, tmp_path / 'x.safetensors')
  monkeypatch.setattr(pwd, 'getpwuid', nobody)  # In a container, say.
  opened = files.open_weights(str(tmp_path / 'x.safetensors'))
  np.testing.assert_array_equal(opened.read('a'), kernel_DF)


def test_shards_hold_what_fits_and_an_index(tmp_path):
  arrays = {f't{i}': np.full((10,), i, np.float32) for i in range(5)}
  shards.write(str(tmp_path), _planned(**arrays), shard_bytes=85)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'model-00001-of-00003.safetensors',
      'model-00002-of-00003.safetensors',
      'model-00003-of-00003.safetensors',
      'model.safetensors.index.json',
  ]
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == 200
  weights = files.open_weights(str(tmp_path))
  assert all(weights.read(f't{i}')[0] == i for i in range(5))
  (tmp_path / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(files.WeightsError, match='lacks .*00002-of-00003'):
    files.open_weights(str(tmp_path))


def test_an_index_that_promises_too_much(tmp_path):
  arrays = {f't{i}': np.full((10,), i, np.float32) for i in range(5)}
  shards.write(str(tmp_path), _planned(**arrays), shard_bytes=85)
  path = tmp_path / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  index['weight_map']['more'] = 'model-00001-of-00003.safetensors'
  path.write_text(json.dumps(index))
  with pytest.raises(files.WeightsError, match="00001.* lacks tensor 'more'"):
    files.open_weights(str(tmp_path))


def test_truncated_files_are_named(tmp_path):
  shards.write(str(tmp_path), _planned(**_arrays()), shard_bytes=1 << 30)
  path = tmp_path / 'model.safetensors'
  whole = path.read_bytes()
  for length in (0, 5, 40, len(whole) - 3):
    path.write_bytes(whole[:length])
    with pytest.raises(files.WeightsError, match='model.safetensors.*truncat'):
      files.open_weights(str(tmp_path))


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
  array = np.zeros((1 << 20) + 5, np.float16)
  array[-1] = value
  shards.write(str(tmp_path), _planned(bad=array), shard_bytes=1 << 30)
  weights = files.open_weights(str(tmp_path))
  with pytest.raises(files.WeightsError, match=r"model.safetensors.*'bad'"):
    weights.read('bad')


def test_nothing_there(tmp_path):
  with pytest.raises(files.WeightsError, match='has no weights'):
    files.open_weights(str(tmp_path))
  with pytest.raises(files.WeightsError, match='does not exist'):
    files.open_weights(str(tmp_path / 'nowhere'))
  (tmp_path / 'weights.npz').write_bytes(b'')
  with pytest.raises(files.WeightsError, match='ends in .safetensors'):
    files.open_weights(str(tmp_path / 'weights.npz'))


def test_bin_files_without_torch_name_the_extra(tmp_path, monkeypatch):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  real = builtins.__import__

  def without_torch(name, *args, **kwargs):
    if name == 'torch':
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', without_torch)
  with pytest.raises(files.WeightsError, match=r'pip install -e \.\[parity\]'):
    files.open_weights(str(tmp_path))
