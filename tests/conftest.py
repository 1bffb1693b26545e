# SPDX-License-Identifier: Apache-2.0
"""The environment of every test; read by pytest before any of them.

XLA and tokenizers read these variables once, when they are first imported, so
nothing above the assignments may import jax. `setdefault` leaves a choice that
was made on the command line alone: `JAX_PLATFORMS=cuda bash launch/test.sh`.
"""

import os
import pathlib

_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME', '~/.cache')).expanduser()

for _name, _value in {
    'JAX_PLATFORMS': 'cpu',
    # XLA sizes the thread pool that the simulated devices share by the number
    # of cores. With two of them, steps that nobody waits for deadlock in a
    # collective: "rendezvous ... may be stuck", then an abort.
    'NPROC': '32',
    # Compiling takes longer than running: keep what has been compiled, however
    # small or quick. Outside the repository, so that clones share it.
    'JAX_COMPILATION_CACHE_DIR': str(_CACHE / 'moellava_jax' / 'jax'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    # No test may fetch anything, nor hang while it tries.
    'HF_HUB_OFFLINE': '1',
    # Its threads do not survive the fork of a worker process, and it says so.
    'TOKENIZERS_PARALLELISM': 'false',
    # Figures are files; no window.
    'MPLBACKEND': 'agg',
}.items():
  os.environ.setdefault(_name, _value)

# Eight devices, so that meshes with several axes run on any machine. Compiling
# takes as long as all else here, and tests run nothing for long: no LLVM
# optimisations, and the older fusion emitter, which compiles faster.
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    + ' --xla_backend_optimization_level=0'
    + ' --xla_cpu_use_fusion_emitters=false'
)

if os.environ['JAX_PLATFORMS'] != 'cpu':
  # GPUs and TPUs round the inputs of fp32 products, beyond our tolerances.
  # Not on the CPU, which does not: there it would only write HIGHEST into
  # every jaxpr, and hide that the router asks for it by itself.
  os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')

from absl import flags  # noqa: E402
import pytest  # noqa: E402

# Grain reads absl flags, which absl.app.run would have parsed.
flags.FLAGS.mark_as_parsed()


# Linux grants a process 65,530 mappings of memory. Every program takes some, and
# beyond them a process crashes in the middle of a compilation.
_MAPPINGS = pathlib.Path('/proc/self/maps')
_MANY = 15_000


@pytest.fixture(scope='module', autouse=True)
def room_for_programs():
  """Frees what a file has compiled once there is much of it."""
  yield
  if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b'\n') > _MANY:
    import jax

    jax.clear_caches()


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """A smoke run of all stages, whose step 2 is recorded; tests copy it.

  And how often the step of each stage has been compiled.
  """
  # Here, because this file comes before everything that imports JAX.
  from moellava_jax.train import loop, profiling, program
  from tests import tiny

  run = tmp_path_factory.mktemp('smoke') / 'run'
  programs = []
  real = program.Program.train_step

  def noted(self, *args):
    programs.append(real(self, *args))
    return programs[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program.Program, 'train_step', noted)
    loop.run(tiny.train_config(run), profiled=profiling.Steps(2, 2))
  return run, [step._cache_size() for step in programs]
