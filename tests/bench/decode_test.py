# SPDX-License-Identifier: Apache-2.0
"""What becomes of times: noise, and bounds; main_test.py runs the suite."""

import pytest

from moellava_jax.bench import decode, measure, sizes
from moellava_jax.train import accelerators, init
from tests import tiny


@pytest.fixture(autouse=True)
def _nothing_to_compile(monkeypatch):
  monkeypatch.setattr(
      init, 'fresh', lambda model, *_: tiny.params_of(model.cfg)
  )


def _taking(seconds, monkeypatch):
  """`seconds` by batch size: with half of the tokens, and with all."""

  def interleaved(runs, repeats):
    del repeats
    return {
        name: measure.Time(*3 * (seconds[name.split()[0]][n % 2],))
        for n, name in enumerate(runs)
    }

  monkeypatch.setattr(measure, 'interleaved', interleaved)


def test_a_step_that_noise_hides_has_no_time(monkeypatch):
  _taking({'1': (0.2, 0.1), '2': (0.1, 0.5)}, monkeypatch)
  case = decode.Case('tiny', sizes.small(16, 2, 3, 'float32'))
  found = decode.run(case, (1, 2), 2)
  assert found['1']['seconds_a_step'] is None
  assert found['2']['seconds_a_step'] > 0
  assert found['2']['steps_over_1'] is None
  one, two = decode.table('tiny', found)
  assert len(one) == len(decode.HEADER)
  assert 'noise' in one[2] and 'noise' in two[5]
  assert float(two[2]) > 0 and float(two[4]) > 0
  assert one[6] == 'not known'  # The bandwidth of a CPU.


def test_a_step_is_compared_with_what_it_must_read(monkeypatch):
  h200 = accelerators.ACCELERATORS['h200']
  monkeypatch.setattr(accelerators, 'of_device', lambda _: h200)
  _taking({'1': (0.1, 0.2), '32': (0.1, 0.2)}, monkeypatch)
  case = decode.Case('tiny', sizes.small(64, 2, 3, 'bfloat16'))
  found = decode.run(case, (1, 32), 2)
  # Kernels of 2 bytes: attention, head, dense FFN; E=4, k=2 in one layer of 2.
  width, vocab, ffn = 64, 512, 2 * 2 * 64 * 256
  kernels = 2 * (2 * 4 * width**2 + width * vocab) + ffn
  # In fp32: 5 norms, the router, and rows of the embedding.
  others = 4 * (5 * width + 4 * width)
  cache = (48 + 32 + 16) * 2 * 2 * width * 2
  for rows, chosen in ((1, 2), (32, 4)):
    entry = found[str(rows)]
    weights = kernels + chosen * ffn + others + rows * 4 * width
    assert entry['bytes_a_step'] == {'weights': weights, 'cache': rows * cache}
    bound = rows * 4.8e12 / (weights + rows * cache)
    assert entry['bound'] == pytest.approx(bound)
    seconds = 0.1 / 32
    assert entry['share_of_bound'] == pytest.approx(rows / seconds / bound)
  one, many = decode.table('tiny', found)
  assert (one[8], many[8]) == ('>= 70%', '>= 60%')
