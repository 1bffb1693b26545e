# SPDX-License-Identifier: Apache-2.0
"""What holds for every script in launch/."""

import re

import pytest

from tests.launch import shell

SCRIPTS = sorted(
    path.name
    for path in shell.LAUNCH.iterdir()
    if path.suffix in ('.sh', '.sbatch') and path.name != 'common.sh'
)


def test_there_are_scripts():
  assert {'local.sh', 'quickstart.sh', 'slurm.sbatch', 'test.sh'} <= set(
      SCRIPTS
  )


@pytest.mark.parametrize('script', SCRIPTS)
def test_strict_and_licensed(script):
  lines = (shell.LAUNCH / script).read_text().splitlines()
  assert lines[0] == '#!/usr/bin/env bash'
  assert lines[1] == '# SPDX-License-Identifier: Apache-2.0'
  assert 'set -euo pipefail' in lines


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_names_the_dry_run(tmp_path, script):
  env = shell.environment(tmp_path)
  done = shell.run(script, '--help', env=env)
  assert done.returncode == 0, done.stderr
  assert script in done.stdout and '--dry-run' in done.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_what_it_names_exists(script):
  text = (shell.LAUNCH / script).read_text()
  for module in re.findall(r'-m (moellava_jax(?:\.\w+)+)', text):
    assert (shell.ROOT / (module.replace('.', '/') + '.py')).is_file(), module
  for config in re.findall(r'configs/\w+\.py', text):
    assert (shell.ROOT / config).is_file(), config
  for other in re.findall(r'launch/(\w+\.(?:sh|py|sbatch|yaml))', text):
    assert (shell.LAUNCH / other).is_file(), other


def test_dry_run_of_the_quickstart(tmp_path):
  args = ('--smoke', f'--run={tmp_path}/a b', '--dry-run')
  done = shell.run('quickstart.sh', *args, env=shell.environment(tmp_path))
  assert done.returncode == 0, done.stderr
  modules = [
      'moellava_jax.train.main',
      'moellava_jax.evals.main',
      'moellava_jax.analysis.main',
      'moellava_jax.analysis.report',
  ]
  counts = [len(shell.commands(done.stdout, module)) for module in modules]
  assert counts == [1, 2, 1, 1]
  assert 'export GLIBC_TUNABLES=glibc.malloc.hugetlb=1' in done.stdout
  assert f'--config.workdir={tmp_path}/a b' in (
      shell.commands(done.stdout, modules[0])[0]
  )
  assert not (tmp_path / 'a b').exists()


def test_dry_run_of_the_tests(tmp_path):
  env = shell.environment(tmp_path)
  done = shell.run('test.sh', '--dry-run', '-k', 'a or b', env=env)
  assert shell.commands(done.stdout, 'pytest')[0][1:] == [
      '-m',
      'pytest',
      '-k',
      'a or b',
  ]
