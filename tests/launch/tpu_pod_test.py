# SPDX-License-Identifier: Apache-2.0
"""tpu_pod.sh on a slice whose hosts are folders of this machine."""

import os
import pathlib
import select
import shlex
import signal
import subprocess
import sys

import pytest

from tests.launch import shell

SLICE = ('--project=p', '--zone=z', '--name=n', '--poll=0')
CONFIG = 'configs/shapes.py:smoke'
HOSTS = 2

# Two hosts. A slice that was taken away (PREEMPT names after how many looks) is
# gone until it is created again.
_GCLOUD = """
import json, os, pathlib, shutil, signal, subprocess, sys

root = pathlib.Path(os.environ['CLOUD'])
words = sys.argv[1:]
with open(root / 'calls', 'a') as calls:
  calls.write(json.dumps(words) + '\\n')
flags = dict(w.split('=', 1) for w in words if w.startswith('--') and '=' in w)
hosts = [root / f'host-{i}' for i in range(2)]
there = root / 'there'
if 'create' in words:
  if there.exists():
    sys.exit('ALREADY_EXISTS')
  there.write_text('0')
  for host in hosts:
    if (host / '.moellava' / 'pid').exists():  # Hosts end with their processes.
      os.kill(int((host / '.moellava' / 'pid').read_text()), signal.SIGTERM)
    shutil.rmtree(host, ignore_errors=True)
    host.mkdir()
elif 'delete' in words:
  there.unlink(missing_ok=True)
elif 'describe' in words:
  if 'queued-resources' in words:
    print('ACTIVE')
  elif 'Endpoints' in flags['--format']:
    print('10.0.0.1;10.0.0.2')
  else:
    print('READY' if there.exists() else 'PREEMPTED')
elif 'scp' in words:
  source, target = words[4:6]
  if source.startswith('n:'):
    shutil.copy(hosts[int(flags['--worker'])] / source[2:], target)
  else:
    for host in hosts:
      shutil.copy(source, host)
elif 'ssh' in words:
  command = flags['--command']
  if 'status' in command and 'PREEMPT' in os.environ and there.exists():
    looks = int(there.read_text()) + 1
    there.write_text(str(looks))
    once = root / 'preempted'
    if looks > int(os.environ['PREEMPT']) and not once.exists():
      once.touch()
      there.unlink()
  if not there.exists():
    sys.exit('ssh: no such host')
  for index, host in enumerate(hosts):
    env = os.environ | {
        'HOME': str(host), 'HOST': str(index), 'ATTEMPTS': f'{root}/{index}-'
    }
    subprocess.run(['bash', '-c', command], cwd=host, env=env, check=True)
"""


def _cloud(folder: pathlib.Path, plan: str) -> dict[str, str]:
  env = shell.environment(folder, {0: plan}) | {'CLOUD': str(folder)}
  (folder / 'gcloud.py').write_text(_GCLOUD)
  for name, body in {
      'gcloud': f'exec {shlex.quote(sys.executable)} {folder}/gcloud.py "$@"',
      'hostname': 'echo "host-$HOST"',
      'uv': f'echo "$@" >>{folder}/uv.log',
  }.items():
    shell.executable(folder / name, f'#!/usr/bin/env bash\n{body}\n')
  for name in ('gzip',):  # tar calls it.
    link = folder / 'tools' / name
    if not link.exists():
      link.symlink_to(f'/bin/{name}')
  return env


def _attempts(folder: pathlib.Path) -> list[int]:
  return [len((folder / f'{i}-0').read_text()) for i in range(HOSTS)]


# A host that fails ends the others: not before they have begun.
_TOGETHER = """
import time
print('hello', flush=True)
here = os.environ['ATTEMPTS']
with open(here + 'begun', 'a') as begun:
  begun.write('.')
for host in '01':
  other = here[:-2] + host + '-begun'
  while not (os.path.exists(other) and os.path.getsize(other) > attempt):
    time.sleep(0.01)
"""


def _by_host(*codes: list[int]) -> str:
  return f"sys.exit({list(codes)}[int(os.environ['HOST'])][attempt])"


@pytest.mark.parametrize(
    ('codes', 'expected', 'attempts'),
    [
        (([0], [0]), 0, 1),
        (([75, 76, 0], [75, 134, 0]), 0, 3),
        (([1], [134]), 1, 1),
        (([75, 75, 76], [75, 75, 134]), 76, 3),  # The restarts are used up.
    ],
)
def test_all(tmp_path, codes, expected, attempts):
  env = _cloud(tmp_path, _TOGETHER + _by_host(*codes))
  done = shell.run(
      'tpu_pod.sh',
      'all',
      *SLICE,
      '--type=v6e-8',
      '--restarts=2',
      f'--logs={tmp_path}/logs',
      '--setup=pwd >data; echo "its data" >>data',
      CONFIG,
      '--',
      '--config.workdir=gs://b/run',
      env=env,
  )
  assert done.returncode == expected, done.stdout + done.stderr
  for host in range(HOSTS):
    tree = tmp_path / f'host-{host}' / 'moellava_jax'
    assert (tree / 'data').read_text() == f'{tree}\nits data\n'
  assert _attempts(tmp_path) == [attempts] * HOSTS
  for host in range(HOSTS):
    log = (tmp_path / 'logs' / f'worker_{host}.log').read_text()
    assert log.count('hello') == attempts
  assert not (tmp_path / 'there').exists()  # Given back.
  assert 'python install 3.11' in (tmp_path / 'uv.log').read_text()


@pytest.mark.parametrize('keep', [False, True])
def test_a_slice_on_which_all_fails_is_given_back(tmp_path, keep):
  env = _cloud(tmp_path, 'pass')
  args = ('all', *SLICE, '--type=v6e-8', '--setup=exit 3', CONFIG)
  done = shell.run('tpu_pod.sh', *args, *['--keep'] * keep, env=env)
  assert done.returncode == 1, done.stdout + done.stderr
  assert (tmp_path / 'there').exists() == keep
  if keep:  # That of another call is not ours to give back.
    again = shell.run('tpu_pod.sh', *args, env=env)
    assert again.returncode == 1 and 'not deleted' in again.stderr
    assert (tmp_path / 'there').exists()


@pytest.mark.parametrize('keep', [False, True])
def test_interrupted_it_saves_and_gives_the_slice_back(tmp_path, keep):
  fifo = tmp_path / 'listening'
  os.mkfifo(fifo)
  end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
  listening = f"open({str(fifo)!r}, 'w').write('.'); signal.pause()"
  env = _cloud(tmp_path, f'end_on_term(75); {listening}')
  with subprocess.Popen(
      ['bash', str(shell.LAUNCH / 'tpu_pod.sh'), 'all', *SLICE, '--poll=1']
      + ['--type=v6e-8', f'--logs={tmp_path}/logs', CONFIG]
      + ['--keep'] * keep,
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      start_new_session=True,
      text=True,
  ) as process:
    heard = b''
    while len(heard) < HOSTS:
      assert select.select([end], [], [], 60)[0], 'training does not start'
      heard += os.read(end, HOSTS)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
  os.close(end)
  assert process.returncode == 143, errors
  for host in range(HOSTS):
    log = (tmp_path / 'logs' / f'worker_{host}.log').read_text()
    assert ('got SIGTERM' in log) != keep
  assert (tmp_path / 'there').exists() == keep
  if keep:
    shell.run('tpu_pod.sh', 'stop', *SLICE, env=env)


def test_a_slice_that_was_taken_away_is_asked_for_again(tmp_path):
  plan = 'attempt or (end_on_term(75), signal.pause())'
  env = _cloud(tmp_path, plan) | {'PREEMPT': '2'}
  done = shell.run(
      'tpu_pod.sh', 'all', *SLICE, '--type=v6e-8', CONFIG, '--spot', '--keep',
      f'--logs={tmp_path}/logs', env=env,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  assert _attempts(tmp_path) == [2] * HOSTS
  assert done.stdout.count('queued-resources create') == 2


def test_stop_saves_a_checkpoint(tmp_path):
  env = _cloud(tmp_path, 'end_on_term(75); signal.pause()')

  def call(*args: str) -> str:
    done = shell.run('tpu_pod.sh', *args, *SLICE, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  call('create', '--type=v5litepod-8', '--request=vm')
  call('install')
  assert call('status').count(' none\n') == HOSTS
  assert call('start', CONFIG).count(' running\n') == HOSTS
  again = shell.run('tpu_pod.sh', 'start', *SLICE, CONFIG, env=env)
  assert again.returncode and 'runs already' in again.stderr
  for host in range(HOSTS):  # It listens for the signal from here on.
    log = tmp_path / f'host-{host}' / '.moellava' / 'log'
    with open(log) as lines:
      while 'ready' not in lines.read():
        lines.seek(0)
  assert call('stop').count(' exit 75\n') == HOSTS
  call('delete', '--request=vm')


def test_dry_run_prints_what_would_run(tmp_path):
  env = shell.environment(tmp_path)
  done = shell.run(
      'tpu_pod.sh',
      'all',
      *SLICE,
      '--type=v5litepod-16',
      '--spot',
      '--create-flag=--network=my net',
      '--dry-run',
      CONFIG,
      '--',
      '--config.workdir=gs://b/run',
      '--config.data.json=a b.json',
      env=env,
  )
  assert done.returncode == 0, done.stderr
  calls = shell.commands(done.stdout, 'gcloud')
  kinds = [' '.join(words[3:5]) for words in calls]
  assert kinds == [
      'queued-resources create',
      'queued-resources describe',
      'tpu-vm scp',
      'tpu-vm ssh',
      'tpu-vm ssh',
      'tpu-vm ssh',
      'tpu-vm ssh',
      'tpu-vm scp',
      'queued-resources delete',
  ]
  assert {'--project=p', '--zone=z'} <= set.intersection(*map(set, calls))
  create = calls[0]
  assert '--runtime-version=v2-alpha-tpuv5-lite' in create
  assert create[-2:] == ['--spot', '--network=my net']
  remote = calls[5][-1].removeprefix('--command=')
  assert shlex.split(remote) == [
      'bash',
      'moellava_jax/launch/tpu_worker.sh',
      'start',
      CONFIG,
      '--xla-flags=v5e',
      '--',
      '--config.workdir=gs://b/run',
      '--config.data.json=a b.json',
  ]
  assert not (tmp_path / 'there').exists()


def test_dry_run_of_a_worker(tmp_path):
  env = shell.environment(tmp_path)
  del env['VENV_PYTHON']
  done = shell.run(
      'tpu_worker.sh', '--dry-run', 'install', '--python=3.12', env=env
  )
  assert done.returncode == 0, done.stderr
  assert ['python3', '-m', 'pip', 'install', '--quiet', '--user', 'uv'] in (
      shell.commands(done.stdout, 'python3')
  )
  assert [w[1:] for w in shell.commands(done.stdout, 'uv')][-1] == [
      'python',
      'install',
      '3.12',
  ]
  assert '[tpu]' in done.stdout


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('up', *SLICE), "unknown command 'up'"),
        (('create', '--zone=z', '--name=n'), 'needs --project'),
        (('create', *SLICE), 'needs --type'),
        (('create', *SLICE, '--type=v9-8'), 'give its --runtime'),
        (('start', *SLICE), 'needs a CONFIG'),
        (('start', *SLICE, 'configs/nope.py'), 'no configs/nope.py'),
        (('logs', *SLICE, '--logz=x'), "unknown option '--logz=x'"),
    ],
)
def test_bad_arguments(tmp_path, args, message):
  env = shell.environment(tmp_path)
  done = shell.run('tpu_pod.sh', *args, '--dry-run', env=env)
  assert done.returncode and message in done.stderr
