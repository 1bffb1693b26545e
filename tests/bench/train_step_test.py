# SPDX-License-Identifier: Apache-2.0
"""What a step is compared with, and the shares that are made of its time."""

import types

import pytest

from moellava_jax.bench import measure, sizes, train_step
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
