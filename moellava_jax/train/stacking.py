# SPDX-License-Identifier: Apache-2.0
"""Layers stacked for `jax.lax.scan`, and taken apart again.

Only the training step sees stacked layers; checkpoints, tables and everything
outside of it speak of `llm/layers_N/...`. No device ever holds two copies of a
tree: arrays are converted one after the other, and freed where they are
`consumed`.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from moellava_jax import config, trees

# Part of the model (`llm`, `vision`) -> its layers; empty: nothing is stacked.
Table = dict[str, tuple[trees.Segment, ...]]


def table(cfg: config.ModelConfig) -> Table:
  """Which layers of a model are stacked: all that repeat."""
  if not cfg.scan_layers:
    return {}
  return {
      'llm': cfg.segments(),
      'vision': trees.segments((False,) * cfg.vision.num_layers),
  }


def stack(tree: Any, layout: Table, *, consume: bool) -> Any:
  """`layers_N` -> `layers_A_to_B_by_P`, wherever a model's parts occur.

  Args:
    tree: any pytree, such as parameters or optimizer state. Leaves are arrays,
      `ShapeDtypeStruct`s or `NamedSharding`s.
    layout: of `table`.
    consume: frees the arrays that have been stacked.
  """

  def join(*leaves):
    joined = _join(leaves)
    if consume:
      _free(*leaves)
    return joined

  def part(layers, segments):
    layers = dict(layers)
    for segment in segments:
      if segment.repeats == 1:
        continue
      for position, name in enumerate(segment.names):
        own = [f'layers_{n}' for n in segment.layers(position)]
        # A half of a split tree has nothing of layers of the other half.
        if own[0] in layers:
          layers[name] = jax.tree.map(join, *(layers.pop(n) for n in own))
    return layers

  return _map_parts(
      tree, lambda name, node: part(node, layout[name]), set(layout)
  )


def unstack(tree: Any, *, consume: bool, to_host: bool = False) -> Any:
  """The inverse of `stack`.

  Args:
    tree: as for `stack`.
    consume: frees the arrays that have been taken apart.
    to_host: single layers go to host memory, so that a save does not need
      twice the memory of a device.
  """

  def part(_, layers):
    out = {}
    for name, subtree in layers.items():
      if (numbers := trees.stacked_layers(name)) is None:
        out[name] = subtree
        continue
      leaves, structure = jax.tree.flatten(subtree)
      cuts = []
      for leaf in leaves:
        cuts.append(_cut(leaf, len(numbers), to_host))
        if consume:
          _free(leaf)
      for index, number in enumerate(numbers):
        out[f'layers_{number}'] = jax.tree.unflatten(
            structure, [cut[index] for cut in cuts]
        )
    return out

  return _map_parts(tree, part, {'llm', 'vision'})


def _map_parts(
    tree: Any, convert: Callable[[str, Any], Any], parts: set[str]
) -> Any:
  """Applies `convert(name, subtree)` to the parts of models inside a tree."""

  def is_model(node):
    return isinstance(node, dict) and not parts.isdisjoint(node)

  def whole(node):
    if not is_model(node):
      return node
    return {
        name: convert(name, child) if name in parts else child
        for name, child in node.items()
    }

  return jax.tree.map(whole, tree, is_leaf=is_model)


def _join(leaves: Sequence[Any]) -> Any:
  first = leaves[0]
  if isinstance(first, jax.sharding.Sharding):
    return _with_layers(first)
  if isinstance(first, jax.ShapeDtypeStruct):
    shape = (len(leaves), *first.shape)
    return first.update(shape=shape, sharding=_with_layers(first.sharding))
  return jax.block_until_ready(_joiner(first.sharding)(*leaves))


def _cut(leaf: Any, count: int, to_host: bool) -> Sequence[Any]:
  if isinstance(leaf, jax.sharding.Sharding):
    return [_without_layers(leaf)] * count
  where = _without_layers(leaf.sharding)
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return [leaf.update(shape=leaf.shape[1:], sharding=where)] * count
  if to_host:
    where = where.with_memory_kind('pinned_host')
  return jax.block_until_ready(_cutter(leaf.sharding, where, count)(leaf))


# A program computes in the memory of the device, wherever its arguments lie.
@functools.cache
def _joiner(where: Any) -> Callable[..., Any]:
  on_device = where.with_memory_kind('device')
  return jax.jit(
      lambda *xs: jnp.stack([jax.device_put(x, on_device) for x in xs]),
      out_shardings=_with_layers(where),
  )


@functools.cache
def _cutter(source: Any, target: Any, count: int) -> Callable[..., Any]:
  on_device = source.with_memory_kind('device')

  def cut(x):
    x = jax.device_put(x, on_device)
    return [x[n] for n in range(count)]

  return jax.jit(cut, out_shardings=[target] * count)


def _with_layers(where: Any) -> Any:
  """The sharding of stacked layers, whose first axis is never split."""
  if isinstance(where, NamedSharding):
    return where.update(spec=PartitionSpec(None, *where.spec))
  return where


def _without_layers(where: Any) -> Any:
  if isinstance(where, NamedSharding):
    return where.update(spec=PartitionSpec(*where.spec[1:]))
  return where


def _free(*leaves: Any) -> None:
  for leaf in leaves:
    if isinstance(leaf, jax.Array):
      leaf.delete()
