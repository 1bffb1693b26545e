# SPDX-License-Identifier: Apache-2.0
"""Runs commands that depend on each other, several at a time.

A job that fails takes those that need it along; the others go on. A job runs
under a lock that its command inherits: of two processes that want the same job
the second waits, also if the first was killed and its command lives on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import threading

_STOPPED = 75  # What train.main ends with after a signal.
_TAIL = 12  # Lines of a log that an error shows.
# Huge pages: training on the CPU is faster; see launch/common.sh.
_CHEAPER = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}


@dataclasses.dataclass(frozen=True)
class Job:
  """A command.

  Attributes:
    name: unique.
    command: to run.
    log: gets its output; longer with every try.
    needs: names of jobs that come first.
    is_done: whether there is nothing left to do.
    finish: called after the command has ended well; may raise.
  """

  name: str
  command: Sequence[str]
  log: pathlib.Path
  needs: tuple[str, ...]
  is_done: Callable[[], bool]
  finish: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Failure:
  job: str
  reason: str
  log: pathlib.Path
  stopped: bool = False  # By a signal, and not by a mistake.


class Runner:
  """Runs jobs on `slots`; each is an environment on top of this process's."""

  def __init__(
      self,
      slots: Sequence[Mapping[str, str]],
      say: Callable[[str, str], None],
  ):
    """Args: `say` is told (name of the job, running|done|failed|...)."""
    self._free = list(slots)
    self._count = len(self._free)
    self._say = say
    self._lock = threading.Lock()
    self._children: set[subprocess.Popen] = set()
    self._stopping = threading.Event()

  def stop(self) -> None:
    """Asks all commands to end, and starts no more; returns at once."""
    self._stopping.set()
    with self._lock:
      for child in self._children:
        child.terminate()

  def run(self, jobs: Sequence[Job]) -> dict[str, Failure]:
    """Runs all jobs in the given order as far as their needs allow.

    Returns:
      By the job's name why it is not done. A job whose need has failed has the
      failure of that one.
    """
    failed: dict[str, Failure] = {}
    done: set[str] = set()
    waiting = list(jobs)
    running: dict[futures.Future, Job] = {}
    with futures.ThreadPoolExecutor(self._count) as pool:
      while waiting or running:
        for job in [j for j in waiting if set(j.needs) & failed.keys()]:
          first = next(n for n in job.needs if n in failed)
          failed[job.name] = failed[first]
          waiting.remove(job)
          self._say(job.name, 'failed')
        ready = [j for j in waiting if done.issuperset(j.needs)]
        for job in ready:
          if len(running) == self._count:
            break
          waiting.remove(job)
          running[pool.submit(self._one, job)] = job
        if not running:
          continue
        over, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
        for future in over:
          job = running.pop(future)
          failure = future.result()
          if failure is None:
            done.add(job.name)
          else:
            failed[job.name] = failure
          self._say(job.name, 'done' if failure is None else 'failed')
    return failed

  def _one(self, job: Job) -> Failure | None:
    """Runs a job unless it is done; None if it is done now."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with self._slot() as environment, _locked(job.log) as lock:
      if job.is_done():
        return None
      if self._stopping.is_set():
        return Failure(job.name, 'stopped before it began', job.log, True)
      self._say(job.name, 'running')
      code = self._call(job, environment, lock)
      if code != 0:
        return self._failure(job, code)
      try:
        job.finish()
      except Exception as error:
        return Failure(job.name, f'{type(error).__name__}: {error}', job.log)
    if not job.is_done():
      return Failure(job.name, 'ended well, but left nothing', job.log)
    return None

  def _call(self, job: Job, environment: Mapping[str, str], lock: int) -> int:
    with job.log.open('ab') as log:
      log.write(f'$ {" ".join(job.command)}\n'.encode())
      log.flush()
      with self._lock:
        # In a session of its own: Ctrl-C reaches it through `stop` alone.
        child = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_CHEAPER, **os.environ, **environment},
            pass_fds=(lock,),
            start_new_session=True,
        )
        self._children.add(child)
      if self._stopping.is_set():  # `stop` came before it was among them.
        child.terminate()
      code = child.wait()
      with self._lock:
        self._children.discard(child)
    return code

  def _failure(self, job: Job, code: int) -> Failure:
    lines = job.log.read_text(errors='replace').rstrip().splitlines()
    stopped = self._stopping.is_set() or code in (_STOPPED, -signal.SIGTERM)
    reason = '\n'.join([f'exit code {code}', *lines[-_TAIL:]])
    return Failure(job.name, reason, job.log, stopped)

  @contextlib.contextmanager
  def _slot(self) -> Iterator[Mapping[str, str]]:
    with self._lock:
      slot = self._free.pop()
    try:
      yield slot
    finally:
      with self._lock:
        self._free.append(slot)


@contextlib.contextmanager
def _locked(log: pathlib.Path) -> Iterator[int]:
  """Holds the job's lock file; yields its descriptor.

  Some network file systems cannot lock; there the caller has to see to it that
  a job is run once at a time.
  """
  path = log.with_suffix('.lock')
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield descriptor
  finally:
    os.close(descriptor)
