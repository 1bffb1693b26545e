# SPDX-License-Identifier: Apache-2.0
import shutil

import jax
import numpy as np
import pytest

from moellava_jax import config
from moellava_jax.model import llava
from moellava_jax.train import features, inputs
from moellava_jax.train import step as step_lib
from tests import tiny

CFG = tiny.model_config()
MODEL = llava.Llava(CFG)


def _batches(*seeds):
  return [tiny.batch(CFG, rows=4, seed=seed) for seed in seeds]


def _cache(folder, params, images=9):
  return features.Cache(str(folder), MODEL, params['vision'], images)


@jax.jit
def _loss(params, batch):
  sums = step_lib.loss_sums(
      MODEL, params, batch, None, train=False, probe_sizes=None
  )
  return sums.ce_loss


def test_the_loss_is_that_of_the_images(tmp_path):
  params = tiny.params_of(CFG)
  (plain,) = _batches(0)
  for _ in range(2):  # Made, and read.
    (kept,) = _cache(tmp_path, params).through(iter([plain]))
    assert isinstance(kept.images_BIHWC, llava.Features)
    np.testing.assert_allclose(
        _loss(params, kept), _loss(params, plain), rtol=1e-5
    )


def test_the_tower_looks_at_an_image_once(tmp_path):
  params = tiny.params_of(CFG)
  cache = _cache(tmp_path, params)
  looked = []
  tower = cache._tower
  cache._tower = lambda *args: looked.append(1) or tower(*args)
  first, second = cache.through(iter(_batches(0, 0)))
  np.testing.assert_array_equal(*(x.images_BIHWC[0] for x in (first, second)))
  assert len(looked) == 1
  # The next run finds all of them; a file that is not whole is made again.
  again = _cache(tmp_path, params)
  again._tower = cache._tower
  list(again.through(iter(_batches(0))))
  assert len(looked) == 1
  file = next(p for p in tmp_path.rglob('*') if p.is_file())
  file.write_bytes(file.read_bytes()[:-1])
  (third,) = again.through(iter(_batches(0)))
  assert len(looked) == 2
  np.testing.assert_array_equal(third.images_BIHWC[0], first.images_BIHWC[0])


def test_another_tower_has_other_features(tmp_path):
  one, other = tiny.params_of(CFG), tiny.params_of(CFG, seed=1)
  (a,) = _cache(tmp_path, one).through(iter(_batches(0)))
  (b,) = _cache(tmp_path, other).through(iter(_batches(0)))
  assert np.abs(a.images_BIHWC[0] - b.images_BIHWC[0]).max() > 1e-3
  assert len(list(tmp_path.iterdir())) == 2


def test_it_says_the_size_and_refuses_without_room(
    tmp_path, monkeypatch, capsys
):
  params = tiny.params_of(CFG)
  size = 4 * CFG.vision.num_tokens * CFG.vision.width
  _cache(tmp_path, params, images=10**6)
  assert f'take {1e6 * size / 1e9:.3g} GB' in capsys.readouterr().out
  usage = shutil.disk_usage(tmp_path)._replace(free=10 * size)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(config.UserError, match='do not fit.*feature_cache'):
    _cache(tmp_path, params, images=10)
  cache = _cache(tmp_path, params, images=9)
  # What is there already needs no room.
  list(cache.through(iter(_batches(0))))
  _cache(tmp_path, params, images=12)


def test_several_processes_are_refused_before_anything_is_read(
    tmp_path, monkeypatch
):
  cfg = tiny.train_config(tmp_path / 'run', data__feature_cache=str(tmp_path))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(config.UserError, match='one process, not for 2'):
    inputs.read(cfg, ['pretrain', 'moe'])
  assert not (tmp_path / 'run').exists()
