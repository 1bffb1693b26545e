# SPDX-License-Identifier: Apache-2.0
"""What becomes of times that noise has spoilt; main_test.py runs the suite."""

from moellava_jax.bench import decode, measure, sizes


def test_a_step_that_noise_hides_has_no_time(monkeypatch):
  seconds = {'1': (0.2, 0.1), '2': (0.1, 0.5)}  # Half of the tokens, all.

  def interleaved(runs, repeats):
    del repeats
    return {
        name: measure.Time(*3 * (seconds[name.split()[0]][n % 2],))
        for n, name in enumerate(runs)
    }

  monkeypatch.setattr(measure, 'interleaved', interleaved)
  case = decode.Case('tiny', sizes.small(16, 2, 3, 'float32'))
  found = decode.run(case, (1, 2), 2)
  assert found['1']['seconds_a_step'] is None
  assert found['2']['seconds_a_step'] > 0
  assert found['2']['steps_over_1'] is None
  one, two = decode.table('tiny', found)
  assert 'noise' in one[2] and 'noise' in two[5]
  assert float(two[2]) > 0 and float(two[4]) > 0
