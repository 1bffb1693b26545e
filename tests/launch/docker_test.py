# SPDX-License-Identifier: Apache-2.0
"""What can be said of the Dockerfiles without building them."""

import fnmatch
import json
import re
import shlex

import pytest

from tests.launch import shell

FILES = ('Dockerfile.gpu', 'Dockerfile.tpu')
EXTRAS = {'Dockerfile.gpu': 'cuda13', 'Dockerfile.tpu': 'tpu'}


def _instructions(name: str) -> list[tuple[str, str]]:
  text = (shell.LAUNCH / name).read_text()
  text = re.sub(r'^#.*\n', '', text, flags=re.MULTILINE).replace('\\\n', ' ')
  lines = [line for line in text.splitlines() if line.strip()]
  return [
      (word, rest.strip())
      for word, _, rest in (x.partition(' ') for x in lines)
  ]


def _sent() -> list[str]:
  """What .dockerignore lets through, of everything in the repository."""
  rules = (shell.ROOT / '.dockerignore').read_text().splitlines()
  rules = [rule for rule in rules if rule and not rule.startswith('#')]
  assert rules[0] == '*'
  kept = [rule[1:] for rule in rules if rule.startswith('!')]
  return [
      p.name
      for p in shell.ROOT.iterdir()
      if any(fnmatch.fnmatch(p.name, rule) for rule in kept)
  ]


@pytest.mark.parametrize('name', FILES)
def test_image(name):
  instructions = _instructions(name)
  known = {'FROM', 'ARG', 'ENV', 'RUN', 'WORKDIR', 'COPY', 'USER', 'ENTRYPOINT'}
  assert {word for word, _ in instructions} <= known
  words = [word for word, _ in instructions]
  assert words[0] == 'FROM'
  minor = re.match(r'python:(3\.\d+)-slim-\w+$', instructions[0][1])
  assert minor, 'a tag without a version changes under us'
  lock = f'requirements-{minor[1]}.lock'
  (install,) = [rest for _, rest in instructions if 'pip install' in rest]
  assert f'-c {lock}' in install
  copied = [rest.split()[:-1] for word, rest in instructions if word == 'COPY']
  files = [source for sources in copied for source in sources]
  assert lock in files
  assert sorted(files) == sorted(_sent())  # All of it is there, and sent.


@pytest.mark.parametrize('name', FILES)
def test_the_user_is_not_root_and_starts_training(name):
  instructions = _instructions(name)
  users = [i for i, (word, _) in enumerate(instructions) if word == 'USER']
  assert instructions[users[-1]][1] == 'trainer'
  runs = [i for i, (word, _) in enumerate(instructions) if word == 'RUN']
  assert max(runs) < users[-1]
  word, rest = instructions[-1]
  assert word == 'ENTRYPOINT'
  assert json.loads(rest) == [
      'python',
      'launch/supervise.py',
      '--',
      'python',
      '-m',
      'moellava_jax.train.main',
  ]


@pytest.mark.parametrize('name', FILES)
def test_the_run_folder_is_that_of_the_user_who_calls_docker(name):
  lines = re.findall(r'^#   (.*)$', (shell.LAUNCH / name).read_text(), re.M)
  commands = shlex.split('\n'.join(lines).replace('\\\n', ''))
  run = commands[commands.index('run') :]
  mount = run[run.index('-v') + 1]
  assert mount == '$PWD/runs:/app/runs'
  # A folder that Docker makes is root's.
  assert commands.index('mkdir') < len(commands) - len(run)
  assert commands[commands.index('mkdir') + 1 :][:2] == ['-p', 'runs']
  assert run[run.index('--user') + 1] == '$(id -u):$(id -g)'
  # Without an entry in passwd the home would be /, which is not theirs.
  assert run[run.index('-e') + 1] == 'HOME=/tmp'


@pytest.mark.parametrize('name', FILES)
def test_the_extra_exists(name):
  text = (shell.LAUNCH / name).read_text()
  extra = EXTRAS[name]
  assert f'ARG EXTRA={extra}' in text or f'".[{extra}]"' in text
  assert f"'{extra}': [" in (shell.ROOT / 'setup.py').read_text()


@pytest.mark.parametrize('name', FILES)
def test_no_secret_has_a_place_in_it(name):
  for word, rest in _instructions(name):
    if word in ('ARG', 'ENV', 'COPY'):
      assert not re.search(
          r'TOKEN|SECRET|PASSWORD|KEY|\.ssh|\.netrc', rest, re.I
      )


def test_nothing_but_the_product_is_sent():
  assert not {'.git', '.venv', 'runs', 'tests'} & set(_sent())
