# SPDX-License-Identifier: Apache-2.0
"""E feed-forward networks: their parameters, and their products.

The products are functions of the parameters, because what is computed from
them differs: all slots of all experts, every expert of every token, only the
experts that were chosen. Experts come first in the arrays, as a batched product
wants them: anywhere else, every product would transpose what it reads and what
it writes.

Letters: G groups, C slots of an expert, N tokens, k choices per token.
"""

from typing import NamedTuple

import flax.linen as nn
from flax.linen import spmd
import jax
import jax.numpy as jnp

from moellava_jax.model import layers


class Linear(NamedTuple):
  kernel_EDF: jax.Array
  bias_EF: jax.Array | None


class Weights(NamedTuple):
  """down(activate(up_0(x), ...)) of each expert."""

  up: tuple[Linear, ...]  # fc1, or gate and up.
  down: Linear


class _Linear(nn.Module):
  """Parameters of E linear maps, named as those of a `layers.Dense`."""

  num_experts: int
  shape: tuple[int, int]
  axes: tuple[str, str]
  use_bias: bool

  @nn.compact
  def __call__(self) -> Linear:
    fan_in, features = self.shape
    kernel_EDF = self.param(
        'kernel',
        layers.partitioned(layers.kernel_init(fan_in), ('expert', *self.axes)),
        (self.num_experts, fan_in, features),
    )
    if not self.use_bias:
      return Linear(kernel_EDF, None)
    bias_EF = self.param(
        'bias',
        layers.partitioned(nn.initializers.zeros, ('expert', self.axes[1])),
        (self.num_experts, features),
    )
    return Linear(kernel_EDF, bias_EF)


class Experts(nn.Module):
  """The parameters of E copies of a `layers.Mlp`."""

  kind: str
  width: int
  use_bias: bool
  num_experts: int

  @nn.compact
  def __call__(self, features: int) -> Weights:
    """`features` is the width (D) of what they read and write."""

    def linear(name, shape, axes):
      return _Linear(self.num_experts, shape, axes, self.use_bias, name=name)()

    gated = self.kind == 'swiglu'
    up = ('gate', 'up') if gated else ('fc1',)
    wider, narrower = (features, self.width), (self.width, features)
    return Weights(
        tuple(linear(name, wider, ('embed', 'mlp')) for name in up),
        linear('down' if gated else 'fc2', narrower, ('mlp', 'embed')),
    )


def activate(kind: str, parts: tuple[jax.Array, ...]) -> jax.Array:
  """What `Weights.down` reads, from the results of `Weights.up`."""
  if kind == 'swiglu':
    gate, up = parts
    return nn.silu(gate) * up
  (x,) = parts
  return layers.ACTIVATIONS[kind](x)


def buckets(
    weights: Weights, kind: str, x_EGCD: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Every expert's FFN of its slots, fp32 `[E, G, C, D]`."""

  def linear(x_EGCD, one):
    y_EGCF = layers.product('EGCD,EDF->EGCF', x_EGCD, one.kernel_EDF, dtype)
    if one.bias_EF is not None:
      y_EGCF += one.bias_EF.astype(jnp.float32)[:, None, None]
    return y_EGCF

  hidden = activate(kind, tuple(linear(x_EGCD, one) for one in weights.up))
  return linear(hidden, weights.down)


def every(
    weights: Weights,
    kind: str,
    x_ND: jax.Array,
    weight_NE: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
  """The sum over all experts of each token by weight, fp32 `[N, D]`.

  As many products as buckets that never drop would take (C = S), and nothing to
  be carried: a weight of 0 does what an empty slot does.
  """
  shape = (weight_NE.shape[-1], 1, *x_ND.shape)
  spread = None if len(x_ND) == 1 else 'expert_batch'
  x_E1ND = spmd.with_logical_constraint(
      jnp.broadcast_to(x_ND, shape), ('expert', None, spread, None)
  )
  y_E1ND = buckets(weights, kind, x_E1ND, dtype).astype(dtype)
  weight_EN1 = weight_NE.T[..., None]
  return jnp.sum(y_E1ND[:, 0].astype(jnp.float32) * weight_EN1, axis=0)


def chosen(
    weights: Weights,
    kind: str,
    x_ND: jax.Array,
    choice_Nk: jax.Array,
    weight_Nk: jax.Array,
    dtype: jnp.dtype,
) -> jax.Array:
  """The same for one or two tokens: only what they chose is read."""

  def one(x_D, expert, weight):
    own = jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, expert, 1), weights
    )
    y_1D = buckets(own, kind, x_D[None, None, None], dtype)[0, 0]
    return y_1D.astype(dtype).astype(jnp.float32) * weight

  tokens, top_k = choice_Nk.shape
  return jnp.concatenate(
      [
          sum(
              one(x_ND[n], choice_Nk[n, i], weight_Nk[n, i])
              for i in range(top_k)
          )
          for n in range(tokens)
      ]
  )


def reads_less(tokens: int, top_k: int, num_experts: int) -> bool:
  """Whether `chosen` moves fewer weights than `every`.

  A CPU copies the weights of an expert before it multiplies with them: they
  are read, written and read again. D=256, F=1024, E=4, k=2, one token: 0.85 ms
  against the 0.51 ms of all experts.
  """
  moved = tokens * top_k * (3 if layers.platform() == 'cpu' else 1)
  return moved < num_experts or (moved == num_experts and tokens <= 2)
