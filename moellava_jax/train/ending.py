# SPDX-License-Identifier: Apache-2.0
"""How a process ends with an error, and takes the others with it.

Processes wait for each other in every step. One that meets an error which the
others do not, such as an image that only its host cannot read, leaves a notice
in the key-value store; a thread in each of the others looks for it.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import traceback
from typing import NoReturn

import jax

from moellava_jax import config
from moellava_jax.train import cluster

# What says by itself what to do; all else is shown with where it was raised.
EXPECTED = (config.UserError, FloatingPointError)

_NOTICE = 'moellava/failed/'
_POLL_S = 1.0
_LEAVE_S = 600  # The dead are noticed earlier, by their heartbeats.

_lock = threading.Lock()  # Held by the one thread that ends this process.


def watch() -> None:
  """Ends this process when another one has failed; call after `start`."""
  if cluster.alone():
    return
  stop = threading.Event()
  threading.Thread(target=_watch, args=(stop,), daemon=True).start()
  # Registered after JAX's own, so it runs before JAX takes leave.
  atexit.register(stop.set)


def _watch(stop: threading.Event) -> None:
  while not stop.wait(_POLL_S):
    try:
      notices = cluster.client().key_value_dir_get(_NOTICE)
    except (jax.errors.JaxRuntimeError, AttributeError):
      return  # The run is over, or JAX is about to abort this process.
    if notices:
      with _lock:
        code, message = json.loads(notices[0][1])
        with _said():
          print(f'error: {message}', file=sys.stderr, flush=True)
        _wait()
        _exit(code)


def fail(error: Exception, code: int = 1) -> NoReturn:
  """Ends this process with `code` after saying why, and all others likewise.

  The others print the message too, unless they have raised the same
  (`cluster.ClusterError`). If one of them has died, that is likely to be the
  cause: this process then ends with SIGABRT, as JAX ends the others.
  """
  expected = isinstance(error, EXPECTED)
  if cluster.alone():
    if not expected:
      raise error
    with _said():
      print(f'error: {error}', file=sys.stderr, flush=True)
    sys.exit(code)
  with _lock:  # Whoever has it ends the process; this may be a consequence.
    with _said():
      if expected:
        print(f'error: {error}', file=sys.stderr, flush=True)
      else:
        traceback.print_exception(error)
    if not isinstance(error, cluster.ClusterError):
      _tell(error, code)
    _exit(code)


def _tell(error: Exception, code: int) -> None:
  kind = '' if isinstance(error, EXPECTED) else f'{type(error).__name__}: '
  who = cluster.name(cluster.process())
  notice = json.dumps([code, f'{who}: {kind}{error}'])
  # Where another process was faster, its message is as good.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    cluster.client().key_value_set(f'{_NOTICE}0', notice)
  _wait()


def _wait() -> None:
  """Waits until all have seen the notice: process 0 keeps it for them."""
  try:
    cluster.client().wait_at_barrier(_NOTICE, _LEAVE_S * 1000)
  except jax.errors.JaxRuntimeError:
    os.abort()


def _said() -> contextlib.suppress:
  """For what is good to say: the log may lie on the disk that is full."""
  return contextlib.suppress(OSError)


def _exit(code: int) -> NoReturn:
  with _said():
    sys.stdout.flush()
  jax.distributed.shutdown()
  # Threads that wait for devices would keep the interpreter from ending.
  os._exit(code)
