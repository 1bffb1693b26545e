# SPDX-License-Identifier: Apache-2.0
"""Counts the choices of tokens, wherever they come from.

A model that is run (`routing`), traces on disk (`recorded`), or a conversation
(`of_routing`). Letters: see `counts`.
"""

from collections.abc import Iterable, Sequence
import itertools
from typing import NamedTuple

import numpy as np

from moellava_jax import config
from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import pathways
from moellava_jax.infer import tracing

# Pathways are merged when that many parts wait.
_PARTS = 64


class Tokens(NamedTuple):
  """Routed tokens of some conversations, laid one behind the other."""

  conversations: int
  is_image_N: np.ndarray  # bool.
  choice_LNk: np.ndarray  # Integers, the likeliest first.
  kept_LNk: np.ndarray  # bool, False: the expert was full.
  entropy_LN: np.ndarray | None  # Of the router, nats; None: not recorded.


def tally(
    layers: Sequence[int], num_experts: int, parts: Iterable[Tokens]
) -> counts_lib.Counts:
  """Counts the tokens of all parts.

  Args:
    layers: numbers of the sparse layers.
    num_experts: of a layer.
    parts: tokens; all with the same layers and choices.

  Raises:
    UserError: there are none, or they do not fit the layers and experts.
  """
  size = (len(layers), len(counts_lib.MODALITIES), num_experts)
  tokens_M = np.zeros(len(counts_lib.MODALITIES), np.int64)
  first, assigned, kept = (np.zeros(size, np.int64) for _ in range(3))
  pairs = np.zeros((*size, num_experts), np.int64)
  entropy_LM: np.ndarray | None = np.zeros(size[:2])
  found: list[list[pathways.Paths]] = [[] for _ in counts_lib.MODALITIES]
  conversations, top_k = 0, None
  for part in parts:
    top_k = _check(part, len(layers), num_experts, top_k)
    conversations += part.conversations
    modality_N = part.is_image_N.astype(np.int64)
    tokens_M += np.bincount(modality_N, minlength=len(counts_lib.MODALITIES))
    at_LN = _index((len(layers), len(counts_lib.MODALITIES)), modality_N)
    at_LNk = at_LN[..., None] * num_experts + part.choice_LNk
    first += _histogram(at_LNk[..., 0], size)
    assigned += _histogram(at_LNk, size)
    kept += _histogram(at_LNk[part.kept_LNk], size)
    for a, b in itertools.permutations(range(top_k), 2):
      both_LN = at_LNk[..., a] * num_experts + part.choice_LNk[..., b]
      pairs += _histogram(both_LN, pairs.shape)
    if part.entropy_LN is None:
      entropy_LM = None
    elif entropy_LM is not None:
      entropy_LM += np.bincount(
          at_LN.ravel(), part.entropy_LN.ravel(), entropy_LM.size
      ).reshape(entropy_LM.shape)
    path_NL = part.choice_LNk[..., 0].T.astype(np.uint8)
    for m, paths in enumerate(found):
      mine_NL = path_NL[modality_N == m]
      paths.append(pathways.Paths(mine_NL, np.ones(len(mine_NL), np.int64)))
      if len(paths) >= _PARTS:
        paths[:] = [pathways.collect(paths, len(layers))]
  if top_k is None or not tokens_M.sum():
    raise config.UserError('There are no tokens to count the experts of.')
  return counts_lib.Counts(
      tuple(int(layer) for layer in layers),
      num_experts,
      top_k,
      conversations,
      tokens_M,
      first,
      assigned,
      kept,
      pairs,
      entropy_LM,
      tuple(
          pathways.views(pathways.collect(paths, len(layers)), num_experts)
          for paths in found
      ),
  )


def of_routing(
    routings: Iterable[tracing.Routing], num_experts: int
) -> counts_lib.Counts:
  """Counts of what `Chat.trace` returned for some conversations.

  Raises:
    UserError: there are none, or they are not of one model.
  """
  routings = list(routings)
  layers = {routing.layers for routing in routings}
  if len(layers) > 1:
    raise config.UserError(
        f'The conversations are of models with the sparse layers {layers};'
        ' give those of one model.'
    )
  parts = [
      Tokens(1, r.is_image_T, r.choice_MTk, r.kept_MTk, None) for r in routings
  ]
  return tally(next(iter(layers), ()), num_experts, parts)


def _check(
    part: Tokens, layers: int, num_experts: int, top_k: int | None
) -> int:
  """The choices of a token; raises UserError if they are of another model."""
  found, _, k = part.choice_LNk.shape
  if found != layers or k != (top_k or k):
    raise config.UserError(
        f'Tokens with {k} choices in {found} sparse layers do not belong to'
        f' those with {top_k or k} choices in {layers} layers.'
    )
  most = int(part.choice_LNk.max(initial=0))
  if most >= num_experts:
    raise config.UserError(
        f'A token chose expert {most}, but a layer has {num_experts} experts,'
        ' from 0: the choices are those of another model.'
    )
  return k


def _index(size: tuple[int, int], modality_N: np.ndarray) -> np.ndarray:
  """`[L, N]`, the place of a token of a layer in an array of L x M."""
  return np.arange(size[0])[:, None] * size[1] + modality_N


def _histogram(index: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
  return np.bincount(index.ravel(), minlength=int(np.prod(size))).reshape(size)
