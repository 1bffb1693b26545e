# SPDX-License-Identifier: Apache-2.0
"""Bytes and FLOPs of a plan against XLA's, arithmetic by hand, its advice."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from moellava_jax import config, sharding
from moellava_jax.model import llava
from moellava_jax.train import (
    accelerators,
    advice,
    compiled,
    flops,
    memory,
    program,
    report,
    residuals,
    topology,
)
from tests import tiny

ONE = (1, 1, 1, 1)


def _config(stage='moe', **overrides):
  """Wide enough for products to outweigh all else."""
  return tiny.train_config(
      **{
          f'{stage}__row_length': 64,
          f'{stage}__batch_size': 8,
          'model__llm__width': 128,
          'model__llm__head_dim': 32,
          'model__llm__mlp_width': 512,
          'model__llm__depth': 2,
          'model__vision__depth': 2,
          **overrides,
      }
  )


def _flops(cfg, stage):
  params = program.Program(
      cfg, stage, memory.abstract_mesh(ONE), 1
  ).abstract_params()
  return flops.of_step(cfg, stage, params)


def _target(count):
  return topology.Target('simulated', jax.devices()[:count], False, None)


@pytest.mark.parametrize('stage', ['pretrain', 'moe'])
def test_flops_agree_with_xla(stage):
  # XLA counts sums and exponentials too, a few per cent here. A weight that is
  # frozen, an expert without gradient or a tower that is differentiated would
  # each be more than that.
  cfg = _config(stage)
  found = compiled.Step(cfg, stage, _target(1)).report()
  assert _flops(cfg, stage).total == pytest.approx(found.flops, rel=0.1)


def test_rematerialisation_repeats_what_gradients_need():
  # The last product of a layer: of the dense FFN half, of dispatch half.
  found = _flops(_config(model__remat='full'), 'moe')
  forward = {name: part.forward for name, part in found.parts.items()}
  expected = (
      forward['attention']
      + forward['attention scores']
      + forward['dense FFNs'] / 2
      + forward['experts']
      + forward['routers']
      + found.capacity / 3
      + found.dispatch / 5
  )
  assert found.recompute == pytest.approx(expected)
  assert _flops(_config(), 'moe').recompute == 0


@pytest.mark.parametrize('remat', ['full', 'expert_io', 'dots_no_batch'])
def test_rematerialisation_in_a_loop_agrees_with_xla(remat):
  # XLA counts a loop's body once, so two layers in a loop count as one. Outside
  # of loops its CPU compiler merges what is computed again with the first time.
  sizes = dict(
      model__remat=remat,
      model__moe__dispatch='einsum',
      model__moe__layers='all',
      model__llm__mlp_width=256,
  )
  looped = _config(model__scan_layers=True, **sizes)
  found = compiled.Step(looped, 'moe', _target(1)).report()
  expected = _flops(_config(model__llm__depth=1, **sizes), 'moe')
  assert expected.total == pytest.approx(found.flops, rel=0.05)
  # What remat repeats is more than the tolerance.
  assert expected.recompute > 0.14 * expected.total


@pytest.mark.parametrize(
    ('stage', 'dispatch'), [('finetune', 'index'), ('moe', 'ragged')]
)
def test_layers_without_slots_have_nothing_that_expert_io_keeps(
    stage, dispatch
):
  again = {
      remat: _flops(
          _config(stage, model__remat=remat, model__moe__dispatch=dispatch),
          stage,
      ).recompute
      for remat in ('full', 'expert_io', 'offload_dots')
  }
  assert again['expert_io'] == again['full'] > again['offload_dots'] > 0


def test_flops_of_experts_by_hand():
  # 512 tokens, 2 of 4 experts, 2 products of 128 x 512 each, forward and twice
  # backward; a capacity of 1.5 leaves half as many slots again empty.
  found = _flops(_config(model__moe__layers='0'), 'moe')
  experts = found.parts['experts']
  forward = 512 * 2 * 2 * (2 * 128 * 512)
  assert experts == (forward, 2 * forward)
  assert found.capacity == 3 * forward / 2


def test_a_large_vocabulary_is_multiplied_again_backward():
  whole = _flops(_config(), 'moe')
  chunked = _flops(_config(model__loss_chunk=16), 'moe')
  assert whole.recompute == 0
  assert chunked.recompute == whole.parts['head'].forward > 0


def test_frozen_layers_pass_gradients_on_but_have_none():
  pretrain = _flops(_config('pretrain'), 'pretrain').parts
  finetune = _flops(_config('finetune'), 'finetune').parts
  for name in ('attention', 'dense FFNs', 'head'):
    assert pretrain[name].backward == pretrain[name].forward
    assert finetune[name].backward == 2 * finetune[name].forward
  assert pretrain['tower'].backward == 0


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (1, 2, 2, 2)])
def test_state_is_what_lies_on_each_device(sizes):
  cfg = _config()
  mesh = dict(zip(sharding.AXES, sizes, strict=True))
  cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **mesh))
  runner = program.Program(cfg, 'moe', sharding.make_mesh(cfg.mesh), 1)
  trained, frozen = runner.split(runner.abstract_params())
  state = runner.abstract_state(trained)
  kept = jax.tree.leaves((state.trained, state.opt_state, frozen))
  # Adam's counters are 4 bytes; nothing else is that small.
  on_device = sum(
      jnp.zeros(x.sharding.shard_shape(x.shape), x.dtype).nbytes for x in kept
  )
  assert memory.of_stage(cfg, 'moe', sizes).state == on_device


def test_compiled_arguments_are_the_state_and_the_batch():
  cfg = _config(mesh__data=2, mesh__fsdp=4)
  found = compiled.Step(cfg, 'moe', _target(8)).report()
  batch = residuals.abstract_batch(cfg, 'moe', 1)  # A row a device.
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
  expected = memory.of_stage(cfg, 'moe', (2, 4, 1, 1)).state + size
  assert found.arguments == pytest.approx(expected, rel=0.01)
  assert found.collectives['all-gather']


def test_activations_follow_rows_and_rematerialisation():
  plain = memory.of_stage(_config(), 'moe', ONE)
  halved = memory.of_stage(_config(moe__accumulate=2), 'moe', ONE)
  assert halved.saved == pytest.approx(plain.saved / 2, rel=0.01)
  assert halved.accumulator == halved.gradients > plain.accumulator == 0
  lean = memory.of_stage(_config(model__remat='full'), 'moe', ONE)
  assert lean.saved < plain.saved / 3
  assert lean.state == plain.state


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_the_estimate_of_a_loop_agrees_with_xla(remat):
  cfg = _config(
      'finetune',
      model__remat=remat,
      model__scan_layers=True,
      model__llm__depth=4,
      finetune__row_length=1024,
  )
  found = compiled.Step(cfg, 'finetune', _target(1)).report()
  estimate = memory.of_stage(cfg, 'finetune', ONE)
  assert estimate.total == pytest.approx(found.total, rel=0.2)


def test_advice_fits_and_the_settings_before_it_do_not():
  cfg = _config()
  usable = memory.of_stage(_config(moe__accumulate=4), 'moe', ONE).total
  for accumulate in (1, 2):
    fewer = _config(moe__accumulate=accumulate)
    assert memory.of_stage(fewer, 'moe', ONE).total > usable
  found = advice.find(cfg, 'moe', ONE, usable)
  assert found == (('moe.accumulate=4',), 0, usable)


def test_advice_splits_the_state_where_no_batch_is_small_enough():
  cfg = _config(model__llm__depth=12, moe__row_length=16)
  sizes = (8, 1, 1, 1)
  usable = memory.of_stage(cfg, 'moe', (1, 8, 1, 1)).total
  assert usable < memory.of_stage(cfg, 'moe', sizes).state
  found = advice.find(cfg, 'moe', sizes, usable)
  assert found == (('mesh.data=1', 'mesh.fsdp=8'), 0, usable)
  assert advice.find(cfg, 'moe', sizes, 1000) is None


def test_advice_asks_for_more_devices_at_last():
  cfg = _config(model__llm__depth=6)
  usable = memory.of_stage(cfg, 'moe', ONE).state
  found = advice.find(cfg, 'moe', ONE, usable)
  assert found is not None and found.total <= usable
  assert found.devices > 1 and str(found).startswith(f'{found.devices} dev')
  assert f'mesh.fsdp={found.devices}' in found.changes


def test_length_of_rows_is_asked_for():
  cfg = _config(moe__row_length=None)
  with pytest.raises(config.UserError, match='config.moe.row_length=N'):
    report.make(
        cfg, 'moe', _target(1), [], mfu=0.4, compiles=False, measures=False
    )


def test_unknown_names_are_errors_with_the_list():
  with pytest.raises(config.UserError, match='a100-80g, h100, h200, v5e, v5p'):
    accelerators.find('h1000')
  for name in ('v5e', 'v5e:4x4x4', 'v9:2x2', 'v5p:2x2'):
    with pytest.raises(config.UserError, match='v5e:NxM'):
      topology.check(name)
  assert topology.check('v5e:4x4') == 16
  assert topology.check('v5p:2x2x4') == 16
  assert topology.check('local') is None


def test_topology_without_libtpu_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(config.UserError, match=r'moellava_jax\[tpu\]'):
    topology.described('v5e:4x4')


def test_a_program_is_traced_for_the_devices_of_its_mesh():
  chip = jax.sharding.AbstractDevice('TPU v5', 1, 'tpu')
  mesh = memory.abstract_mesh(ONE).update(abstract_device=chip)
  assert llava.compute_dtype('auto') == jnp.float32
  with jax.sharding.use_abstract_mesh(mesh):
    assert llava.compute_dtype('auto') == jnp.bfloat16


def _run(*arguments, **more):
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | more
  return subprocess.run(
      [sys.executable, '-m', 'moellava_jax.train.plan', *arguments],
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )


@pytest.mark.slow
@pytest.mark.large
def test_a_plan_orders_the_step_for_memory(tmp_path):
  """As accelerators do; XLA for the CPU by itself orders it for its cores."""

  def temporary(**more):
    path = tmp_path / 'plan.json'
    done = _run(
        '--config=configs/shapes.py:moe',
        '--config.model.llm.depth=2',
        '--config.moe.row_length=256',
        '--config.moe.batch_size=8',
        f'--json={path}',
        **more,
    )
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(path.read_text())
    return plan['xla']['temporary']

  # What the user sets wins.
  for_cores = '--xla_cpu_enable_concurrency_optimized_scheduler=true'
  assert 1.5 * temporary() < temporary(XLA_FLAGS=for_cores)


@pytest.mark.parametrize(
    'remat, scan, cpu, warned',
    [
        ('full', False, True, True),
        ('full', True, True, False),
        ('none', False, True, False),
        ('full', False, False, False),
    ],
)
def test_a_plan_says_where_the_compiler_of_the_cpu_misleads(
    capsys, remat, scan, cpu, warned
):
  cfg = _config(
      model__llm__depth=4, model__remat=remat, model__scan_layers=scan
  )
  plan = report.make(
      cfg,
      'moe',
      _target(1),
      [accelerators.find('v5e')],
      mfu=0.4,
      compiles=False,
      measures=False,
  )
  sizes = dict.fromkeys(('seconds', 'arguments', 'temporary', 'total'), 1)
  plan['xla'] = {'target': 'this', 'cpu': cpu, 'collectives': {}, **sizes}
  report.show(plan)
  shown = ' '.join(capsys.readouterr().out.split())
  assert ('the compiler of the CPU keeps much' in shown) == warned


@pytest.mark.parametrize('says', ['error', 'total'])
def test_what_xla_says_of_an_accelerator_overrides_the_estimate(
    monkeypatch, says
):
  cfg, v5e = _config(), accelerators.find('v5e')
  estimate = memory.of_stage(cfg, 'moe', ONE).total
  usable = 1.1 * estimate  # Of both devices: the estimate fits.
  small = v5e._replace(memory=int(usable / accelerators.USABLE))
  other = small._replace(name='other')
  found = {'error': 'RESOURCE_EXHAUSTED'}
  if says == 'total':
    found = {'total': int(1.2 * estimate)}
  monkeypatch.setattr(report, '_xla', lambda *_: found)
  monkeypatch.setattr(accelerators, 'of_device', lambda _: small)
  plan = report.make(
      cfg,
      'moe',
      _target(1),
      [small, other],
      mfu=0.4,
      compiles=True,
      measures=False,
  )
  described, unasked = plan['accelerators']
  assert not described['fits'] and unasked['fits']
  # Less than what XLA refused is taken for what would fit.
  room = estimate if says == 'error' else 1.1 / 1.2 * estimate
  assert described['advice']['total'] < room
  assert described['advice_text'] and not unasked['advice_text']


def test_command_prints_the_plan_and_writes_it(tmp_path):
  path = tmp_path / 'plan.json'
  done = _run(
      '--config=configs/shapes.py:moe',
      '--config.moe.row_length=64',
      '--devices=4',
      '--accelerator=v5e',
      '--nocompile',
      f'--json={path}',
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads(path.read_text())
  assert plan['mesh'] == {'data': 4, 'fsdp': 1, 'expert': 1, 'tensor': 1}
  assert plan['compute_dtype'] == 'bfloat16'
  (device,) = plan['accelerators']
  expected = plan['flops']['model'] / (4 * 197e12 * 0.4)
  assert device['fits'] and device['seconds'] == pytest.approx(expected)
  for text in ('total (estimate)', 'TPU v5e', 'experts', 'Stage moe on 4'):
    assert text in done.stdout


def test_command_ends_with_the_reason(tmp_path):
  done = _run('--config=configs/shapes.py:moe', '--topology=v5e:17')
  assert done.returncode == 1
  assert done.stderr.startswith('error: --topology=v5e:17')


@pytest.mark.slow
def test_the_compiler_of_the_tpu_takes_the_step(tmp_path):
  pytest.importorskip('libtpu')
  path = tmp_path / 'plan.json'
  done = _run(
      '--config=configs/shapes.py:moe',
      '--topology=v5e:2x4',
      '--config.mesh.data=4',
      '--config.mesh.expert=2',
      '--config.model.llm.depth=2',
      '--config.moe.row_length=256',
      '--config.moe.batch_size=8',
      '--accelerator=v5e',
      f'--json={path}',
  )
  assert done.returncode == 0, done.stderr
  (plan,) = json.loads(path.read_text())
  assert plan['devices'] == 8 and plan['compute_dtype'] == 'bfloat16'
  xla = plan['xla']
  assert not xla['cpu'] and xla['target'] == 'TPU v5e:2x4'
  assert xla['collectives']['all-to-all'] > 0
  # TPUs carry tokens by products, which the estimate knows as well.
  assert plan['flops']['dispatch'] > 0
  (device,) = plan['accelerators']
  assert device['fits'] and xla['total'] < device['usable']
