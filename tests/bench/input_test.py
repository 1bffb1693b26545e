# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import numpy as np

from moellava_jax.bench import input as bench


def test_the_histogram_has_the_published_proportions():
  lengths_N, images_N = bench.histogram(6653)
  total = sum(source.rows for source in bench.SOURCES)
  assert total == 665_298
  text = next(s for s in bench.SOURCES if s.name == 'text')
  assert abs((images_N == 0).mean() - text.rows / total) < 1e-3
  assert len(lengths_N) == len(images_N)
  # An image takes its positions, and the template and the turns the rest.
  assert lengths_N[images_N == 1].min() > 576 + 50
  np.testing.assert_array_equal(lengths_N, bench.histogram(6653)[0])


def test_the_command_prints_and_writes_what_it_measured(tmp_path):
  command = (sys.executable, '-m', 'moellava_jax.bench.input')
  done = subprocess.run(
      (*command, f'--out={tmp_path}', '--rows=4000', '--repeats=1'),
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'input.json').read_text())
  assert [p['row_length'] for p in found['packing']] == [2048, 4096, 8192]
  for packed in found['packing']:
    assert packed['padded'] < packed['packed'] <= packed['offline'] < 1
    assert packed['packed_over_offline'] >= 0.98
    assert f'fill {packed["padded"]:.3f} padded' in done.stdout
  for rate in found['jpeg']:
    assert rate['largest_difference'] < 1
    assert rate['fast_over_exact'] > 1
  assert found['device'] and 'matmul_precision' in found
  assert found['versions'].keys() >= {'jax', 'grain'} and found['revision']
  assert set(found['overhead']) == {'shuffled', 'packed'}
  assert 'of the time of decoding' in done.stdout
