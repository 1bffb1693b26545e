# SPDX-License-Identifier: Apache-2.0
"""Runs N copies of a training command on this machine as if they were one.

  python launch/supervise.py --processes=2 -- python -m moellava_jax.train.main \
      --config=configs/shapes.py

Each copy learns its place from three flags that are put at its end. SIGTERM and
SIGINT go to all of them as SIGTERM, a second one kills them. When one ends with
an error, so do the others: by SIGTERM, then by SIGKILL. The exit code is that of
the first to fail; one of `RESUME` asks to be started again, and is, up to
`--restarts` times. Needs nothing but the standard library.
"""

import argparse
from collections.abc import Sequence
import contextlib
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, TextIO

# What training exits with when the same command should be run again: stopped
# with a checkpoint (EX_TEMPFAIL of sysexits.h), or ended by the watchdog.
CHECKPOINTED = 75
HUNG = 76
RESUME = (CHECKPOINTED, HUNG)


def outcome(codes: Sequence[int]) -> int:
  """The exit code of a group.

  Args:
    codes: `Popen.returncode` of every process (negative: a signal), in the
      order in which they ended.

  Returns:
    0 if all are 0; the first other one, a signal as 128 + its number. A code of
    `RESUME` wins over signals: those that the loss of a process brings to its
    peers (SIGABRT by JAX's coordination service) may be noticed before it.
  """
  failures = [128 - code if code < 0 else code for code in codes if code]
  if not failures:
    return 0
  if failures[0] > 128:
    return next((code for code in failures if code in RESUME), failures[0])
  return failures[0]


def place(
    command: Sequence[str], index: int, count: int, port: int | str
) -> list[str]:
  """`command` for process `index` of `count`; the same if there is only one."""
  if count == 1:
    return list(command)
  return [
      *command,
      f'--coordinator_address=127.0.0.1:{port}',
      f'--num_processes={count}',
      f'--process_id={index}',
  ]


def share(gpus: str, index: int, count: int) -> dict[str, str]:
  """The GPUs of process `index`, as a change to its environment."""
  if not gpus:
    return {}
  ids = gpus.split(',')
  each = len(ids) // count
  mine = ids[index * each : (index + 1) * each]
  return {'CUDA_VISIBLE_DEVICES': ','.join(mine)}


def say(text: str) -> None:
  _write(sys.stderr, f'== {text}\n'.encode())


class Group:
  """The processes of one attempt."""

  def __init__(self, args: argparse.Namespace):
    self._args = args
    self._processes: list[subprocess.Popen[bytes]] = []
    self._untold: list[subprocess.Popen[bytes]] = []  # No SIGTERM sent yet.
    self._threads: list[threading.Thread] = []
    self._ended: queue.Queue[tuple[int, int]] = queue.Queue()
    self._output = threading.Lock()

  def start(self) -> None:
    count = self._args.processes
    port = _free_port() if count > 1 else 0
    for index in range(count):
      process = subprocess.Popen(
          place(self._args.command, index, count, port),
          env=os.environ | share(self._args.gpus, index, count),
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE if count > 1 else None,
          stderr=subprocess.STDOUT if count > 1 else None,
          # So that Ctrl-C in a terminal comes through us alone, and that what a
          # process leaves behind can be ended with it.
          process_group=0,
      )
      self._processes.append(process)
      self._untold.append(process)
      self._run(self._wait, index, process)
      if process.stdout is not None:
        self._run(self._copy, index, process.stdout)

  def terminate(self) -> None:
    """SIGTERM to all that run, once: a second one may mean something else."""
    # Taken out one by one: a signal may come and do the same in between.
    with contextlib.suppress(IndexError):
      while True:
        self._untold.pop().send_signal(signal.SIGTERM)

  def kill(self) -> None:
    for process in self._processes:
      _kill_group(process)

  def wait(self) -> int:
    """Waits until all have ended; see `outcome`."""
    codes: list[int] = []
    term_at = kill_at = float('inf')
    while len(codes) < len(self._processes):
      now = time.monotonic()
      if now >= kill_at:
        say(f'not ended {self._args.grace:g} s after SIGTERM: killed')
        self.kill()
        kill_at = float('inf')
      elif now >= term_at:
        self.terminate()
        term_at = float('inf')
      soonest = min(term_at, kill_at)
      timeout = None if soonest == float('inf') else max(0.0, soonest - now)
      try:
        index, code = self._ended.get(timeout=timeout)
      except queue.Empty:
        continue
      codes.append(code)
      if code and len(self._processes) > 1 and not any(codes[:-1]):
        say(f'process {index} ended first, with {code}; ending the others')
        # After a checkpoint the others are about to end by themselves, one of
        # them with the last of the checkpoint still to write.
        delay = self._args.grace if code == CHECKPOINTED else 0.0
        term_at = time.monotonic() + delay
        kill_at = term_at + self._args.grace
    for thread in self._threads:  # The last lines.
      thread.join()
    return outcome(codes)

  def _run(self, function, *args) -> None:
    self._threads.append(threading.Thread(target=function, args=args))
    self._threads[-1].start()

  def _wait(self, index: int, process: subprocess.Popen[bytes]) -> None:
    code = process.wait()
    _kill_group(process)  # Workers that it left behind hold its pipe open.
    self._ended.put((index, code))

  def _copy(self, index: int, lines: IO[bytes]) -> None:
    prefix = f'[{index}] '.encode()
    for line in lines:
      with self._output:
        _write(sys.stdout, prefix + line.rstrip(b'\n') + b'\n')


def _write(file: TextIO, line: bytes) -> None:
  """Writes `line` or loses it: a full disk must not stop those who train.

  Unbuffered, since a buffer would fail again at exit and change the code.
  """
  with contextlib.suppress(OSError):
    os.write(file.fileno(), line)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def run(args: argparse.Namespace) -> int:
  """Attempts until one ends otherwise than with `RESUME`."""
  signals = 0
  group = None

  def on_signal(number: int, frame: object) -> None:
    del frame
    nonlocal signals
    signals += 1
    if group is not None and signals == 1:
      say(f'{signal.Signals(number).name}: passed on as SIGTERM')
      group.terminate()
    elif group is not None:
      group.kill()

  signal.signal(signal.SIGTERM, on_signal)
  signal.signal(signal.SIGINT, on_signal)
  left = args.restarts
  while True:
    group = Group(args)
    group.start()
    if signals:  # It came while they were started.
      group.terminate()
    code = group.wait()
    if code not in RESUME or signals or not left:
      return code
    left -= 1
    say(f'ended with {code}: started again ({left} restarts left)')


def parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--restarts', type=int, default=0)
  parser.add_argument(
      '--grace', type=float, default=30.0, help='seconds from TERM to KILL'
  )
  parser.add_argument(
      '--gpus', default='', help='ids that the processes share, by commas'
  )
  parser.add_argument('--dry-run', action='store_true')
  parser.add_argument('command', nargs='+')
  args = parser.parse_args(argv)
  if args.processes < 1:
    parser.error(f'--processes={args.processes}: expected at least 1')
  if args.gpus and len(args.gpus.split(',')) % args.processes:
    parser.error(
        f'--gpus={args.gpus} cannot be shared by {args.processes} processes'
    )
  return args


def main(argv: Sequence[str]) -> int:
  args = parse(argv)
  if not args.dry_run:
    return run(args)
  for index in range(args.processes):
    words = place(args.command, index, args.processes, 'PORT')
    changes = share(args.gpus, index, args.processes)
    print(shlex.join([*(f'{k}={v}' for k, v in changes.items()), *words]))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
