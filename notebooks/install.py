# SPDX-License-Identifier: Apache-2.0
"""Installs this checkout into the Python of a notebook.

  python notebooks/install.py [--dry-run]

A JAX that setup.py accepts is kept: that of Colab fits its GPU or TPU, and the
one that pip would choose instead may know the CPU alone. An older one is
replaced by the newest for what is here.
"""

from importlib import metadata
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

from packaging import specifiers

ROOT = pathlib.Path(__file__).resolve().parents[1]


def version(package: str) -> str | None:
  """The installed version of a distribution; None if there is none."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def wanted() -> specifiers.SpecifierSet:
  """The versions of JAX that setup.py accepts."""
  found = re.search(r"'jax([<>=][^']+)'", (ROOT / 'setup.py').read_text())
  assert found is not None
  return specifiers.SpecifierSet(found[1])


def requirements(
    jax: str | None, jaxlib: str | None, libtpu: str | None, gpu: bool
) -> list[str]:
  """What pip is to install.

  Args:
    jax: the installed version, also a development version; None: none.
    jaxlib: likewise.
    libtpu: likewise; where it is installed there is a TPU.
    gpu: whether there is an NVIDIA driver.
  """
  if jax and jaxlib and wanted().contains(jax, prereleases=True):
    return [str(ROOT), f'jax=={jax}', f'jaxlib=={jaxlib}']
  extra = '[tpu]' if libtpu else '[cuda12]' if gpu else ''
  return [f'{ROOT}{extra}']


def main(argv: list[str]) -> int:
  if unknown := set(argv) - {'--dry-run'}:
    print(f'error: unknown arguments {sorted(unknown)}', file=sys.stderr)
    return 2
  given = (version(name) for name in ('jax', 'jaxlib', 'libtpu'))
  what = requirements(*given, gpu=shutil.which('nvidia-smi') is not None)
  command = [sys.executable, '-m', 'pip', 'install', '-q', '-e', *what]
  print(shlex.join(command), flush=True)
  return 0 if '--dry-run' in argv else subprocess.run(command).returncode


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
