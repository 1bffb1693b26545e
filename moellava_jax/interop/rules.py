# SPDX-License-Identifier: Apache-2.0
"""Their tensors <-> our parameters: strict, invertible, one tensor at a time.

`link` joins the tree that a config implies with the names of a dialect.
Nothing is guessed: a parameter without a rule, a tensor that no rule takes and
nobody discards on purpose, or a shape that differs is an error.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import math
import re
from typing import NamedTuple

import numpy as np

from moellava_jax.interop import files, layout, names, shards

Shape = tuple[int, ...]


class Layout(NamedTuple):
  """How a parameter lies in torch: `[out, in]` against our `[in, out]`."""

  shape: Callable[[Shape], Shape]  # Ours -> theirs.
  to_ours: Callable[[np.ndarray, Shape], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def _conv_in(x: np.ndarray, shape: Shape) -> np.ndarray:
  return x.transpose(2, 3, 1, 0).reshape(shape)


def _conv_out(x: np.ndarray) -> np.ndarray:
  p = math.isqrt(x.shape[0] // 3)
  return x.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)


LAYOUTS = {
    'same': Layout(lambda s: s, lambda x, _: x, lambda x: x),
    'linear': Layout(lambda s: s[::-1], lambda x, _: x.T, lambda x: x.T),
    # q, k, v: [heads * d, D] -> [D, heads, d]; the output: [D, heads * d].
    'heads_in': Layout(
        lambda s: (s[1] * s[2], s[0]),
        lambda x, s: x.T.reshape(s),
        lambda x: x.reshape(x.shape[0], -1).T,
    ),
    'heads_bias': Layout(
        lambda s: (s[0] * s[1],),
        lambda x, s: x.reshape(s),
        lambda x: x.reshape(-1),
    ),
    'heads_out': Layout(
        lambda s: (s[2], s[0] * s[1]),
        lambda x, s: x.T.reshape(s),
        lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
    # A convolution without overlap, as a matrix of (row, column, channel).
    'conv': Layout(
        lambda s: (s[1], 3, math.isqrt(s[0] // 3), math.isqrt(s[0] // 3)),
        _conv_in,
        _conv_out,
    ),
}


class Link(NamedTuple):
  """One of their tensors, or a part of it, and where it lies in ours."""

  ours: str
  shape: Shape  # Of our leaf.
  expert: int | None  # Index into our first axis.
  theirs: str
  part: int  # Of `parts` along their first axis.
  parts: int
  how: str

  @property
  def piece(self) -> Shape:
    """Shape of our side of the link."""
    return self.shape if self.expert is None else self.shape[1:]

  @property
  def their_shape(self) -> Shape:
    first, *rest = LAYOUTS[self.how].shape(self.piece)
    return (first * self.parts, *rest)


_PART = re.compile(r'(.+)\[(\d+)/(\d+)\]')
_LAYER = re.compile(r'(?<=layers_)\d+|(?<=linear_)\d+')


def link(
    shapes: layout.Shapes, table: Iterable[names.Row], prefix: str
) -> list[Link]:
  """The links of all parameters below `prefix`.

  Args:
    shapes: path -> shape (`layout`).
    table: a dialect of `names`.
    prefix: `vision/`, `projector/` or `llm/`; their names have none.

  Raises:
    UserError: a parameter that the dialect has no name for.
  """
  rows = {row.ours: row for row in table}
  links = []
  for path, shape in shapes.items():
    if not path.startswith(prefix):
      continue
    short = path.removeprefix(prefix)
    number = _LAYER.search(short)
    row = rows.get(_LAYER.sub('{n}', short))
    if row is None:
      raise files.WeightsError(
          f'Parameter {path!r} has no name in this family of models; its'
          ' config asks for something that the family cannot have.'
      )
    theirs = row.theirs
    if number:
      theirs = theirs.replace('{n}', number[0])
    part, parts = 0, 1
    if match := _PART.fullmatch(theirs):
      theirs, part, parts = match[1], int(match[2]), int(match[3])
    experts = range(shape[0]) if '{e}' in theirs else [None]
    for e in experts:
      name = theirs.replace('{e}', str(e))
      links.append(Link(path, shape, e, name, part, parts, row.how))
  return links


def rename(links: list[Link], to: Callable[[str], str]) -> list[Link]:
  return [item._replace(theirs=to(item.theirs)) for item in links]


def check(
    links: list[Link], weights: files.Weights, discarded: Mapping[str, str]
) -> None:
  """Compares names and shapes before anything is read.

  Args:
    links: with the names in the files.
    weights: the files.
    discarded: name -> reason, for tensors left out on purpose.

  Raises:
    WeightsError: a tensor is missing, not expected, or of another shape.
  """
  wanted = {item.theirs: item.their_shape for item in links}
  if missing := [name for name in wanted if name not in weights.infos]:
    raise files.WeightsError(
        f'{weights.where} lacks {len(missing)} of {len(wanted)} tensors, such'
        f' as {missing[:3]}. It is incomplete, or its config.json describes'
        ' another model.'
    )
  extra = [n for n in weights.infos if n not in wanted and n not in discarded]
  if extra:
    adapters = any('lora_' in name for name in extra)
    raise files.WeightsError(
        f'{weights.where} has {len(extra)} tensors that nothing takes, such as'
        f' {extra[:3]}. '
        + (
            'These are LoRA adapters: merge them into the weights first.'
            if adapters
            else 'Its config.json describes another model.'
        )
    )
  for name, shape in wanted.items():
    info = weights.infos[name]
    if info.shape != shape:
      raise files.WeightsError(
          f'{info.file}: tensor {name!r} has shape {list(info.shape)}; by'
          f' config.json it should have {list(shape)}.'
      )
    if info.dtype.kind in 'iub':
      raise files.WeightsError(
          f'{info.file}: tensor {name!r} is {info.dtype}; expected floating'
          ' point. Take the unquantised checkpoint.'
      )


def read(
    links: list[Link], weights: files.Weights
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (path, array) for every parameter, in the dtype of the source.

  Holds one parameter and one of their tensors at a time.

  Raises:
    WeightsError: NaN or infinite values; names file and tensor.
  """
  for group in _groups(links):
    if group[0].parts > 1:
      whole = weights.read(group[0].theirs)
      for item in group:
        piece = np.split(whole, item.parts)[item.part]
        piece = LAYOUTS[item.how].to_ours(piece, item.piece)
        yield item.ours, np.ascontiguousarray(piece)
      continue
    dtypes = {weights.infos[item.theirs].dtype for item in group}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    out = np.empty(group[0].shape, dtype)
    for item in group:
      place = out if item.expert is None else out[item.expert]
      tensor = weights.read(item.theirs)
      place[...] = LAYOUTS[item.how].to_ours(tensor, item.piece)
      del tensor, place
    yield group[0].ours, out
    del out  # Before the next one is made.


def _groups(links: list[Link]) -> list[list[Link]]:
  """Links that share a tensor or a parameter, together."""
  groups: dict[str, list[Link]] = {}
  for item in links:
    groups.setdefault(item.theirs if item.parts > 1 else item.ours, []).append(
        item
    )
  return list(groups.values())


def write(
    links: list[Link],
    leaf: Callable[[str], np.ndarray],
    dtype: Callable[[Link], np.dtype],
) -> list[shards.Planned]:
  """Their tensors, each made when it is written.

  Args:
    links: with the names to write.
    leaf: our parameter at a path, on the host.
    dtype: of the tensor of a link.
  """
  by_name: dict[str, list[Link]] = {}
  for item in links:
    by_name.setdefault(item.theirs, []).append(item)

  def planned(name: str, group: list[Link]) -> shards.Planned:
    kind = dtype(group[0])

    def make() -> np.ndarray:
      pieces = []
      for item in sorted(group, key=lambda item: item.part):
        value = leaf(item.ours)
        value = value if item.expert is None else value[item.expert]
        pieces.append(LAYOUTS[item.how].to_theirs(value))
      whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
      return cast(whole, kind, name)

    return shards.Planned(name, group[0].their_shape, kind, make)

  return [planned(name, group) for name, group in by_name.items()]


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """`array` as `dtype`.

  Raises:
    WeightsError: values that are finite before and not after.
  """
  if array.dtype == dtype:
    return array
  with np.errstate(over='ignore'):
    result = array.astype(dtype)
  if dtype.itemsize < array.dtype.itemsize and not np.isfinite(result).all():
    raise files.WeightsError(
        f'Tensor {name!r} does not fit into {dtype}; write bfloat16 or float32.'
    )
  return result
