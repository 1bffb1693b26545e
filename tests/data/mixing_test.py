# SPDX-License-Identifier: Apache-2.0
"""Several sources: one after the other, or by weight."""

import collections

import numpy as np
import pytest

from moellava_jax import config
from moellava_jax.data import conversion, order, pipeline
from moellava_jax.data.builders import main
from moellava_jax.train import inputs
from tests import tiny
from tests.data import conversations, llava_files

SIZES = (40, 10, 6)
SOURCE_N = np.repeat(np.arange(3), SIZES)


def _layout(weights, seed=0, lengths_N=None):
  known = order.Known(('a', 'b', 'c'), SOURCE_N, lengths_N, None, None)
  return order.Layout(order.Plan('shuffled', weights, 4, 1, 64, 1), known, seed)


def _items(layout, epochs):
  return [int(layout[r][0]) for r in range(layout.rows(epochs))]


def test_without_weights_every_row_comes_once():
  assert sorted(_items(_layout(None), 1)) == list(range(56))


def test_weights_are_the_shares_of_an_epoch():
  layout = _layout((2.0, 1.0, 1.0))
  for epoch in range(3):
    items = _items(layout, epoch + 1)[epoch * 56 :]
    assert np.bincount(SOURCE_N[items]).tolist() == [28, 14, 14]


def test_a_source_repeats_only_after_all_of_its_rows():
  items = _items(_layout((1.0, 1.0, 2.0)), 4)  # 28 of the last an epoch.
  for source, size in enumerate(SIZES):
    drawn = [i for i in items if SOURCE_N[i] == source]
    counts = collections.Counter(drawn)
    assert len(counts) == min(size, len(drawn))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_mixture_is_shuffled_and_reproducible():
  one, again, other = (
      _items(_layout((1.0, 1.0, 1.0), seed), 2) for seed in (0, 0, 1)
  )
  assert one == again != other
  # No source comes in a block.
  assert len(set(SOURCE_N[one[:20]])) == 3


def test_a_source_of_weight_zero_is_left_out():
  items = _items(_layout((1.0, 0.0, 1.0)), 2)
  assert set(SOURCE_N[items]) == {0, 2}


def test_weights_that_do_not_fit_are_errors():
  with pytest.raises(config.UserError, match="each of the sources .*'b', 'c'"):
    _layout((1.0, 1.0))
  lengths_N = np.where(SOURCE_N == 1, 0, 9)
  with pytest.raises(
      config.UserError, match='b has weight 1.0, but no usable row'
  ):
    _layout((1.0, 1.0, 1.0), lengths_N=lengths_N)
  for weights in ((1.0,), (-1.0, 2.0), (0.0, 0.0)):
    with pytest.raises(config.UserError, match='one for each of its 2 files'):
      tiny.train_config(data__json='a.json,b.json', data__weights=weights)
  with pytest.raises(config.UserError, match='go with config.data.json'):
    tiny.train_config(data__weights=(1.0,))
  with pytest.raises(config.UserError, match="stage 'moe'"):
    tiny.train_config(moe__data__weights=(1.0, 1.0))


@pytest.mark.parametrize('arrangement', ['shuffled', 'packed'])
def test_files_of_a_stage_are_mixed_by_its_weights(tmp_path, arrangement):
  first = conversations.mixed(tmp_path, 9, 'a.json')
  second = conversations.mixed(tmp_path, 3, 'b.json', first=100)
  cfg = tiny.train_config(
      tmp_path / 'run',
      data__json=f'{first},{second}',
      data__images=str(tmp_path),
      data__eval_json=second,
      data__weights=(1.0, 1.0),
      data__arrangement=arrangement,
      data__shapes__dir=str(tmp_path / 'shapes'),
      data__shapes__train_scenes=16,
      data__shapes__heldout_scenes=8,
      finetune__row_length=200,
      finetune__max_images=2,
  )
  data = inputs.read(cfg, ['finetune']).examples['finetune']
  layout = data.layout(0, 4)
  items = [int(i) for r in range(layout.rows(1)) for i in layout[r]]
  assert len(items) == 12
  assert sum(i < 9 for i in items) == 6
  batch = next(pipeline.train_batches(data, 4, 0, 0, share=np.arange(4)))
  assert batch.loss_weight_BT.any()


def test_json_records_and_tfds_are_mixed_and_name_themselves(tmp_path):
  published = tmp_path / 'published'
  published.mkdir()
  path = llava_files.write(published, 8, 'blip_laion_cc_sbu_558k.json')
  tfds = main.prepare(
      'llava_pt', str(published), str(tmp_path / 'tfds'), 'error', 0
  )
  stored = str(tmp_path / 'prepared')
  options = conversion.Options((path,), stored, False, 0, 4, None)
  conversion.run(options, llava_files.settings(published))
  joined = f'{path},{stored},{tfds}'

  def read(run, weights, arrangement='packed', **changes):
    cfg = tiny.train_config(
        tmp_path / run,
        warmup=None,
        data__shapes=None,
        stages=('finetune', 'moe'),
        data__arrangement=arrangement,
        finetune__data__json=joined,
        finetune__data__images=str(published),
        finetune__data__eval_json=None,
        finetune__data__weights=weights,
        moe__data__json=f'{tfds},{path}',
        moe__data__images=str(published),
        moe__data__eval_json=None,
        pretrain__data__json=path,
        pretrain__data__images=str(published),
        finetune__row_length=200,
        finetune__max_images=2,
        moe__max_images=2,
        moe__row_length=128,
        **changes,
    )
    (tmp_path / run).mkdir(exist_ok=True)
    return inputs.read(cfg, ['finetune', 'moe']).examples

  both = read('run', (2.0, 1.0, 1.0))
  layout = both['finetune'].layout(0, 4)
  items = [int(i) for r in range(layout.rows(1)) for i in layout[r]]
  assert np.bincount(np.array(items) // 8).tolist() == [12, 6, 6]
  assert len(both['moe']) == 16  # The other stage: each row of both once.
  # The same conversation, wherever it comes from.
  for n in (0, 1, 3):
    one, *others = (both['finetune'][n + 8 * source] for source in range(3))
    for other in others:
      for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
  # Each names itself when it is broken, and none of the others.
  for file in (tmp_path / 'prepared').glob('images-*'):
    file.write_bytes(file.read_bytes().replace(b'PNG', b'---'))
  with pytest.raises(config.UserError, match=f'^{stored}.*cannot be read'):
    read('run', None, data__cache_mb=0)['finetune'][9]
  for file in (tmp_path / 'prepared').glob('rows-*'):
    file.unlink()
  with pytest.raises(config.UserError, match=f'^{stored}.*rows-00000'):
    read('run', None)
