# SPDX-License-Identifier: Apache-2.0
"""Parameter trees as paths: `{'llm': {'norm': x}}` <-> `{'llm/norm': x}`.

A parameter tree is a plain nested dict whose leaves are arrays. Its paths are
the checkpoint format: stage tables, rule tables and reports all speak in them.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
import re
from typing import Any, NamedTuple

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
  """Returns `{'a/b': leaf}`; empty subtrees vanish."""
  return dict(_walk(tree, ''))


def _walk(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _walk(value, f'{prefix}/{key}' if prefix else key)
  else:
    yield prefix, tree


def unflatten(flat: dict[str, Any]) -> Tree:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[name] = leaf
  return tree


def map_paths(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
  """Returns `tree` with every leaf replaced by `fn(path, leaf)`."""
  return unflatten(
      {path: fn(path, leaf) for path, leaf in flatten(tree).items()}
  )


def split(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
  """Splits `tree` into (leaves where `mask` is True, the other leaves).

  Unlike a tree with `None` holes, each half is a plain tree of its own, so
  that gradients and optimizer state of a half know nothing of the other.
  """
  flat, chosen = flatten(tree), flatten(mask)
  if flat.keys() != chosen.keys():
    raise ValueError(
        'Tree and mask differ in ' f'{sorted(flat.keys() ^ chosen.keys())[:5]}.'
    )
  return (
      unflatten({p: x for p, x in flat.items() if chosen[p]}),
      unflatten({p: x for p, x in flat.items() if not chosen[p]}),
  )


def merge(*parts: Tree) -> Tree:
  """Joins trees without common paths: `merge(*split(t, m)) == t`."""
  flat: dict[str, Any] = {}
  for part in parts:
    for path, leaf in flatten(part).items():
      if path in flat:
        raise ValueError(f'Path {path!r} occurs in two of the merged trees.')
      flat[path] = leaf
  return unflatten(flat)


class Segment(NamedTuple):
  """Consecutive layers: `repeats` times the same `period` kinds in a row.

  Stacked, the layers of each position in the period share a subtree, whose
  arrays have them along a new first axis. Its name says which ones they are,
  so that no table is needed to take it apart.
  """

  start: int
  period: int
  repeats: int

  @property
  def span(self) -> range:
    """Numbers of all its layers."""
    return range(self.start, self.start + self.period * self.repeats)

  def layers(self, position: int) -> range:
    """Numbers of the layers at a position, from 0, of the period."""
    return self.span[position :: self.period]

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the stacked subtrees, one per position."""
    numbers = [self.layers(position) for position in range(self.period)]
    return tuple(f'layers_{n[0]}_to_{n[-1]}_by_{self.period}' for n in numbers)


def segments(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
  """Cuts layers into repeating segments, with the fewest layers to compile.

  Args:
    kinds: of each layer; layers of one kind have parameters of one shape.

  Returns:
    Segments in order that cover all layers; one that does not repeat is a
    single layer. `interval` of 24 is one segment of period 2, `first_half`
    two of period 1; what repeats nowhere is as many segments as layers.
  """
  best: list[tuple[int, tuple[Segment, ...]]] = [(0, ())]
  for end in range(1, len(kinds) + 1):
    count, before = best[end - 1]
    options = [(count + 1, (*before, Segment(end - 1, 1, 1)))]
    for period in range(1, end // 2 + 1):
      repeats = 1
      while (start := end - period * (repeats + 1)) >= 0 and list(
          kinds[start : start + period]
      ) == list(kinds[end - period : end]):
        repeats += 1
        count, before = best[start]
        found = (*before, Segment(start, period, repeats))
        options.append((count + period, found))
    best.append(min(options, key=lambda option: (option[0], len(option[1]))))
  return best[-1][1]


_STACKED = re.compile(r'layers_(\d+)_to_(\d+)_by_(\d+)')


def stacked_layers(name: str) -> range | None:
  """The layers of a stacked subtree; None for any other name."""
  if (match := _STACKED.fullmatch(name)) is None:
    return None
  first, last, period = (int(group) for group in match.groups())
  return range(first, last + 1, period)
