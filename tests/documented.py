# SPDX-License-Identifier: Apache-2.0
"""Reads commands in documentation, so that tests can hold them to the code."""

import ast
import re
from typing import Any

import ml_collections


def unknown_overrides(text: str, c: ml_collections.ConfigDict) -> list[str]:
  """The `--config.a.b` of `text` that `c` does not have."""
  paths = re.findall(r'--config\.(\w+(?:\.\w+)*)', text)
  assert paths
  return [path for path in paths if not _has(c, path)]


def _has(section: Any, path: str) -> bool:
  for name in path.split('.'):
    if not isinstance(section, ml_collections.ConfigDict):
      return False
    if name not in section:
      return False
    section = section[name]
  return True


def commands(markdown: str) -> list[str]:
  """The lines of code blocks, those that end in a backslash joined."""
  lines = '\n'.join(_blocks(markdown, 'bash')).replace('\\\n', ' ').splitlines()
  return [line.split(' # ')[0].strip() for line in lines if line.strip()]


def python(markdown: str) -> list[str]:
  """The code blocks of Python."""
  return _blocks(markdown, 'python')


def _blocks(markdown: str, language: str) -> list[str]:
  return re.findall(
      rf'^```{language}\n(.*?)^```', markdown, re.DOTALL | re.MULTILINE
  )


def flags_of(source: str) -> set[str]:
  """The flags that a Python file defines, with absl or argparse."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    called = ast.unparse(node.func)
    first = node.args[0] if node.args else None
    if isinstance(first, ast.Constant) and (
        '.DEFINE_' in called or called.endswith('.add_argument')
    ):
      found.add(str(first.value).removeprefix('--'))
  return found
