# SPDX-License-Identifier: Apache-2.0
"""The managed job of SkyPilot starts the training that is there."""

import pytest
import yaml

from tests.launch import shell

TASK = yaml.safe_load((shell.LAUNCH / 'skypilot.yaml').read_text())
CONFIG = 'configs/phi2.py'
FLAGS = ('--config.workdir=gs://b/run', '--config.data.json=a "b" $c.json')
_SHOW = "print('given', *sys.argv[1:], sep='|')"


def test_recovery():
  recovery = TASK['resources']['job_recovery']
  assert recovery['recover_on_exit_codes'] == [75, 76]
  assert recovery['max_restarts_on_errors'] == 0
  assert TASK['resources']['use_spot'] is True
  assert TASK['workdir'] == '.'


@pytest.mark.parametrize('nodes', [1, 2])
def test_what_a_node_runs(tmp_path, nodes):
  """`run`, with the environment that SkyPilot makes from our command."""
  env = shell.environment(tmp_path, {0: _SHOW, 1: _SHOW})
  done = shell.run(
      'skypilot.sh',
      CONFIG,
      f'--nodes={nodes}',
      '--dry-run',
      '--',
      *FLAGS,
      env=env,
  )
  (words,) = shell.commands(done.stdout, 'sky')
  given = [words[i + 1] for i, w in enumerate(words) if w == '--env']
  job = TASK['envs'] | dict(x.split('=', 1) for x in given)
  shell.executable(
      tmp_path / 'uv', '#!/usr/bin/env bash\necho no-such-python\n'
  )
  run = shell.executable(tmp_path / 'run', TASK['run'])
  job |= {
      'SKYPILOT_NUM_NODES': str(nodes),
      'SKYPILOT_NODE_RANK': str(nodes - 1),
      'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2',
  }
  ran = shell.run(run, env=env | job)
  place = [
      '--coordinator_address=10.0.0.1:8476',
      '--num_processes=2',
      '--process_id=1',
  ]
  assert ran.stdout.strip().split('|') == [
      'given',
      f'--config={CONFIG}',
      *FLAGS,
      *(place if nodes > 1 else []),
  ], ran.stderr


def test_setup_installs_python(tmp_path):
  env = shell.environment(tmp_path) | TASK['envs']
  log = tmp_path / 'log'
  shell.executable(tmp_path / 'uv', f'#!/usr/bin/env bash\necho "$@" >>{log}\n')
  setup = shell.executable(tmp_path / 'setup', TASK['setup'])
  data = tmp_path / 'data'
  env['SETUP'] = f'echo "its data" >{data}'
  assert shell.run(setup, env=env).returncode == 0
  assert data.read_text() == 'its data\n'
  assert log.read_text() == f'python install {TASK["envs"]["PYTHON_MINOR"]}\n'
  assert (
      shell.ROOT / f'requirements-{TASK["envs"]["PYTHON_MINOR"]}.lock'
  ).exists()


def test_dry_run_prints_what_would_run(tmp_path):
  env = shell.environment(tmp_path)
  args = ('--on-demand', '--infra=gcp/us-central1', '--gpus=A100-80GB:4')
  args += ('--setup=mount "a b"',)
  done = shell.run(
      'skypilot.sh',
      CONFIG,
      *args,
      '--dry-run',
      '--',
      *FLAGS,
      env=env,
      cwd=tmp_path,
  )
  (words,) = shell.commands(done.stdout, 'sky')
  assert words[:4] == ['sky', 'jobs', 'launch', 'launch/skypilot.yaml']
  assert '--no-use-spot' in words and '--use-spot' not in words
  assert words[words.index('--infra') + 1] == 'gcp/us-central1'
  assert words[words.index('--gpus') + 1] == 'A100-80GB:4'
  assert 'SETUP=mount "a b"' in words


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((), 'which CONFIG?'),
        ((CONFIG,), 'needs -- --config.workdir='),
        ((CONFIG, '--', '--config.workdir=s3://b/run'), 'may be in gs:// only'),
        ((CONFIG, '--nodes=x'), '--nodes=x is not a whole number'),
        (('configs/nope.py',), 'no configs/nope.py'),
    ],
)
def test_bad_arguments(tmp_path, args, message):
  env = shell.environment(tmp_path)
  done = shell.run('skypilot.sh', '--dry-run', *args, env=env)
  assert done.returncode and message in done.stderr
