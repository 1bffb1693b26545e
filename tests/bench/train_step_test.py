# SPDX-License-Identifier: Apache-2.0
"""What a step is compared with, and the shares that are made of its time."""

import gc
import types
import weakref

import jax
import pytest

from moellava_jax.bench import main, measure, sizes, train_step
from moellava_jax.model import llava
from moellava_jax.train import accelerators, flops, init


def _of_step(cfg, stage):
  paths = init.abstract(llava.Llava(cfg.stage_model(stage)))
  return flops.of_step(cfg, stage, paths)


@pytest.mark.parametrize('depth', [2, 5])
def test_a_token_meets_as_many_weights_in_the_control(depth):
  model = sizes.small(32, depth, 3, 'float32')
  configs = train_step.Case('', model, 'moe', 2, 32).configs()
  dense = _of_step(configs.pop('dense'), 'moe')
  assert configs.keys() == train_step.WAYS.keys()
  for cfg in configs.values():
    sparse = _of_step(cfg, 'moe')
    routers = sum(sparse.parts['routers'])
    # The width of an FFN is rounded where the depth is odd.
    assert sparse.model - routers == pytest.approx(dense.model, rel=2e-3)


def test_stages_before_iii_are_dense():
  model = sizes.small(32, 2, 3, 'float32')
  (cfg,) = train_step.Case('', model, 'finetune', 2, 32).configs().values()
  assert cfg.model.moe is None
  assert cfg.model.llm == model.llm


def test_shares_are_those_of_the_definition(monkeypatch):
  card = types.SimpleNamespace(device_kind='NVIDIA H200')
  monkeypatch.setattr(train_step.jax, 'devices', lambda: [card])
  entry = {'tokens': 4096, 'flops_necessary': 4e12, 'flops': 5e12}
  found = {
      'dense': {**entry, 'flops': 4e12},
      'index': dict(entry),
  }
  for name, seconds in (('dense', 0.010), ('index', 0.016)):
    time = measure.Time(seconds, seconds, seconds)
    train_step._add_time(found, name, time, peak=500e12)
  index = found['index']
  assert index['mfu'] == pytest.approx(4e12 / 0.016 / 989e12)
  assert index['mfu_of_measured_peak'] == pytest.approx(0.5)
  assert index['speed'] == pytest.approx(10 / 16)
  assert index['ceiling'] == pytest.approx(4 / 5)
  assert index['tokens_a_second'] == pytest.approx(256000)
  assert 'speed' not in found['dense']


def _as_on_a_gpu(monkeypatch):
  monkeypatch.setattr(train_step.jax, 'default_backend', lambda: 'gpu')


@pytest.mark.slow
@pytest.mark.large
def test_the_looped_models_of_the_gpu_suite_run(monkeypatch):
  _as_on_a_gpu(monkeypatch)
  small = sizes.small(16, 4, 3, 'float32')
  monkeypatch.setattr(sizes, 'full', lambda name: small)
  model = main._looped('qwen_1_8b')
  assert model.scan_layers and model.remat == 'expert_io'
  case = train_step.Case('small', model, 'moe', 2, 32, ('index',))
  found = train_step.run(case, 2, 1e12)
  assert found.keys() == {'dense', 'index'}
  for entry in found.values():
    assert entry['seconds']['median'] > 0
    assert sum(entry['memory_split'].values()) == entry['memory_bytes']
    assert (
        entry['memory_split']['optimizer'] > entry['memory_split']['gradients']
    )
    assert entry['waste']['remat'] > 0.1
    assert entry['matmul_flops_a_second'] == 1e12
    assert 'peak_bytes_in_use' not in entry  # A CPU does not count.
  assert 0 < found['index']['ceiling'] < 1


class _Card:
  """A GPU whose peak of bytes grows as given, call by call."""

  device_kind = 'NVIDIA H200'

  def __init__(self, *peaks):
    self._peaks = list(peaks)

  def memory_stats(self):
    return {'peak_bytes_in_use': self._peaks.pop(0)}


def _fake_runners(monkeypatch, fails):
  """`Runner` without a model; one at a time.

  Way number `fails[0]` has too little memory, to compile or else to run.
  """
  alive = weakref.WeakSet()
  made = []

  class Runner:
    report = types.SimpleNamespace(seconds=1.0, total=2**31, arguments=2**30)

    def __init__(self, cfg, stage):
      gc.collect()
      assert not alive, 'the state of another way is still there'
      self._number = len(made)
      made.append(0)
      if fails == (self._number, False):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: compiling')
      alive.add(self)

    def memory(self):
      return dict(weights=1, optimizer=2, gradients=1, activations=2**31 - 4)

    def __call__(self):
      if fails == (self._number, True):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: running')
      return {'sums': types.SimpleNamespace(stats=[], tokens=64.0)}

  monkeypatch.setattr(train_step, 'Runner', Runner)


@pytest.mark.parametrize('compiles', [False, True])
def test_on_a_gpu_ways_run_alone_and_what_does_not_fit_is_said(
    compiles, monkeypatch, capsys
):
  _as_on_a_gpu(monkeypatch)
  # Before and after each way that fits; the last stays below the first.
  card = _Card(0, 2**30, 2**30, 2**30, 2**30)
  monkeypatch.setattr(train_step.jax, 'devices', lambda: [card])
  _fake_runners(monkeypatch, (1, compiles))
  model = sizes.small(16, 2, 3, 'float32')
  case = train_step.Case('', model, 'moe', 2, 32, ('einsum_256', 'index'))
  found = train_step.run(case, 2, 1e12)
  assert found['einsum_256'].keys() == {'error'}
  assert found['dense']['peak_bytes_in_use'] == 2**30
  assert 'peak_bytes_in_use' not in found['index']
  assert found['index']['speed'] > 0
  rows = train_step.table('', found)
  assert {len(row) for row in rows} == {len(train_step.HEADER)}
  assert rows[1][2].startswith('RESOURCE_EXHAUSTED')
  dense, index = train_step.memory_table('', found)
  assert len(dense) == len(train_step.MEMORY_HEADER)
  assert dense[5:] == ('2.00', '2.00', '1.00', '1')
  assert index[7] == '-'
  shown = main.cases('gpu_train', 2, False)[0]
  main.show([(shown, found), (shown, found)])
  printed = capsys.readouterr().out
  assert printed.count('MFU = necessary FLOPs / (seconds x peak)') == 1
  assert printed.count('matmul TFLOP/s') == 1


def test_other_errors_of_a_way_are_not_hidden(monkeypatch):
  def broken(cfg, stage):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')

  monkeypatch.setattr(train_step, 'Runner', broken)
  case = train_step.Case('', sizes.small(16, 2, 3, 'float32'), 'moe', 2, 32)
  with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
    train_step.run(case, 2, 1e12)


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        ('NVIDIA A100-SXM4-80GB', 'A100-80G SXM'),
        ('NVIDIA H100 80GB HBM3', 'H100 SXM'),
        ('NVIDIA H200', 'H200 SXM'),
        ('TPU v5 lite', 'TPU v5e'),
        ('TPU v5', 'TPU v5p'),
        ('TPU v5p', 'TPU v5p'),
        ('TPU v6 lite', 'TPU v6e'),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind, name):
  device = types.SimpleNamespace(device_kind=kind)
  found = accelerators.of_device(device)
  assert found is not None and found.name == name


def test_other_devices_have_no_published_peak():
  for kind in ('cpu', 'NVIDIA A100-SXM4-40GB', 'TPU v4'):
    device = types.SimpleNamespace(device_kind=kind)
    assert accelerators.of_device(device) is None
