# SPDX-License-Identifier: Apache-2.0
"""`scores.json`: model -> control -> benchmark -> scores, and its tables."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from moellava_jax.evals import base

SERVER = 'server'  # The score that a server gave, in points.
_OF_MODEL = ('model', 'activated_parameters', 'image_size')
_WIDEST = 200


def read(
    path: str | os.PathLike[str],
) -> dict[str, dict[str, dict[str, Any]]]:
  """Model -> control -> benchmark -> entry.

  Raises:
    EvalError: no such file, or it is no scores.json.
  """
  scores = base.read_json(path)
  inner = [scores]
  for _ in range(3):
    if not all(isinstance(node, dict) for node in inner):
      raise base.EvalError(
          f'{path}: expected model -> control -> benchmark; remove the file or'
          ' write to another directory.'
      )
    inner = [value for node in inner for value in node.values()]
  return scores


def merge(
    path: str | os.PathLike[str],
    model: str,
    control: str,
    benchmark: str,
    entry: Mapping[str, Any],
) -> None:
  """Puts one entry into `path`, keeping the others; atomic.

  Of the entry that it replaces stays what is as true of the new one: what
  answers alone do not tell of a model, and the score that a server gave to the
  same answers.

  Raises:
    EvalError: the file there is no scores.json.
  """
  path = pathlib.Path(path)
  scores = read(path) if path.exists() else {}
  by_control = scores.setdefault(model, {})
  entries = by_control.setdefault(control, {})
  entries[benchmark] = {**entry, **_kept(entries.get(benchmark, {}), entry)}
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  new.write_text(json.dumps(scores, indent=1) + '\n', encoding='utf-8')
  os.replace(new, path)


def _kept(
    before: Mapping[str, Any], entry: Mapping[str, Any]
) -> dict[str, Any]:
  """What `merge` keeps of the entry `before` and `entry` does not have."""
  names = []
  if (
      entry.get('digest') is not None
      and before.get('digest') == entry['digest']
  ):
    names += _OF_MODEL
  # Entries of earlier versions do not say of which answers they are.
  known = 'answers' if 'answers' in before else 'digest'
  if before.get(known, entry.get(known)) == entry.get(known):
    names.append(SERVER)
  return {
      name: before[name]
      for name in names
      if name in before and entry.get(name) is None
  }


def show(title: str, entry: Mapping[str, Any]) -> None:
  """Prints an entry: rows of equal keys as a table, other rates as a line."""
  # Imported here because only what is printed needs it.
  from rich import console

  out = console.Console(highlight=False, soft_wrap=True)
  out.print(f'\n{title}', style='bold', markup=False)
  _show_group(out, '', entry)


def print_table(
    title: str,
    columns: Sequence[str],
    published: Mapping[str, Sequence[str]],
    own: Mapping[str, Sequence[str]],
) -> None:
  """Prints published rows and, below them in bold, own rows."""
  from rich import console, table

  grid = table.Table(
      *columns, title=title, title_justify='left', box=None, pad_edge=False
  )
  for column in grid.columns[1:]:
    column.justify = 'right'
  for name, cells in published.items():
    grid.add_row(name, *cells)
  for name, cells in own.items():
    grid.add_row(name, *cells, style='bold')
  # As wide as it is, also where the terminal is not.
  console.Console(highlight=False, width=_WIDEST).print(grid)


def _show_group(out: Any, name: str, group: Mapping[str, Any]) -> None:
  from rich import table

  inner = {k: v for k, v in group.items() if isinstance(v, Mapping)}
  if len({tuple(row) for row in inner.values()}) == 1:
    columns = next(iter(inner.values()))
    grid = table.Table(name, *columns, box=None, padding=(0, 2, 0, 0))
    for column in grid.columns[1:]:
      column.justify = 'right'
    for key, row in inner.items():
      grid.add_row(key, *map(_cell, row.values()))
    out.print(grid)
  else:
    for key, value in inner.items():
      _show_group(out, key, value)
  line = [f'{k} {_cell(v)}' for k, v in group.items() if k not in inner]
  if line:
    out.print(f'{name}: '.lstrip(': ') + ', '.join(line), markup=False)


def _cell(value: Any) -> str:
  return f'{value:.4f}' if isinstance(value, float) else str(value)
