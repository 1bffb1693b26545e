# SPDX-License-Identifier: Apache-2.0
"""Ends a process in good order: when it is told to, and when it hangs.

The first SIGTERM or Ctrl-C is a request: training finishes its step, saves a
checkpoint and exits with `STOPPED`. Where nothing would be lost (data are being
read, a program is being compiled) the process ends at once, with that code too.
A second Ctrl-C ends it where it is; SIGTERM may come twice, as schedulers send
it.

A step that does not return within `config.watchdog` ends the process with
`HUNG`, after the stack of every thread has been written to stderr and to
RUN/stacks-PROCESS.txt: a peer that is gone, a disk that does not answer.

A thread does both: the interpreter runs a signal handler only when the main
thread comes back to it, which it does not while XLA compiles or a device waits
for another host. It leaves all writing to other threads, for which it does not
wait long: what hangs may be what reads stderr, or the disk. Nothing here
imports JAX, so that a signal during that import finds the guard in its place.
"""

import collections
from collections.abc import Callable
import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from typing import NamedTuple

# Both ask for the same command again, which goes on after the last checkpoint.
STOPPED = 75  # EX_TEMPFAIL of sysexits.h.
HUNG = 76

_POLL = 1.0  # Seconds until a new deadline is noticed, at most.
_WRITING = 30.0  # Seconds that a disk and stderr have for the stacks.
_SAYING = 3.0  # Seconds that stderr has for a line.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
  """The run has ended early because a signal asked for it."""


class _Phase(NamedTuple):
  what: str
  deadline: float  # Of `time.monotonic`.
  minutes: float | None
  disposable: bool


class Guard:
  """Watches over the process while it is entered; without that, does nothing.

  Attributes:
    workdir: where the stacks of a hanging process go.
    process: the number of this process among those of the run.
  """

  def __init__(self):
    self.workdir = ''
    self.process = 0
    # A signal comes through the pipe, to the Python handler or, mostly, both.
    self._piped = collections.Counter[int]()
    self._handled = collections.Counter[int]()
    self._closed = threading.Event()
    self._told = False
    self._read, self._write = -1, -1
    self._phase = _Phase('the start', float('inf'), None, True)

  def __enter__(self) -> 'Guard':
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._before = {s: signal.signal(s, self._handle) for s in _SIGNALS}
    self._fd_before = signal.set_wakeup_fd(self._write)
    self._thread = threading.Thread(target=self._run, name='guard', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._closed.set()
    signal.set_wakeup_fd(self._fd_before)
    self._wake()
    self._thread.join()
    for number, handler in self._before.items():
      signal.signal(number, handler)
    os.close(self._read)
    os.close(self._write)
    self._write = -1

  @property
  def stopping(self) -> bool:
    """Whether a signal has asked the run to end."""
    return any(self._count(number) for number in _SIGNALS)

  def watch(
      self, what: str, minutes: float | None, *, disposable: bool = False
  ) -> None:
    """Says what begins now.

    Args:
      what: for the message, such as 'step 12'.
      minutes: how long it may take until the next call; None: no limit.
      disposable: a signal may end the process here: nothing would be lost.
    """
    deadline = float('inf')
    if minutes is not None:
      deadline = time.monotonic() + 60 * minutes
    self._phase = _Phase(what, deadline, minutes, disposable)
    if self._write >= 0:
      # Orbax's event loop, uvloop, takes this descriptor away.
      signal.set_wakeup_fd(self._write)
      if disposable and self.stopping:
        self._react()

  def _count(self, number: int) -> int:
    return max(self._piped[number], self._handled[number])

  def _handle(self, number: int, frame: object) -> None:
    del frame
    self._handled[number] += 1
    self._wake()  # It may have interrupted what starting a thread waits for.

  def _wake(self) -> None:
    with contextlib.suppress(BlockingIOError):  # It is full of reasons to.
      os.write(self._write, b'\0')

  def _run(self) -> None:
    while not self._closed.is_set():
      left = self._phase.deadline - time.monotonic()
      ready, _, _ = select.select(
          [self._read], [], [], min(_POLL, max(left, 0.0))
      )
      if ready:
        self._piped.update(os.read(self._read, 64))
        self._react()
      elif time.monotonic() > self._phase.deadline:
        self._hang()

  def _react(self) -> None:
    """Does what the signals so far and the phase ask for."""
    phase = self._phase
    if not self.stopping:
      return
    if self._count(signal.SIGINT) > 1:
      _say('Interrupted twice: ending without a checkpoint.')
      os._exit(128 + signal.SIGINT)
    if phase.disposable:
      _say(
          f'Told to stop during {phase.what}: nothing to save. Run the same'
          ' command again to go on.'
      )
      os._exit(STOPPED)
    if not self._told:
      self._told = True
      _say(f'Told to stop during {phase.what}: a checkpoint comes first.')

  def _hang(self) -> None:
    """Writes the stacks of all threads, then ends the process."""
    try:
      phase = self._phase
      text = (
          f'error: {phase.what} has not returned within {phase.minutes:g}'
          ' minutes (config.watchdog). The stacks of all threads follow, also'
          f' in {self._stacks_path()}. Run the same command again to go on'
          ' after the last checkpoint, or raise the limit if this only was'
          ' slow.'
      )
      stacks = _stacks()
      _try_for(
          _WRITING,
          lambda: _to_stderr(f'{text}\n{stacks}'),
          lambda: self._write_stacks(stacks),
      )
    finally:
      os._exit(HUNG)

  def _stacks_path(self) -> str:
    return os.path.join(self.workdir, f'stacks-{self.process}.txt')

  def _write_stacks(self, stacks: str) -> None:
    from etils import epath  # Also writes to gs://.

    epath.Path(self._stacks_path()).write_text(stacks)


def _stacks() -> str:
  """Of all threads; `faulthandler` would hold the GIL while it writes them."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  lines = []
  for number, frame in sys._current_frames().items():
    lines.append(f'Thread {names.get(number, number)}, most recent call first:')
    lines += [
        f'  File "{f.f_code.co_filename}", line {line} in {f.f_code.co_name}'
        for f, line in traceback.walk_stack(frame)
    ]
  return '\n'.join(lines) + '\n'


def _say(text: str) -> None:
  _try_for(_SAYING, lambda: _to_stderr(f'{text}\n'))


def _to_stderr(text: str) -> None:
  if sys.__stderr__ is None:
    return
  # Its own buffer: a thread that hangs in that of `sys.stderr` would make the
  # interpreter abort at its end.
  with (
      contextlib.suppress(OSError),  # Nobody reads it any more.
      open(
          sys.__stderr__.fileno(), 'w', errors='backslashreplace', closefd=False
      ) as file,
  ):
    file.write(text)


def _try_for(seconds: float, *writers: Callable[[], None]) -> None:
  """Calls each in a thread, and waits no longer than that for all of them."""
  threads = [threading.Thread(target=w, daemon=True) for w in writers]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + seconds
  for thread in threads:
    thread.join(max(deadline - time.monotonic(), 0.0))
