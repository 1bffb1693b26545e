# SPDX-License-Identifier: Apache-2.0
"""torch in processes of its own, as threads and OpenMP are set at their start.

A process is sent a line of JSON for each call and answers with the seconds that
the call took, by its own clock; `torch_child` is what runs in it. Whoever waits
for the answer does nothing else, so that one program runs at a time.
"""

import contextlib
import dataclasses
from importlib import util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any, NamedTuple

from moellava_jax import config

# Of one call, compilation included.
LIMIT_S = 300.0


class Setting(NamedTuple):
  """How torch runs; what of it is None is left to torch."""

  threads: int | None
  wait: str | None  # OMP_WAIT_POLICY.
  compiled: bool
  huge_pages: bool | None = None  # Asked of glibc; None: as it is here.

  @property
  def name(self) -> str:
    parts = ['compile' if self.compiled else 'eager']
    if self.threads is not None:
      parts.append(f'{self.threads} thread{"s" if self.threads > 1 else ""}')
    if self.wait is not None:
      parts.append(self.wait)
    return ', '.join([*parts, *(['huge pages'] if self.huge_pages else [])])

  @property
  def variables(self) -> dict[str, str | None]:
    """What the environment is to say of it; None: nothing."""
    found: dict[str, str | None] = {
        'OMP_WAIT_POLICY': None if self.wait == 'default' else self.wait
    }
    if self.threads is not None:
      found |= dict.fromkeys(_THREADS, str(self.threads))
    if self.huge_pages is not None:
      tunables = os.environ.get('GLIBC_TUNABLES', '').split(':')
      kept = [x for x in tunables if x and not x.startswith(_HUGE_PAGES)]
      if self.huge_pages:
        kept.append(f'{_HUGE_PAGES}=1')
      found['GLIBC_TUNABLES'] = ':'.join(kept) or None
    return found


_THREADS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
_HUGE_PAGES = 'glibc.malloc.hugetlb'
# With huge pages only the fastest of them, see `peer_picks`.
CPU_SETTINGS = tuple(
    Setting(threads, wait, compiled, huge_pages=False)
    for compiled in (False, True)
    for threads in (2, 1)
    for wait in ('passive', 'default')
)
GPU_SETTINGS = (Setting(None, None, False), Setting(None, None, True))


class Work(NamedTuple):
  """What is run: one implementation of a layer, a training step or decoding."""

  kind: str  # layer | train | decode.
  implementation: str  # See `torch_models`.
  model: config.ModelConfig
  rows: int
  length: int  # Positions of a row, or of a prompt.
  new: int  # Tokens of an answer.
  device: str  # cpu | cuda.

  def to_json(self) -> dict[str, Any]:
    return {**self._asdict(), 'model': dataclasses.asdict(self.model)}

  @classmethod
  def from_json(cls, raw: dict[str, Any]) -> 'Work':
    model = config.build(config.ModelConfig, raw['model'], 'model')
    return cls(**{**raw, 'model': model})


class TorchError(config.UserError):
  """A program failed in a torch process; the message is its first line."""


class _Process:
  """One child; ended by `close`, or by itself when it crashes."""

  def __init__(self, setting: Setting):
    env = {**os.environ, **setting.variables}
    self.built: set[str] = set()
    self._log = tempfile.TemporaryFile('w+')
    self._child = subprocess.Popen(
        [sys.executable, '-m', 'moellava_jax.bench.torch_child'],
        env={name: value for name, value in env.items() if value is not None},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._log,
        text=True,
        # With what it starts to compile, which ends with it.
        start_new_session=True,
    )

  def ask(self, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request.

    Raises:
      TorchError: the request failed; or there was no answer, and the process
        is gone.
    """
    assert self._child.stdin is not None and self._child.stdout is not None
    timer = threading.Timer(LIMIT_S, self._kill)
    timer.start()
    try:
      self._child.stdin.write(json.dumps(request) + '\n')
      self._child.stdin.flush()
      line = self._child.stdout.readline()
    except BrokenPipeError:
      line = ''
    late = not timer.is_alive()
    timer.cancel()
    if not line:
      why = f'no answer within {LIMIT_S:.0f} s' if late else self._last_words()
      self.close()
      raise TorchError(why)
    answer = json.loads(line)
    if 'error' in answer:
      raise TorchError(answer['error'])
    return answer

  def _last_words(self) -> str:
    code = self._child.wait()
    self._log.seek(0)
    lines = self._log.read().strip().splitlines()
    return f'the process ended with {code}: {lines[-1] if lines else ""}'

  @property
  def alive(self) -> bool:
    return self._child.poll() is None

  def _kill(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._child.pid, signal.SIGKILL)

  def close(self) -> None:
    self._kill()
    self._child.wait()
    for stream in (self._child.stdin, self._child.stdout, self._log):
      if stream is not None:
        stream.close()


class Torch:
  """All torch processes of a suite; use it as a context.

  Attributes:
    about: versions of torch and transformers, and the device.
  """

  def __init__(self, device: str):
    """Args: `device` is cpu or cuda.

    Raises:
      UserError: torch or transformers is missing, or torch without CUDA.
    """
    check_installed()
    self._device = device
    self._processes: dict[str, _Process] = {}
    self.about: dict[str, str] = {}

  def __enter__(self) -> 'Torch':
    first = (CPU_SETTINGS if self._device == 'cpu' else GPU_SETTINGS)[0]
    try:
      self.about = self._process(first, '').ask({'do': 'about'})
    except TorchError as error:
      self.__exit__()
      raise config.UserError(f'torch does not start: {error}') from error
    if self._device == 'cuda' and self.about['cuda'] == 'none':
      self.__exit__()
      raise config.UserError(
          f'torch {self.about["torch"]} finds no CUDA device. Install a build'
          ' of torch for CUDA beside JAX, or measure with --suite=peers.'
      )
    return self

  def __exit__(self, *_) -> None:
    for process in self._processes.values():
      process.close()
    self._processes.clear()

  def _process(self, setting: Setting, name: str) -> _Process:
    """Programs that are not compiled share one.

    One that is has its own: after a few variants of a function torch compiles
    no more of them in a process, and runs them uncompiled without a word.
    """
    key = name if setting.compiled else json.dumps(setting)
    found = self._processes.get(key)
    if found is None or not found.alive:
      if found is not None:
        found.close()
      found = self._processes[key] = _Process(setting)
    return found

  def seconds(self, setting: Setting, work: Work, part: str) -> float:
    """Runs a part of a program once, after building it if need be.

    Raises:
      TorchError: it does not run.
    """
    name = _name(setting, work)
    process = self._process(setting, name)
    if name not in process.built:
      process.ask(
          {
              'do': 'build',
              'name': name,
              'work': work.to_json(),
              'threads': setting.threads,
              'compiled': setting.compiled,
          }
      )
      process.built.add(name)
    return process.ask({'do': 'run', 'name': name, 'part': part})['seconds']

  def drop(self, setting: Setting, work: Work) -> None:
    """Frees what a program holds."""
    name = _name(setting, work)
    if setting.compiled:
      if (process := self._processes.pop(name, None)) is not None:
        process.close()
      return
    process = self._process(setting, name)
    if name in process.built:
      process.built.remove(name)
      process.ask({'do': 'drop', 'name': name})


def _name(setting: Setting, work: Work) -> str:
  return json.dumps([setting, work.to_json()])


def check_installed() -> None:
  """Raises UserError where torch or transformers is missing."""
  missing = [
      name for name in ('torch', 'transformers') if not util.find_spec(name)
  ]
  if missing:
    raise config.UserError(
        f'The peers run in {" and ".join(missing)}, not installed here: pip'
        ' install -e .[parity]'
    )
