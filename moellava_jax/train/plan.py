# SPDX-License-Identifier: Apache-2.0
"""What a stage takes on each device, before anything runs.

python -m moellava_jax.train.plan --config=configs/phi2.py:moe --devices=8
python -m moellava_jax.train.plan --config=... --accelerator=h100 --mfu=0.45
python -m moellava_jax.train.plan --config=... --nocompile        (seconds)
python -m moellava_jax.train.plan --config=... --topology=v5e:4x4 (needs libtpu)
python -m moellava_jax.train.plan --config=... --topology=local --measure

Weights are never made: the state is read from shapes and shardings, and the
step is compiled for simulated devices, or for a TPU slice that need not be
there. What the activations take of an accelerator is estimated; see
`train.memory`. `--topology=local` compiles for the devices of this machine
instead, and `--measure` then runs one step there and compares.
"""

import dataclasses
import json
import os
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from moellava_jax import config

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, optionally with :stage.', lock_config=True
)
_DEVICES = flags.DEFINE_integer('devices', 1, 'How many devices to plan for.')
_ACCELERATOR = flags.DEFINE_string(
    'accelerator', None, 'Only this one; by default all that are known.'
)
_MFU = flags.DEFINE_float(
    'mfu', 0.4, 'Share of the peak that the model is expected to use.'
)
_COMPILE = flags.DEFINE_bool(
    'compile', True, 'Compile the step; else estimates only.'
)
_TOPOLOGY = flags.DEFINE_string(
    'topology',
    None,
    'Compile for a TPU slice (v5e:4x4; needs libtpu, but no TPU) or for the'
    ' devices of this machine (local) instead of simulated devices.',
)
_MEASURE = flags.DEFINE_bool(
    'measure', False, 'With --topology=local: run one step and compare.'
)
_JSON = flags.DEFINE_string('json', None, 'Also write everything to this file.')

# Of a step that is not run, only the memory is of interest: the CPU's compiler
# has less to do, and does not order the work for its cores (as it otherwise
# does, at several times the memory that accelerators take).
_FOR_MEMORY = (
    '--xla_backend_optimization_level=0',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false',
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  if _CONFIG.value is None:
    raise app.UsageError('--config=FILE is required.')
  logging.set_verbosity(logging.WARNING)
  if _TOPOLOGY.value is None:
    given = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = ' '.join((*_FOR_MEMORY, given))
  try:
    plans = run(config.from_dict(_CONFIG.value))
  except config.UserError as error:
    sys.exit(f'error: {error}')
  if _JSON.value is not None:
    with open(_JSON.value, 'w', encoding='utf-8') as file:
      json.dump(plans, file, indent=1)


def run(cfg: config.TrainConfig) -> list[dict[str, Any]]:
  """Plans and prints every stage of the config, as the flags say.

  Raises:
    config.UserError: flags or settings that cannot be planned.
  """
  # After the flags, which decide what JAX starts with.
  from moellava_jax.train import accelerators, report, topology

  chosen = list(accelerators.ACCELERATORS.values())
  if _ACCELERATOR.value is not None:
    chosen = [accelerators.find(_ACCELERATOR.value)]
  count = _DEVICES.value
  name = _TOPOLOGY.value
  if _MEASURE.value and name != topology.LOCAL:
    raise config.UserError('--measure needs --topology=local.')
  if name is None:
    memory = chosen[0].memory if len(chosen) == 1 else None
    target = topology.simulated(count, memory)
  elif topology.check(name) is None:
    target = topology.local()
  else:
    target = topology.described(name)
  if name != topology.LOCAL and cfg.model.compute_dtype == 'auto':
    # What the accelerators resolve it to; the CPU would take float32.
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, compute_dtype='bfloat16'),
    )
  plans = []
  for stage in cfg.stages:
    if plans:
      print()
    plan = report.make(
        cfg,
        stage,
        target,
        chosen,
        mfu=_MFU.value,
        compiles=_COMPILE.value,
        measures=_MEASURE.value,
    )
    report.show(plan)
    plans.append(plan)
  return plans


if __name__ == '__main__':
  app.run(main)
