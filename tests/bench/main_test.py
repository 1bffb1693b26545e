# SPDX-License-Identifier: Apache-2.0
"""The suites at their smallest: what they write, and that they go on."""

import json

import pytest

from moellava_jax import config
from moellava_jax.bench import input as input_lib
from moellava_jax.bench import main, measure, moe_layer, train_step


def test_a_suite_is_measured_once(tmp_path, capsys, monkeypatch):
  main.run('cpu', str(tmp_path), 2, True)
  printed = capsys.readouterr().out
  path = tmp_path / 'cpu.json'
  found = json.loads(path.read_text())
  layer, decoder, step = found['cases'].values()
  for name in ('einsum_128', 'index', 'ragged'):
    assert layer[name]['forward']['ratio'] > 0
    assert name in printed
  assert layer['dense']['forward']['ratio'] == 1
  assert decoder['1']['rate_over_1'] == 1
  assert decoder['2']['tokens_a_second'] > 0
  assert step['index']['speed'] > 0 and 0 < step['index']['ceiling'] < 1
  assert 0 < step['index']['mfu_of_measured_peak'] < 1
  assert step['dense']['waste']['capacity'] == 0
  assert step['index']['waste']['capacity'] > 0
  assert found['about']['versions'].keys() == set(measure.PACKAGES)
  # Again: nothing is measured, and what is there is shown.
  monkeypatch.setattr(measure, 'interleaved', None)
  main.run('cpu', str(tmp_path), 2, True)
  assert 'index' in capsys.readouterr().out
  assert json.loads(path.read_text()) == found
  # A half of it: only the rest is measured.
  del found['cases'][next(iter(found['cases']))]
  path.write_text(json.dumps(found))
  with pytest.raises(TypeError):
    main.run('cpu', str(tmp_path), 2, True)


def test_results_of_other_settings_are_not_mixed(tmp_path):
  results = measure.Results(str(tmp_path), 'cpu', {'repeats': 2})
  results.add('a', 1)
  assert measure.Results(str(tmp_path), 'cpu', {'repeats': 2}).cases == {'a': 1}
  with pytest.raises(config.UserError, match='another settings'):
    measure.Results(str(tmp_path), 'cpu', {'repeats': 3})


def test_full_suites_have_the_sizes_of_the_backbones():
  names = [case.name for case in main.cases('gpu_layer', 2, False)]
  assert 'D=2560 F=10240 gelu_tanh E=4 tokens=16384 bfloat16' in names
  layers = [name for name in names if name.startswith('D=')]
  assert len(layers) == 8 and sum('E=8' in name for name in layers) == 2
  names = [case.name for case in main.cases('gpu_decode', 2, False)]
  assert 'decode phi2 E=4' in names
  names = [case.name for case in main.cases('gpu_train', 2, False)]
  assert 'train qwen_1_8b moe' in names


def test_floors_are_those_of_the_arithmetic():
  case = moe_layer.Case(256, 1024, 'gelu_tanh', 4, 4096, 'float32')
  floors = moe_layer.WAYS['einsum_256'].floors(case)
  assert floors == {
      'forward': pytest.approx(1.5 * (1 + 2 * 256 / 2048)),
      'forward_backward': pytest.approx(1.5 * (1 + 5 * 256 / (3 * 2048))),
  }
  whole = moe_layer.WAYS['einsum_batch'].floors(case)['forward']
  assert whole == pytest.approx(1.5 * (1 + 2 * 4096 / 2048))
  assert moe_layer.WAYS['index'].floors(case)['forward'] == 1.5
  assert moe_layer.WAYS['ragged'].floors(case)['forward'] == 1


def test_growth_is_of_few_and_many_tokens_in_turns(monkeypatch):
  turns = []

  def in_turns(runs, repeats):
    turns.append((list(runs), repeats))
    found = {}
    for way, tokens in runs:
      # The whole batch as one group costs the square.
      seconds = tokens ** (2 if way == 'einsum_batch' else 1) / 1e6
      if way == 'ragged' and tokens > 4096:
        seconds *= 1.25
      found[way, tokens] = measure.Time(*3 * (seconds,))
    return found

  monkeypatch.setattr(measure, 'in_turns', in_turns)
  monkeypatch.setattr(
      moe_layer, 'programs', lambda *_: dict.fromkeys(moe_layer.PHASES)
  )
  (case,) = (c for c in main.cases('cpu', 2, False) if 'growth' in c.name)
  grown = case.run()
  assert len(turns) == len(moe_layer.PHASES)
  for keys, repeats in turns:
    assert repeats == 6
    assert {('dense', 1024), ('dense', 16384), ('index', 16384)} <= {*keys}
    assert ('einsum_2048', 16384) not in keys
  assert grown['dense']['tokens'] == [1024, 16384]
  assert grown['dense']['forward']['growth'] == 16
  assert grown['einsum_batch']['tokens'] == [1024, 4096]
  assert grown['einsum_batch']['forward']['growth'] == pytest.approx(16)
  shown = {row[1]: row[2:] for row in case.rows(case.name, grown)}
  assert shown['einsum_batch'] == ('1024 to 4096', '4', '16.00', '16.00')
  assert shown['dense'] == ('1024 to 16384', '16', '16.00', '16.00')
  assert shown['index'][2:] == ('16.00 <= 17 met',) * 2
  assert shown['ragged'][2:] == ('20.00 <= 17 missed',) * 2


def test_a_layer_has_the_goals_of_its_size(monkeypatch):
  ratios = {'index': 1.5 * 1.16, 'einsum_256': 1.875 * 1.14, 'ragged': 1.26}

  def interleaved(runs, repeats):
    del repeats
    return {x: measure.Time(*3 * (ratios.get(x, 1.0),)) for x in runs}

  monkeypatch.setattr(measure, 'interleaved', interleaved)
  monkeypatch.setattr(
      moe_layer, 'programs', lambda *_: dict.fromkeys(moe_layer.PHASES)
  )
  case = moe_layer.Case(256, 1024, 'gelu_tanh', 4, 4096, 'float32')
  rows = {r[1]: r for r in moe_layer.table('', moe_layer.run(case, 2))}
  assert rows['dense'][5] == ''
  assert rows['index'][5] == '1.16 <= 1.15 missed'
  assert rows['einsum_256'][5] == '1.14 <= 1.15 met'
  assert rows['ragged'][5] == '1.26 <= 1.25 missed'
  assert rows['ragged'][9] == '1.26 <= 1.6 met'
  assert rows['einsum_batch'][5] == f'{1 / 7.5:.2f}'
  found = moe_layer.run(case._replace(tokens=16384), 2)
  assert 'einsum_batch' not in found and 'einsum_256' in found
  assert '=' not in moe_layer.table('', found)[-1][5]


def test_what_has_a_goal_on_a_cpu_runs_three_times_as_often(monkeypatch):
  ran = {}

  def noted(case, repeats, *_):
    ran[case] = repeats
    return {}

  monkeypatch.setattr(moe_layer, 'run', noted)
  monkeypatch.setattr(train_step, 'run', noted)
  monkeypatch.setattr(main, '_peak', lambda dtype: 1.0)
  for case in main.cases('cpu', 5, False):
    if case.name.startswith(('D=', 'train')):
      case.run()
  layers = {x for x in ran if isinstance(x, moe_layer.Case)}
  often = {(x.experts, x.tokens) for x in layers if ran[x] == 15}
  assert often == {(4, 4096)}
  assert {ran[x] for x in layers} == {5, 15}
  stages = {x.stage: n for x, n in ran.items() if x not in layers}
  assert stages == {'pretrain': 5, 'finetune': 5, 'moe': 15}


def test_a_share_of_the_ceiling_has_the_goal_of_the_suite(monkeypatch):
  header = train_step.HEADER
  entry = {'speed': 0.81, 'ceiling': 0.9}
  monkeypatch.setattr(
      train_step, 'table', lambda *_: [('step', x, *header[2:]) for x in found]
  )
  found = {'dense': {}, 'index': entry, 'ragged': {'error': 'full'}}
  for suite, goal in (('cpu', '0.85 met'), ('gpu_train', '0.92 missed')):
    case = next(c for c in main.cases(suite, 2, False) if 'moe' in c.name)
    dense, index, ragged = case.rows('', found)
    assert index[5] == f'0.90 >= {goal}'
    assert dense[5] == ragged[5] == 'share'
    assert index[:5] == ('step', 'index', *header[2:5])
    assert index[6:] == header[6:]


def test_the_suite_of_the_cpu_ends_with_the_input_pipeline(capsys, monkeypatch):
  last = main.cases('cpu', 2, False)[-1]
  assert last.name == 'input'
  monkeypatch.setattr(input_lib.util, 'find_spec', lambda name: None)
  assert 'input' not in [case.name for case in main.cases('cpu', 2, False)]
  assert 'input pipeline: not measured' in capsys.readouterr().out
