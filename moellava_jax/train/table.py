# SPDX-License-Identifier: Apache-2.0
"""What lies where: the parameters of a stage, their shards and their bytes."""

import math
import re
from typing import Any, NamedTuple

import jax

from moellava_jax import sharding, trees


class Row(NamedTuple):
  """Parameters that are alike: the same place in other layers."""

  paths: str  # Numbers of layers as *.
  count: int
  shape: tuple[int, ...]
  dtype: str
  spec: str  # Mesh axes of each dimension.
  shard: str  # The same for gradient and optimizer state.
  trained: bool
  parameter_bytes: int  # On one device, all `count` of them.
  gradient_bytes: int
  optimizer_bytes: int


_NUMBER = re.compile(r'(?<=_)\d+(?=/)')


def table(trained: Any, frozen: Any, opt_state: Any) -> list[Row]:
  """One row per group of like parameters, of arrays or abstract ones."""
  moments: dict[str, int] = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
    names = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey)]
    path = '/'.join(str(name) for name in names)
    moments[path] = moments.get(path, 0) + _bytes(leaf.sharding, leaf)
  rows: dict[tuple, Row] = {}
  both = [(True, trees.flatten(trained)), (False, trees.flatten(frozen))]
  for is_trained, tree in both:
    for path, leaf in tree.items():
      where = sharding.zero(leaf.sharding, leaf.shape)
      row = Row(
          _NUMBER.sub('*', path),
          1,
          leaf.shape,
          str(leaf.dtype),
          _spec(leaf.sharding),
          _spec(where) if is_trained else '',
          is_trained,
          _bytes(leaf.sharding, leaf),
          _bytes(where, leaf) if is_trained else 0,
          sum(
              size
              for name, size in moments.items()
              if name == path or name.endswith('/' + path)
          )
          if is_trained
          else 0,
      )
      key = (row.paths, row.shape, row.dtype, row.spec, row.shard, is_trained)
      rows[key] = _add(rows[key], row) if key in rows else row
  return list(rows.values())


def _add(a: Row, b: Row) -> Row:
  return a._replace(
      count=a.count + b.count,
      parameter_bytes=a.parameter_bytes + b.parameter_bytes,
      gradient_bytes=a.gradient_bytes + b.gradient_bytes,
      optimizer_bytes=a.optimizer_bytes + b.optimizer_bytes,
  )


def _bytes(where, leaf) -> int:
  return math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _spec(where) -> str:
  """The mesh axes that split each dimension: `-,data+expert`."""
  split = [
      [axis for axis in axes if where.mesh.shape[axis] > 1]
      for axes in sharding.axes_of(where)
  ]
  while split and not split[-1]:
    split.pop()
  return ','.join('+'.join(axes) or '-' for axes in split)


def text(rows: list[Row]) -> str:
  """The table as aligned lines, with totals; bytes are those of one device."""
  head = (
      'parameters (one device)',
      'shape',
      'dtype',
      'mesh axes',
      'gradient, optimizer',
      'parameters',
      'gradient',
      'optimizer',
  )
  lines: list[tuple[str, ...]] = [head]
  for row in rows:
    times = '' if row.count == 1 else f' ({row.count}x)'
    lines.append(
        (
            row.paths + times,
            'x'.join(map(str, row.shape)) or '1',
            row.dtype,
            row.spec or 'whole',
            (row.shard or 'whole') if row.trained else 'frozen',
            size(row.parameter_bytes),
            size(row.gradient_bytes),
            size(row.optimizer_bytes),
        )
    )
  lines.append(('total', '', '', '', '', *map(size, totals(rows))))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
      '  '.join(
          cell.ljust(width) if n < 5 else cell.rjust(width)
          for n, (cell, width) in enumerate(zip(line, widths, strict=True))
      ).rstrip()
      for line in lines
  )


def totals(rows: list[Row]) -> tuple[int, int, int]:
  """Bytes of parameters, gradients and optimizer state on one device."""
  return (
      sum(row.parameter_bytes for row in rows),
      sum(row.gradient_bytes for row in rows),
      sum(row.optimizer_bytes for row in rows),
  )


def summary(rows: list[Row], mesh: jax.sharding.Mesh) -> str:
  """Mesh and totals in one line."""
  axes = ' x '.join(f'{a} {n}' for a, n in mesh.shape.items() if n > 1)
  whole = sum(
      row.count * math.prod(row.shape) * jax.numpy.dtype(row.dtype).itemsize
      for row in rows
  )
  parameters, gradient, optimizer = map(size, totals(rows))
  return (
      f'mesh {axes or "of one device"}: each device holds {parameters} of'
      f' {size(whole)} of parameters, {gradient} of gradients and {optimizer}'
      ' of optimizer state'
  )


def size(count: int) -> str:
  """Bytes for people: `1.50 GB`."""
  for unit, name in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if count >= unit:
      return f'{count / unit:.2f} {name}'
  return f'{count} B'
