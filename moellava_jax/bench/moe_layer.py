# SPDX-License-Identifier: Apache-2.0
"""The MoE layer by dispatch, against a dense FFN of equal active FLOPs.

The dense FFN is k times as wide as an expert, so that a token meets as many
weights in both. Floors are what the arithmetic of a dispatch costs at least, as
a multiple of that FFN, with capacity factor cf, S tokens a group, and n matrices
of width F an expert:

  einsum   cf (1 + 2 S / (n F)) forward, cf (1 + 5 S / (3 n F)) with backward
  index    cf
  ragged   1

einsum_batch is the original's: one group of all tokens (S = tokens).
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax.bench import measure, sizes
from moellava_jax.model import layers, moe

_ROW = 2048  # Tokens of a row, at most.


class Case(NamedTuple):
  """A layer and its tokens."""

  width: int  # D.
  mlp_width: int  # F.
  kind: str  # Of the FFN: gelu_tanh has 2 matrices, swiglu 3.
  experts: int
  tokens: int
  dtype: str

  @property
  def name(self) -> str:
    return (
        f'D={self.width} F={self.mlp_width} {self.kind} E={self.experts}'
        f' tokens={self.tokens} {self.dtype}'
    )

  @property
  def matrices(self) -> int:
    return 3 if self.kind == 'swiglu' else 2


class Way(NamedTuple):
  """How tokens get to experts; `size` is of a group, None: all tokens."""

  dispatch: str
  size: int | None

  def tokens(self, case: Case) -> int:
    """Tokens of a group."""
    row = min(case.tokens, _ROW)
    return case.tokens if self.size is None else min(self.size, row)

  def floors(self, case: Case) -> dict[str, float]:
    """At least so many times the dense FFN; see the head of this file."""
    if self.dispatch == 'ragged':
      return {'forward': 1.0, 'forward_backward': 1.0}
    carried = {'forward': 0.0, 'forward_backward': 0.0}
    if self.dispatch == 'einsum':
      share = self.tokens(case) / (case.matrices * case.mlp_width)
      carried = {'forward': 2 * share, 'forward_backward': 5 * share / 3}
    return {
        name: sizes.CAPACITY_FACTOR * (1 + extra)
        for name, extra in carried.items()
    }


WAYS = {
    'einsum_128': Way('einsum', 128),
    'einsum_256': Way('einsum', 256),
    'einsum_batch': Way('einsum', None),
    'index': Way('index', 2048),
    'ragged': Way('ragged', 2048),
}
# One-hot factors of more tokens than this do not fit a small machine.
_MOST_OF_A_BATCH = 4096


def run(case: Case, repeats: int) -> dict[str, Any]:
  """Times over the dense FFN's, by way: forward, and with backward."""
  ways = {
      name: way
      for name, way in WAYS.items()
      if way.size is not None or case.tokens <= _MOST_OF_A_BATCH
  }
  made = {name: programs(case, name) for name in ('dense', *ways)}
  found: dict[str, Any] = {'flops_forward': _flops(case)}
  for phase in ('forward', 'forward_backward'):
    times = measure.interleaved(
        {name: each[phase] for name, each in made.items()}, repeats
    )
    dense = times['dense'].median
    for name, time in times.items():
      entry = found.setdefault(name, {})
      entry[phase] = {'seconds': time._asdict(), 'ratio': time.median / dense}
      if name != 'dense':
        entry[phase]['floor'] = ways[name].floors(case)[phase]
  return found


def _flops(case: Case) -> float:
  """Of the dense FFN forward."""
  width = case.matrices * case.mlp_width * sizes.TOP_K
  return 2.0 * case.tokens * case.width * width


def _dense(case: Case) -> Callable[[jax.Array], Any]:
  layer = layers.Mlp(
      case.kind, case.mlp_width * sizes.TOP_K, False, jnp.dtype(case.dtype)
  )
  return functools.partial(_bound, layer)


def _sparse(case: Case, way: Way) -> Callable[[jax.Array], Any]:
  cfg = dataclasses.replace(
      sizes.moe(way.dispatch, way.size or case.tokens, sizes.CAPACITY_FACTOR),
      num_experts=case.experts,
      group='batch' if way.size is None else 'row',
  )
  layer = moe.Moe(cfg, case.kind, case.mlp_width, False, jnp.dtype(case.dtype))
  return functools.partial(_bound, layer)


def _bound(layer: Any, x_BTD: jax.Array) -> tuple[Any, Callable[..., Any]]:
  """(random parameters, (parameters, x) -> y) of a layer."""
  inputs: tuple[Any, ...] = (x_BTD,)
  options: dict[str, Any] = {}
  if isinstance(layer, moe.Moe):
    real_BT = jnp.ones(x_BTD.shape[:2], bool)
    inputs, options = (x_BTD, real_BT, ~real_BT), {'train': True}
  drawn = layer.init({'params': jax.random.key(0)}, *inputs, **options)
  params = nn.unbox(drawn)['params']

  def apply(params, x_BTD):
    y = layer.apply({'params': params}, x_BTD, *inputs[1:], **options)
    return y[0] if isinstance(layer, moe.Moe) else y

  return params, apply


def programs(case: Case, way: str) -> dict[str, Callable[[], Any]]:
  """`forward` and `forward_backward`, each of which runs once when called.

  Args:
    case: the layer and its tokens.
    way: a key of `WAYS`, or dense: the FFN of equal active FLOPs.
  """
  bind = _dense(case) if way == 'dense' else _sparse(case, WAYS[way])
  rows = -(-case.tokens // _ROW)
  shape = (rows, case.tokens // rows, case.width)
  x_BTD = jax.random.normal(jax.random.key(1), shape, jnp.dtype(case.dtype))
  params, apply = bind(x_BTD)
  forward = jax.jit(apply)

  def loss(params, x_BTD):
    return jnp.sum(apply(params, x_BTD).astype(jnp.float32) ** 2)

  both = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return {
      'forward': lambda: forward(params, x_BTD),
      'forward_backward': lambda: both(params, x_BTD),
  }


def table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows for people: case, way, and for each phase ratio, spread and floor."""
  rows = []
  for name, entry in found.items():
    if name == 'flops_forward':
      continue
    cells = [case, name]
    for phase in ('forward', 'forward_backward'):
      timing = entry[phase]['seconds']
      spread = (timing['high'] - timing['low']) / timing['median']
      cells += [
          f'{1e3 * timing["median"]:.2f} ms ± {spread / 2:.0%}',
          f'{entry[phase]["ratio"]:.2f}',
          f'{entry[phase]["floor"]:.2f}' if 'floor' in entry[phase] else '',
      ]
    rows.append(tuple(cells))
  return rows
