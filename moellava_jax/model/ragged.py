# SPDX-License-Identifier: Apache-2.0
"""Experts of any number of tokens each: rows sorted by expert, none dropped.

On TPUs by grouped products (`jax.lax.ragged_dot`). Elsewhere XLA has none: on
CPUs and, in jaxlib 0.10.2, on NVIDIA GPUs its form multiplies all rows with all
experts and masks the result (newer ones still do for gradients of weights). So
there the run of each expert is padded to blocks of
rows, and loops go over experts and their blocks: as many as there are, so that
only what rounding up adds is wasted.

Letters: T tokens, k choices per token, E experts, R sorted rows with padding,
b rows of a block.
"""

import functools
import math
from typing import Any

from flax.linen import spmd
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moellava_jax.model import dispatch, layers
from moellava_jax.model import experts as experts_lib
from moellava_jax.model import routing as routing_lib

_BLOCK = 128  # Rows, at least; products of twice as many are a little faster.
# As many of these: a GPU waits for its host in every round of a loop whose
# length it does not know, some 20 us, and multiplies 512 rows with an expert of
# full size in 45 to 70 us: estimates, not measured.
_BLOCKS_OF_GPU = 4


def block_rows(choices: int, experts: int) -> int:
  """Rows of a block (b): twice the least where rounding adds 1/4 at most."""
  least = _BLOCK * (_BLOCKS_OF_GPU if layers.platform() == 'gpu' else 1)
  return 2 * least if choices >= 8 * least * experts else least


def beats_every(weights: experts_lib.Weights, tokens: int, top_k: int) -> bool:
  """Whether `ragged` takes less time than `experts.every`, where both serve.

  On the CPU, if the products of a block outweigh what its loop costs, a fixed
  0.2 ms, and blocks have 3/4 of the rows. 512 tokens, E=4, k=2, swiglu: 26 of
  31 ms at D=256, F=1024; 11.9 of 10.8 ms at D=128, F=512. 4096 tokens: 152 of
  244 ms at D=256. Not where several devices share the tokens, each with blocks
  of its own.
  """
  if math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1:
    return False
  experts, width, mlp_width = weights.up[0].kernel_EDF.shape
  choices = tokens * top_k
  rows = choices + experts * block_rows(choices, experts)
  large = width * mlp_width >= 1 << 17
  return (
      layers.platform() == 'cpu' and large and 4 * rows <= 3 * tokens * experts
  )


def sort(
    routing: routing_lib.Routing, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rows in the order of their experts; a run begins at a multiple of `block`.

  Returns:
    place_1Tk: int32, the row of each choice; R where it is not kept.
    filled_11R: int32, token * k + choice of what is in a row; T k where it is
      empty.
    size_E: int32, rows of each expert, padding included.
  """
  experts = routing.probs_GSE.shape[-1]
  top_k = routing.choice_GSk.shape[-1]
  expert_N = jnp.where(routing.kept_GSk, routing.choice_GSk, experts).ravel()
  mine_NE = expert_N[:, None] == jnp.arange(experts)
  queue_NE = jnp.cumsum(mine_NE.astype(jnp.int32), axis=0)
  size_E = -(-queue_NE[-1] // block) * block
  begin_E = jnp.cumsum(size_E) - size_E
  row_N = jnp.sum((queue_NE - 1 + begin_E) * mine_NE, axis=-1)
  count = expert_N.size
  rows = (-(-count // block) + experts) * block if block > 1 else count
  row_N = jnp.where(expert_N < experts, row_N, rows)
  filled_R = jnp.full(rows, count, jnp.int32)
  number_N = jnp.arange(count, dtype=jnp.int32)
  filled_R = filled_R.at[row_N].set(number_N, mode='drop')
  return row_N.reshape(1, -1, top_k), filled_R[None, None], size_E


def ragged(
    x_GSD: jax.Array,
    routing: routing_lib.Routing,
    weights: experts_lib.Weights,
    kind: str,
    dtype: jnp.dtype,
) -> jax.Array:
  """What the experts make of the tokens they keep, fp32 `[G, S, D]`.

  Every device sorts the groups it holds, and has all experts.
  """
  local = functools.partial(_local, kind=kind, dtype=dtype)
  mesh = jax.sharding.get_abstract_mesh()
  (axes,) = spmd.logical_to_mesh_axes(('batch',)) or (None,)
  if mesh.empty or axes is None:
    return local(x_GSD, routing, weights)
  ways = math.prod(mesh.shape[axis] for axis in axes)
  if ways == 1 or len(x_GSD) % ways:
    return local(x_GSD, routing, weights)
  rows = PartitionSpec(axes)
  return jax.shard_map(
      local,
      in_specs=(rows, rows, PartitionSpec()),
      out_specs=rows,
      check_vma=False,  # Loops whose length differs from device to device.
  )(x_GSD, routing, weights)


def _local(x_GSD, routing, weights, *, kind, dtype):
  by_blocks = layers.platform() != 'tpu'
  experts = routing.probs_GSE.shape[-1]
  block = block_rows(routing.choice_GSk.size, experts) if by_blocks else 1
  place_1Tk, filled_11R, size_E = sort(routing, block)
  x_1TD = x_GSD.reshape(1, -1, x_GSD.shape[-1]).astype(dtype)
  x_RD = dispatch.to_slots(x_1TD, place_1Tk, filled_11R)[0, 0]
  run: Any = functools.partial(blocks, block=block) if by_blocks else grouped
  y_RD = run(weights, x_RD, size_E, kind, dtype).astype(dtype)
  weight_1Tk = routing.weight_GSk.reshape(place_1Tk.shape)
  y_1TD = dispatch.from_slots(
      y_RD[None, None], weight_1Tk, place_1Tk, filled_11R
  )
  return y_1TD.reshape(x_GSD.shape)


def grouped(weights, x_RD, size_E, kind, dtype) -> jax.Array:
  """The FFNs by grouped products, fp32 `[R, D]`; see `blocks`."""
  end_E = jnp.cumsum(size_E)
  row_R1 = jnp.arange(len(x_RD))[:, None]
  expert_R = jnp.sum(row_R1 >= end_E, axis=-1)

  def linear(x_RD, one):
    y_RF = jax.lax.ragged_dot(
        x_RD.astype(dtype),
        one.kernel_EDF.astype(dtype),
        size_E,
        preferred_element_type=jnp.float32,
    )
    if one.bias_EF is not None:
      bias_EF = one.bias_EF.astype(jnp.float32)
      y_RF += jnp.take(bias_EF, expert_R, axis=0, mode='clip')
    return y_RF

  parts = tuple(linear(x_RD, one) for one in weights.up)
  return linear(experts_lib.activate(kind, parts), weights.down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def blocks(weights, x_RD, size_E, kind, dtype, block) -> jax.Array:
  """The FFNs by loops over experts and their blocks, fp32 `[R, D]`.

  Args:
    weights: of E experts.
    x_RD: sorted by expert.
    size_E: int32, rows of each, multiples of `block`; rows behind them are not
      computed, their result is 0.
    kind: of the FFN.
    dtype: of the factors of products.
    block: rows of a block.
  """
  return _run(weights, x_RD, size_E, kind, dtype, block, keeps=False)[0]


def _product(equation, dtype):
  return lambda x, y: layers.product(equation, x, y, dtype)


def _rounded(weights, dtype):
  """Kernels as products take them: not rounded again in every block."""
  return jax.tree.map(
      lambda one: one._replace(kernel_EDF=one.kernel_EDF.astype(dtype)),
      weights,
      is_leaf=lambda node: isinstance(node, experts_lib.Linear),
  )


def _loop(weights, size_E, block, body, sums, buffers):
  """`body(one expert's weights, first row, sums, buffers)` of every block.

  `sums` begin anew for each expert and come back stacked; `buffers` are handed
  on.
  """
  first_E = (jnp.cumsum(size_E) - size_E) // block

  def expert(buffers, given):
    own, first, count = given

    def step(n, carry):
      return body(own, n * block, *carry)

    sums_of_one, buffers = jax.lax.fori_loop(
        first, first + count, step, (sums, buffers)
    )
    return buffers, sums_of_one

  return jax.lax.scan(expert, buffers, (weights, first_E, size_E // block))


def _take(x_RF, at, block):
  return jax.lax.dynamic_slice_in_dim(x_RF, at, block)


def _put(x_RF, new_bF, at):
  return jax.lax.dynamic_update_slice_in_dim(
      x_RF, new_bF.astype(x_RF.dtype), at, 0
  )


def _run(weights, x_RD, size_E, kind, dtype, block, *, keeps):
  """(results, what `activate` was given if `keeps`)."""
  multiply = _product('bD,DF->bF', dtype)

  def linear(x_bD, one):
    y_bF = multiply(x_bD, one.kernel_EDF)
    if one.bias_EF is not None:
      y_bF += one.bias_EF.astype(jnp.float32)
    return y_bF

  def body(own, at, sums, buffers):
    y_RD, parts = buffers
    x_bD = _take(x_RD, at, block)
    new = tuple(linear(x_bD, one) for one in own.up)
    parts = tuple(_put(*pair, at) for pair in zip(parts, new, strict=False))
    y_bD = linear(experts_lib.activate(kind, new), own.down)
    return sums, (_put(y_RD, y_bD, at), parts)

  rows, width = x_RD.shape
  parts = tuple(
      jnp.zeros((rows, one.kernel_EDF.shape[-1])) for one in weights.up if keeps
  )
  (y_RD, parts), _ = _loop(
      _rounded(weights, dtype),
      size_E,
      block,
      body,
      (),
      (jnp.zeros((rows, width)), parts),
  )
  return y_RD, parts


def _blocks_forward(weights, x_RD, size_E, kind, dtype, block):
  y_RD, parts = _run(weights, x_RD, size_E, kind, dtype, block, keeps=True)
  return y_RD, (weights, x_RD, size_E, parts)


def _blocks_backward(kind, dtype, block, kept, grad_RD):
  weights, x_RD, size_E, parts = kept
  to_weights = _product('bD,bF->DF', dtype)
  to_input = _product('bF,DF->bD', dtype)

  def add(total, x_bD, grad_bF):
    bias_F = total.bias_EF
    if bias_F is not None:
      bias_F += jnp.sum(grad_bF, axis=0)
    kernel_DF = total.kernel_EDF + to_weights(x_bD, grad_bF)
    return experts_lib.Linear(kernel_DF, bias_F)

  def body(own, at, sums, grad_x_RD):
    grad_bD = _take(grad_RD, at, block)
    hidden_bF, back = jax.vjp(
        functools.partial(experts_lib.activate, kind),
        tuple(_take(part, at, block) for part in parts),
    )
    down = add(sums.down, hidden_bF, grad_bD)
    (grads,) = back(to_input(grad_bD, own.down.kernel_EDF))
    x_bD = _take(x_RD, at, block)
    up = tuple(
        add(total, x_bD, grad_bF)
        for total, grad_bF in zip(sums.up, grads, strict=True)
    )
    grad_x_bD = sum(
        to_input(grad_bF, one.kernel_EDF)
        for grad_bF, one in zip(grads, own.up, strict=True)
    )
    return experts_lib.Weights(up, down), _put(grad_x_RD, grad_x_bD, at)

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), weights)
  grad_x_RD, grads = _loop(
      _rounded(weights, dtype), size_E, block, body, zeros, jnp.zeros_like(x_RD)
  )
  grads = jax.tree.map(lambda new, old: new.astype(old.dtype), grads, weights)
  return grads, grad_x_RD, None


blocks.defvjp(_blocks_forward, _blocks_backward)
