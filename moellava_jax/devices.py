# SPDX-License-Identifier: Apache-2.0
"""Which device takes which place in the mesh, and how large its axes can be.

Devices of one slice (TPU) or node (GPU) exchange data many times faster than
those of two. What is exchanged within a layer stays inside: tokens (`expert`)
and parts of a product (`tensor`); only the gradients of `data`, and parameters
where `fsdp` is larger than a slice, travel between.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jax.experimental import mesh_utils
import numpy as np

from moellava_jax import config

AXES = ('data', 'fsdp', 'expert', 'tensor')


def sizes(cfg: config.MeshConfig, count: int) -> tuple[int, ...]:
  """The sizes of `AXES` for `count` devices: -1 filled in, None as 1.

  Raises:
    UserError: their product is not `count`.
  """
  given = dataclasses.asdict(cfg)
  asked = {a: 1 if given[a] is None else given[a] for a in AXES}
  values = list(asked.values())
  if values.count(-1) > 1 or any(s < 1 and s != -1 for s in values):
    raise config.UserError(
        f'Mesh {asked}: sizes are positive, and one may be -1.'
    )
  if -1 in values:
    rest = -math.prod(values)
    values[values.index(-1)] = max(count // rest, 1)
  if math.prod(values) != count:
    raise config.UserError(
        f'Mesh {asked} needs {math.prod(values)} devices, but there are'
        f' {count}. Set --config.mesh.* (or --mesh) to sizes whose product is'
        f' {count}, one of them -1 to fill.'
    )
  return tuple(values)


def slices(devices: Sequence[Any]) -> list[list[Any]]:
  """The devices, in groups that are near each other.

  JAX numbers the slices of TPUs and the nodes of GPUs (`slice_index`); where it
  does not, a process is a group, except that one TPU slice has many.
  """
  first = devices[0]
  attribute = 'slice_index'
  if not hasattr(first, attribute):
    attribute = 'process_index'
    if first.platform == 'tpu':
      return [list(devices)]
  groups: dict[int, list[Any]] = {}
  for device in devices:
    groups.setdefault(getattr(device, attribute), []).append(device)
  return [groups[key] for key in sorted(groups)]


def arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
  """Devices as an array of `shape` (of `AXES`), near ones along the last axes.

  Raises:
    UserError: slices of different sizes, or `expert` x `tensor` (x `fsdp`, as
      far as `data` is not a multiple of the number of slices) larger than one.
  """
  groups = slices(devices)
  if len(groups) == 1:
    return mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )
  data, fsdp, *inner = shape
  outer = math.gcd(len(groups), data)
  across = (outer, len(groups) // outer, 1, 1)
  alike = len({len(group) for group in groups}) == 1
  if not alike or fsdp % across[1]:
    raise config.UserError(
        f'Mesh {dict(zip(AXES, shape, strict=True))} does not fit'
        f' {len(groups)} slices or nodes of'
        f' {sorted({len(group) for group in groups})} devices: expert x tensor'
        f' = {math.prod(inner)} has to lie within one. Make data (or data x'
        f' fsdp) a multiple of {len(groups)}.'
    )
  within = (data // across[0], fsdp // across[1], *inner)
  return mesh_utils.create_hybrid_device_mesh(
      within,
      across,
      devices,
      process_is_granule=not hasattr(devices[0], 'slice_index'),
      allow_split_physical_axes=True,
  )
