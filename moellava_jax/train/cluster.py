# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, and how they agree.

JAX's own runtime does the work: `jax.distributed` connects the processes, its
key-value store and barriers carry what they tell each other. A process that
dies is noticed by its missing heartbeats, upon which JAX aborts the others.

Without other processes every function here is a plain call. How a run ends
with an error is in `ending`.
"""

from collections.abc import Callable
import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import traceback
from typing import Any

import jax

# There is no public door to the key-value store of `jax.distributed`.
from jax._src import distributed

from moellava_jax import config

# Beyond that a process counts as stuck, though its heart beats. Data and
# weights of others may take long to read.
_PATIENCE_S = 3600
_SHUTDOWN_S = 60  # How far apart processes may end.
_REMIND_S = 30.0

_phases = itertools.count()
_hosts: dict[int, str] = {}
_joined = threading.Event()  # JAX forgets it when this process takes leave.


class ClusterError(config.UserError):
  """What went wrong in some process; all of them raise it."""


def start(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    start_timeout_s: int,
    heartbeat_timeout_s: int,
) -> None:
  """Joins the other processes of the run, if there are any.

  To be called before anything that touches a device. Without the first three,
  JAX looks for what started this process: Open MPI, SLURM, a TPU slice (by the
  variables of GKE or the metadata of Compute Engine), or a Kubernetes Job or
  JobSet (with the package `kubernetes`). Where it finds nothing, and for a
  single task of SLURM or Open MPI, the process stays alone, as it does with
  `num_processes` 1.

  Args:
    coordinator_address: host:port of process 0, reachable from all others.
    num_processes: of the run.
    process_id: of this process, from 0.
    start_timeout_s: how long to wait for the others.
    heartbeat_timeout_s: after that long without a sign of life a process
      counts as dead, and all others are aborted (SIGABRT).

  Raises:
    config.UserError: only some of the three flags, unless `num_processes` is 1,
      or a cluster in which JAX cannot find its place.
  """
  flags = {
      '--coordinator_address': coordinator_address,
      '--num_processes': num_processes,
      '--process_id': process_id,
  }
  if num_processes == 1 and not process_id:
    return
  missing = [name for name, value in flags.items() if value is None]
  if missing and len(missing) < len(flags):
    raise config.UserError(
        f'{", ".join(missing)} must be given too: a process is told its place'
        f' by all of {", ".join(flags)}, or finds it by itself with none.'
    )
  if missing and _only_task():
    return
  # JAX would abort without a word about what to do.
  late = threading.Timer(start_timeout_s, _nobody_came, [start_timeout_s])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        cluster_detection_method=None if missing else 'deactivate',
        initialization_timeout=start_timeout_s + 60,
        heartbeat_timeout_seconds=heartbeat_timeout_s,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )
  except Exception as error:  # The package kubernetes has its own.
    if missing and 'coordinator_address should be defined' in str(error):
      _check_not_lost()
      return
    raise config.UserError(
        f'This process cannot join the others: {error} Its place can be given'
        f' with {", ".join(flags)}.'
    ) from error
  finally:
    late.cancel()
  _joined.set()
  names = gather('start', socket.gethostname())
  _hosts.update(enumerate(names))


def _only_task() -> bool:
  """Whether a launcher says that there is one task.

  JAX would join a cluster of one, in which it leaves all but one GPU alone.
  """
  for name in ('OMPI_COMM_WORLD_SIZE', 'SLURM_NTASKS'):
    if name in os.environ:
      return os.environ[name] == '1'
  return False


def _check_not_lost() -> None:
  """Raises UserError for a pod of an indexed job that believes to be alone.

  Nothing in its environment tells how many there are. Pod 0 would train alone,
  in the run folder of all of them.
  """
  index = os.environ.get('JOB_COMPLETION_INDEX')
  if index is not None:
    raise config.UserError(
        f'This is pod {index} of a Kubernetes job, but JAX does not find the'
        ' others. On TPUs, install the extra `tpu`; elsewhere the package'
        ' kubernetes (pip install kubernetes, and a service account that may'
        ' read pods and jobs), or give --coordinator_address, --num_processes'
        ' and --process_id; to a pod that is alone, --num_processes=1.'
    )


def _nobody_came(seconds: int) -> None:
  state = distributed.global_state
  where = ''
  if state.coordinator_address is not None:
    where = (
        f' of {state.num_processes} as process {state.process_id}, with the'
        f' coordinator at {state.coordinator_address}'
    )
  print(
      f'error: {socket.gethostname()} has waited {seconds} s for the other'
      f' processes{where}. Are all of them running, with the same coordinator'
      ' and each with its own number, and may they connect to it?',
      file=sys.stderr,
      flush=True,
  )
  os._exit(1)


def alone() -> bool:
  """Whether this process is the whole run."""
  return not _joined.is_set()


def is_first() -> bool:
  """Whether this process writes what one process writes for all."""
  return process() == 0


def client() -> Any:
  """The key-value store and barriers of the run."""
  return distributed.global_state.client


def process() -> int:
  """The number of this process; unlike JAX's, known without its devices."""
  return distributed.global_state.process_id


def say(text: str) -> None:
  """Prints a line for the whole run."""
  if is_first():
    with contextlib.suppress(OSError):  # The log may be on a full disk.
      print(text, flush=True)


def name(number: int) -> str:
  """'process 3 (its host)'."""
  return f'process {number} ({_hosts.get(number, "host unknown")})'


def gather(what: str, value: str) -> list[str]:
  """The values of all processes, in the order of their numbers.

  Args:
    what: the point that the run has reached, for messages.
    value: a short text.

  Raises:
    ClusterError: a process did not come here, or went elsewhere.
  """
  if alone():
    return [value]
  place = f'moellava/{next(_phases)}/'
  client().key_value_set(f'{place}{process()}', json.dumps([what, value]))
  done = threading.Event()
  if is_first():
    threading.Thread(
        target=_remind, args=(what, place, done), daemon=True
    ).start()
  try:
    client().wait_at_barrier(place, _PATIENCE_S * 1000)
  except jax.errors.JaxRuntimeError as error:
    raise ClusterError(
        f'{", ".join(_absent(place)[:4]) or "A process"} did not reach'
        f' {what!r}: {str(error).splitlines()[0]}'
    ) from error
  finally:
    done.set()
  found = {
      int(key.removeprefix(place)): json.loads(text)
      for key, text in client().key_value_dir_get(place)
  }
  points = {point for point, _ in found.values()}
  if len(points) > 1:
    raise ClusterError(
        'The processes do different things: '
        + _by_process({n: repr(point) for n, (point, _) in found.items()})
        + '. Do all of them run the same code and see the same files?'
    )
  return [found[n][1] for n in sorted(found)]


def _absent(place: str) -> list[str]:
  """Names of the processes that have not come to a `gather`."""
  try:
    arrived = client().key_value_dir_get(place)
  except (jax.errors.JaxRuntimeError, AttributeError):
    return []  # The run is being ended.
  here = {int(key.removeprefix(place)) for key, _ in arrived}
  count = distributed.global_state.num_processes
  return [name(n) for n in range(count) if n not in here]


def _remind(what: str, place: str, done: threading.Event) -> None:
  while not done.wait(_REMIND_S):
    print(
        f'waiting at {what!r} for {", ".join(_absent(place)[:4])}', flush=True
    )


def together(what: str, function: Callable[[], Any]) -> Any:
  """Calls `function` in every process; if it fails in one, all raise.

  Args:
    what: the point that the run has reached, for messages.
    function: nothing in it may wait for other processes.

  Returns:
    What `function` returned here.

  Raises:
    ClusterError: it raised in some process; the message says in which, and
      why. In a process alone its own exceptions are raised.
  """
  if alone():
    return function()
  result, failure = None, ''
  try:
    result = function()
  except (config.UserError, OSError) as error:
    failure = str(error)
  except Exception as error:
    traceback.print_exc()
    failure = f'{type(error).__name__}: {error}'
  failures = dict(enumerate(gather(what, failure)))
  if any(failures.values()):
    if len(set(failures.values())) == 1:
      raise ClusterError(failure)
    raise ClusterError(
        _by_process({n: text for n, text in failures.items() if text})
    )
  return result


def first(what: str, function: Callable[[], Any]) -> None:
  """Calls `function` in process 0 while the others wait; see `together`."""
  together(what, function if is_first() else lambda: None)


def agree(what: str, facts: dict[str, str]) -> None:
  """Checks that all processes hold the same facts, a text by its name.

  Raises:
    ClusterError: they do not; the message names what differs, and where.
  """
  text = json.dumps(facts, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  if len(set(gather(what, digest))) == 1:
    return
  all_facts = [json.loads(x) for x in gather(f'{what}: differences', text)]
  names = sorted({key for some in all_facts for key in some})
  different = []
  for key in names:
    values = {n: str(some.get(key)) for n, some in enumerate(all_facts)}
    if len(set(values.values())) > 1:
      different.append(f'{key}: {_by_value(values)}')
  more = f' and {len(different) - 5} more' if len(different) > 5 else ''
  raise ClusterError(
      f'The processes do not agree on {what}: {"; ".join(different[:5])}{more}.'
      ' Start all of them with the same code, flags and files.'
  )


def _by_process(texts: dict[int, str]) -> str:
  some = [f'{name(n)}: {text}' for n, text in list(texts.items())[:4]]
  more = f' (and {len(texts) - 4} more)' if len(texts) > 4 else ''
  return '; '.join(some) + more


def _by_value(values: dict[int, str]) -> str:
  """'0 on process 0 (a), 1 on process 1 (b)', each value with one process."""
  holders: dict[str, list[int]] = {}
  for n, value in values.items():
    holders.setdefault(value, []).append(n)
  parts = []
  for value, processes in list(holders.items())[:4]:
    more = f' and {len(processes) - 1} others' if len(processes) > 1 else ''
    parts.append(f'{value} on {name(processes[0])}{more}')
  return ', '.join(parts)
