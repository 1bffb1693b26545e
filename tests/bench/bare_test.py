# SPDX-License-Identifier: Apache-2.0
"""The suites run where there is JAX, Flax and Optax, and nothing else."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_SCRIPT = """
import sys

class Bare:
  names = (
      'PIL', 'grain', 'jinja2', 'matplotlib', 'ml_collections', 'safetensors',
      'tensorboardX', 'tensorflow_datasets', 'tokenizers', 'torch',
      'transformers',
  )

  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in self.names:
      raise ModuleNotFoundError(f'{name} is not in a bare image', name=name)

sys.meta_path.insert(0, Bare())
from moellava_jax.bench import main
for suite in ('cpu', 'gpu_layer', 'gpu_train', 'gpu_decode'):
  assert main.cases(suite, 2, False)
for case in main.cases('cpu', 2, True):
  print(case.name, sys.argv[1] == 'run' and case.run())
"""


@pytest.mark.parametrize(
    'how', ['import', pytest.param('run', marks=pytest.mark.large)]
)
def test_the_suites_need_no_other_package(how):
  done = subprocess.run(
      [sys.executable, '-c', _SCRIPT, how],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  for name in ('D=16', 'decode width=16', 'train width=16'):
    assert name in done.stdout
