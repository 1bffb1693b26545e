# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config
from moellava_jax.model import dot_product, llava
from tests import tiny


@pytest.mark.parametrize('kv_heads', [1, 2])
@pytest.mark.parametrize('parallel', [False, True])
def test_causality_by_gradient(kv_heads, parallel):
  cfg = tiny.model_config(num_kv_heads=kv_heads, parallel_block=parallel)
  params, data = tiny.params_of(cfg), tiny.batch(cfg, rows=1, length=8)
  data = data._replace(
      tokens_BT=np.abs(data.tokens_BT), segment_ids_BT=np.ones((1, 8), np.int32)
  )
  llm = llava.Llava(cfg)

  def logits(x_BTD):
    mask_BTS = dot_product.causal_mask(jnp.asarray(data.segment_ids_BT))
    real_BT = jnp.ones((1, 8), bool)
    out = llm.apply(
        {'params': params},
        x_BTD,
        jnp.arange(8)[None],
        mask_BTS,
        real_BT,
        ~real_BT,
        None,
        train=False,
        method=lambda m, *a, **k: m.llm(*a, **k),
    )
    return out.hidden_BTD[0].sum(-1)

  x_BTD = jax.random.normal(jax.random.key(0), (1, 8, cfg.llm.width))
  gradient_TSD = jax.jit(jax.jacobian(logits))(x_BTD)[:, 0]
  influence_TS = jnp.abs(gradient_TSD).sum(-1)
  np.testing.assert_array_equal(influence_TS > 0, np.tri(8, dtype=bool))


def test_segments_do_not_see_each_other_and_padding_is_not_seen():
  mask_TS = dot_product.causal_mask(jnp.array([[1, 1, 2, 2, 0]]))[0]
  np.testing.assert_array_equal(
      mask_TS.astype(int),
      [
          [1, 0, 0, 0, 0],
          [1, 1, 0, 0, 0],
          [0, 0, 1, 0, 0],
          [0, 0, 1, 1, 0],
          [1, 1, 1, 1, 0],
      ],
  )


def _segments(length):
  """A full row, three conversations, padding on both sides, padding alone."""
  rows = np.zeros((4, length), np.int32)
  rows[0] = 1
  for n, part in enumerate(np.array_split(np.arange(length - 3), 3)):
    rows[1, part] = n + 1
  rows[2, 5:-7] = 1
  return jnp.asarray(rows)


@pytest.mark.parametrize('length', [7, 129, 300, 640])
def test_blocks_of_queries_give_what_all_scores_give(length):
  segments_BT = _segments(length)
  shapes = [(4, length, 4, 8), (4, length, 2, 8), (4, length, 2, 8)]
  keys = jax.random.split(jax.random.key(0), 4)
  inputs = [
      jax.random.normal(k, s) for k, s in zip(keys[:3], shapes, strict=True)
  ]
  weights_BTHd = jax.random.normal(keys[3], shapes[0])

  def both(function, segments):
    return jax.jit(
        jax.value_and_grad(
            lambda x: ((y := function(*x, segments)) * weights_BTHd).sum()
            + (y**2).sum(),
        )
    )(inputs), jax.jit(function)(*inputs, segments)

  by_blocks = both(dot_product.attend_causal, segments_BT)
  by_all = both(
      lambda q, k, v, s: dot_product.attend(
          q, k, v, dot_product.causal_mask(s)
      ),
      segments_BT,
  )
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
      by_blocks,
      by_all,
  )


def test_blocks_of_queries_leave_out_most_later_keys():
  x_BTHd = jnp.zeros((1, 1024, 2, 64))
  segments_BT = jnp.ones((1, 1024), jnp.int32)

  def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()['flops']

  some = flops(dot_product.attend_causal, *[x_BTHd] * 3, segments_BT)
  every = flops(
      dot_product.attend, *[x_BTHd] * 3, dot_product.causal_mask(segments_BT)
  )
  assert some < 0.65 * every


def test_blocks_of_queries_keep_each_key_once():
  shape_BTHd = (1, 1024, 2, 64)
  inputs = [jnp.zeros(shape_BTHd)] * 3
  segments_BT = jnp.ones((1, 1024), jnp.int32)

  def kept(q, k, v):
    return jax.vjp(
        lambda *x: dot_product.attend_causal(*x, segments_BT), q, k, v
    )[1]

  floats = [
      x.size
      for x in jax.tree.leaves(jax.eval_shape(kept, *inputs))
      if x.dtype == jnp.float32
  ]
  assert floats == [x.size for x in inputs]


def test_packed_conversations_equal_single_ones():
  cfg = tiny.model_config()
  params = tiny.params_of(cfg)
  rng = np.random.default_rng(0)
  first, second = (rng.integers(1, 40, n) for n in (5, 7))

  blank = tiny.batch(cfg, rows=1)._replace(images_BIHWC=None)

  def logits(tokens, segments, positions):
    data = blank._replace(
        tokens_BT=np.array([tokens], np.int32),
        segment_ids_BT=np.array([segments], np.int32),
        positions_BT=np.array([positions], np.int32),
    )
    return tiny.forward(cfg, params, data).logits_BTV[0]

  packed = logits([*first, *second], [1] * 5 + [2] * 7, [*range(5), *range(7)])
  for tokens, part in ((first, packed[:5]), (second, packed[5:])):
    alone = logits([*tokens], [1] * len(tokens), [*range(len(tokens))])
    np.testing.assert_allclose(part, alone, atol=1e-5)


@pytest.mark.parametrize('moe', [False, True])
def test_cached_decoding_equals_the_full_forward(moe):
  cfg = tiny.model_config(moe=tiny.moe_config() if moe else None)
  params, data = tiny.params_of(cfg), tiny.batch(cfg, rows=2, length=12)
  data = data._replace(segment_ids_BT=np.ones((2, 12), np.int32))
  full_BTV = tiny.forward(cfg, params, data).logits_BTV
  cache = llava.init_cache(cfg.llm, 2, 16, jnp.float32)
  prompt = data._replace(
      **{
          name: getattr(data, name)[:, :8]
          for name in ('tokens_BT', 'segment_ids_BT', 'positions_BT')
      }
  )
  out = tiny.forward(cfg, params, prompt, cache=cache)
  np.testing.assert_allclose(out.logits_BTV, full_BTV[:, :8], atol=1e-5)
  for t in range(8, 12):
    one = data._replace(
        images_BIHWC=None,
        **{
            name: getattr(data, name)[:, t : t + 1]
            for name in ('tokens_BT', 'segment_ids_BT', 'positions_BT')
        },
    )
    out = tiny.forward(cfg, params, one, cache=out.cache)
    np.testing.assert_allclose(out.logits_BTV[:, 0], full_BTV[:, t], atol=1e-5)


def test_an_empty_cache_is_filled_but_not_read():
  """Right-padded rows of which some are cut into blocks of queries."""
  cfg = tiny.model_config()
  params, data = tiny.params_of(cfg), tiny.batch(cfg, rows=3, length=140)

  def run(is_empty):
    cache = llava.init_cache(cfg.llm, 3, 160, jnp.float32)
    if is_empty:
      cache = jax.tree.map(lambda x: x + np.nan, cache)
    out = jax.jit(
        lambda: llava.Llava(cfg).apply(
            {'params': params},
            data.tokens_BT,
            data.segment_ids_BT,
            data.positions_BT,
            data.images_BIHWC,
            train=False,
            cache=cache,
            cache_is_empty=is_empty,
        )
    )()
    assert out.cache is not None
    return out.logits_BTV, out.cache

  logits_BTV, cache = run(False)
  found_BTV, found = run(True)
  real_BT = data.segment_ids_BT > 0
  np.testing.assert_allclose(found_BTV[real_BT], logits_BTV[real_BT], atol=5e-5)
  for layer, expected in zip(found, cache, strict=True):
    for a_BKSd, b_BKSd in zip(layer, expected, strict=True):
      np.testing.assert_allclose(
          np.moveaxis(a_BKSd, 2, 1)[:, :140][real_BT],
          np.moveaxis(b_BKSd, 2, 1)[:, :140][real_BT],
          atol=1e-5,
      )


def test_a_row_of_padding_is_finite():
  cfg = tiny.model_config()
  params, data = tiny.params_of(cfg), tiny.batch(cfg)
  data = data._replace(segment_ids_BT=np.zeros_like(data.segment_ids_BT))
  assert bool(jnp.all(jnp.isfinite(tiny.forward(cfg, params, data).logits_BTV)))


def test_partial_rotation_leaves_the_rest_alone():
  from moellava_jax.model import layers

  x_BTHd = jax.random.normal(jax.random.key(0), (1, 3, 1, 10))
  positions_BT = jnp.arange(3)[None]
  by = layers.rotation(positions_BT, 10, 0.4, 10000.0)
  turned = layers.rotate(x_BTHd, by)
  np.testing.assert_array_equal(turned[..., 4:], x_BTHd[..., 4:])
  np.testing.assert_array_equal(turned[:, 0], x_BTHd[:, 0])
  assert not np.allclose(turned[:, 1, :, :4], x_BTHd[:, 1, :, :4])
  # Dimension 0 turns with dimension 2, by one radian per position.
  a, b = x_BTHd[0, 2, 0, 0], x_BTHd[0, 2, 0, 2]
  np.testing.assert_allclose(
      turned[0, 2, 0, 0], a * np.cos(2.0) - b * np.sin(2.0), rtol=1e-5
  )


def test_dimensions_that_turn_are_pairs():
  from moellava_jax.model import layers

  with pytest.raises(config.UserError, match='rotates 3 dimensions'):
    layers.rotation(jnp.arange(3)[None], 10, 0.3, 10000.0)


def test_residual_dropout_acts_in_training_only():
  cfg = tiny.model_config()
  cfg = dataclasses.replace(
      cfg, llm=dataclasses.replace(cfg.llm, residual_dropout=0.5)
  )
  params, data = tiny.params_of(cfg), tiny.batch(cfg)
  once = tiny.forward(cfg, params, data).logits_BTV
  np.testing.assert_array_equal(
      once, tiny.forward(cfg, params, data).logits_BTV
  )
  trained = tiny.forward(
      cfg, params, data, train=True, rng=jax.random.key(0)
  ).logits_BTV
  assert not np.allclose(once, trained)
