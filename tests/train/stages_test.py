# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import diagnose, optimizer, program, stages
from moellava_jax.train import state as state_lib
from moellava_jax.train import step as step_lib
from tests import tiny

PROBE = (5, 4)


def _setting(stage, **overrides):
  """(config of the run, model config, parameters, batch) of a tiny model."""
  cfg = tiny.train_config(**overrides)
  moe = cfg.model.moe if stage == 'moe' else None
  model = tiny.model_config(moe=moe, mlp_bias=True)
  params, data = tiny.params_of(model), tiny.batch(model)
  if stage == 'warmup':
    width = model.vision.width
    params['probe'] = {
        'linear': {'kernel': jnp.ones((width, 9)) * 0.1, 'bias': jnp.zeros(9)}
    }
    patches = model.vision.num_tokens
    data = data._replace(
        tokens_BT=np.maximum(data.tokens_BT, 0),
        attributes_BIPA=np.ones((4, 1, patches, 2), np.int32),
    )
  return cfg, model, params, data


def _start(cfg, stage, params, steps=10):
  trained, frozen = trees.split(params, stages.mask(params, stage))
  tx = optimizer.make(trained, cfg.optimizer, cfg.stage(stage), steps)
  zero = jnp.int32(0)
  state = state_lib.TrainState(zero, trained, tx.init(trained), zero, zero)
  return tx, state, frozen


def _steps(stage, count, **overrides):
  cfg, model, params, data = _setting(stage, **overrides)
  tx, state, frozen = _start(cfg, stage, params)
  probe = PROBE if stage == 'warmup' else None
  step = jax.jit(
      step_lib.make_train_step(
          llava.Llava(model), tx, lambda _: 0.0, cfg, stage, probe
      )
  )
  for _ in range(count):
    state, metrics = step(state, frozen, data)
  return params, state, metrics


@pytest.mark.parametrize('stage', config.STAGES)
def test_exactly_the_listed_parameters_change(stage):
  # The first update has a rate of 0 (warm-up), so two steps are taken.
  before, state, _ = _steps(stage, 2)
  flat, after = trees.flatten(before), trees.flatten(state.trained)
  mask = trees.flatten(stages.mask(before, stage))
  assert set(after) == {path for path, trained in mask.items() if trained}
  for path, leaf in after.items():
    # A bias of the keys has no gradient: softmax does not see a shift.
    if path.startswith('vision') and path.endswith('k_bias'):
      continue
    if path == 'llm/embedding':
      assert not np.array_equal(leaf, flat[path])
      continue
    assert not np.array_equal(leaf, flat[path]), path


def test_sets_of_the_original():
  expected = {
      'pretrain': {'projector'},
      'finetune': {'projector', 'llm'},
      'warmup': {'vision', 'probe', 'llm'},
      'moe': {'projector', 'llm'},
  }
  for stage, parts in expected.items():
    params = _setting(stage)[2]
    trained = trees.flatten(trees.split(params, stages.mask(params, stage))[0])
    assert {path.split('/')[0] for path in trained} == parts
  # Stage III: experts, routers, and the FFNs of the dense layers.
  assert {p for p in trained if p.startswith('llm')} == {
      *(
          f'llm/layers_0/moe/experts/{fc}/{x}'
          for fc in ('fc1', 'fc2')
          for x in ('kernel', 'bias')
      ),
      'llm/layers_0/moe/router/kernel',
      *(
          f'llm/layers_1/mlp/{fc}/{x}'
          for fc in ('fc1', 'fc2')
          for x in ('kernel', 'bias')
      ),
  }


def test_stage_3_may_train_the_whole_lm():
  params = _setting('moe')[2]
  usual = trees.flatten(stages.mask(params, 'moe'))
  whole = trees.flatten(stages.mask(params, 'moe', whole_lm=True))
  more = {path for path in whole if whole[path] and not usual[path]}
  assert all(path.startswith('llm/') for path in more)
  assert 'llm/embedding' in more and 'llm/layers_0/attn/q_kernel' in more
  assert {p for p, on in whole.items() if not on} == {
      p for p in whole if p.startswith('vision/')
  }
  cfg = tiny.train_config(moe__whole_lm=True)
  what = program.Program(cfg, 'moe', sharding.make_mesh(cfg.mesh), 10)
  trained, frozen = what.split(what.shardings)
  assert trained.keys() == {'projector', 'llm'} and frozen.keys() == {'vision'}
  with pytest.raises(config.UserError, match='only stage moe'):
    tiny.train_config(finetune__whole_lm=True)


def _moments(opt_state):
  """Paths of the parameters that have an Adam moment."""
  import optax

  (adam,) = [
      s
      for s in jax.tree.leaves(
          opt_state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)
      )
      if isinstance(s, optax.ScaleByAdamState)
  ]
  return set(trees.flatten(adam.mu))


@pytest.mark.parametrize('stage', config.STAGES)
def test_frozen_parameters_have_no_optimizer_state(stage):
  cfg, _, params, _ = _setting(stage)
  _, state, frozen = _start(cfg, stage, params)
  moments = _moments(state.opt_state)
  assert moments == set(trees.flatten(state.trained))
  assert not moments & set(trees.flatten(frozen))


def test_changing_a_row_of_the_table_changes_the_optimizer_state(monkeypatch):
  cfg, _, params, _ = _setting('pretrain')
  monkeypatch.setitem(
      stages.STAGES,
      'pretrain',
      (('(projector|vision)/.*', True), ('llm/.*', False)),
  )
  _, state, _ = _start(cfg, 'pretrain', params)
  assert any(path.startswith('vision/') for path in _moments(state.opt_state))


def test_uncovered_leaf_unused_pattern_and_unknown_stage(monkeypatch):
  params = _setting('finetune')[2]
  with pytest.raises(ValueError, match='extra/x'):
    stages.mask({**params, 'extra': {'x': 1}}, 'finetune')
  with pytest.raises(ValueError, match='nothing matches .*vision'):
    stages.mask({k: params[k] for k in ('llm', 'projector')}, 'finetune')
  with pytest.raises(ValueError, match="'tune'.*finetune"):
    stages.mask(params, 'tune')


def test_micro_batches_add_up_to_one_batch():
  for normalization in ('token', 'microbatch'):
    results = []
    for count in (1, 2):
      _, state, metrics = _steps(
          'moe',
          2,
          moe__accumulate=count,
          moe__batch_size=4,
          model__moe__aux_loss_weight=0.0,
          model__moe__second_choice='argmax',
          optimizer__eps=1e-3,
          optimizer__loss_normalization=normalization,
      )
      results.append((float(metrics['loss']), trees.flatten(state.trained)))
    (one, once), (two, twice) = results
    if normalization == 'microbatch':
      # Rows have unlike numbers of targets: the two definitions differ.
      assert one != pytest.approx(two, rel=1e-5)
      continue
    assert one == pytest.approx(two, rel=1e-5)
    for path in once:
      np.testing.assert_allclose(once[path], twice[path], atol=1e-5)


def test_a_step_that_is_not_finite_changes_only_the_counters():
  cfg, model, params, data = _setting('finetune')
  params['llm']['norm']['scale'] = (
      params['llm']['norm']['scale'].at[0].set(jnp.nan)
  )
  tx, state, frozen = _start(cfg, 'finetune', params)
  step = jax.jit(
      step_lib.make_train_step(
          llava.Llava(model), tx, lambda _: 0.0, cfg, 'finetune', None
      )
  )
  for n in (1, 2):
    state, metrics = step(state, frozen, data)
    assert int(metrics['skipped']) == int(metrics['streak']) == n
  assert int(state.step) == 2
  for path, leaf in trees.flatten(state.trained).items():
    np.testing.assert_array_equal(leaf, trees.flatten(params)[path])


def test_projector_rate_decay_and_schedule():
  cfg, _, params, _ = _setting(
      'finetune', finetune__projector_lr=0.5, optimizer__weight_decay=0.1
  )
  tx, state, _ = _start(cfg, 'finetune', params, steps=100)
  grads = jax.tree.map(jnp.zeros_like, state.trained)
  opt_state = state.opt_state
  for _ in range(2):  # The first has a rate of 0.
    updates, opt_state = tx.update(grads, opt_state, state.trained)
  flat, old = trees.flatten(updates), trees.flatten(state.trained)
  rate = optimizer.schedule(1.0, 100, 0.03)
  for path, lr in (
      ('projector/linear_0/kernel', 0.5),
      ('llm/layers_0/mlp/fc1/kernel', cfg.finetune.lr),
  ):
    np.testing.assert_allclose(
        flat[path], -float(rate(1)) * lr * 0.1 * old[path], rtol=1e-4
    )
  for path in ('projector/linear_0/bias', 'llm/norm/scale'):
    assert not np.any(flat[path])
  # transformers' get_cosine_schedule_with_warmup(3, 100).
  for step, value in (
      (0, 0.0),
      (1, 1 / 3),
      (3, 1.0),
      (51, 0.509),
      (99, 0.0003),
  ):
    np.testing.assert_allclose(
        rate(step), value, atol=1.2e-2 if step == 51 else 1e-3
    )


def test_evaluation_may_sample_as_the_original_does():
  cfg, model, params, data = _setting(
      'moe', model__moe__eval_second_choice='sampled'
  )
  _, state, frozen = _start(cfg, 'moe', params)
  step = jax.jit(step_lib.make_eval_step(llava.Llava(model)))
  loss, weight = step(state.trained, frozen, data)
  assert np.isfinite(float(loss)) and float(weight) > 0


def test_the_first_module_that_is_not_finite_is_named():
  _, model, params, data = _setting('finetune')
  assert 'gradient' in diagnose.first_bad(llava.Llava(model), params, data)
  attention = params['llm']['layers_1']['attn']
  attention['v_kernel'] = attention['v_kernel'] * 1e38
  attention['o_kernel'] = attention['o_kernel'] * 1e38
  blame = diagnose.first_bad(llava.Llava(model), params, data)
  assert blame == 'output of llm/layers_1/attn'
  params['vision']['layers_0']['mlp']['fc1']['bias'] *= np.nan
  blame = diagnose.first_bad(llava.Llava(model), params, data)
  assert blame == 'parameter vision/layers_0/mlp/fc1/bias'
