# SPDX-License-Identifier: Apache-2.0
"""The MoE layer by dispatch, against a dense FFN of equal active FLOPs.

The dense FFN is k times as wide as an expert, so that a token meets as many
weights in both. Floors are what the arithmetic of a dispatch costs at least, as
a multiple of that FFN, with capacity factor cf, S tokens a group, and n matrices
of width F an expert:

  einsum   cf (1 + 2 S / (n F)) forward, cf (1 + 5 S / (3 n F)) with backward
  index    cf
  ragged   1

einsum_batch is the original's: one group of all tokens (S = tokens). index and
einsum_2048, index_256 and einsum_256 have groups of the same size. ragged is the
one that skips empty rows: it sorts rows by expert, drops none and pads none.

Goals are of 4 experts and 4096 tokens in fp32 on a CPU, as a multiple of the floor,
and of how the time of a way grows from 1024 to 16384 tokens.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax.bench import measure, sizes
from moellava_jax.model import layers, moe

_ROW = 2048  # Tokens of a row, at most.
PHASES = ('forward', 'forward_backward')
HEADER = (
    *('case', 'way', 'forward', 'x dense', 'floor', 'x floor'),
    *('with backward', 'x dense', 'floor', 'x floor'),
)
GROWTH_HEADER = (
    *('growth of the time', 'way', 'tokens', 'x', 'forward x'),
    'with backward x',
)
LEGEND = """\
x floor: goals are of 4 experts and 4096 tokens in fp32 on a CPU. ragged skips empty
rows; einsum_batch, the original's, is one group of all tokens. Groups of index and
einsum without a number are of 2048 tokens, or all of them.
"""
GROWTH_LEGEND = """\
Beside dense, the FFN's own growth. einsum_batch grows with the square, and ends at
4096 tokens: at 16384 a one-hot factor has 3.2 GB in fp32, of which a step holds
several. einsum_2048 ends there too, to save time.
"""


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
    'einsum_2048': Way('einsum', 2048),
    'einsum_batch': Way('einsum', None),
    'index_256': Way('index', 256),
    'index': Way('index', 2048),
    'ragged': Way('ragged', 2048),
}
# Of tokens, for products in groups of more than 256. At 16384, each one-hot factor of
# a whole batch has 3.2 GB, of which a step holds several, for minutes.
_MOST_IN_LARGE_GROUPS = 4096

# At most so many times the floor: forward, and with backward.
GOALS = {
    'einsum_128': (1.15, 1.15),
    'einsum_256': (1.15, 1.15),
    'index_256': (1.15, 1.15),
    'index': (1.15, 1.15),
    'ragged': (1.25, 1.6),
}
# And times as long for 16 times the tokens.
MOST_GROWTH = {16: 17.0}


def run(case: Case, repeats: int) -> dict[str, Any]:
  """Times over the dense FFN's, by way: forward, and with backward."""
  ways = {name: way for name, way in WAYS.items() if _is_measured(case, name)}
  made = {name: programs(case, name) for name in ('dense', *ways)}
  found: dict[str, Any] = {'flops_forward': _flops(case)}
  for n, phase in enumerate(PHASES):
    times = measure.interleaved(
        {name: each[phase] for name, each in made.items()}, repeats
    )
    dense = times['dense'].median
    for name, time in times.items():
      entry = found.setdefault(name, {})
      entry[phase] = {'seconds': time._asdict(), 'ratio': time.median / dense}
      if name != 'dense':
        entry[phase]['floor'] = ways[name].floors(case)[phase]
      if has_goals(case) and name in GOALS:
        entry[phase]['goal'] = GOALS[name][n]
  return found


def _is_measured(case: Case, way: str) -> bool:
  """Whether a way is not too large for the tokens of a case."""
  few = case.tokens <= _MOST_IN_LARGE_GROUPS
  return few or WAYS[way].dispatch != 'einsum' or WAYS[way].tokens(case) <= 256


def has_goals(case: Case) -> bool:
  """Whether it is the layer of the goals."""
  size = (case.experts, case.tokens, case.dtype)
  return size == (4, 4096, 'float32') and jax.default_backend() == 'cpu'


def growth(case: Case, tokens: tuple[int, int], repeats: int) -> dict[str, Any]:
  """How the time of each way grows with the tokens.

  All in turns, few tokens and many: what a machine does at a time changes by
  more in minutes than the ways differ.

  Args:
    case: the layer; its own tokens do not matter.
    tokens: the least and the most; ways with large groups end at
      `_MOST_IN_LARGE_GROUPS`.
    repeats: runs of each.

  Returns:
    By way the tokens between which it is measured (`tokens`), and by phase the
    `seconds` of both and how many times as long the most take (`growth`).
  """
  few, many = (case._replace(tokens=n) for n in tokens)
  middle = case._replace(tokens=min(_MOST_IN_LARGE_GROUPS, tokens[1]))
  ends = {
      way: (few, many if way == 'dense' or _is_measured(many, way) else middle)
      for way in ('dense', *WAYS)
  }
  made = {
      (way, end.tokens): programs(end, way)
      for way, pair in ends.items()
      for end in pair
  }
  grown: dict[str, Any] = {
      way: {'tokens': [end.tokens for end in pair]}
      for way, pair in ends.items()
  }
  for phase in PHASES:
    timed = {
        key: functools.partial(measure.seconds, each[phase])
        for key, each in made.items()
    }
    times = measure.in_turns(timed, repeats)
    for way, entry in grown.items():
      of_way = [times[way, count] for count in entry['tokens']]
      entry[phase] = {
          'seconds': [time._asdict() for time in of_way],
          'growth': of_way[1].median / of_way[0].median,
      }
  return grown


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
  """Rows of HEADER."""
  rows = []
  for name, entry in found.items():
    if name == 'flops_forward':
      continue
    cells = [case, name]
    for phase in PHASES:
      timing = entry[phase]['seconds']
      spread = (timing['high'] - timing['low']) / timing['median']
      cells += [
          f'{1e3 * timing["median"]:.2f} ms ± {spread / 2:.0%}',
          f'{entry[phase]["ratio"]:.2f}',
          *_over_floor(entry[phase]),
      ]
    rows.append(tuple(cells))
  return rows


def _over_floor(entry: Mapping[str, Any]) -> tuple[str, str]:
  """The floor, and the ratio over it with its goal."""
  if 'floor' not in entry:
    return '', ''
  over = entry['ratio'] / entry['floor']
  return f'{entry["floor"]:.2f}', measure.beside_goal(over, entry.get('goal'))


def growth_table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows of GROWTH_HEADER."""
  rows = []
  for way, entry in found.items():
    least, most = entry['tokens']
    goal = None if way == 'dense' else MOST_GROWTH.get(most // least)
    grown = (
        measure.beside_goal(entry[phase]['growth'], goal) for phase in PHASES
    )
    rows.append((case, way, f'{least} to {most}', f'{most / least:g}', *grown))
  return rows
