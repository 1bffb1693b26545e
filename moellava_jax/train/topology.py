# SPDX-License-Identifier: Apache-2.0
"""Devices to compile a step for: simulated, of this machine, or described.

A described TPU slice needs libtpu (extra `tpu`) but no TPU: its compiler runs
on any Linux machine.
"""

import contextlib
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.experimental import topologies

from moellava_jax import config, sharding
from moellava_jax.train import accelerators

LOCAL = 'local'

# Chips of a slice as "NxM" (v5e, v6e: two dimensions) or "NxMxK" (v5p).
_SLICE = re.compile(r'(?P<kind>\w+):(?P<shape>\d+x\d+(x\d+)?)')
_DIMENSIONS = {'v5e': 2, 'v6e': 2, 'v5p': 3}


class Target(NamedTuple):
  """Devices that a step is compiled for.

  Attributes:
    name: what to print.
    devices: JAX devices; those of a described slice can hold no arrays.
    described: whether they are only described.
    memory: bytes of each, to choose a mesh by; None: what the devices say.
  """

  name: str
  devices: list[Any]
  described: bool
  memory: int | None


def simulated(count: int, memory: int | None) -> Target:
  """`count` devices on the CPU; call before JAX starts.

  Args:
    count: how many.
    memory: bytes of each of the accelerators they stand for, if known.

  Raises:
    UserError: JAX has started with another count.
  """
  if count < 1:
    raise config.UserError(f'--devices={count}; expected at least 1.')
  with contextlib.suppress(RuntimeError):  # Started: the check below decides.
    jax.config.update('jax_platforms', 'cpu')
  sharding.simulate_devices(count)
  devices = jax.devices()
  if len(devices) < count:
    raise config.UserError(
        f'--devices={count}, but JAX has started with {len(devices)}. Plan in a'
        ' new process, and without --xla_force_host_platform_device_count in'
        ' XLA_FLAGS.'
    )
  return Target(f'{count} simulated devices', devices[:count], False, memory)


def local() -> Target:
  """All devices of this machine."""
  devices = jax.devices()
  name = f'{len(devices)} x {devices[0].device_kind}'
  return Target(name, devices, False, None)


def check(name: str) -> int | None:
  """The number of devices of a topology; None for `local`.

  Raises:
    UserError: no such topology; lists the kinds.
  """
  if name == LOCAL:
    return None
  match = _SLICE.fullmatch(name)
  shape = match['shape'].split('x') if match else []
  if match is None or _DIMENSIONS.get(match['kind']) != len(shape):
    raise config.UserError(
        f'--topology={name} is not known; expected {LOCAL}, v5e:NxM, v6e:NxM or'
        ' v5p:NxMxK with N, M and K chips a side, such as v5e:4x4.'
    )
  return math.prod(int(side) for side in shape)


def described(name: str) -> Target:
  """A TPU slice `name` that need not be there.

  Raises:
    UserError: libtpu is not installed, or knows no such slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise config.UserError(
        f'--topology={name} compiles with libtpu, which is not installed:'
        " pip install 'moellava_jax[tpu]' (Linux, x86-64)."
    )
  # Else libtpu asks the metadata server of Google Cloud, for minutes.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
  jax.config.update('jax_platforms', 'cpu')  # A TPU that is here stays free.
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name)
  except (RuntimeError, NotImplementedError) as error:
    raise config.UserError(
        f'--topology={name}: libtpu refuses it: {str(error).splitlines()[0]}'
    ) from error
  # Devices that are not there cannot be asked.
  memory = accelerators.find(name.split(':')[0]).memory
  return Target(f'TPU {name}', list(found.devices), True, memory)


@contextlib.contextmanager
def use(mesh: jax.sharding.Mesh, target: Target):
  """As `sharding.use`, for devices that may not exist."""
  if not target.described:
    with sharding.use(mesh):
      yield
    return
  # The mesh itself would make eager operations run on its devices.
  abstract = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  with abstract, nn.logical_axis_rules(sharding.RULES):
    yield
