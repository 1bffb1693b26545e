# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and which logical axis lives on which mesh axis.

Modules name the axes of their parameters and activations; this file alone
says where these names go. Enter `use(mesh)` before tracing: a bare
`with mesh:` would silently disable the constraints.
"""

import contextlib
import itertools
import math
import os
import re
from typing import Any

import flax.linen as nn
from flax.linen import spmd
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from moellava_jax import config, devices

AXES = devices.AXES

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


def make_mesh(cfg: config.MeshConfig, given: Any = None) -> Mesh:
  """Arranges devices in the axes `AXES`; one size may be -1, the rest.

  Over several slices of TPUs or nodes of GPUs, the data axis is the one that
  spans them; see `devices.arrange`.

  Args:
    cfg: sizes; None is 1 here, where the model that decides is not known.
    given: devices; None: all there are.

  Raises:
    UserError: the product of the sizes is not the device count, or a slice is
      too small for the axes that may not leave it.
  """
  if cfg.optimizer_memory != 'device':
    require_memory(
        cfg.optimizer_memory, f'mesh.optimizer_memory={cfg.optimizer_memory!r}'
    )
  given = jax.devices() if given is None else list(given)
  return _mesh(devices.sizes(cfg, len(given)), given)


def parse_mesh(text: str) -> Mesh:
  """The mesh that a flag names: 'fsdp=2,expert=2'; `data` is the rest.

  Raises:
    UserError: not sizes of axes, or what `make_mesh` raises.
  """
  sizes: dict[str, int] = {}
  for part in text.split(','):
    axis, _, size = (word.strip() for word in part.partition('='))
    if axis not in AXES or axis in sizes or not re.fullmatch(r'\d+', size):
      raise config.UserError(
          f'--mesh={text}: {part!r} is not understood. Give sizes of'
          f' {", ".join(AXES)}, each once, as in --mesh=fsdp=2,expert=2; data'
          ' takes the devices that are left.'
      )
    sizes[axis] = int(size)
  return make_mesh(
      config.MeshConfig(
          **{'data': -1, 'fsdp': None, 'expert': None, 'tensor': 1, **sizes},
          cpu_devices=1,
          print_table=False,
          optimizer_memory='device',
      )
  )


def data_mesh() -> Mesh:
  """All devices along `data`: what evaluation runs on unless told otherwise."""
  return _mesh((jax.device_count(), 1, 1, 1), jax.devices())


def _mesh(sizes, given) -> Mesh:
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)  # Not JAX's default.
  return Mesh(devices.arrange(sizes, given), AXES, axis_types=auto)


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
        f' {jax.default_backend()!r} have only {_memories()}. Leave that'
        ' setting at its default on this backend.'
    )


@contextlib.contextmanager
def use(mesh: Mesh):
  """Makes `mesh` and `RULES` current, for tracing and for eager code."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def of_parameters(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree of `nn.LogicallyPartitioned` (abstract) leaves.

  A dimension that its mesh axes do not divide stays whole.

  Raises:
    ValueError: a name that has no rule; Flax would not split that axis.
  """
  known = {name for name, _ in RULES}
  specs = nn.get_partition_spec(boxed)
  for spec in jax.tree.leaves(
      specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
  ):
    if unknown := set(spec or ()) - known - {None}:
      raise ValueError(f'No rule of sharding.RULES names {sorted(unknown)}.')
  split = spmd.logical_to_mesh_sharding(specs, mesh, list(RULES))
  return jax.tree.map(
      lambda where, box: _whole_where_uneven(where, box.value), split, boxed
  )


def _whole_where_uneven(where: NamedSharding, leaf: Any) -> NamedSharding:
  spec = [
      axes if axes and size % _ways(where.mesh, axes) == 0 else ()
      for axes, size in zip(_axes(where, leaf.shape), leaf.shape, strict=True)
  ]
  return _with_axes(where, spec)


def zero(where: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """Where optimizer state and gradient of a parameter lie (ZeRO-2).

  The parameter's own sharding and the data axes that it does not use yet, as
  many as one dimension can be divided by, on the largest such dimension
  (ZeRO, arXiv 1910.02054, section 5.2).

  Args:
    where: the sharding of the parameter.
    shape: of the whole parameter.
  """
  spec = _axes(where, shape)
  used = set(itertools.chain(*spec))
  free = [a for a in BATCH if a not in used and where.mesh.shape[a] > 1]
  rest = [
      size // _ways(where.mesh, axes)
      for size, axes in zip(shape, spec, strict=True)
  ]
  choices = [
      (_ways(where.mesh, axes), size, dimension, axes)
      for count in range(1, len(free) + 1)
      # The axes of nearer devices first: among equals, max takes the first.
      for axes in reversed(list(itertools.combinations(free, count)))
      for dimension, size in enumerate(rest)
      if size and size % _ways(where.mesh, axes) == 0
  ]
  if not choices:
    return where
  _, _, dimension, axes = max(choices, key=lambda choice: choice[:2])
  spec[dimension] += axes
  return _with_axes(where, spec)


def _ways(mesh: Any, axes: tuple[str, ...]) -> int:
  return math.prod(mesh.shape[axis] for axis in axes)


def axes_of(where: NamedSharding) -> list[tuple[str, ...]]:
  """The mesh axes of every dimension that the sharding names."""
  return [
      () if s is None else (s,) if isinstance(s, str) else tuple(s)
      for s in where.spec
  ]


def _axes(where: NamedSharding, shape) -> list[tuple[str, ...]]:
  """The mesh axes of every dimension of an array of this shape."""
  named = axes_of(where)
  return named + [()] * (len(shape) - len(named))


def _with_axes(where: NamedSharding, spec) -> NamedSharding:
  entries = [
      None if not axes else axes[0] if len(axes) == 1 else tuple(axes)
      for axes in spec
  ]
  while entries and entries[-1] is None:
    entries.pop()
  return NamedSharding(
      where.mesh, PartitionSpec(*entries), memory_kind=where.memory_kind
  )


def of_batch(mesh: Mesh) -> NamedSharding:
  """Rows over the data axes, everything else whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def rows_of_process(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a global batch that the devices of this process hold."""
  places = of_batch(mesh).addressable_devices_indices_map((batch_size,))
  held: set[int] = set()
  for index in places.values():
    assert index is not None  # As it would be for another process's device.
    held.update(_range(index[0], batch_size))
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
