# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.model import dispatch, layers, moe
from moellava_jax.model import routing as routing_lib
from tests import tiny

# What DeepSpeed 0.9.5 does with these logits (8 tokens, 4 experts) was
# recorded by running its own functions.
LOGITS_SE = np.array(
    [
        [2, 1, 0, -1],
        [2, 1.5, 0, -1],
        [1, 0, 3, 0.5],
        [2.5, 2, 1, 0],
        [0, 3, 1, 0],
        [2, 0.5, 1.5, 0],
        [3, 2.5, 0, 0],
        [1.8, 1.7, 0.1, 0.2],
    ],
    np.float32,
)


def _route(
    logits_SE,
    *,
    top_k=2,
    capacity=8,
    noise_SE=None,
    priority_SE=None,
    real_S=None,
):
  if real_S is None:
    real_S = np.ones(len(logits_SE), bool)
  return routing_lib.route(
      jnp.asarray(logits_SE)[None],
      jnp.asarray(real_S)[None],
      top_k=top_k,
      capacity=capacity,
      noise_GSE=None if noise_SE is None else jnp.asarray(noise_SE)[None],
      priority_GSE=(
          None if priority_SE is None else jnp.asarray(priority_SE)[None]
      ),
  )


def _weights(routing):
  """Per token {expert: weight} of what was kept."""
  found = []
  for choice_k, kept_k, weight_k in zip(
      routing.choice_GSk[0],
      routing.kept_GSk[0],
      routing.weight_GSk[0],
      strict=True,
  ):
    found.append(
        {
            int(e): round(float(w), 5)
            for e, k, w in zip(choice_k, kept_k, weight_k, strict=True)
            if k
        }
    )
  return found


@pytest.mark.parametrize(
    'factor, capacity, expected',
    [
        (
            1.0,
            4,
            [
                {0: 0.73106, 1: 0.26894},
                {0: 0.62246, 1: 0.37754},
                {2: 1.0},
                {0: 0.62246, 1: 0.37754},
                {1: 0.8808, 2: 0.1192},
                {0: 0.62246, 2: 0.37754},
                {},
                {},
            ],
        ),
        (
            0.5,
            2,
            [
                {0: 0.73106, 1: 0.26894},
                {0: 1.0},
                {2: 1.0},
                {},
                {1: 0.8808, 2: 0.1192},
                {},
                {},
                {},
            ],
        ),
    ],
)
def test_top2_without_noise_equals_deepspeed(factor, capacity, expected):
  assert routing_lib.capacity(8, 4, 2, factor, 0) == capacity
  assert _weights(_route(LOGITS_SE, capacity=capacity)) == expected


def test_top2_noise_moves_the_second_choice_but_not_the_weights():
  noise_SE = np.zeros_like(LOGITS_SE)
  noise_SE[0, 3], noise_SE[2, 1] = 5, 4
  found = _weights(_route(LOGITS_SE, capacity=6, noise_SE=noise_SE))
  assert found[0] == {0: 0.95257, 3: 0.04743}
  assert found[2] == {2: 0.95257, 1: 0.04743}
  assert found[7] == {0: 0.52498, 1: 0.47502}


def test_top1_keeps_the_raw_probability():
  found = _weights(_route(LOGITS_SE, top_k=1, capacity=2))
  assert found == [
      {0: 0.64391},
      {0: 0.55814},
      {2: 0.78914},
      {},
      {1: 0.80978},
      {},
      {},
      {},
  ]


@pytest.mark.parametrize(
    'tokens, factor, slots', [(637, 1.5, 478), (5001, 1.5, 3751), (10, 1.5, 8)]
)
def test_capacity_is_the_originals(tokens, factor, slots):
  assert routing_lib.capacity(tokens, 4, 2, factor, 0) == slots
  assert routing_lib.capacity(tokens, 4, 2, factor, slots + 3) == slots + 3


def test_three_tokens_and_three_experts_by_hand():
  # Token 0 prefers experts 0, 1; token 1 prefers 0, 2; token 2 prefers 1, 0.
  # First choices in order: expert 0 <- tokens 0, 1; expert 1 <- token 2. The
  # second choices queue behind: expert 1 <- token 0 (slot 1), expert 2 <-
  # token 1 (slot 0), expert 0 <- token 2 (slot 2, beyond a capacity of 2).
  logits_SE = np.log([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.4, 0.5, 0.1]])
  routing = _route(logits_SE.astype(np.float32), capacity=2)
  np.testing.assert_array_equal(routing.choice_GSk[0], [[0, 1], [0, 2], [1, 0]])
  np.testing.assert_array_equal(routing.slot_GSk[0], [[0, 1], [1, 0], [0, 2]])
  dispatch_GSEC, combine_GSEC = dispatch.one_hot(routing, 2, jnp.float32)
  expected_SEC = np.zeros((3, 3, 2))
  expected_SEC[0, 0, 0] = 6 / 9
  expected_SEC[0, 1, 1] = 3 / 9
  expected_SEC[1, 0, 1] = 5 / 9
  expected_SEC[1, 2, 0] = 4 / 9
  expected_SEC[2, 1, 0] = 1  # Its other choice was dropped.
  np.testing.assert_allclose(combine_GSEC[0], expected_SEC, atol=1e-6)
  np.testing.assert_array_equal(dispatch_GSEC[0], expected_SEC > 0)


def test_overflow_drops_the_last_token():
  logits_SE = np.tile(np.array([[3, 0, -1]], np.float32), (4, 1))
  routing = _route(logits_SE, top_k=1, capacity=3)
  np.testing.assert_array_equal(
      routing.kept_GSk[0, :, 0], [True, True, True, False]
  )


def test_padding_takes_no_slot():
  real_S = np.array([False, True, False, True, True])
  logits_SE = np.tile(np.array([[3, 2, -1]], np.float32), (5, 1))
  routing = _route(logits_SE, capacity=3, real_S=real_S)
  np.testing.assert_array_equal(routing.kept_GSk[0, :, 0], real_S)
  np.testing.assert_array_equal(
      np.asarray(routing.slot_GSk[0, :, 0])[real_S], [0, 1, 2]
  )
  assert not np.any(np.asarray(routing.weight_GSk[0])[~real_S])


def test_too_many_choices_is_an_error():
  with pytest.raises(ValueError, match='between 1 and 4 experts'):
    _route(LOGITS_SE, top_k=5)


@pytest.mark.parametrize('experts', [2, 4])
def test_balance_loss_is_one_when_uniform_and_e_when_collapsed(experts):
  tokens = 4 * experts
  uniform_SE = np.zeros((tokens, experts), np.float32)
  uniform_SE[np.arange(tokens), np.arange(tokens) % experts] = 1e-6
  collapsed_SE = np.zeros((tokens, experts), np.float32)
  collapsed_SE[:, 0] = 50
  real_GS = jnp.ones((1, tokens), bool)
  uniform = moe.balance_loss(_route(uniform_SE), real_GS)
  collapsed = moe.balance_loss(_route(collapsed_SE), real_GS)
  np.testing.assert_allclose(uniform, 1.0, rtol=1e-5)
  np.testing.assert_allclose(collapsed, experts, rtol=1e-5)


def test_random_token_selection_keeps_those_of_highest_priority():
  falling_SE = np.broadcast_to(np.linspace(1, 0.3, 8)[:, None], (8, 4))
  first = _route(LOGITS_SE, top_k=1, capacity=2, priority_SE=falling_SE)
  assert _weights(first) == [  # As recorded from DeepSpeed.
      {0: 0.64391},
      {0: 0.55814},
      {2: 0.78914},
      {},
      {1: 0.80978},
      {},
      {},
      {},
  ]
  # Tokens 0, 1, 3, 5, 6 and 7 want expert 0: now the last two have it.
  rising_SE = falling_SE[::-1]
  last = _route(LOGITS_SE, top_k=1, capacity=2, priority_SE=rising_SE)
  np.testing.assert_array_equal(
      last.kept_GSk[0, :, 0], np.isin(np.arange(8), [2, 4, 6, 7])
  )
  # Their slots are in token order, whatever the priorities.
  np.testing.assert_array_equal(last.slot_GSk[0, [6, 7], 0], [0, 1])
  swapped_SE = rising_SE.copy()
  swapped_SE[[6, 7]] = swapped_SE[[7, 6]]
  again = _route(LOGITS_SE, top_k=1, capacity=2, priority_SE=swapped_SE)
  np.testing.assert_array_equal(again.slot_GSk[0, [6, 7], 0], [0, 1])


def test_random_token_selection_passes_over_padding():
  real_S = np.arange(8) < 6
  rising_SE = np.broadcast_to(np.linspace(0.3, 1, 8)[:, None], (8, 4))
  found = _route(
      LOGITS_SE, top_k=1, capacity=2, priority_SE=rising_SE, real_S=real_S
  )
  np.testing.assert_array_equal(
      found.kept_GSk[0, :, 0], np.isin(np.arange(8), [2, 3, 4, 5])
  )
  with pytest.raises(ValueError, match='top-1'):
    _route(LOGITS_SE, priority_SE=rising_SE)


def test_balance_loss_equals_deepspeed_and_ignores_padding():
  real_S = np.ones(8, bool)
  loss = moe.balance_loss(_route(LOGITS_SE), jnp.asarray(real_S)[None])
  np.testing.assert_allclose(loss, 1.53914392, rtol=1e-6)
  padded_SE = np.concatenate([LOGITS_SE, np.full((5, 4), 9, np.float32)])
  real_S = np.arange(13) < 8
  routing = _route(padded_SE, real_S=real_S)
  loss = moe.balance_loss(routing, jnp.asarray(real_S)[None])
  np.testing.assert_allclose(loss, 1.53914392, rtol=1e-6)


def _layer(cfg, rows=3, length=10, seed=0):
  layer = moe.Moe(cfg, 'gelu_tanh', 12, True, jnp.float32)
  x_BTD = jax.random.normal(jax.random.key(seed), (rows, length, 8))
  real_BT = jnp.arange(length)[None] < length - jnp.arange(rows)[:, None]
  image_BT = jnp.broadcast_to(jnp.arange(length) < 4, (rows, length))
  rngs = {'params': jax.random.key(1), 'router': jax.random.key(2)}
  params = nn.unbox(
      jax.jit(functools.partial(layer.init, train=True))(
          rngs, x_BTD, real_BT, image_BT
      )
  )
  params = {'params': params['params']}  # Without the sown diagnostics.

  @functools.partial(jax.jit, static_argnames='train')
  def apply(params, x_BTD, train=True):
    return layer.apply(
        {'params': params['params']},
        x_BTD,
        real_BT,
        image_BT,
        train=train,
        rngs={'router': jax.random.key(3)},
    )

  return apply, params, x_BTD, real_BT


def _loop_over_experts(params, x_BTD, real_BT, cfg):
  """The layer without buckets or drops: every token, expert by expert."""
  router_DE = params['params']['router']['kernel']
  probs = jax.nn.softmax(x_BTD @ router_DE, axis=-1)
  order = np.argsort(-np.asarray(probs), axis=-1)[..., : cfg.top_k]
  out = np.zeros(x_BTD.shape)
  for e in range(cfg.num_experts):
    one = jax.tree.map(lambda x, e=e: x[e], params['params']['experts'])
    mlp = layers.Mlp('gelu_tanh', 12, True, jnp.float32)
    y_BTD = np.asarray(mlp.apply({'params': one}, x_BTD))
    chosen = (order == e).any(-1) & np.asarray(real_BT)
    total = np.take_along_axis(np.asarray(probs), order, -1).sum(-1)
    weight = np.asarray(probs)[..., e] / (total if cfg.top_k > 1 else 1)
    out += np.where(chosen, weight, 0)[..., None] * y_BTD
  return out


@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('max_group_size', [2048, 4])
def test_equals_a_loop_over_experts(top_k, max_group_size):
  cfg = tiny.moe_config(
      top_k=top_k, second_choice='argmax', max_group_size=max_group_size
  )
  apply, params, x_BTD, real_BT = _layer(cfg)
  y_BTD, _ = apply(params, x_BTD, train=False)
  np.testing.assert_allclose(
      y_BTD, _loop_over_experts(params, x_BTD, real_BT, cfg), atol=1e-5
  )


def test_one_expert_equals_the_dense_ffn():
  cfg = tiny.moe_config(num_experts=1, top_k=1, capacity_factor=1.0)
  apply, params, x_BTD, real_BT = _layer(cfg)
  y_BTD, aux = apply(params, x_BTD)
  dense = jax.tree.map(lambda x: x[0], params['params']['experts'])
  mlp = layers.Mlp('gelu_tanh', 12, True, jnp.float32)
  expected_BTD = mlp.apply({'params': dense}, x_BTD)
  np.testing.assert_allclose(
      y_BTD, jnp.where(real_BT[..., None], expected_BTD, 0), atol=1e-5
  )
  np.testing.assert_allclose(aux.balance_loss, 1.0, rtol=1e-6)


def test_residual_experts_are_mixed_with_the_dense_ffn():
  cfg = tiny.moe_config(use_residual=True)
  apply, params, x_BTD, real_BT = _layer(cfg)
  flat = params['params']
  flat['coefficient']['bias'] += jnp.array([0.5, -1.0])
  y_BTD, _ = apply(params, x_BTD, train=False)
  mlp = layers.Mlp('gelu_tanh', 12, True, jnp.float32)
  dense_BTD = mlp.apply({'params': flat['residual']}, x_BTD)
  share_BT2 = jax.nn.softmax(
      x_BTD @ flat['coefficient']['kernel'] + flat['coefficient']['bias']
  )
  expected_BTD = (
      _loop_over_experts(params, x_BTD, real_BT, cfg) * share_BT2[..., :1]
      + dense_BTD * share_BT2[..., 1:]
  )
  np.testing.assert_allclose(y_BTD, expected_BTD, atol=1e-5)


def test_noise_from_outside_replaces_what_would_be_drawn():
  cfg = tiny.moe_config(second_choice='sampled')
  layer = moe.Moe(cfg, 'gelu_tanh', 12, True, jnp.float32)
  _, params, x_BTD, real_BT = _layer(cfg)
  noise_BTE = jnp.zeros((3, 10, 4)).at[..., 3].set(100.0)
  (_, _), seen = layer.apply(
      {**params, 'routing': {'noise': noise_BTE}},
      x_BTD,
      real_BT,
      real_BT,
      train=True,
      mutable=['diagnostics'],
  )
  (trace,) = seen['diagnostics']['routing']
  first_BT, second_BT = np.moveaxis(np.asarray(trace.choice_BTk), -1, 0)
  np.testing.assert_array_equal(second_BT[first_BT != 3], 3)
  assert trace.logits_BTE.shape == (3, 10, 4)


def test_an_answer_does_not_depend_on_its_neighbours():
  cfg = tiny.moe_config()
  apply, params, x_BTD, _ = _layer(cfg, rows=3)
  y_BTD, _ = apply(params, x_BTD, train=False)
  other_BTD = x_BTD.at[1:].set(5.0)
  z_BTD, _ = apply(params, other_BTD, train=False)
  np.testing.assert_array_equal(y_BTD[0], z_BTD[0])


@pytest.mark.parametrize('rows', [1, 2, 3, 4])
def test_any_number_of_rows(rows):
  # The original takes a dense output of three rows for a sparse one.
  cfg = tiny.moe_config()
  apply, params, x_BTD, _ = _layer(cfg, rows=rows)
  y_BTD, aux = apply(params, x_BTD)
  assert y_BTD.shape == x_BTD.shape
  assert aux.balance_loss.shape == ()


def test_gradients_reach_router_and_experts():
  cfg = tiny.moe_config()
  apply, params, x_BTD, _ = _layer(cfg)

  def loss(params):
    y_BTD, _ = apply(params, x_BTD)
    return jnp.sum(y_BTD**2)

  grads = jax.grad(loss)(params)
  for leaf in jax.tree.leaves(grads):
    assert float(jnp.max(jnp.abs(leaf))) > 0

  aux_grad = jax.grad(lambda p: apply(p, x_BTD)[1].balance_loss)(params)
  assert float(jnp.max(jnp.abs(aux_grad['params']['router']['kernel']))) > 0


def test_group_batch_shares_one_capacity_among_all_rows():
  # Row 0 wants expert 0 only, row 1 expert 1 only: per row three of four
  # tokens overflow a capacity of one, over the batch two of eight slots...
  cfg = tiny.moe_config(
      num_experts=2, top_k=1, capacity_factor=1.0, max_group_size=2048
  )
  by_row = routing_lib.grouping(cfg, 2, 4)
  by_batch = routing_lib.grouping(dataclasses.replace(cfg, group='batch'), 2, 4)
  assert (by_row.groups, by_row.size) == (2, 4)
  assert (by_batch.groups, by_batch.size) == (1, 8)
  assert routing_lib.capacity(by_row.size, 2, 1, 1.0, 0) == 2
  assert routing_lib.capacity(by_batch.size, 2, 1, 1.0, 0) == 4
  x_BT = jnp.arange(8).reshape(2, 4)
  for plan in (by_row, by_batch):
    np.testing.assert_array_equal(plan.join(plan.split(x_BT, 0)), x_BT)


def test_long_rows_are_split_evenly_and_joined_again():
  cfg = tiny.moe_config(max_group_size=4)
  plan = routing_lib.grouping(cfg, 2, 10)
  assert (plan.groups, plan.size) == (6, 4)
  x_BT = jnp.arange(20).reshape(2, 10)
  split_GS = plan.split(x_BT, -1)
  assert int(jnp.sum(split_GS == -1)) == 4
  np.testing.assert_array_equal(plan.join(split_GS), x_BT)


def test_router_product_is_exact_on_every_backend():
  router = moe.Router(4)
  x_GSD = jnp.ones((1, 2, 8), jnp.bfloat16)
  params = nn.unbox(router.init(jax.random.key(0), x_GSD))
  jaxpr = jax.make_jaxpr(lambda x: router.apply(params, x))(x_GSD)
  dots = [e for e in jaxpr.eqns if e.primitive.name == 'dot_general']
  assert len(dots) == 1
  highest = jax.lax.Precision.HIGHEST
  assert dots[0].params['precision'] == (highest, highest)
  assert all(v.aval.dtype == jnp.float32 for v in dots[0].invars)


def test_statistics_count_by_modality():
  real_GS = jnp.asarray(np.arange(8) < 7)[None]
  image_GS = jnp.asarray(np.arange(8) < 3)[None]
  routing = _route(LOGITS_SE, capacity=2, real_S=np.arange(8) < 7)
  stats = moe.statistics(routing, real_GS, image_GS)
  np.testing.assert_array_equal(stats.tokens_M, [4, 3])
  np.testing.assert_array_equal(np.sum(stats.assigned_ME, axis=1), [8, 6])
  # First choices 0, 0, 2 and second choices 1, 1, 0 of the image tokens.
  np.testing.assert_array_equal(stats.assigned_ME[1], [3, 2, 1, 0])
  assert float(np.sum(stats.kept_ME)) == float(np.sum(routing.kept_GSk))
