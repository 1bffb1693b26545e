# SPDX-License-Identifier: Apache-2.0
"""The suites at their smallest: what they write, and that they go on."""

import json

import pytest

from moellava_jax import config
from moellava_jax.bench import main, measure, moe_layer


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
