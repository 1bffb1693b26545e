# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config
from moellava_jax.data import assemble, encode, packing, pipeline, sources
from moellava_jax.model import llava
from moellava_jax.train import step as step_lib
from tests import tiny


def _conversations(count, seed=0, image_tokens=576):
  """Lengths and images as of a mix of image questions and plain text."""
  rng = np.random.default_rng(seed)
  images_N = (rng.random(count) < 0.9).astype(int)
  text_N = np.minimum(np.exp(rng.normal(5, 0.8, count)), 1400).astype(int) + 40
  return images_N * image_tokens + text_N, images_N


def _pack(lengths_N, images_N, row_length, max_images, **window):
  items_N = np.arange(len(lengths_N), dtype=np.int32)
  return packing.pack(
      items_N,
      lengths_N,
      images_N,
      row_length=row_length,
      max_images=max_images,
      **window,
  )


def _fill(plan, lengths_N, row_length):
  return lengths_N.sum() / (len(plan.ends_R) * row_length)


@pytest.mark.parametrize('row_length, slots', [(2048, 3), (4096, 6), (8192, 8)])
def test_rows_are_as_full_as_packing_everything_at_once(row_length, slots):
  lengths_N, images_N = _conversations(20_000)
  plan = _pack(lengths_N, images_N, row_length, slots, window=4096)
  offline = _pack(lengths_N, images_N, row_length, slots, window=20_000)
  ratio = _fill(plan, lengths_N, row_length) / _fill(
      offline, lengths_N, row_length
  )
  assert ratio > 0.98
  # And much fuller than a conversation each.
  assert _fill(plan, lengths_N, row_length) > 0.8 > 2 * lengths_N.mean() / 2048


def test_every_conversation_has_one_place_and_no_row_overflows():
  lengths_N, images_N = _conversations(5000)
  plan = _pack(lengths_N, images_N, 2048, 2, window=512)
  assert sorted(plan.items_N) == list(range(5000))
  rows = [plan.row(r) for r in range(len(plan.ends_R))]
  assert max(lengths_N[row].sum() for row in rows) <= 2048
  assert max(images_N[row].sum() for row in rows) == 2
  assert sum(len(row) for row in rows) == 5000


def test_image_slots_limit_a_row_as_positions_do():
  lengths_N, images_N = np.full(12, 10), np.ones(12, int)
  assert len(_pack(lengths_N, images_N, 100, 3).ends_R) == 4
  assert len(_pack(lengths_N, images_N, 100, 12).ends_R) == 2
  # Text still goes beside images that have filled the slots.
  images_N[::2] = 0
  assert len(_pack(lengths_N, images_N, 60, 3).ends_R) == 2


def test_what_no_row_takes_is_an_error():
  with pytest.raises(ValueError, match='101 positions or 1 images'):
    _pack(np.array([101]), np.array([1]), 100, 1)
  with pytest.raises(ValueError, match='10 positions or 2 images'):
    _pack(np.array([10]), np.array([2]), 100, 1)


def test_rows_can_be_put_in_another_order():
  lengths_N, images_N = _conversations(200)
  plan = _pack(lengths_N, images_N, 2048, 3)
  order = np.random.default_rng(0).permutation(len(plan.ends_R))
  moved = packing.shuffle(plan, order)
  for r, old in enumerate(order):
    np.testing.assert_array_equal(moved.row(r), plan.row(old))


CFG = tiny.train_config()
VISION = tiny.model_config().vision


def _format(row_length, max_images):
  return encode.Format('bare', row_length, max_images, VISION, CFG.data)


def _loaded(lengths, seed=0):
  """Conversations of random tokens; those of even number have an image, and
  the first has two.
  """
  rng = np.random.default_rng(seed)
  patches, size = VISION.num_tokens, VISION.image_size
  loaded = []
  for number, length in enumerate(lengths):
    count = 2 if not number else (number + 1) % 2
    tokens_L = rng.integers(1, 48, length).astype(np.int32)
    for image in range(count):
      at = 1 + image * (patches + 1)
      tokens_L[at : at + patches] = config.IMAGE_TOKEN
    supervised_L = np.arange(length) >= length - 4
    pixels = [
        rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)
    ]
    paths = tuple(str(n) for n in range(count))
    loaded.append(
        assemble.Loaded(
            encode.Example(
                tokens_L, supervised_L, paths, None, number + 1, False, False
            ),
            pixels,
        )
    )
  return loaded


LENGTHS = (17, 9, 14, 8, 12, 6)


def _batches():
  """The same conversations, each in a row of its own and two or three a row."""
  alone, packed = _format(24, 2), _format(44, 3)
  loaded = _loaded(LENGTHS)
  return (
      pipeline.stack([assemble.fill_row([x], alone) for x in loaded]),
      pipeline.stack(
          [
              assemble.fill_row([loaded[n] for n in row], packed)
              for row in ([0, 1, 2], [4, 3, 5])
          ]
      ),
  )


@functools.partial(jax.jit, static_argnames='cfg')
def _loss(cfg, params, batch):
  """The loss of training and its gradient; and all sums."""

  def loss(params):
    sums = step_lib.loss_sums(
        llava.Llava(cfg),
        params,
        batch,
        jax.random.key(0),
        train=True,
        probe_sizes=None,
    )
    return sums.ce_loss + sums.balance_loss, sums

  (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(params)
  return sums, gradient


@pytest.mark.parametrize('sparse', [False, True])
def test_a_packed_batch_has_the_loss_of_its_conversations(sparse):
  moe = None
  if sparse:  # Nothing is dropped, and nothing drawn.
    moe = tiny.moe_config(
        layers='all',
        capacity_factor=8.0,
        second_choice='argmax',
        max_group_size=16,  # Rows of 44 are divided otherwise than those of 24.
    )
  cfg = tiny.model_config(moe, residual_dropout=0.0)
  params = tiny.params_of(cfg)
  (one, gradient), (other, gradient_packed) = (
      _loss(cfg, params, batch) for batch in _batches()
  )
  assert float(one.weight) == float(other.weight) == 4 * len(LENGTHS)
  assert float(one.tokens) == float(other.tokens) == sum(LENGTHS)
  np.testing.assert_allclose(other.ce_loss, one.ce_loss, rtol=1e-5)
  np.testing.assert_allclose(other.balance_loss, one.balance_loss, rtol=1e-5)
  assert bool(other.balance_loss) == sparse
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient))
  pairs = zip(
      jax.tree.leaves(gradient), jax.tree.leaves(gradient_packed), strict=True
  )
  for a, b in pairs:
    np.testing.assert_allclose(b, a, atol=1e-5 * largest, rtol=1e-4)


def test_neighbours_in_a_row_do_not_matter():
  cfg = tiny.model_config()
  params = tiny.params_of(cfg)
  loaded, fmt = _loaded(LENGTHS), _format(44, 3)

  def logits_of_last(row):
    batch = pipeline.stack([assemble.fill_row([loaded[n] for n in row], fmt)])
    where = batch.segment_ids_BT[0] == len(row)
    assert where.sum() == LENGTHS[row[-1]]
    out = tiny.forward(cfg, params, jax.tree.map(jnp.asarray, batch))
    return np.asarray(out.logits_BTV[0][where])

  beside = logits_of_last([0, 2])
  np.testing.assert_allclose(logits_of_last([4, 2]), beside, atol=1e-5)
  np.testing.assert_allclose(logits_of_last([1, 2]), beside, atol=1e-5)


def test_segments_positions_and_targets_of_a_packed_row():
  row = assemble.fill_row(_loaded((5, 3))[1:], _format(8, 1))
  assert row.segment_ids_BT.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
  loaded = _loaded((17, 3, 14))
  row = assemble.fill_row([loaded[1], loaded[2]], _format(20, 1))
  assert row.segment_ids_BT.tolist() == 3 * [1] + 14 * [2] + 3 * [0]
  assert row.positions_BT[:17].tolist() == [*range(3), *range(14)]
  # Nothing predicts the first token of a conversation.
  assert row.loss_weight_BT[2] == 0 and row.loss_weight_BT[16] == 0
  assert row.loss_weight_BT.sum() == 2 + 4
  taught = np.flatnonzero(row.loss_weight_BT)
  np.testing.assert_array_equal(
      row.targets_BT[taught], row.tokens_BT[taught + 1]
  )
  assert row.ids_B != loaded[1].example.id


def test_lengths_that_were_wrong_are_an_error():
  loaded = _loaded((17, 9))
  for fmt in (_format(25, 2), _format(26, 1)):
    with pytest.raises(sources.DataError, match='count them again'):
      assemble.fill_row(loaded, fmt)


def test_the_parity_modes_do_not_pack():
  with pytest.raises(config.UserError, match='parity_truncation'):
    tiny.train_config(data__arrangement='packed', data__parity_truncation=True)
