# SPDX-License-Identifier: Apache-2.0
"""Trains all stages of a config, or one; goes on where it stopped.

python -m moellava_jax.train.main --config=configs/shapes.py
python -m moellava_jax.train.main --config=configs/shapes.py:moe
python -m moellava_jax.train.main --config=... --config.moe.lr=1e-4

Several processes train together when the same command runs in each of them:
as tasks of SLURM or Open MPI, on the hosts of a TPU slice or in a Kubernetes
JobSet they find each other; elsewhere each is told its place:

python -m moellava_jax.train.main --config=... --process_id=0 \
    --num_processes=2 --coordinator_address=HOST_OF_PROCESS_0:8476

SIGTERM or Ctrl-C: training finishes its step, saves a checkpoint and ends; a
second Ctrl-C ends it at once.

Exit codes: 0 all stages are finished; 75 stopped by a signal, run the same
command again to go on; 76 a step did not return (config.watchdog) and the stacks
of all threads are in RUN/stacks-PROCESS.txt, the same command goes on after the
last checkpoint; 1 an error that its message explains; SIGABRT where another
process has died.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from moellava_jax import config
from moellava_jax.train import guard

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file, optionally with :stage.', lock_config=True
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator_address', None, 'host:port of process 0, seen from all.'
)
_PROCESSES = flags.DEFINE_integer(
    'num_processes', None, 'Processes of the run.', lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    'process_id', None, 'Number of this process, from 0.', lower_bound=0
)
_START = flags.DEFINE_integer(
    'start_timeout_s',
    300,
    'How long to wait for the other processes to start.',
    lower_bound=1,
)
_HEARTBEAT = flags.DEFINE_integer(
    'heartbeat_timeout_s',
    60,
    'A process without a sign of life for that long is dead, and ends the run.',
    lower_bound=1,
)

_PROFILE = flags.DEFINE_string(
    'profile_steps',
    None,
    'Steps of each stage to record, such as 10-14, into RUN/profile/STAGE (of'
    ' several processes into process-N there): traces for TensorBoard and, on a'
    ' disk but not in gs://, for Perfetto. See docs/profiling.md.',
)

# XLA sizes the threads of simulated devices by the cores. With few of them,
# devices that wait for each other leave none for those that are waited for.
_THREADS = 32


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  if _CONFIG.value is None:
    raise app.UsageError('--config=FILE is required.')
  if flags.FLAGS.verbosity <= 0:
    logging.set_verbosity(logging.WARNING)  # Orbax narrates every save.
    # And every failure, on hundreds of lines, as does the event loop below it;
    # it comes to us as an exception.
    logging.get_absl_handler().addFilter(
        lambda r: 'orbax' not in r.pathname and r.name != 'asyncio'
    )
  if (os.cpu_count() or 1) < _THREADS:
    os.environ.setdefault('NPROC', str(_THREADS))
  with guard.Guard() as watchman:
    # After the flags: JAX starts here.
    import jax

    from moellava_jax.train import cluster, ending, loop, profiling

    # It would take SIGTERM away from the guard.
    jax.config.update('jax_enable_preemption_service', False)
    try:
      cluster.start(
          _COORDINATOR.value,
          _PROCESSES.value,
          _PROCESS.value,
          start_timeout_s=_START.value,
          heartbeat_timeout_s=_HEARTBEAT.value,
      )
      ending.watch()
      profiled = None
      if _PROFILE.value is not None:
        profiled = profiling.parse(_PROFILE.value)
      loop.run(config.from_dict(_CONFIG.value), watchman, profiled)
    except guard.Stopped as stopped:
      cluster.say(f'{stopped} Run the same command again to go on.')
      sys.exit(guard.STOPPED)
    except Exception as error:
      ending.fail(error)


if __name__ == '__main__':
  app.run(main)
