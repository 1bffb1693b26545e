# SPDX-License-Identifier: Apache-2.0
"""Carries tokens to the slots of experts and back: by products, or by index.

Both fill the same slots and return the same result. The products (GShard,
arXiv 2006.16668) are the definition; they cost 2 S / (n F) of the experts' own,
with n matrices of D x F each. By index, integers are scattered, and activations
are only ever gathered, forward and backward: adding up floats where many rows
may meet is slow on every backend.

Letters: G groups, S tokens per group, E experts, C slots of an expert, k
choices per token, N = S k assignments of a group.
"""

from collections.abc import Callable
import functools

from flax.linen import spmd
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from moellava_jax.model import layers
from moellava_jax.model import routing as routing_lib

# Name, for rematerialisation, of what experts receive and what they return.
EXPERT_IO = 'expert_io'

# `[E, G, C, D] -> [E, G, C, D]`: every expert's FFN of its slots.
Buckets = Callable[[jax.Array], jax.Array]


def one_hot(
    routing: routing_lib.Routing, slots: int, dtype
) -> tuple[jax.Array, jax.Array]:
  """The routing as (dispatch_GSEC, combine_GSEC) for `slots` buckets.

  A token that fills no slot has an all-zero row: its output is 0 and only the
  residual connection carries it on.
  """
  experts = routing.probs_GSE.shape[-1]
  shape = (*routing.probs_GSE.shape, slots)
  dispatch_GSEC = jnp.zeros(shape, dtype)
  combine_GSEC = jnp.zeros(shape, dtype)
  for n in range(routing.choice_GSk.shape[-1]):
    kept_GS1 = routing.kept_GSk[..., n, None]
    expert_GSE = jax.nn.one_hot(routing.choice_GSk[..., n], experts) * kept_GS1
    slot_GSC = jax.nn.one_hot(routing.slot_GSk[..., n], slots)
    place_GSEC = expert_GSE[..., :, None] * slot_GSC[..., None, :]
    weight_GS11 = routing.weight_GSk[..., n, None, None]
    dispatch_GSEC += place_GSEC.astype(dtype)
    combine_GSEC += (weight_GS11 * place_GSEC).astype(dtype)
  return dispatch_GSEC, combine_GSEC


def resolve(dispatch: str, platform: str, *, quiet: bool = False) -> str:
  """What 'auto' stands for, said once; other names stand for themselves.

  Only among what gives the same results, so that no setting of a run depends
  on where it runs.
  """
  if dispatch != 'auto':
    return dispatch
  name, why = _AUTO.get(platform, _AUTO['cpu'])
  if not quiet:
    _announce(f"model.moe.dispatch='auto' is {name!r} on {platform}: {why}")
  return name


_AUTO = {
    'cpu': (
        'index',
        'products took 1.2 to 4.9 times as long, in groups of the same size',
    ),
    'gpu': ('index', 'it has no products to carry tokens (not measured)'),
    'tpu': ('einsum', 'it makes the one-hot factors on the fly (not measured)'),
}


@functools.cache
def _announce(line: str) -> None:
  """Prints a line once."""
  print(line, flush=True)


def einsum(
    x_GSD: jax.Array,
    routing: routing_lib.Routing,
    slots: int,
    experts: Buckets,
    dtype: jnp.dtype,
) -> jax.Array:
  """The layer by one-hot products, fp32 `[G, S, D]`."""
  dispatch_GSEC, combine_GSEC = one_hot(routing, slots, dtype)
  x_EGCD = layers.product('GSEC,GSD->EGCD', dispatch_GSEC, x_GSD, dtype)
  y_EGCD = _exchange(x_EGCD, experts, dtype)
  return layers.product('EGCD,GSEC->GSD', y_EGCD, combine_GSEC, dtype)


def index(
    x_GSD: jax.Array,
    routing: routing_lib.Routing,
    slots: int,
    experts: Buckets,
    dtype: jnp.dtype,
) -> jax.Array:
  """The layer by gathers, fp32 `[G, S, D]`; sums are fp32."""
  experts_count = routing.probs_GSE.shape[-1]
  place_GSk, filled_GEC = places(routing, slots, experts_count)
  x_EGCD = to_slots(x_GSD.astype(dtype), place_GSk, filled_GEC)
  y_EGCD = _exchange(x_EGCD, experts, dtype)
  return from_slots(y_EGCD, routing.weight_GSk, place_GSk, filled_GEC)


def _exchange(x_EGCD: jax.Array, experts: Buckets, dtype) -> jax.Array:
  """Runs the experts where they are.

  The two constraints on each side make the partitioner exchange tokens
  (all-to-all) instead of gathering the experts' weights.
  """
  lone = x_EGCD.shape[1] == 1
  batch, spread = (None, None) if lone else ('batch', 'expert_batch')

  def here(x):
    return spmd.with_logical_constraint(x, (None, batch, None, None))

  def there(x):
    return spmd.with_logical_constraint(x, ('expert', spread, None, None))

  x_EGCD = there(here(x_EGCD))
  x_EGCD = ad_checkpoint.checkpoint_name(x_EGCD, EXPERT_IO)
  y_EGCD = experts(x_EGCD).astype(dtype)
  y_EGCD = here(there(y_EGCD))
  return ad_checkpoint.checkpoint_name(y_EGCD, EXPERT_IO)


def places(
    routing: routing_lib.Routing, slots: int, experts: int
) -> tuple[jax.Array, jax.Array]:
  """Slots by choice and choices by slot.

  Args:
    routing: of G groups of S tokens.
    slots: buckets (C) of each expert.
    experts: E.

  Returns:
    place_GSk: int32, expert * C + slot; E C where not kept.
    filled_GEC: int32, token * k + choice of what fills a slot; S k where it
      is empty.
  """
  groups, size, k = routing.choice_GSk.shape
  place_GSk = jnp.where(
      routing.kept_GSk,
      routing.choice_GSk * slots + routing.slot_GSk,
      experts * slots,
  )
  number_GN = jnp.broadcast_to(
      jnp.arange(size * k, dtype=jnp.int32), (groups, size * k)
  )
  empty_GZ = jnp.full((groups, experts * slots), size * k, jnp.int32)
  place_GN = place_GSk.reshape(groups, -1)
  filled_GZ = jax.vmap(
      lambda empty_Z, place_N, number_N: empty_Z.at[place_N].set(
          number_N, mode='drop', unique_indices=False
      )
  )(empty_GZ, place_GN, number_GN)
  return place_GSk, filled_GZ.reshape(groups, experts, slots)


def _rows(x_GND: jax.Array, index_GM: jax.Array) -> jax.Array:
  """Rows of each group by number, `[G, M, D]`; zeros where there is none."""
  return jnp.take_along_axis(
      x_GND, index_GM[..., None], axis=1, mode='fill', fill_value=0
  )


@jax.custom_vjp
def to_slots(x_GSD, place_GSk, filled_GEC):
  """What fills each slot, `[E, G, C, D]`; empty ones are 0."""
  groups, experts, slots = filled_GEC.shape
  index_GZ = filled_GEC.reshape(groups, -1) // place_GSk.shape[-1]
  x_GZD = _rows(x_GSD, index_GZ)
  x_GECD = x_GZD.reshape(groups, experts, slots, -1)
  return jnp.swapaxes(x_GECD, 0, 1)


def _to_slots_forward(x_GSD, place_GSk, filled_GEC):
  return to_slots(x_GSD, place_GSk, filled_GEC), (place_GSk,)


def _to_slots_backward(kept, grad_EGCD):
  (place_GSk,) = kept
  grad_GSkD = _of_choices(grad_EGCD, place_GSk).astype(jnp.float32)
  grad_GSD = _sum_of_choices(grad_GSkD).astype(grad_EGCD.dtype)
  return grad_GSD, None, None


to_slots.defvjp(_to_slots_forward, _to_slots_backward)


def _of_choices(x_EGCD, place_GSk):
  """What is in the slot of each choice, `[G, S, k, D]`; 0 for a dropped one."""
  experts, groups, slots, width = x_EGCD.shape
  x_GZD = jnp.swapaxes(x_EGCD, 0, 1).reshape(groups, experts * slots, width)
  x_GND = _rows(x_GZD, place_GSk.reshape(groups, -1))
  return x_GND.reshape(*place_GSk.shape, width)


def _sum_of_choices(x_GSkD):
  """As additions: XLA's CPU would fuse a sum with the gather, as below."""
  return functools.reduce(jnp.add, jnp.unstack(x_GSkD, axis=2))


@jax.custom_vjp
def from_slots(y_EGCD, weight_GSk, place_GSk, filled_GEC):
  """The sum of a token's results by weight, fp32 `[G, S, D]`."""
  del filled_GEC
  y_GSkD = _of_choices(y_EGCD, place_GSk).astype(jnp.float32)
  return _sum_of_choices(y_GSkD * weight_GSk[..., None])


def _from_slots_forward(y_EGCD, weight_GSk, place_GSk, filled_GEC):
  y_GSD = from_slots(y_EGCD, weight_GSk, place_GSk, filled_GEC)
  return y_GSD, (y_EGCD, weight_GSk, place_GSk, filled_GEC)


def _from_slots_backward(kept, grad_GSD):
  y_EGCD, weight_GSk, place_GSk, filled_GEC = kept
  groups, experts, slots = filled_GEC.shape
  k = weight_GSk.shape[-1]
  filled_GZ = filled_GEC.reshape(groups, -1)
  grad_GZD = _rows(grad_GSD.astype(y_EGCD.dtype), filled_GZ // k)
  weight_GN = weight_GSk.reshape(groups, -1)
  weight_GZ1 = _rows(weight_GN[..., None], filled_GZ)
  grad_GECD = (grad_GZD * weight_GZ1).astype(y_EGCD.dtype)
  grad_GECD = grad_GECD.reshape(groups, experts, slots, -1)
  y_GSkD = _of_choices(y_EGCD, place_GSk).astype(jnp.float32)
  if layers.platform() == 'cpu':
    # Which would fuse a sum with the gather, and take 12 times as long.
    grad_GSk = jnp.einsum(
        'GSkD,GSD->GSk', y_GSkD, grad_GSD, precision=jax.lax.Precision.HIGHEST
    )
  else:  # Where a product would first write what was gathered.
    grad_GSk = jnp.sum(y_GSkD * grad_GSD[:, :, None], axis=-1)
  return jnp.swapaxes(grad_GECD, 0, 1), grad_GSk, None, None


from_slots.defvjp(_from_slots_forward, _from_slots_backward)
