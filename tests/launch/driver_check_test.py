# SPDX-License-Identifier: Apache-2.0
"""The extra that is named is the CUDA which the driver can run."""

import pytest

from tests.launch import shell


@pytest.mark.parametrize(
    ('driver', 'capability', 'extra'),
    [
        ('580.65.06', '9.0', 'cuda13'),
        ('595.10', '10.0', 'cuda13'),
        ('570.124.06', '9.0', 'cuda12'),
        ('525.60.13', '8.0', 'cuda12'),
        ('580.65.06', '7.0', 'cuda12'),  # V100: CUDA 13 begins at 7.5.
        ('580.65.06', '7.5', 'cuda13'),
        ('580.65.06', '9.0,7.0', 'cuda12'),  # The oldest GPU decides.
    ],
)
def test_extra(tmp_path, driver, capability, extra):
  count = capability.count(',') + 1
  shell.nvidia_smi(tmp_path, driver, capability, count=count)
  done = shell.run('driver_check.sh', env=shell.environment(tmp_path))
  assert done.stdout == f'{extra}\n', done.stderr
  assert f"pip install -e '.[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ('driver', 'capability', 'message'),
    [
        ('520.61.05', '8.0', 'driver is 520.61.05; JAX needs 525 or newer'),
        ('570.1', '3.5', 'compute capability 3.5; JAX needs 5.2'),
        ('[N/A]', '8.0', "no driver version but '[N/A]'"),
        ('570.1', '[N/A]', "no compute capability but '[N/A]'"),
    ],
)
def test_what_cannot_run_is_an_error(tmp_path, driver, capability, message):
  shell.nvidia_smi(tmp_path, driver, capability)
  done = shell.run('driver_check.sh', env=shell.environment(tmp_path))
  assert done.returncode == 1
  assert message in done.stderr
  assert done.stdout == ''


def test_no_driver(tmp_path):
  done = shell.run('driver_check.sh', env=shell.environment(tmp_path))
  assert done.returncode == 1
  assert 'no NVIDIA driver is installed' in done.stderr


def test_a_driver_that_is_not_loaded(tmp_path):
  shell.executable(
      tmp_path / 'nvidia-smi',
      '#!/usr/bin/env bash\necho "cannot communicate with the driver"\nexit 9\n',
  )
  done = shell.run('driver_check.sh', env=shell.environment(tmp_path))
  assert done.returncode == 1
  assert 'cannot communicate with the driver' in done.stderr


def test_an_extra_that_the_driver_cannot_run_is_an_error(tmp_path):
  shell.nvidia_smi(tmp_path, '570.124.06')
  env = shell.environment(tmp_path) | {'EXTRAS': 'wandb,cuda13'}
  done = shell.run('local.sh', 'configs/shapes.py', '--dry-run', env=env)
  assert done.returncode == 1
  assert 'runs CUDA 12 only' in done.stderr


def test_training_installs_what_the_driver_can_run(tmp_path):
  shell.nvidia_smi(tmp_path, '570.124.06')
  env = shell.environment(tmp_path)
  python = env.pop('VENV_PYTHON')
  env |= {'PYTHON': python, 'EXTRAS': 'wandb'}
  done = shell.run('local.sh', 'configs/shapes.py', '--dry-run', env=env)
  assert f'{shell.ROOT}[wandb,cuda12]' in done.stdout


def test_dry_run(tmp_path):
  env = shell.environment(tmp_path)
  done = shell.run('driver_check.sh', '--dry-run', env=env)
  assert len(shell.commands(done.stdout, 'nvidia-smi')) == 2
