# SPDX-License-Identifier: Apache-2.0
"""Published figures of accelerators: what plans and benchmarks divide by."""

import re
from typing import Any, NamedTuple

from moellava_jax import config


class Accelerator(NamedTuple):
  """One device: a GPU, or a chip of a TPU (what JAX calls a device).

  `peak` is bf16 FLOP/s of dense matrices: half of what data sheets give "with
  sparsity". `memory` is the published capacity in bytes of 10^9 a GB, and
  `bandwidth` that of this memory, bytes a second. `source` has all three.
  """

  name: str
  peak: float
  memory: int
  bandwidth: float
  source: str
  kind: str


_NVIDIA = 'https://www.nvidia.com/en-us/data-center'
_GOOGLE = 'https://docs.cloud.google.com/tpu/docs'

ACCELERATORS = {
    'a100-80g': Accelerator(
        'A100-80G SXM',
        312e12,
        80 * 10**9,
        2.039e12,
        f'{_NVIDIA}/a100/',
        r'.*A100.*80GB.*',
    ),
    'h100': Accelerator(
        'H100 SXM',
        989e12,
        80 * 10**9,
        3.35e12,
        f'{_NVIDIA}/h100/',
        r'.*H100.*',
    ),
    'h200': Accelerator(
        'H200 SXM',
        989e12,
        141 * 10**9,
        4.8e12,
        f'{_NVIDIA}/h200/',
        r'.*H200.*',
    ),
    'v5e': Accelerator(
        'TPU v5e',
        197e12,
        16 * 10**9,
        0.819e12,
        f'{_GOOGLE}/v5e',
        r'TPU v5 ?(lite|e)',
    ),
    'v5p': Accelerator(
        'TPU v5p',
        459e12,
        95 * 10**9,
        2.765e12,
        f'{_GOOGLE}/v5p',
        r'TPU v5p?',
    ),
    'v6e': Accelerator(
        'TPU v6e',
        918e12,
        32 * 10**9,
        1.64e12,
        f'{_GOOGLE}/v6e',
        r'TPU v6 ?(lite|e)',
    ),
}

# Of the capacity: the rest is the runtime's, and lost between buffers. JAX
# itself takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
USABLE = 0.92


def find(name: str) -> Accelerator:
  """Raises UserError if `name` is not in the table; lists what is."""
  if name not in ACCELERATORS:
    raise config.UserError(
        f'--accelerator={name} is not known; expected one of'
        f' {", ".join(ACCELERATORS)}.'
    )
  return ACCELERATORS[name]


def of_device(device: Any) -> Accelerator | None:
  """The accelerator that a JAX device is; None: none of the table."""
  for found in ACCELERATORS.values():
    if re.fullmatch(found.kind, device.device_kind):
      return found
  return None
