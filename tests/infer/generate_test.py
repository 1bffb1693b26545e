# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, sharding
from moellava_jax.infer import generate, sampling
from moellava_jax.model import llava
from tests import tiny

END = 3
NEW = 6


def _prompts(cfg, count=5, seed=0):
  """Prompts of one bucket; those of odd numbers are text alone."""
  rng = np.random.default_rng(seed)
  return [_prompt(rng, cfg, 17 + n, 1 - n % 2) for n in range(count)]


def _prompt(rng, cfg, length, images):
  size, patches = cfg.vision.image_size, cfg.vision.num_tokens
  text_L = rng.integers(4, cfg.llm.vocab_size, length).astype(np.int32)
  text_L[1 : 1 + images * patches] = config.IMAGE_TOKEN
  shape = (images, size, size, 3)
  return generate.Prompt(text_L, rng.integers(0, 256, shape, np.uint8))


def _generate(
    cfg, params, prompts, rows, *, end=END, first_seed=0, mesh=None, **options
):
  """New tokens of each prompt, without the end; seeds count from the first."""
  batch = generate.Batch(
      llava.Llava(cfg),
      params,
      prompts,
      [
          sampling.Options(**options)._replace(seed=first_seed + n)
          for n in range(len(prompts))
      ],
      max_new_tokens=NEW,
      ends=(end,),
      rows=rows,
      mesh=sharding.data_mesh() if mesh is None else mesh,
  )
  batch.advance(NEW, np.zeros(rows, bool))
  answers = []
  for tokens in batch.tokens()[: len(prompts)]:
    ends = np.flatnonzero(tokens == end)
    answers.append(tokens[: ends[0] if len(ends) else None])
  return answers


def test_a_ragged_batch_equals_one_by_one():
  cfg = tiny.model_config(moe=tiny.moe_config())
  params, prompts = tiny.params_of(cfg), _prompts(cfg)
  asked: list[dict[str, Any]] = [
      {},
      {'temperature': 0.8},
      {'temperature': 2.0, 'top_k': 9},
  ]
  for options in asked:
    together = _generate(cfg, params, prompts, 8, **options)
    assert len({tuple(answer) for answer in together}) > 1
    for n, prompt in enumerate(prompts):
      (alone,) = _generate(cfg, params, [prompt], 1, first_seed=n, **options)
      np.testing.assert_array_equal(together[n], alone)


@pytest.mark.slow
def test_a_row_does_not_depend_on_longer_ones_with_more_images():
  cfg = tiny.model_config(moe=tiny.moe_config())
  params, rng = tiny.params_of(cfg), np.random.default_rng(0)
  prompts = [
      _prompt(rng, cfg, length, images)
      for length, images in ((17, 0), (30, 1), (60, 3))
  ]
  assert len({generate.bucket(len(p.tokens_L)) for p in prompts}) == 3
  one = jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), sharding.AXES
  )
  together = _generate(cfg, params, prompts, 3, mesh=one)
  assert len({tuple(answer) for answer in together}) == len(prompts)
  for prompt, expected in zip(prompts, together, strict=True):
    (alone,) = _generate(cfg, params, [prompt], 1, mesh=one)
    np.testing.assert_array_equal(alone, expected)


def test_greedy_equals_the_argmax_of_full_recomputation():
  cfg = tiny.model_config(moe=tiny.moe_config())
  params, prompts = tiny.params_of(cfg), _prompts(cfg, 3)
  for prompt, answer in zip(
      prompts, _generate(cfg, params, prompts, 8), strict=True
  ):
    tokens = list(prompt.tokens_L)
    expected = []
    while len(expected) < 6:
      # One length for all, so that one program serves: the rest is padding.
      length = 32
      row = np.zeros((1, length), np.int32)
      row[0, : len(tokens)] = tokens
      data = tiny.batch(cfg, rows=1, length=length)._replace(
          tokens_BT=row,
          segment_ids_BT=(np.arange(length) < len(tokens))[None].astype(
              np.int32
          ),
          images_BIHWC=prompt.images_IHWC[None]
          if len(prompt.images_IHWC)
          else np.zeros((1, 1, 28, 28, 3), np.uint8),
      )
      out = tiny.forward(cfg, params, data)
      token = int(jnp.argmax(out.logits_BTV[0, len(tokens) - 1]))
      if token == END:
        break
      expected.append(token)
      tokens.append(token)
    np.testing.assert_array_equal(answer, expected)


def test_stops_at_the_end_token():
  cfg = tiny.model_config(moe=tiny.moe_config())
  params, prompts = tiny.params_of(cfg), _prompts(cfg, 1)
  (first,) = _generate(cfg, params, prompts, 1)
  (again,) = _generate(cfg, params, prompts, 1, end=int(first[2]))
  stop = list(first).index(first[2])
  np.testing.assert_array_equal(again, first[:stop])


def test_the_cache_is_bf16_and_stays_where_it_is():
  """Every part of a batch goes on in the memory of the one before."""
  cfg = tiny.model_config(moe=tiny.moe_config())
  cfg = dataclasses.replace(cfg, compute_dtype='bfloat16')
  batch = generate.Batch(
      llava.Llava(cfg),
      llava.rounded(tiny.params_of(cfg), cfg),
      _prompts(cfg, 1),
      [sampling.Options()],
      max_new_tokens=NEW,
      ends=(),
      rows=1,
      mesh=sharding.make_mesh(
          config.MeshConfig(1, 1, 1, 1, 1, False, 'device'), jax.devices()[:1]
      ),
  )
  before = jax.tree.leaves(batch._run.state.cache)
  assert {x.dtype for x in before} == {jnp.dtype('bfloat16')}
  where = [x.unsafe_buffer_pointer() for x in before]
  while batch.advance(2, np.zeros(1, bool)):
    after = jax.tree.leaves(batch._run.state.cache)
    assert [x.unsafe_buffer_pointer() for x in after] == where
    assert all(x.is_deleted() for x in before)


def _compiled():
  return generate._start._cache_size(), generate._advance._cache_size()


def test_one_program_serves_a_bucket_whatever_is_asked():
  cfg = tiny.model_config(width=24)
  params, prompts = tiny.params_of(cfg), _prompts(cfg, 5)
  shown = [p for p in prompts if len(p.images_IHWC)][:2]
  start, advance = _compiled()
  _generate(cfg, params, shown, 2)
  cut = shown[1]._replace(tokens_L=shown[1].tokens_L[:-1])
  _generate(cfg, params, [cut], 2)  # Shorter, and fewer rows.
  _generate(cfg, params, shown, 2, temperature=0.7, top_p=0.9, top_k=3)
  _generate(cfg, params, shown, 2, end=7, first_seed=9)
  assert _compiled() == (start + 1, advance + 1)


def test_buckets_grow_by_half_at_most():
  sizes = sorted({generate.bucket(n) for n in range(1, 3000)})
  assert sizes[:6] == [16, 24, 32, 48, 64, 96]
  assert all(generate.bucket(n) >= n for n in range(1, 3000))
  assert all(b <= 1.5 * a for a, b in itertools.pairwise(sizes))


def test_image_slots_are_padded_too():
  assert [generate.image_slots(n) for n in range(6)] == [0, 1, 2, 4, 4, 8]
  cfg = tiny.model_config()
  (prompt,) = _prompts(cfg, 1)
  three = prompt._replace(images_IHWC=np.tile(prompt.images_IHWC, (3, 1, 1, 1)))
  padded = generate.pad([prompt, three], 4)
  assert padded.images_BIHWC is not None
  assert padded.images_BIHWC.shape == (4, 4, 28, 28, 3)
  assert padded.lengths_B.tolist() == [17, 17, 1, 1]


def _drawn(logits_V, count=400, chosen=0, **options):
  given = sampling.rows(
      [sampling.Options(seed=n, **options) for n in range(count)], count
  )
  logits_BV = jnp.tile(jnp.asarray(logits_V), (count, 1))
  draw = jax.jit(sampling.choose)
  return np.asarray(draw(given, logits_BV, jnp.full(count, chosen)))


LOGITS_V = np.log([0.5, 0.3, 0.15, 0.05], dtype=np.float32)


def test_nucleus_keeps_the_smallest_set_of_that_mass():
  for top_p, kept in ((0.5, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2}), (1.0, None)):
    drawn = set(_drawn(LOGITS_V, temperature=1.0, top_p=top_p))
    assert drawn == (kept or {0, 1, 2, 3})
  assert set(_drawn(LOGITS_V, temperature=0.01)) == {0}
  share = np.mean(_drawn(LOGITS_V, temperature=1.0) == 0)
  assert 0.4 < share < 0.6


def test_top_k_keeps_the_largest_and_counts_before_the_nucleus():
  for top_k, kept in ((1, {0}), (2, {0, 1}), (3, {0, 1, 2}), (9, {0, 1, 2, 3})):
    assert set(_drawn(LOGITS_V, temperature=1.0, top_k=top_k)) == kept
  # Of the two largest the first has 0.625; of all it has half.
  assert set(_drawn(LOGITS_V, temperature=1.0, top_k=2, top_p=0.6)) == {0}
  assert set(_drawn(LOGITS_V, temperature=1.0, top_p=0.6)) == {0, 1}


def test_every_token_has_noise_of_its_own():
  first, second, again = (
      _drawn(LOGITS_V, temperature=1.0, chosen=n) for n in (0, 1, 0)
  )
  np.testing.assert_array_equal(first, again)
  assert np.mean(first == second) < 0.6  # 0.365 by chance.
