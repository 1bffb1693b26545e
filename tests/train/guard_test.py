# SPDX-License-Identifier: Apache-2.0
"""Real processes that are told to stop, or that hang."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

# Says 'ready' when it is, then runs the body of a test.
_SCRIPT = """
import hashlib, os, signal, sys, threading, time
from moellava_jax.train import guard

def say_ready(main):
  while sys._current_frames()[main].f_code.co_name != 'native_call':
    pass
  print('ready')

def native_call():
  # Like a compilation: for minutes, no signal handler runs.
  main = threading.get_ident()
  threading.Thread(target=say_ready, args=(main,), daemon=True).start()
  hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)

def waits_for_a_peer():
  threading.Event().wait()

with guard.Guard() as watchman:
  watchman.workdir = sys.argv[1]
"""


@pytest.fixture
def start(tmp_path):
  """Starts a script that ends with `body`; ends what a failure leaves."""
  processes = []

  def begin(body: str) -> subprocess.Popen:
    processes.append(_start(tmp_path, body))
    assert processes[-1].stdout.readline() == 'ready\n'
    return processes[-1]

  yield begin
  for process in processes:
    process.kill()
    process.communicate()


def _start(tmp_path, body: str) -> subprocess.Popen:
  return subprocess.Popen(
      [
          *(sys.executable, '-u', '-c'),
          _SCRIPT + textwrap.indent(textwrap.dedent(body), '  '),
          str(tmp_path),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  )


def _end(process: subprocess.Popen) -> tuple[int, str]:
  _, stderr = process.communicate(timeout=60)
  return process.returncode, stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish(start, number):
  process = start(
      """
      watchman.watch('step 7', 5)
      print('ready')
      while not watchman.stopping:
        pass
      sys.exit(3)
      """,
  )
  process.send_signal(number)
  code, stderr = _end(process)
  assert code == 3
  assert 'Told to stop during step 7: a checkpoint comes first' in stderr


def test_what_is_disposable_ends_at_once_though_in_native_code(start):
  process = start(
      """
      watchman.watch('compiling', 5, disposable=True)
      native_call()
      """,
  )
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  code, stderr = _end(process)
  assert code == 75 and time.monotonic() - began < 10
  assert 'during compiling: nothing to save' in stderr


def test_a_request_is_kept_until_something_disposable_begins(start):
  process = start(
      """
      watchman.watch('step 7', 5)
      print('ready')
      while not watchman._piped[signal.SIGTERM]:
        pass  # It has come in every way.
      watchman.watch('compiling', 5, disposable=True)
      """,
  )
  process.send_signal(signal.SIGTERM)
  assert _end(process)[0] == 75


def test_only_a_second_interrupt_ends_at_once(start):
  process = start(
      """
      watchman.watch('step 7', 5)
      native_call()
      """,
  )
  assert process.stderr is not None
  process.send_signal(signal.SIGTERM)
  assert 'a checkpoint comes first' in process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(timeout=1)
  process.send_signal(signal.SIGINT)
  code, stderr = _end(process)
  assert code == 130 and 'Interrupted twice' in stderr


def test_a_signal_counts_though_orbax_takes_the_wakeup_descriptor(start):
  process = start(
      """
      signal.set_wakeup_fd(-1)  # As uvloop does when it ends.
      watchman.watch('compiling', 5, disposable=True)
      native_call()
      """,
  )
  process.send_signal(signal.SIGTERM)
  assert _end(process)[0] == 75


def test_a_hanging_step_ends_the_process_with_its_stacks(start, tmp_path):
  process = start(
      """
      watchman.process = 3
      watchman.watch('step 6', 5)
      watchman.watch('step 7', 0.01)
      print('ready')
      waits_for_a_peer()
      """,
  )
  code, stderr = _end(process)
  assert code == 76
  assert 'step 7 has not returned within 0.01 minutes' in stderr
  stacks = (tmp_path / 'stacks-3.txt').read_text()
  assert 'in waits_for_a_peer' in stacks and 'in waits_for_a_peer' in stderr


_FULL = """
      os.set_blocking(2, False)
      try:
        while os.write(2, b'.' * 4096):
          pass
      except BlockingIOError:
        os.set_blocking(2, True)
      guard._WRITING = guard._SAYING = 1.0
"""


def test_a_hanging_step_ends_the_process_though_nobody_reads_stderr(
    start, tmp_path
):
  process = start(_FULL + """
      watchman.watch('step 7', 0.01)
      print('ready')
      waits_for_a_peer()
  """)
  assert process.wait(timeout=30) == 76
  assert 'in waits_for_a_peer' in (tmp_path / 'stacks-0.txt').read_text()


def test_a_hanging_step_ends_the_process_though_stderr_is_broken(start):
  process = start("""
      watchman.watch('step 7', 0.05)
      print('ready')
      waits_for_a_peer()
  """)
  assert process.stderr is not None
  process.stderr.close()
  assert process.wait(timeout=30) == 76


def test_signals_count_though_nobody_reads_stderr(start):
  process = start(_FULL + """
      watchman.watch('step 7', 5)
      print('ready')
      while not watchman.stopping:
        pass
      watchman.watch('compiling', 5, disposable=True)
      native_call()
  """)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) == 75


def test_steps_that_return_are_left_alone(start):
  process = start(
      """
      print('ready')
      for step in range(30):
        watchman.watch(f'step {step}', 0.01)
        time.sleep(0.05)
      watchman.watch('reading', None)
      time.sleep(1)
      """,
  )
  assert _end(process) == (0, '')
