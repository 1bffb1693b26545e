# SPDX-License-Identifier: Apache-2.0
"""Counts are those of plain loops, and their shares are never NaN."""

import json

import numpy as np
import pytest

from moellava_jax import config
from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import tally
from moellava_jax.infer import tracing
from tests.analysis import routers


def tokens(layers, experts, top_k, number=60, seed=0, image=0.6, without=()):
  """Random choices; nobody chooses the experts `without`."""
  rng = np.random.default_rng(seed)
  score_LNE = rng.random((layers, number, experts))
  score_LNE[..., list(without)] = -1
  return tally.Tokens(
      2,
      rng.random(number) < image,
      np.argsort(-score_LNE, axis=-1)[..., :top_k],
      rng.random((layers, number, top_k)) < 0.8,
      rng.random((layers, number)),
  )


def counts_of(layers, experts, top_k, **kwargs):
  part = tokens(layers, experts, top_k, **kwargs)
  return tally.tally(range(layers), experts, [part])


@pytest.mark.parametrize(
    'layers, experts, top_k', [(1, 1, 1), (3, 2, 2), (2, 16, 3), (24, 4, 2)]
)
def test_counts_are_those_of_loops(layers, experts, top_k):
  part = tokens(layers, experts, top_k)
  expected = routers.Counted(layers, experts)
  for n, is_image in enumerate(part.is_image_N):
    expected.add(is_image, part.choice_LNk[:, n], part.kept_LNk[:, n])
  counts = tally.tally(range(layers), experts, [part])
  expected.check(counts)
  entropy_LN = part.entropy_LN
  for m, name in enumerate(counts_lib.MODALITIES):
    mine_N = part.is_image_N == (name == 'image')
    np.testing.assert_allclose(
        counts_lib.entropy_L(counts, m), entropy_LN[:, mine_N].mean(1)
    )


def test_parts_add_up():
  whole = tokens(3, 4, 2, number=210)
  parts = [
      tally.Tokens(
          1,
          whole.is_image_N[n : n + 2],
          whole.choice_LNk[:, n : n + 2],
          whole.kept_LNk[:, n : n + 2],
          whole.entropy_LN[:, n : n + 2],
      )
      for n in range(0, 210, 2)
  ]
  one = tally.tally(range(3), 4, [whole])
  many = tally.tally(range(3), 4, parts)
  assert (one.conversations, many.conversations) == (2, 105)
  one, many = counts_lib.to_json(one), counts_lib.to_json(many)
  np.testing.assert_allclose(one.pop('entropy_LM'), many.pop('entropy_LM'))
  del one['conversations'], many['conversations']
  assert one == many


def test_an_expert_without_a_token_is_zero_and_nothing_is_nan():
  counts = counts_of(2, 4, 2, without=(3,))
  for load_LE in (
      counts_lib.load_LE(counts),
      counts_lib.image_part_LE(counts),
      counts_lib.text_part_LE(counts),
      counts_lib.pairs_LEE(counts)[:, 3],
  ):
    assert np.all(np.isfinite(load_LE))
    assert np.all(load_LE[:, 3] == 0)
  both_LE = counts_lib.image_part_LE(counts) + counts_lib.text_part_LE(counts)
  np.testing.assert_allclose(both_LE[:, :3], 1)


@pytest.mark.parametrize('image, empty', [(0.0, 1), (1.0, 0)])
def test_a_modality_without_tokens_is_zero(image, empty):
  counts = counts_of(2, 4, 2, image=image)
  assert counts_lib.present(counts) == [1 - empty]
  assert not counts_lib.load_LE(counts, empty).any()
  assert not counts_lib.drop_rate_L(counts, empty).any()
  assert not counts_lib.entropy_L(counts, empty).any()
  assert not counts_lib.pairs_LEE(counts, empty).any()
  assert counts.paths_M[empty].distinct == 0
  np.testing.assert_array_equal(
      counts_lib.load_LE(counts), counts_lib.load_LE(counts, 1 - empty)
  )


def test_preference_weighs_modalities_equally():
  # Expert 0: one of two texts, one of eight patches.
  choice_LNk = np.array([[[0], [1], [0], [1], [1], [1], [1], [1], [1], [1]]])
  part = tally.Tokens(1, np.arange(10) >= 2, choice_LNk, choice_LNk >= 0, None)
  counts = tally.tally([0], 2, [part])
  image_LE = counts_lib.image_part_LE(counts)
  np.testing.assert_allclose(image_LE, [[0.125 / 0.625, 0.875 / 1.375]])
  assert counts_lib.entropy_L(counts) is None


def test_json_has_all_that_is_shown():
  counts = counts_of(3, 4, 2)
  text = json.dumps(counts_lib.to_json(counts), allow_nan=False)
  again = counts_lib.from_json(json.loads(text))
  assert counts_lib.to_json(again) == counts_lib.to_json(counts)
  assert again.paths_M[0].top_CL.shape == counts.paths_M[0].top_CL.shape


def test_tokens_of_another_model_are_refused():
  with pytest.raises(config.UserError, match='chose expert 3, but a layer has'):
    tally.tally(range(2), 2, [tokens(2, 4, 2)])
  with pytest.raises(config.UserError, match='2 choices in 3 sparse layers'):
    tally.tally(range(2), 4, [tokens(3, 4, 2)])
  with pytest.raises(config.UserError, match='1 choices .* with 2 choices'):
    tally.tally(range(2), 4, [tokens(2, 4, 2), tokens(2, 4, 1)])
  with pytest.raises(config.UserError, match='no tokens'):
    tally.tally(range(2), 4, [])


def test_one_conversation_of_a_chat():
  choice_MTk = np.array([[[0, 1], [2, 3]], [[1, 0], [3, 2]]])
  routing = tracing.Routing(
      (1, 3),
      np.array([7, config.IMAGE_TOKEN]),
      np.array([False, True]),
      choice_MTk,
      np.ones((2, 2, 2)),
      np.ones((2, 2, 2), bool),
  )
  counts = tally.of_routing([routing], 4)
  assert counts.layers == (1, 3)
  assert counts.tokens_M.tolist() == [1, 1]
  assert counts.paths_M[0].top_CL.tolist() == [[0, 1]]
  assert counts.paths_M[1].top_CL.tolist() == [[2, 3]]
  with pytest.raises(config.UserError, match='give those of one model'):
    tally.of_routing([routing, routing._replace(layers=(0, 2))], 4)
