# SPDX-License-Identifier: Apache-2.0
"""Runs the launchers with stand-ins for what they start."""

from collections.abc import Mapping
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'

# In place of training: does what the variable PLAN says for its process.
_STAND_IN = """
import json, os, pathlib, signal, subprocess, sys

process = next((a[13:] for a in sys.argv if a.startswith('--process_id=')), '0')
attempts = pathlib.Path(os.environ['ATTEMPTS'] + process)
attempt = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text('x' * (attempt + 1))

def end_on_term(code):
  def end(number, frame):
    os.write(1, f'got {signal.Signals(number).name}\\n'.encode())
    os._exit(code)  # Whatever it was in the middle of.
  signal.signal(signal.SIGTERM, end)
  print('ready', flush=True)

exec(json.loads(os.environ['PLAN'])[process])
"""


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


def python(folder: pathlib.Path) -> pathlib.Path:
  """A Python that runs the stand-in where it is asked for train.main."""
  stand_in = folder / 'stand_in.py'
  stand_in.write_text(_STAND_IN)
  real = shlex.quote(sys.executable)
  return executable(
      folder / 'python',
      f"""#!/usr/bin/env bash
if [[ $1 == -m && $2 == moellava_jax.train.main ]]; then
  shift 2
  exec {real} {shlex.quote(str(stand_in))} "$@"
fi
exec {real} "$@"
""",
  )


def nvidia_smi(
    folder: pathlib.Path,
    driver: str = '580.65.06',
    capability: str = '9.0',
    name: str = 'NVIDIA H100 80GB HBM3',
    count: int = 1,
) -> None:
  """Puts a stand-in for nvidia-smi into `folder`; one value a GPU, by commas."""
  values = {'driver_version': driver, 'compute_cap': capability, 'name': name}
  cases = [f"--query-gpu=index) printf '%s\\n' {{0..{count - 1}}} ;;"]
  for field, value in values.items():
    each = value.split(',') if ',' in value else [value] * count
    lines = ' '.join(shlex.quote(v) for v in each)
    cases.append(f"--query-gpu={field}) printf '%s\\n' {lines} ;;")
  body = '\n'.join(cases)
  executable(
      folder / 'nvidia-smi', f'#!/usr/bin/env bash\ncase $1 in\n{body}\nesac\n'
  )


def environment(
    folder: pathlib.Path, plan: Mapping[int, str] | None = None
) -> dict[str, str]:
  """Tools of the system and of `folder`; no settings of this test session."""
  return {
      'PATH': f'{folder}:{tools(folder)}',
      'HOME': str(folder),
      'VENV_PYTHON': str(python(folder) if plan else sys.executable),
      'ATTEMPTS': str(folder / 'attempts-'),
      'PLAN': json.dumps(plan or {}),
  }


def tools(folder: pathlib.Path) -> pathlib.Path:
  """A folder with links to harmless tools: no cloud is ever called."""
  links = folder / 'tools'
  links.mkdir(exist_ok=True)
  names = 'bash grep cat chmod cksum date dirname env flock head ls mkdir mktemp mv rm'
  names += ' rmdir sed setsid sleep sort tail tar touch tr uname true hostname'
  for name in names.split():
    for place in ('/usr/bin', '/bin'):
      if os.path.exists(f'{place}/{name}') and not (links / name).exists():
        (links / name).symlink_to(f'{place}/{name}')
  return links


def run(
    script: str | pathlib.Path,
    *args: str,
    env: Mapping[str, str],
    cwd: pathlib.Path = ROOT,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
  """Runs a script of launch/ (or a path) with bash; stderr is kept apart."""
  return subprocess.run(
      ['bash', str(LAUNCH / script), *args],
      env=dict(env),
      cwd=cwd,
      timeout=timeout,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      check=False,
  )


def commands(output: str, program: str) -> list[list[str]]:
  """The printed commands that call `program`, split as a shell would."""
  found = []
  for line in output.splitlines():
    if program in line and not line.startswith('=='):
      words = shlex.split(line.removeprefix('$ '))
      if any(pathlib.PurePath(word).name == program for word in words):
        found.append(words)
  return found
