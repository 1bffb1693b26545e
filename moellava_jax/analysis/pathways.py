# SPDX-License-Identifier: Apache-2.0
"""Pathways: the first-choice experts of a token, from layer to layer.

Two views of many of them: those that occur most, and the principal components
that MoE-LLaVA draws (figures 6 and 15 to 18; `scripts/vis/vis3.py` of the
original), which are no pathways of any token.

Letters: N tokens, P distinct pathways, C what is shown of them, L sparse layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SHOWN = 10  # Pathways of a view, as in the paper.
# Variance below this part of the first component's is rounding.
_RANK = 1e-9
# The original cuts the scaled scores off before it makes experts of them.
_LOWEST, _HIGHEST = 0.01, 0.99


class Paths(NamedTuple):
  """Distinct pathways, the most frequent first, then by their experts."""

  path_PL: np.ndarray  # uint8.
  count_P: np.ndarray  # int64, tokens.


class Views(NamedTuple):
  """What is shown of the pathways of a modality; C may be 0."""

  tokens: int
  distinct: int
  top_CL: np.ndarray  # uint8, the most frequent pathways.
  top_count_C: np.ndarray  # int64, tokens.
  component_CL: np.ndarray  # uint8, principal components as experts.
  variance_C: np.ndarray  # float64, their parts of the variance.


def collect(parts: Sequence[Paths], layers: int) -> Paths:
  """The distinct pathways of all parts, whose own need not be distinct."""
  none = Paths(np.zeros((0, layers), np.uint8), np.zeros(0, np.int64))
  path_NL = np.concatenate([none.path_PL, *(p.path_PL for p in parts)])
  count_N = np.concatenate([none.count_P, *(p.count_P for p in parts)])
  if not len(path_NL):
    return none
  # Rows as single values: they are then sorted at once, not byte by byte.
  row_N = np.ascontiguousarray(path_NL).view(f'V{layers}').ravel()
  _, first_P, of_N = np.unique(row_N, return_index=True, return_inverse=True)
  count_P = np.zeros(len(first_P), np.int64)
  np.add.at(count_P, of_N, count_N)
  order_P = np.argsort(-count_P, kind='stable')
  return Paths(path_NL[first_P[order_P]], count_P[order_P])


def views(paths: Paths, num_experts: int) -> Views:
  """Both views of the pathways of a modality."""
  component_CL, variance_C = components(paths, num_experts)
  return Views(
      int(np.sum(paths.count_P)),
      len(paths.count_P),
      paths.path_PL[:SHOWN],
      paths.count_P[:SHOWN],
      component_CL,
      variance_C,
  )


def components(paths: Paths, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
  """The original's pseudo-pathways, and how much of the variance they have.

  A PCA whose samples are the layers and whose features are the tokens. Every
  component has one score a layer; scaled to [0, 1] over the layers, it is cut
  into as many equal parts as there are experts. The sign of a component is
  arbitrary: here its largest score, or the first of several, is positive.

  Args:
    paths: pathways.
    num_experts: of a layer.

  Returns:
    (component_CL uint8, variance_C float64), C at most `SHOWN` and less than
    the number of layers; 0 if every token stays with the expert of its number.
  """
  layers = paths.path_PL.shape[1]
  centred_PL = paths.path_PL - np.mean(
      paths.path_PL, axis=1, keepdims=True, dtype=np.float64
  )
  # Tokens of one pathway are equal features, so their products with a count
  # are all that is needed: a matrix of layers, however many tokens there are.
  gram_LL = (centred_PL * paths.count_P[:, None]).T @ centred_PL
  variance_C, score_LC = np.linalg.eigh(gram_LL)
  variance_C, score_LC = variance_C[::-1], score_LC[:, ::-1]
  total = float(np.sum(np.maximum(variance_C, 0)))
  shown = int(np.sum(variance_C > _RANK * variance_C[0]))
  shown = min(shown, SHOWN, layers - 1)
  variance_C, score_LC = variance_C[:shown], score_LC[:, :shown]
  # Of scores that are as large but for rounding, the first layer's counts.
  size_LC = np.abs(score_LC)
  peak_C = np.argmax(size_LC > (1 - 1e-6) * size_LC.max(0), axis=0)
  score_LC = score_LC * np.sign(score_LC[peak_C, np.arange(shown)])
  low_C, high_C = score_LC.min(0), score_LC.max(0)
  scaled_LC = np.clip((score_LC - low_C) / (high_C - low_C), _LOWEST, _HIGHEST)
  expert_LC = np.floor(scaled_LC * num_experts).astype(np.uint8)
  return np.ascontiguousarray(expert_LC.T), variance_C / total
