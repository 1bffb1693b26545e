# SPDX-License-Identifier: Apache-2.0
"""The comparison with torch: that it is a fair one, and what it writes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moellava_jax import config, trees
from moellava_jax.bench import (
    main,
    peer_cases,
    peer_picks,
    peers,
    sizes,
    torch_process,
)
from moellava_jax.model import llava, moe
from moellava_jax.train import init, stages

E, D, F = 4, 16, 32


def _of_torch(layer):
  """The weights of an `EinsumMoe` as those of our layer."""

  def kernel(linear):
    return linear.weight.detach().numpy().T

  return {
      'router': {'kernel': kernel(layer.router)},
      'experts': {
          name: {
              'kernel': np.stack(
                  [kernel(getattr(expert, name)) for expert in layer.experts]
              )
          }
          for name in ('gate', 'up', 'down')
      },
  }


@pytest.mark.parity
@pytest.mark.parametrize('factor', [4.0, 0.6])
def test_the_original_layer_in_torch_is_ours_over_the_whole_batch(factor):
  torch = pytest.importorskip('torch')
  from moellava_jax.bench import torch_moe

  torch.manual_seed(0)
  layer = torch_moe.EinsumMoe(D, F, E, factor, sampled=False)
  x_BTD = torch.randn(2, 12, D)
  theirs_BTD = layer(x_BTD).detach().numpy()
  cfg = dataclasses.replace(
      sizes.moe('einsum', 24, factor), group='batch', num_experts=E
  )
  real_BT = np.ones((2, 12), bool)
  ours_BTD, aux = moe.Moe(cfg, 'swiglu', F, False, np.dtype('float32')).apply(
      {'params': _of_torch(layer)},
      x_BTD.numpy(),
      real_BT,
      ~real_BT,
      train=True,
  )
  np.testing.assert_allclose(ours_BTD, theirs_BTD, atol=1e-5)
  np.testing.assert_allclose(aux.balance_loss, layer.balance_loss.item(), 1e-5)
  # With the small capacity, tokens are dropped; with the large one, none.
  dropped_BT = ~np.any(theirs_BTD, axis=-1)
  assert np.any(dropped_BT) == (factor < 1)


@pytest.mark.parity
def test_a_drawn_second_choice_is_another_expert():
  torch = pytest.importorskip('torch')
  from moellava_jax.bench import torch_moe

  logits_SE = torch.tensor([[4.0, 1.0, 0.0, -60.0]]).repeat(200, 1)
  combine_SEC, _ = torch_moe.top2(logits_SE, 200, sampled=True)
  weight_SE = combine_SEC.sum(dim=2)
  torch.testing.assert_close(weight_SE.sum(dim=1), torch.ones(200))
  taken_E = (weight_SE > 0).sum(dim=0).tolist()
  assert taken_E[0] == 200 and taken_E[3] == 0
  assert taken_E[1] + taken_E[2] == 200 and min(taken_E[1:3]) > 20


@pytest.mark.parity
@pytest.mark.parametrize('stage', ['finetune', 'moe'])
def test_peers_have_our_parameters_and_train_the_same(stage):
  pytest.importorskip('torch')
  from moellava_jax.bench import torch_models

  model = peer_cases.cases('cpu', True)[0].model
  if stage == 'finetune':
    model = dataclasses.replace(model, moe=None)
  theirs = torch_models.llava(model, 'deepspeed')
  shapes = init.abstract(llava.Llava(model))
  trained, _ = trees.split(shapes, stages.mask(shapes, stage))

  def count(arrays):
    return sum(int(np.prod(x.shape)) for x in arrays)

  assert count(jax.tree.leaves(trained)) == count(
      p for _, p in torch_models.trained(theirs, stage == 'moe')
  )
  # Not the tower: theirs has the last layer too, which we leave out.
  assert count(jax.tree.leaves(shapes['llm'])) == count(
      p
      for name, p in theirs.named_parameters()
      if 'language_model' in name or 'lm_head' in name
  )


@pytest.mark.parity
def test_all_that_is_measured_is_written(tmp_path, capsys, monkeypatch):
  pytest.importorskip('torch')
  # Compiling takes minutes; that it fails must be said.
  monkeypatch.setenv('CXX', str(tmp_path / 'none'))
  monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
  monkeypatch.setattr(peers, 'DISPATCHES', ('index',))
  main.run('peers', str(tmp_path), 2, True)
  printed = capsys.readouterr().out
  found = json.loads((tmp_path / 'peers.json').read_text())
  assert found['about']['settings']['peers'].keys() >= {'torch', 'transformers'}
  listed = peer_cases.cases('cpu', True)
  assert list(found['cases']) == [case.name for case in listed]
  for case in listed:
    result = found['cases'][case.name]
    for part in peer_cases.PARTS[case.kind]:
      for ours in result['ours'].values():
        assert ours[part]['median'] > 0
      for peer in case.peers:
        entry = result['peers'][peer]
        assert entry['best'][part]['seconds']['median'] > 0
        assert 'eager' in entry['best'][part]['setting']
        tried = {name: t[part] for name, t in entry['tried'].items()}
        names = [
            f'{implementation}, {setting.name}'
            for implementation in peer_cases.IMPLEMENTATIONS[peer]
            for setting in case.settings
        ]
        *those, last = tried
        assert those == names and last.endswith('huge pages')
        for name, trial in tried.items():
          assert ('eager' in name) == ('seconds' in trial)
  tried = found['cases'][listed[0].name]['peers']['deepspeed']['tried']
  errors = [
      t['forward']['error'] for t in tried.values() if 'error' in t['forward']
  ]
  assert len(errors) == 1 and 'No working C++ compiler' in errors[0]
  assert 'mixtral' in printed and '>= 2' in printed


def test_without_torch_one_is_told_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(
      torch_process.util, 'find_spec', lambda name: name != 'torch'
  )
  with pytest.raises(config.UserError, match=r'torch, .*-e \.\[parity\]'):
    main.run('peers', str(tmp_path), 2, False)
  assert not list(tmp_path.iterdir())


def test_full_suites_have_the_sizes_that_they_say():
  for case in peer_cases.cases('cpu', False):
    llm, tower = case.model.llm, case.model.vision
    assert (llm.width, llm.mlp_width, llm.depth) == (256, 1024, 4)
    assert tower.num_tokens == 576
    if case.kind != 'decode':
      assert (case.rows, case.length) == (4, 1024)
  names = [case.name for case in peer_cases.cases('cuda', False)]
  assert len(set(names)) == len(names)
  assert (
      'train sparse qwen_1_8b D=2048 F=5504 layers=24 2x2048 mixtral' in names
  )


class _FakeTorch:
  """Answers with given seconds, and notes what is dropped."""

  def __init__(self, seconds, huge_pages):
    self.seconds_of, self.huge_pages = seconds, huge_pages
    self.calls, self.dropped = {}, []

  def seconds(self, setting, work, part):
    del work
    key = setting._replace(huge_pages=False).name, part
    found = self.seconds_of[key]
    if isinstance(found, str):
      raise torch_process.TorchError(found)
    count = self.calls[setting.name, part] = (
        self.calls.get((setting.name, part), 0) + 1
    )
    # The first two are slow, in which it compiles.
    slow = 100 if count <= 2 else 0
    return slow + found * (self.huge_pages if setting.huge_pages else 1)

  def drop(self, setting, work):
    del work
    self.dropped.append(setting.name)


def _pick(kind, seconds, huge_pages=2.0):
  """Picks among all settings of the CPU, of which these are the seconds."""
  case = next(c for c in peer_cases.cases('cpu', False) if c.kind == kind)
  parts = peer_cases.PARTS[kind]
  torch = _FakeTorch(
      {
          (setting.name, part): value
          for setting, value in zip(case.settings, seconds, strict=True)
          for part in parts
      },
      huge_pages,
  )
  tried, best = peer_picks.pick(case, 'dense', torch)
  decisive = {
      name.removeprefix('dense, '): found[parts[-1]]
      for name, found in tried.items()
  }
  return best[parts[-1]].setting.name, decisive, torch.dropped


_EAGER = (0.3, 0.2, 0.9, 0.8)
_COMPILED = (0.35, 0.25, 0.01, 0.4)


def test_a_peer_has_all_settings():
  named = [setting.name for setting in torch_process.CPU_SETTINGS]
  assert sorted(named) == sorted(
      f'{way}, {threads}, {wait}'
      for way in ('eager', 'compile')
      for threads in ('1 thread', '2 threads')
      for wait in ('default', 'passive')
  )
  for case in peer_cases.cases('cpu', False):
    assert case.settings == torch_process.CPU_SETTINGS


def test_a_layer_is_tried_in_all_of_them():
  name, tried, dropped = _pick('layer', _EAGER + _COMPILED)
  assert name == 'compile, 1 thread, passive'
  seconds = {setting: t['seconds'] for setting, t in tried.items()}
  plain = dict(
      zip(
          [setting.name for setting in torch_process.CPU_SETTINGS],
          _EAGER + _COMPILED,
          strict=True,
      )
  )
  # With huge pages only the fastest ones, which gain nothing from them here.
  assert seconds == plain | {
      'eager, 2 threads, default, huge pages': 0.4,
      'compile, 1 thread, passive, huge pages': 0.02,
  }
  assert set(dropped) == set(seconds) - {name}


def test_what_is_faster_with_huge_pages_has_them():
  name, tried, dropped = _pick('layer', _EAGER + _COMPILED, huge_pages=0.5)
  assert name == 'compile, 1 thread, passive, huge pages'
  assert tried[name]['seconds'] == 0.005
  assert 'compile, 1 thread, passive' in dropped and name not in dropped


def test_a_model_is_not_compiled_where_that_is_hopeless():
  name, tried, _ = _pick('train', _EAGER + _COMPILED)
  # Compiling the best one gained nothing, but it is not the only one.
  assert name == 'eager, 2 threads, default'
  assert tried['compile, 2 threads, default']['seconds'] == 0.25
  assert tried['compile, 2 threads, passive']['seconds'] == 0.35
  assert '4.5 x' in tried['compile, 1 thread, passive']['skipped']
  assert '4.0 x' in tried['compile, 1 thread, default']['skipped']


def test_a_setting_that_fails_is_said_to():
  eager, compiled = ('no kernel', 0.2, 0.2, 0.2), (0.3, 'no g++', 0.1, 0.1)
  name, tried, _ = _pick('layer', eager + compiled)
  assert name == 'eager, 2 threads, default'
  assert tried['eager, 2 threads, passive'] == {'error': 'no kernel'}
  assert tried['compile, 2 threads, default'] == {'error': 'no g++'}
  assert 'no g++' in tried['compile, 2 threads, passive']['skipped']


def test_a_setting_reaches_the_process_of_torch(monkeypatch):
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=2:glibc.a.b=3')
  monkeypatch.setenv('OMP_WAIT_POLICY', 'active')
  started = []
  monkeypatch.setattr(torch_process.tempfile, 'TemporaryFile', lambda *_: None)
  monkeypatch.setattr(
      torch_process.subprocess,
      'Popen',
      lambda *_, env, **_options: started.append(env),
  )
  for huge_pages in (None, False, True):
    torch_process._Process(
        torch_process.Setting(1, 'passive', False, huge_pages)
    )
  monkeypatch.delenv('GLIBC_TUNABLES')
  torch_process._Process(torch_process.Setting(2, 'default', False, False))
  assert [env.get('GLIBC_TUNABLES') for env in started] == [
      'glibc.malloc.hugetlb=2:glibc.a.b=3',
      'glibc.a.b=3',
      'glibc.a.b=3:glibc.malloc.hugetlb=1',
      None,
  ]
  assert [env.get('OMP_WAIT_POLICY') for env in started[2:]] == [
      'passive',
      None,
  ]
  assert started[0]['OMP_NUM_THREADS'] == started[0]['MKL_NUM_THREADS'] == '1'


def _decoding(device, rows):
  return next(
      c
      for c in peer_cases.cases(device, False)
      if (c.kind, c.rows) == ('decode', rows)
  )


def test_the_table_has_ratios_of_speeds_and_goals():
  case = _decoding('cpu', 1)

  def time(median):
    return {'median': median, 'low': median, 'high': median}

  found = {
      'ours': {'ours': {'prefill': time(0.1), 'answer': time(0.2)}},
      'peers': {
          'dense': {
              'tried': {},
              'best': {
                  part: {'setting': 'eager', 'seconds': time(seconds)}
                  for part, seconds in (('prefill', 0.1), ('answer', 0.5))
              },
          }
      },
  }
  rows = {row[1]: row for row in peers.table(case, found)}
  # 31 steps of ours in 0.1 s, of theirs in 0.4 s.
  assert rows['steps'][3] == '100.0 ms (310 tokens/s)'
  assert rows['steps'][-2:] == ('4.00', '>= 2')
  assert rows['answer'][-2:] == ('2.50', '')
  for device, rows, goal in (
      ('cpu', 8, '>= 2'),
      ('cuda', 1, '>= 2'),
      ('cuda', 8, ''),  # On a GPU, of one answer at a time.
  ):
    shown = peers.table(_decoding(device, rows), found)
    assert {row[1]: row[-1] for row in shown}['steps'] == goal
