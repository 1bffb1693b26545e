# SPDX-License-Identifier: Apache-2.0
"""local.sh runs the processes of one machine as one."""

import os
import signal
import subprocess
import sys

import pytest

from launch import supervise
from tests.launch import shell

CONFIG = 'configs/shapes.py:smoke'
SHOW = "print('given', *sys.argv[1:], sep='|')"


def _marked(output: str, process: int) -> list[str]:
  mark = f'[{process}] '
  return [x[len(mark) :] for x in output.splitlines() if x.startswith(mark)]


def test_two_processes_learn_their_place(tmp_path):
  env = shell.environment(tmp_path, {0: SHOW, 1: SHOW})
  done = shell.run(
      'local.sh',
      CONFIG,
      '--processes=2',
      '--cpu-devices=4',
      '--',
      '--config.data.json=a b.json',
      env=env,
  )
  assert done.returncode == 0, done.stderr
  ports = set()
  for process in (0, 1):
    (line,) = _marked(done.stdout, process)
    given = line.split('|')[1:]
    assert given[:3] == [
        f'--config={CONFIG}',
        '--config.mesh.cpu_devices=4',
        '--config.data.json=a b.json',
    ]
    address, count, place = given[3:]
    assert address.startswith('--coordinator_address=127.0.0.1:')
    assert [count, place] == ['--num_processes=2', f'--process_id={process}']
    ports.add(int(address.split(':')[1]))
  assert len(ports) == 1


def test_one_process_is_run_as_it_is(tmp_path):
  env = shell.environment(tmp_path, {0: SHOW})
  done = shell.run('local.sh', CONFIG, '--', "--config.seed='1 2'", env=env)
  assert done.stdout == f"given|--config={CONFIG}|--config.seed='1 2'\n"


def test_cpu_runs_have_threads_enough_and_the_devices_asked_for(tmp_path):
  names = "'NPROC', 'GLIBC_TUNABLES', 'JAX_PLATFORMS', 'XLA_FLAGS'"
  plan = {0: f'print(*(os.environ.get(x) for x in ({names})), sep="|")'}
  env = shell.environment(tmp_path, plan) | {
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8 --xla_cpu_x=1'
  }
  done = shell.run('local.sh', CONFIG, '--cpu-devices=4', env=env)
  assert done.stdout == '32|glibc.malloc.hugetlb=1|cpu|--xla_cpu_x=1\n'


def test_a_config_is_found_from_another_folder(tmp_path):
  env = shell.environment(tmp_path, {0: SHOW})
  done = shell.run('local.sh', CONFIG, env=env, cwd=tmp_path)
  assert done.stdout == f'given|--config={shell.ROOT}/{CONFIG}\n'


def test_when_one_fails_the_other_is_told_and_the_code_is_its_own(tmp_path):
  os.mkfifo(tmp_path / 'ready')
  fifo = str(tmp_path / 'ready')
  plan = {
      0: f"end_on_term(75); open({fifo!r}, 'w').close(); signal.pause()",
      1: f'open({fifo!r}).read(); sys.exit(3)',
  }
  env = shell.environment(tmp_path, plan)
  done = shell.run('local.sh', CONFIG, '--processes=2', env=env)
  assert _marked(done.stdout, 0) == ['ready', 'got SIGTERM']
  assert done.returncode == 3
  assert 'process 1 ended first, with 3' in done.stderr


def test_one_that_does_not_end_is_killed(tmp_path):
  os.mkfifo(tmp_path / 'ready')
  fifo = str(tmp_path / 'ready')
  plan = {
      0: (
          'signal.signal(signal.SIGTERM, signal.SIG_IGN);'
          f" open({fifo!r}, 'w').close(); signal.pause()"
      ),
      1: f'open({fifo!r}).read(); sys.exit(76)',
  }
  env = shell.environment(tmp_path, plan)
  done = shell.run('local.sh', CONFIG, '--processes=2', '--grace=1', env=env)
  assert done.returncode == 76
  assert 'killed' in done.stderr


def test_what_a_process_leaves_behind_is_ended_with_it(tmp_path):
  left = f'subprocess.Popen([{sys.executable!r}, "-c", "import signal;'
  plan = dict.fromkeys((0, 1), left + ' signal.pause()"])')
  env = shell.environment(tmp_path, plan)
  done = shell.run('local.sh', CONFIG, '--processes=2', env=env, timeout=20)
  assert done.returncode == 0  # And its output has come to an end.


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_and_end_the_restarts(tmp_path, number):
  wait = 'end_on_term(75); signal.pause()'
  env = shell.environment(tmp_path, {0: wait, 1: wait})
  command = ['bash', str(shell.LAUNCH / 'local.sh'), CONFIG, '--processes=2']
  with subprocess.Popen(
      [*command, '--restarts=5'],
      env=env,
      cwd=shell.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  ) as process:
    assert process.stdout is not None
    seen = {process.stdout.readline(), process.stdout.readline()}
    assert seen == {'[0] ready\n', '[1] ready\n'}
    process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
  assert sorted(rest.splitlines()) == ['[0] got SIGTERM', '[1] got SIGTERM']
  assert process.returncode == 75


# Tells itself to end when the last process is there, but is not known yet.
_INTERRUPTED = """
import os, signal, subprocess, sys
from launch import supervise

class Popen(subprocess.Popen):
  def __init__(self, command, **kwargs):
    super().__init__(command, **kwargs)
    if command[-1] == '--process_id=1':
      os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = Popen
sys.exit(supervise.main(sys.argv[1:]))
"""


def test_a_signal_while_they_are_started_reaches_all():
  pause = [sys.executable, '-c', 'import signal; signal.pause()']
  done = subprocess.run(
      [sys.executable, '-c', _INTERRUPTED, '--processes=2', '--grace=5']
      + ['--', *pause],
      cwd=shell.ROOT,
      timeout=60,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 128 + signal.SIGTERM, done.stderr
  assert 'passed on as SIGTERM' in done.stderr
  assert 'killed' not in done.stderr


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='Linux has it')
def test_training_goes_on_where_its_output_cannot_be_written(tmp_path):
  # More than a pipe holds.
  plan: dict[int, str] = dict.fromkeys(
      (0, 1), "print('x\\n' * 100_000); sys.exit(75)"
  )
  with open('/dev/full', 'w') as full:
    done = subprocess.run(
        ['bash', str(shell.LAUNCH / 'local.sh'), CONFIG, '--processes=2'],
        env=shell.environment(tmp_path, plan),
        cwd=shell.ROOT,
        timeout=30,
        stdout=full,
        stderr=full,
        check=False,
    )
  assert done.returncode == 75


@pytest.mark.parametrize(
    ('codes', 'restarts', 'expected', 'runs'),
    [
        ((75, 76, 0), 5, 0, 3),
        ((75, 75, 75), 1, 75, 2),
        ((75, 1, 0), 5, 1, 2),
        ((1, 0), 5, 1, 1),
    ],
)
def test_restarts(tmp_path, codes, restarts, expected, runs):
  env = shell.environment(tmp_path, {0: f'sys.exit({codes}[attempt])'})
  done = shell.run('local.sh', CONFIG, f'--restarts={restarts}', env=env)
  assert done.returncode == expected, done.stderr
  assert len((tmp_path / 'attempts-0').read_text()) == runs


@pytest.mark.parametrize(
    ('codes', 'expected'),
    [
        ((0, 0), 0),
        ((0, 3, 1), 3),
        ((-9, 0), 137),
        ((1, 75), 1),  # The error was first: starting again would repeat it.
        ((76, -6, -9), 76),
        ((-6, 76), 76),  # The abort of a peer was noticed first.
        ((134, 75), 75),
        ((75, 0), 75),
    ],
)
def test_the_code_of_a_group(codes, expected):
  assert supervise.outcome(codes) == expected


def test_dry_run_prints_what_would_run(tmp_path):
  env = shell.environment(tmp_path)
  done = shell.run(
      'local.sh',
      CONFIG,
      '--processes=2',
      '--cpu-devices=4',
      '--dry-run',
      '--',
      '--config.data.json=a b.json',
      env=env,
  )
  assert done.returncode == 0, done.stderr
  printed = shell.commands(done.stdout, 'moellava_jax.train.main')
  assert [words[-1] for words in printed] == [
      '--process_id=0',
      '--process_id=1',
  ]
  for words in printed:
    assert words[:3] == [sys.executable, '-m', 'moellava_jax.train.main']
    assert '--config.data.json=a b.json' in words
  assert '$ export NPROC=32' in done.stdout


def test_several_processes_share_the_gpus(tmp_path):
  shell.nvidia_smi(tmp_path, count=4)
  env = shell.environment(tmp_path)
  done = shell.run(
      'local.sh', CONFIG, '--processes=2', '--dry-run', env=env, cwd=tmp_path
  )
  printed = shell.commands(done.stdout, 'moellava_jax.train.main')
  assert [words[0] for words in printed] == [
      'CUDA_VISIBLE_DEVICES=0,1',
      'CUDA_VISIBLE_DEVICES=2,3',
  ]
  assert 'NPROC' not in done.stdout
  assert '--xla_gpu_enable_latency_hiding_scheduler=true' in done.stdout
  odd = shell.run('local.sh', CONFIG, '--processes=3', '--dry-run', env=env)
  assert odd.returncode and 'cannot be shared by 3' in odd.stderr


def test_flags_of_the_caller_win(tmp_path):
  shell.nvidia_smi(tmp_path)
  mine = '--xla_gpu_enable_latency_hiding_scheduler=false'
  plan = {0: "print(os.environ['XLA_FLAGS'])"}
  env = shell.environment(tmp_path, plan) | {'XLA_FLAGS': mine}
  done = shell.run('local.sh', CONFIG, env=env)
  assert done.stdout.split()[-1] == mine
  assert len(done.stdout.split()) > 1
  none = shell.run('local.sh', CONFIG, '--xla-flags=none', env=env)
  assert none.stdout.split() == [mine]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((), 'which CONFIG?'),
        (('configs/nope.py',), "no config 'configs/nope.py'"),
        ((CONFIG, CONFIG), 'two configs'),
        ((CONFIG, '--procs=2'), "unknown option '--procs=2'"),
        ((CONFIG, '--processes=two'), '--processes=two is not a whole number'),
        ((CONFIG, '--processes=0'), 'expected at least 1'),
        ((CONFIG, '--xla-flags=h9', '--dry-run'), 'there are cpu, a100, h100'),
    ],
)
def test_bad_arguments(tmp_path, args, message):
  done = shell.run('local.sh', *args, env=shell.environment(tmp_path))
  assert done.returncode
  assert message in done.stderr


@pytest.mark.parametrize(
    ('extras', 'workdir', 'installed'),
    [
        ('wandb', 'gs://b/run', '[wandb,gcs]'),
        ('', 'gs://b/run', '[gcs]'),
        ('tpu', 'gs://b/run', '[tpu]'),  # Which has it.
        ('wandb', 'runs/gs', '[wandb]'),
    ],
)
def test_a_run_folder_in_a_store_needs_an_extra(
    tmp_path, extras, workdir, installed
):
  env = shell.environment(tmp_path) | {'EXTRAS': extras, 'JAX_PLATFORMS': 'cpu'}
  del env['VENV_PYTHON']
  done = shell.run(
      *('local.sh', '--dry-run', 'configs/shapes.py'),
      *('--', f'--config.workdir={workdir}'),
      env=env,
  )
  assert done.returncode == 0, done.stderr
  assert f'{installed} into' in done.stdout
