# SPDX-License-Identifier: Apache-2.0
"""slurm.sbatch starts the tasks, passes SIGTERM on, and requeues."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.launch import shell

SCRIPT = shell.LAUNCH / 'slurm.sbatch'
CONFIG = 'configs/shapes.py:smoke'

# Starts two tasks as SLURM does. A SIGTERM to srun kills them; the highest code
# is returned.
_SRUN = """
import os, signal, subprocess, sys

command = sys.argv[1:]
while command[0].startswith('--'):
  command.pop(0)
tasks = []
def terminate(number, frame):
  for task in tasks:
    os.killpg(task.pid, signal.SIGKILL)
signal.signal(signal.SIGTERM, terminate)
enter = 'echo $$ >>"${ATTEMPTS}tasks"; exec "$@"'
for rank in (0, 1):
  env = os.environ | {'SLURM_PROCID': str(rank)}
  words = [*command, f'--process_id={rank}']  # For the stand-in only.
  words = ['bash', '-c', enter, 'task', *words]
  tasks.append(subprocess.Popen(words, env=env, start_new_session=True))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""


# Without --batch or --full the signal goes to the tasks, not to the script.
_SCANCEL = """#!/usr/bin/env bash
[[ $* == '--signal=TERM 77' ]] || exit 1
while read -r task; do
  kill -TERM -- "-$task"
done <"${ATTEMPTS}tasks"
"""


def _cluster(folder: pathlib.Path, plan: dict[int, str]) -> dict[str, str]:
  (folder / 'srun.py').write_text(_SRUN)
  shell.executable(
      folder / 'srun',
      f'#!/usr/bin/env bash\nexec {sys.executable} {folder}/srun.py "$@"\n',
  )
  shell.executable(
      folder / 'scontrol',
      f'#!/usr/bin/env bash\nprintf "%s\\n" "$*" >>{folder}/scontrol.log\n',
  )
  shell.executable(folder / 'scancel', _SCANCEL)
  return shell.environment(folder, plan) | {
      'SLURM_JOB_ID': '77',
      'SLURM_SUBMIT_DIR': str(folder),
      'MOELLAVA_ROOT': str(shell.ROOT),
  }


def _requeued(folder: pathlib.Path) -> bool:
  log = folder / 'scontrol.log'
  if not log.exists():
    return False
  assert log.read_text() == 'requeue 77\n'
  return True


@pytest.mark.parametrize(
    ('codes', 'expected', 'requeued'),
    [
        ((0, 0), 0, False),
        ((75, 75), 75, True),
        ((76, 76), 76, True),
        ((3, 0), 3, False),
        ((134, 76), 76, True),  # srun alone says 134.
        ((134, 0), 134, False),
    ],
)
def test_the_job_is_requeued_when_training_asks_for_it(
    tmp_path, codes, expected, requeued
):
  plan = {i: f'sys.exit({code})' for i, code in enumerate(codes)}
  done = shell.run(SCRIPT, CONFIG, env=_cluster(tmp_path, plan))
  assert done.returncode == expected, done.stderr
  assert _requeued(tmp_path) == requeued
  assert not list(tmp_path.glob('.resume-*'))


def test_requeues_come_to_an_end(tmp_path):
  env = _cluster(tmp_path, dict.fromkeys((0, 1), 'sys.exit(76)'))
  env['SLURM_RESTART_COUNT'] = '3'
  done = shell.run(SCRIPT, CONFIG, '--max-requeues=3', env=env)
  assert done.returncode == 1 and 'requeued 3 times' in done.stderr
  assert not _requeued(tmp_path)


@pytest.mark.parametrize('to', ['the tasks', 'the script'])
def test_at_sigterm_training_saves_and_the_job_is_requeued(tmp_path, to):
  env = _cluster(
      tmp_path, dict.fromkeys((0, 1), 'end_on_term(75); signal.pause()')
  )
  with subprocess.Popen(
      ['bash', str(SCRIPT), CONFIG],
      env=env,
      cwd=shell.ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
  ) as process:
    assert process.stdout is not None
    ready = 0
    for line in process.stdout:
      ready += line == 'ready\n'
      if ready == 2:
        break
    if to == 'the tasks':  # By SLURM, or by the user.
      scancel = [str(tmp_path / 'scancel'), '--signal=TERM', '77']
      subprocess.run(scancel, env=env, check=True)
    else:
      process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=30)
  assert rest.count('got SIGTERM') == 2, rest + errors
  assert process.returncode == 75
  assert _requeued(tmp_path)


def test_it_finds_the_repository_from_the_spool(tmp_path):
  spool = tmp_path / 'spool' / 'slurm_script'
  shell.executable(spool, SCRIPT.read_text())
  env = _cluster(tmp_path, dict.fromkeys((0, 1), 'pass'))
  del env['MOELLAVA_ROOT']
  lost = shell.run(spool, CONFIG, env=env)
  assert lost.returncode and 'submit from the repository' in lost.stderr
  env['SLURM_SUBMIT_DIR'] = str(shell.ROOT)
  found = shell.run(spool, CONFIG, env=env, cwd=tmp_path)
  assert found.returncode == 0, found.stderr


def test_options_for_sbatch():
  lines = re.findall(r'^#SBATCH (\S+)$', SCRIPT.read_text(), re.MULTILINE)
  options = dict(
      x.lstrip('-').split('=') if '=' in x else (x[2:], '') for x in lines
  )
  assert options['signal'] == 'TERM@120'  # With B: to the script alone.
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert 'requeue' in options and options['open-mode'] == 'append'


def test_dry_run_outside_of_slurm(tmp_path):
  shell.nvidia_smi(tmp_path, count=8)
  env = shell.environment(tmp_path) | {'SLURM_CPUS_PER_TASK': '12'}
  done = shell.run(
      SCRIPT, '--dry-run', CONFIG, '--', '--config.data.json=a b.json', env=env
  )
  assert done.returncode == 0, done.stderr
  (words,) = shell.commands(done.stdout, 'srun')
  assert {'--wait=120', '--gpu-bind=none', '--cpus-per-task=12'} <= set(words)
  assert words[-4:] == [
      '-m',
      'moellava_jax.train.main',
      f'--config={CONFIG}',
      '--config.data.json=a b.json',
  ]
  assert '--xla_gpu_enable_latency_hiding_scheduler=true' in done.stdout
  assert shell.commands(done.stdout, 'scontrol') == [
      ['scontrol', 'requeue', 'JOB']
  ]
  refused = shell.run(SCRIPT, CONFIG, env=env)
  assert refused.returncode and 'not in a SLURM job' in refused.stderr


def test_dry_run_of_a_task(tmp_path):
  done = shell.run(
      'slurm_task.sh',
      '--dry-run',
      'note',
      'a',
      'b c',
      env=os.environ,
      cwd=tmp_path,
  )
  assert done.stdout.split('\n')[0] == 'a b\\ c '
  assert not list(tmp_path.iterdir())
