# SPDX-License-Identifier: Apache-2.0
"""Converting holds the model and little more, in both directions."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import safetensors.numpy

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens'
# Runs the command and prints the most memory of its own that it has had, MB.
_WATCHED = """
import atexit, pathlib, runpy, threading, time
top = [0]
def look():
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith('RssAnon'):
      top[0] = max(top[0], int(line.split()[1]))
def watch():
  while True:
    look()
    time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
atexit.register(lambda: print('PEAK', top[0] / 1e3))
runpy.run_module('moellava_jax.interop.main', run_name='__main__', alter_sys=True)
"""


def _peak(source, target):
  done = subprocess.run(
      [
          *(sys.executable, '-c', _WATCHED, f'--source={source}'),
          *(f'--target={target}', *_tower(source)),
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  assert 'PEAK' in done.stdout, done.stderr
  return float(done.stdout.split('PEAK')[1])


def _tower(source):
  theirs = (pathlib.Path(source) / 'model.safetensors').exists()
  return [f'--tower={GOLDENS / "clip_tiny"}'] if theirs else []


def _grow(target, scale):
  """phi_dense with `scale` times the width; (bytes, bytes of the largest)."""
  case = GOLDENS / 'phi_dense'
  about = json.loads((case / 'config.json').read_text())
  wider = {64: 64 * scale, 128: 128 * scale}
  rng = np.random.default_rng(0)
  tensors = safetensors.numpy.load_file(case / 'model.safetensors')
  for name, x in tensors.items():
    if 'image_tower' not in name:
      shape = [wider.get(n, n) for n in x.shape]
      tensors[name] = rng.standard_normal(shape, np.float32).astype(np.float16)
  for key in ('hidden_size', 'intermediate_size', 'num_attention_heads'):
    about[key] *= scale
  about['num_key_value_heads'] = about['num_attention_heads']
  target.mkdir()
  (target / 'config.json').write_text(json.dumps(about))
  safetensors.numpy.save_file(tensors, target / 'model.safetensors')
  sizes = [x.nbytes for x in tensors.values()]
  return sum(sizes) / 1e6, max(sizes) / 1e6


def test_converting_holds_the_model_and_few_tensors(tmp_path):
  model, largest = _grow(tmp_path / 'large', 32)
  assert model > 200
  case = GOLDENS / 'phi_dense'
  small = _peak(case, tmp_path / 'ours_small')
  imported = _peak(tmp_path / 'large', tmp_path / 'ours') - small
  # One tensor is read and one copied; the rest is the work space of threads,
  # whatever the size of the model. Orbax alone would hold two more models.
  allowed = model + 2 * largest + 150
  assert imported < allowed
  small = _peak(tmp_path / 'ours_small', tmp_path / 'theirs_small')
  exported = _peak(tmp_path / 'ours', tmp_path / 'theirs') - small
  assert exported < allowed
  print(f'{model=} {largest=} {imported=} {exported=} {allowed=}')
