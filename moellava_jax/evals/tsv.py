# SPDX-License-Identifier: Apache-2.0
"""Question files with the images in them, as MMBench and VLMEvalKit have them.

A file is a table with tabs and a head; `index`, `question`, the options under
their letters, `answer`, and `image` in base64. An image that several rows show
is in one of them; the others have the index of that row in its place.
"""

import ast
import base64
from collections.abc import Iterator, Mapping
import csv
import os
import pathlib
import string

from moellava_jax.evals import base

# What pandas, with which the official scripts read, takes for a missing cell.
_MISSING = frozenset(
    [
        *('', '#N/A', '#N/A N/A', '#NA', '-1.#IND', '-1.#QNAN', '-NaN', '-nan'),
        *('1.#IND', '1.#QNAN', '<NA>', 'N/A', 'NA', 'NULL', 'NaN', 'None'),
        *('n/a', 'nan', 'null'),
    ]
)
_LONGEST_INDEX = 64  # A shorter `image` is the index of another row.
_LARGEST_CELL = 2**30

Row = Mapping[str, str | None]


def rows(path: str | os.PathLike[str], needed: tuple[str, ...]) -> list[Row]:
  """The rows without their images; a missing cell is None.

  Raises:
    EvalError: no such file, a column of `needed` or an index is missing, an
      index occurs twice.
  """
  found, line_of = [], {}
  for number, row in enumerate(_read(path), 2):
    if lacking := [name for name in ('index', *needed) if name not in row]:
      raise base.EvalError(
          f'{path}: no column {lacking}; there are {sorted(row)}.'
      )
    index = row['index']
    if index is None:
      raise base.EvalError(f'{path}, row {number}: no index.')
    first = line_of.setdefault(index, number)
    if first != number:
      raise base.EvalError(
          f'{path}, row {number}: index {index} occurs already in row {first}.'
      )
    found.append({key: row[key] for key in row if key != 'image'})
  if not found:
    raise base.EvalError(f'{path}: no rows.')
  return found


def options(row: Row) -> dict[str, str]:
  """Letter -> text of every option that the row has."""
  texts = {letter: row.get(letter) for letter in string.ascii_uppercase}
  return {letter: text for letter, text in texts.items() if text is not None}


def image_names(
    path: str | os.PathLike[str],
) -> dict[str, tuple[str, ...]]:
  """The names that `unpack` gives to the images of each index."""
  found = {}
  for row in _read(path):
    index, image = str(row['index']), row.get('image')
    count = len(_cells(image)) if image else 0
    if image and count == 1 and len(image) <= _LONGEST_INDEX:
      found[index] = (f'{image}.jpg',)
    else:
      found[index] = tuple(
          f'{index}.jpg' if count == 1 else f'{index}_{n}.jpg'
          for n in range(1, count + 1)
      )
  return found


def unpack(path: str | os.PathLike[str], folder: pathlib.Path) -> None:
  """Writes the images of a file into `folder`, but those that are there.

  Raises:
    EvalError: a cell is no base64.
  """
  folder.mkdir(parents=True, exist_ok=True)
  names = image_names(path)
  for row in _read(path):
    cells = _cells(row.get('image') or '')
    if len(cells) == 1 and len(cells[0]) <= _LONGEST_INDEX:
      continue
    for name, cell in zip(names[str(row['index'])], cells, strict=True):
      target = folder / name
      if target.exists():
        continue
      try:
        data = base64.b64decode(cell, validate=True)
      except ValueError as e:
        raise base.EvalError(
            f'{path}, index {row["index"]}: the image is no base64 ({e}).'
        ) from e
      new = target.with_name(f'{target.name}.{os.getpid()}.tmp')
      new.write_bytes(data)
      os.replace(new, target)


def _cells(image: str) -> list[str]:
  """The images of a cell: one, or a list in Python's notation."""
  if not image:
    return []
  if image.startswith('['):
    return list(ast.literal_eval(image))
  return [image]


def _read(path: str | os.PathLike[str]) -> Iterator[dict[str, str | None]]:
  """The rows of a file, cell by cell as pandas sees them."""
  path = pathlib.Path(path)
  if not path.is_file():
    raise base.EvalError(f'{path}: no such file.')
  before = csv.field_size_limit(_LARGEST_CELL)
  try:
    with path.open(encoding='utf-8', newline='') as file:
      for row in csv.DictReader(file, delimiter='\t'):
        if None in row or None in row.values():
          raise base.EvalError(
              f'{path}: row {row.get("index")!r} has more or fewer cells than'
              ' the head.'
          )
        yield {
            key: None if value in _MISSING else value
            for key, value in row.items()
        }
  finally:
    csv.field_size_limit(before)
