# SPDX-License-Identifier: Apache-2.0
"""E feed-forward networks: their parameters, and what they make of buckets.

The products are functions of the parameters, because what is computed from
them differs: all slots of all experts, blocks of rows, a few chosen experts.
Experts come first in the arrays, as a batched product wants them: anywhere
else, every product would transpose what it reads and what it writes.
"""

from typing import NamedTuple

import flax.linen as nn
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
