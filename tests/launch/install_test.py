# SPDX-License-Identifier: Apache-2.0
"""ensure_venv installs once, whoever else is at it."""

import io
import os
import pathlib
import shutil
import subprocess

from tests.launch import shell

# In place of Python: makes environments of itself. Installing takes until a
# line comes.
_PYTHON = """#!/usr/bin/env bash
case "$*" in
  '-c import sys'*) echo 3.11 ;;
  '-c import ensurepip'*) ;;
  '-m venv --clear '*)
    mkdir -p "$4/bin"
    touch "$4/pyvenv.cfg"
    cat "$0" >"$4/bin/python"
    chmod +x "$4/bin/python"
    ;;
  '-m pip --version') ;;
  '-m pip install '*)
    echo begin
    echo begin >>"$LOG"
    read -r _ <"$GO"
    echo end >>"$LOG"
    ;;
  *) exit 1 ;;
esac
"""


def _tree(folder: pathlib.Path) -> dict[str, str]:
  """A repository with nothing in it but what ensure_venv reads."""
  (folder / 'launch').mkdir()
  shutil.copy(shell.LAUNCH / 'common.sh', folder / 'launch')
  for name in ('setup.py', 'pyproject.toml', 'requirements-3.11.lock'):
    (folder / name).touch()
  os.mkfifo(folder / 'go')
  env = shell.environment(folder) | {
      'PYTHON': str(shell.executable(folder / 'python', _PYTHON)),
      'LOG': str(folder / 'log'),
      'GO': str(folder / 'go'),
  }
  del env['VENV_PYTHON']
  return env


def _go(folder: pathlib.Path) -> io.FileIO:
  return open(folder / 'go', 'r+b', buffering=0)  # Waits for no reader.


def _launcher(
    folder: pathlib.Path, env: dict[str, str]
) -> subprocess.Popen[str]:
  script = "set -euo pipefail; source launch/common.sh; ensure_venv ''"
  return subprocess.Popen(
      ['bash', '-c', script],
      env=env,
      cwd=folder,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
  )


def test_two_launchers_install_once(tmp_path):
  env = _tree(tmp_path)
  with _go(tmp_path) as go, _launcher(tmp_path, env) as first:
    assert first.stdout is not None
    try:
      assert 'begin\n' in iter(first.stdout.readline, '')
      second = _launcher(tmp_path, env)
      assert second.stdout is not None
      waiting = second.stdout.readline()
    finally:
      go.write(b'first\nsecond\n')
    rest, _ = second.communicate(timeout=30)
  assert 'Another launcher is installing' in waiting
  assert rest == ''  # It is there by now.
  assert first.returncode == second.returncode == 0
  assert (tmp_path / 'log').read_text() == 'begin\nend\n'


def test_where_files_cannot_be_locked_it_installs_all_the_same(tmp_path):
  env = _tree(tmp_path)
  shell.executable(  # As on Lustre that is mounted without -o flock.
      tmp_path / 'flock',
      '#!/usr/bin/env bash\necho "flock: not implemented" >&2\nexit 71\n',
  )
  with _go(tmp_path) as go:
    go.write(b'go\n')
    launcher = _launcher(tmp_path, env)
    output, _ = launcher.communicate(timeout=30)
  assert launcher.returncode == 0, output
  assert 'not implemented' not in output
  assert (tmp_path / 'log').read_text() == 'begin\nend\n'
