# SPDX-License-Identifier: Apache-2.0
"""Building blocks shared by the tower, the projector and the decoder.

Letters in this package: B batch, T query positions, S key positions, D width,
H query heads, K key/value heads, d head size, F MLP width, E experts, C
capacity, k choices per token, V vocabulary, I images a row, P positions an
image takes. In the files of the sparse layer (`moe.py`, `routing.py`,
`dispatch.py`, `experts.py`), G and S are groups and tokens per group.
"""

import functools
import math
import string
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax import config

ACTIVATIONS = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),
}


def platform() -> str:
  """Of the devices that a program is traced for: those of the mesh in use.

  Not always those of this machine: a program can be compiled for others.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def partitioned(init: Any, axes: tuple[str, ...]) -> Any:
  """An initialiser whose parameter has the logical axes `axes`."""
  return nn.with_logical_partitioning(init, axes)


def kernel_init(fan_in: int):
  """Uniform with variance 1/fan_in; XLA compiles normals for twice as long."""
  bound = (3 / fan_in) ** 0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def product(equation: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
  """`jnp.einsum` of factors rounded to `dtype`, with an fp32 result.

  Only what enters a product is ever rounded: in bf16 this takes a third off the
  distance between the logits and those of fp32. That holds for the gradients
  too: the one that comes in is rounded, those that go out are not. Left to
  itself, JAX would multiply the fp32 gradient by bf16 factors, which GPUs do
  at the speed of fp32.

  Every letter of a factor must be in the other one or in the result.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return _multiply(equation, x, y, dtype)
  return _rounded_product(_spelt(equation, x.ndim), jnp.dtype(dtype), x, y)


def _multiply(equation, x, y, dtype):
  x, y = x.astype(dtype), y.astype(dtype)
  if platform() == 'cpu':  # It has no mixed products.
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return _by_matrices(_spelt(equation, x.ndim), x, y)
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _by_matrices(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`jnp.einsum` by `[batch, m, k] @ [batch, k, n]`.

  XLA's CPU takes twice as long for the gradient of a product whose sum is over
  several axes, such as that of a kernel over rows and positions.
  """
  factors, result = equation.split('->')
  of_x, of_y = factors.split(',')
  batch = [n for n in result if n in of_x and n in of_y]
  summed = [n for n in of_x if n in of_y and n not in result]
  rows = [n for n in result if n not in of_y]
  columns = [n for n in result if n not in of_x]
  size = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))

  def matrices(factor, letters, first, second):
    factor = factor.transpose(
        [letters.index(n) for n in batch + first + second]
    )
    shape = [math.prod(size[n] for n in each) for each in (first, second)]
    return factor.reshape(*(size[n] for n in batch), *shape)

  made = jnp.matmul(
      matrices(x, of_x, rows, summed), matrices(y, of_y, summed, columns)
  )
  letters = batch + rows + columns
  made = made.reshape([size[n] for n in letters])
  return made.transpose([letters.index(n) for n in result])


def _spelt(equation: str, ndim: int) -> str:
  """`equation` with letters for the '...' of a first factor of `ndim` axes."""
  first = equation.split(',')[0]
  if '...' not in first:
    return equation
  return equation.replace(
      '...', string.ascii_lowercase[: ndim - len(first) + 3]
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_product(equation, dtype, x, y):
  return _multiply(equation, x, y, dtype)


def _product_forward(equation, dtype, x, y):
  like = (jnp.zeros((), x.dtype), jnp.zeros((), y.dtype))
  x, y = x.astype(dtype), y.astype(dtype)
  return _multiply(equation, x, y, dtype), (x, y, like)


def _product_backward(equation, dtype, kept, gradient):
  x, y, like = kept
  factors, result = equation.split('->')
  of_x, of_y = factors.split(',')
  return (
      _multiply(f'{result},{of_y}->{of_x}', gradient, y, dtype).astype(
          like[0].dtype
      ),
      _multiply(f'{of_x},{result}->{of_y}', x, gradient, dtype).astype(
          like[1].dtype
      ),
  )


_rounded_product.defvjp(_product_forward, _product_backward)


class Dense(nn.Module):
  """A linear map of the last axis, `[..., D] -> [..., F]`, kernel `[D, F]`.

  The result is fp32, whatever `dtype` the product is taken in.
  """

  features: int
  axes: tuple[str, str]  # Logical names of the kernel's axes.
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    fan_in = x.shape[-1]
    kernel_DF = self.param(
        'kernel',
        partitioned(kernel_init(fan_in), self.axes),
        (fan_in, self.features),
    )
    y = product('...D,DF->...F', x, kernel_DF, self.dtype)
    if self.use_bias:
      y += self.param(
          'bias',
          partitioned(nn.initializers.zeros, self.axes[1:]),
          (self.features,),
      ).astype(jnp.float32)
    return y


def norm(
    kind: Literal['layernorm', 'rmsnorm'], eps: float, dtype, name: str
) -> nn.Module:
  """LayerNorm (scale and bias) or RMSNorm (scale); statistics in fp32."""
  ones = partitioned(nn.initializers.ones, ('norm',))
  if kind == 'rmsnorm':
    return nn.RMSNorm(
        epsilon=eps,
        dtype=dtype,
        scale_init=ones,
        use_fast_variance=False,
        name=name,
    )
  return nn.LayerNorm(
      epsilon=eps,
      dtype=dtype,
      scale_init=ones,
      bias_init=partitioned(nn.initializers.zeros, ('norm',)),
      use_fast_variance=False,
      name=name,
  )


class Rotation(NamedTuple):
  """What `rotate` turns heads by: of n rotated dimensions, n/2 angles each."""

  cos_BTd: jax.Array
  sin_BTd: jax.Array


def rotation(
    positions_BT: jax.Array, head_dim: int, fraction: float, base: float
) -> Rotation | None:
  """Angles of rotary embedding for the first `fraction` of the head size, fp32.

  The layout of all backbones of the original: dimension i turns with
  dimension i + n/2 of the n rotated ones, at the angle position / base^(2i/n).
  None if nothing is rotated.

  Raises:
    UserError: n is odd; dimensions turn in pairs.
  """
  n = int(head_dim * fraction)
  if n % 2:
    raise config.UserError(
        f'model.llm.head_dim={head_dim} times rotary_fraction={fraction}'
        f' rotates {n} dimensions; expected an even number, as they turn in'
        ' pairs.'
    )
  if n == 0:
    return None
  inverse = base ** (-jnp.arange(0, n, 2, dtype=jnp.float32) / n)
  angle_BTd = positions_BT[..., None].astype(jnp.float32) * inverse
  if platform() != 'cpu' or positions_BT.shape[1] == 1:
    return Rotation(jnp.cos(angle_BTd), jnp.sin(angle_BTd))
  # XLA's CPU would compute each of them again for every head and layer, which
  # takes several times as long as the rotation itself, but it keeps what comes
  # out of a loop.
  both_NBTd = jax.lax.map(
      lambda way: jax.lax.switch(way, (jnp.cos, jnp.sin), angle_BTd),
      jnp.arange(2),
  )
  return Rotation(*both_NBTd)


def rotate(x_BTHd: jax.Array, by: Rotation | None) -> jax.Array:
  """Rotary embedding; the dimensions that have no angle stay as they are."""
  if by is None:
    return x_BTHd
  n = 2 * by.cos_BTd.shape[-1]
  cos, sin = (x[:, :, None, :] for x in by)
  first, second = jnp.split(x_BTHd[..., :n].astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  turned = [part.astype(x_BTHd.dtype) for part in turned]
  return jnp.concatenate([*turned, x_BTHd[..., n:]], axis=-1)


class Mlp(nn.Module):
  """The feed-forward network of a block; `experts.Experts` holds E of them.

  `gelu_tanh`: fc2(gelu(fc1(x))) (Phi-2, whose `gelu_new` is the tanh form);
  `swiglu`: down(silu(gate(x)) * up(x)) (LLaMA, Mistral, Qwen, StableLM).
  Other names of `ACTIVATIONS` (the towers') take the first form.
  """

  kind: str
  width: int
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    def dense(features, axes, name):
      return Dense(features, axes, self.use_bias, self.dtype, name=name)

    up_axes, down_axes = ('embed', 'mlp'), ('mlp', 'embed')
    if self.kind == 'swiglu':
      h = nn.silu(dense(self.width, up_axes, 'gate')(x))
      h *= dense(self.width, up_axes, 'up')(x)
      return dense(x.shape[-1], down_axes, 'down')(h)
    h = ACTIVATIONS[self.kind](dense(self.width, up_axes, 'fc1')(x))
    return dense(x.shape[-1], down_axes, 'fc2')(h)
