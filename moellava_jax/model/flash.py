# SPDX-License-Identifier: Apache-2.0
"""Causal attention of packed rows without their T x T scores in memory.

On GPUs by cuDNN's kernel (`jax.nn.dot_product_attention`), on TPUs by splash
attention, the Pallas kernel in JAX. Both take what `dot_product.attend_causal`
takes, in training and for prompts, and give the same results, up to rounding, at
all real positions. Neither has been run on its accelerator here: a process
compares its kernel with `dot_product.attend` on a small case first, and does
without it if they differ.
"""

import functools
import math
from typing import Any

from flax.linen import spmd
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from moellava_jax import config
from moellava_jax.model import dot_product, layers

# Rows shorter than this have scores as small as everything else.
SHORTEST = 256
# Kernels divide rows into tiles of so many positions; splash a head as well.
_TILE = 128
# Of the largest value: bf16 rounds by 1/256, in another order.
_TOLERANCE = 0.05


def choose(
    setting: str, platform: str, dtype: jnp.dtype, head_dim: int, length: int
) -> str:
  """'einsum' (`dot_product`) or 'flash' (`attend`).

  Args:
    setting: `config.ModelConfig.attention`.
    platform: of the devices.
    dtype: of queries, keys and values.
    head_dim: d.
    length: T.

  Raises:
    UserError: 'flash' is wanted where it cannot be had; says why.
  """
  if setting == 'einsum':
    return setting
  short = length < SHORTEST or platform not in _KERNELS
  if setting == 'auto' and short:
    return 'einsum'
  why = _why_not(platform, dtype, head_dim)
  if why is None:
    return 'flash'
  if setting == 'auto':
    _announce(f"model.attention='auto' is 'einsum' on {platform}: {why}")
    return 'einsum'
  raise config.UserError(
      f"model.attention='flash' cannot be had on {platform}: {why}. Set"
      " model.attention to 'auto' or 'einsum'."
  )


def attend(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
  """`dot_product.attend_causal`, by the platform's kernel.

  Padding queries may see other keys than there; nobody sees what they get.
  Every device runs the kernel on the rows and heads it holds.
  """
  local = _KERNELS[layers.platform()]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or math.prod(mesh.shape.values()) == 1:
    return local(q_BTHd, k_BTKd, v_BTKd, segment_ids_BT)
  rows = _axes('batch', len(q_BTHd), mesh)
  # All heads or a share of both: a query's key head has to be on its device.
  heads = _axes('kv_heads', k_BTKd.shape[2], mesh)
  split = PartitionSpec(rows, None, heads)
  return jax.shard_map(
      local,
      in_specs=(split, split, split, PartitionSpec(rows)),
      out_specs=split,
      check_vma=False,  # Kernels do not say how their results vary.
  )(q_BTHd, k_BTKd, v_BTKd, segment_ids_BT)


def _axes(name: str, size: int, mesh: Any) -> Any:
  """Mesh axes of the logical axis if they divide `size`; else None."""
  (axes,) = spmd.logical_to_mesh_axes((name,)) or (None,)
  if axes is None:
    return None
  names = (axes,) if isinstance(axes, str) else axes
  return None if size % math.prod(mesh.shape[n] for n in names) else axes


def cudnn(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    implementation: Any = 'cudnn',
) -> jax.Array:
  """By `jax.nn.dot_product_attention`, which has bf16 and fp16 kernels."""
  length = q_BTHd.shape[1]
  q_BTHd, k_BTKd, v_BTKd = (_tiled(x) for x in (q_BTHd, k_BTKd, v_BTKd))
  mask_BTS = dot_product.causal_mask(_tiled(segment_ids_BT))
  y_BTHd = jax.nn.dot_product_attention(
      q_BTHd,
      k_BTKd,
      v_BTKd,
      mask=mask_BTS[:, None],
      is_causal=True,  # So that it skips the tiles above the diagonal.
      implementation=implementation,
  )
  return y_BTHd[:, :length]


def splash(
    q_BTHd: jax.Array,
    k_BTKd: jax.Array,
    v_BTKd: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
  """By the Pallas kernel for TPUs; `interpret` runs it anywhere, slowly."""
  from jax.experimental.pallas.ops.tpu import splash_attention as lib

  length, heads, d = q_BTHd.shape[1:]
  q_BTHd *= jnp.asarray(d**-0.5, q_BTHd.dtype)
  q_BHTd, k_BKTd, v_BKTd = (
      jnp.swapaxes(_tiled(x, head=True), 1, 2) for x in (q_BTHd, k_BTKd, v_BTKd)
  )
  segments_BT = _tiled(segment_ids_BT)
  padded = segments_BT.shape[1]
  run = lib.make_splash_mha(
      lib.MultiHeadMask([lib.CausalMask((padded, padded))] * heads),
      block_sizes=_blocks(lib, padded),
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
  )

  def row(q_HTd, k_KTd, v_KTd, segments_T):
    return run(q_HTd, k_KTd, v_KTd, lib.SegmentIds(segments_T, segments_T))

  y_BHTd: Any = jax.vmap(row)(q_BHTd, k_BKTd, v_BKTd, segments_BT)
  return jnp.swapaxes(y_BHTd, 1, 2)[:, :length, :, :d]


def _blocks(lib: Any, length: int) -> Any:
  """Tiles of up to 512 positions, forward and backward."""
  forward = ('q', 'kv', 'kv_compute')
  backward = ('q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
  side = math.gcd(length, 512)
  return lib.BlockSizes(
      **{f'block_{name}': side for name in forward + backward}
  )


# By platform. The CPU has none.
_KERNELS = {'gpu': cudnn, 'tpu': splash}


def _tiled(x: jax.Array, *, head: bool = False) -> jax.Array:
  """`[B, T, ...]` with zeros at the end: whole tiles, of the head as well."""
  pad = [(0, 0)] * x.ndim
  pad[1] = (0, -x.shape[1] % _TILE)
  if head:
    pad[-1] = (0, -x.shape[-1] % _TILE)
  return jnp.pad(x, pad)


def _why_not(platform: str, dtype: jnp.dtype, head_dim: int) -> str | None:
  """Why the platform's kernel cannot be used; None: it can."""
  if platform not in _KERNELS:
    return 'there is no kernel for it'
  if platform == 'gpu' and dtype == jnp.float32:
    return 'cuDNN has no fp32 kernel'
  if platform == 'gpu' and (head_dim % 8 or head_dim > 128):
    return f'head_dim={head_dim}; cuDNN takes multiples of 8 up to 128'
  if jax.default_backend() != platform:
    return None  # Compiled for devices that are not here.
  return _fails(platform, jnp.dtype(dtype).name, head_dim)


@functools.cache
def _fails(platform: str, dtype: str, head_dim: int) -> str | None:
  """What is wrong with the kernel on this machine, by a small case."""
  try:
    with jax.ensure_compile_time_eval():
      difference = _difference(platform, jnp.dtype(dtype), head_dim)
  # Whatever a driver, a library or a compiler may raise.
  except Exception as error:
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]
  if difference < _TOLERANCE:
    return None
  return f'its results differ from those of einsum by {difference:.2g}'


def _difference(platform: str, dtype: jnp.dtype, head_dim: int) -> float:
  """Largest difference to `dot_product.attend`, over the largest value."""
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (2, 200, 2, head_dim)
  with jax.default_device(jax.local_devices()[0]):
    q, k, v, weight = (
        jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys
    )
    segments_BT = jnp.repeat(jnp.array([[1, 2], [1, 0]]), 100, axis=1)

    def loss(inputs, run):
      y_BTHd = run(*inputs).astype(jnp.float32)
      real_BT = (segments_BT > 0)[..., None, None]
      return jnp.sum(jnp.where(real_BT, y_BTHd * weight, 0)), y_BTHd * real_BT

    def both(run):
      step = jax.value_and_grad(loss, has_aux=True)
      (_, y), gradients = jax.jit(functools.partial(step, run=run))((q, k, v))
      return (y, *gradients)

    mask_BTS = dot_product.causal_mask(segments_BT)
    ours = both(lambda q, k, v: dot_product.attend(q, k, v, mask_BTS))
    theirs = both(lambda q, k, v: _KERNELS[platform](q, k, v, segments_BT))
    pairs = [map(np.asarray, pair) for pair in zip(ours, theirs, strict=True)]
  # By numpy: the largest of many NaN is -inf by XLA's CPU.
  return float(
      np.max([np.max(np.abs(a - b)) / np.max(np.abs(a)) for a, b in pairs])
  )


@functools.cache
def _announce(line: str) -> None:
  """Prints a line once."""
  print(line, flush=True)
