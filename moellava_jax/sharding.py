# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and which logical axis lives on which mesh axis.

Modules name the axes of their parameters and activations; this file alone
says where these names go. Enter `use(mesh)` before tracing: a bare
`with mesh:` would silently disable the constraints.
"""

import contextlib
import os
from typing import Any

import flax.linen as nn
from flax.linen import spmd
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from moellava_jax import config

AXES = ('data', 'fsdp', 'expert', 'tensor')

# The batch is split over all axes that do not split a matrix product; `expert`
# comes last, any other order costs a collective-permute per all-to-all.
BATCH = ('data', 'fsdp', 'expert')

# Logical axis -> mesh axes. Every name that a module uses is listed here.
RULES = (
    # Activations.
    ('batch', BATCH),
    ('expert_batch', ('data', 'fsdp')),
    ('length', None),
    ('features', None),
    # Parameters.
    ('expert', 'expert'),
    ('vocab', 'tensor'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('mlp', 'tensor'),
    ('embed', 'fsdp'),
    ('head_dim', None),
    ('norm', None),
    ('patch', None),
    ('position', None),
    ('router', None),
)


def simulate_devices(count: int) -> None:
  """Splits the CPU into `count` devices; accelerators are not affected.

  A count that XLA_FLAGS sets stays.

  Raises:
    UserError: JAX has started with another count. A run that went on with
      fewer devices than it began with would not be the same to the bit.
  """
  flag = '--xla_force_host_platform_device_count'
  if count == 1 or flag in os.environ.get('XLA_FLAGS', ''):
    return
  try:
    jax.config.update('jax_num_cpu_devices', count)
  except RuntimeError as error:  # JAX has started.
    devices = jax.local_device_count()
    if jax.default_backend() == 'cpu' and devices != count:
      raise config.UserError(
          f'mesh.cpu_devices={count}, but JAX has started with {devices}'
          ' devices. Call this before anything that uses JAX, or set'
          f' mesh.cpu_devices={devices}.'
      ) from error


def make_mesh(cfg: config.MeshConfig) -> Mesh:
  """Arranges all devices in the axes `AXES`; one size may be -1.

  Raises:
    UserError: the product of the sizes is not the device count.
  """
  sizes = [cfg.data, cfg.fsdp, cfg.expert, cfg.tensor]
  count = jax.device_count()
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise config.UserError(
        f'Mesh {dict(zip(AXES, sizes, strict=True))}: sizes are positive, and one may be -1.'
    )
  if -1 in sizes:
    rest = -int(np.prod(sizes))
    sizes[sizes.index(-1)] = max(count // rest, 1)
  if int(np.prod(sizes)) != count:
    raise config.UserError(
        f'Mesh {dict(zip(AXES, sizes, strict=True))} needs {np.prod(sizes)} devices, but'
        f' there are {count}. Set --config.mesh.* to sizes whose product is'
        f' {count}, one of them -1 to fill.'
    )
  if cfg.optimizer_memory != 'device':
    require_memory(
        cfg.optimizer_memory, f'mesh.optimizer_memory={cfg.optimizer_memory!r}'
    )
  return jax.make_mesh(
      tuple(sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
  )


def data_mesh() -> Mesh:
  """All devices along `data`: what evaluation runs on."""
  return make_mesh(
      config.MeshConfig(
          data=-1,
          fsdp=1,
          expert=1,
          tensor=1,
          cpu_devices=1,
          optimizer_memory='device',
      )
  )


def _memories() -> list[str]:
  return sorted(m.kind for m in jax.local_devices()[0].addressable_memories())


def has_memory(kind: str) -> bool:
  """Whether devices can address a kind of memory such as 'pinned_host'."""
  return kind in _memories()


def require_memory(kind: str, setting: str) -> None:
  """Raises UserError where devices cannot address a kind of memory.

  Args:
    kind: such as 'pinned_host'.
    setting: what asks for it, for the message.
  """
  if not has_memory(kind):
    raise config.UserError(
        f'{setting} needs {kind} memory, but the devices of'
        f' {jax.default_backend()!r} have only {_memories()}. Leave that setting at its default on this backend.'
    )


@contextlib.contextmanager
def use(mesh: Mesh):
  """Makes `mesh` and `RULES` current, for tracing and for eager code."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def of_parameters(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree of `nn.LogicallyPartitioned` (abstract) leaves."""
  return spmd.logical_to_mesh_sharding(
      nn.get_partition_spec(boxed), mesh, list(RULES)
  )


def of_batch(mesh: Mesh) -> NamedSharding:
  """Rows over the data axes, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def rows_of_process(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that the devices of this process hold."""
  places = of_batch(mesh).addressable_devices_indices_map((batch_size,))
  held = {
      row for (part,) in places.values() for row in _range(part, batch_size)
  }
  return np.array(sorted(held))


def _range(part: slice, size: int) -> range:
  return range(*part.indices(size))


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Host arrays of this process -> global arrays split over the mesh.

  Args:
    batch: arrays `[rows, ...]` of the rows `rows_of_process`.
    mesh: the mesh.
  """
  sharding = of_batch(mesh)
  divisor = batch_divisor(mesh)
  part = len(rows_of_process(mesh, divisor))

  def put(x):
    count = len(x) * divisor // part
    rows = rows_of_process(mesh, count)

    def local(index):
      first = _range(index[0], count)[0]
      begin = int(np.searchsorted(rows, first))
      return x[begin : begin + len(_range(index[0], count))]

    shape = (count, *x.shape[1:])
    return jax.make_array_from_callback(shape, sharding, local)

  return jax.tree.map(put, batch)


def batch_divisor(mesh: Mesh) -> int:
  """The number of rows must be a multiple of this."""
  return int(np.prod([mesh.shape[axis] for axis in BATCH]))
