# SPDX-License-Identifier: Apache-2.0
"""Pathways are counted as they are; components are the original's."""

import numpy as np
import pytest

from moellava_jax.analysis import pathways


def _paths(path_NL):
  one_N = np.ones(len(path_NL), np.int64)
  return pathways.collect(
      [pathways.Paths(np.asarray(path_NL, np.uint8), one_N)], path_NL.shape[1]
  )


def _reference(path_NL, num_experts):
  """PCA as the original does it: samples are layers, features are tokens."""
  x_LN = path_NL.T.astype(float)
  x_LN = x_LN - x_LN.mean(axis=0)
  u_LC, s_C, _ = np.linalg.svd(x_LN, full_matrices=False)
  found = []
  for c in range(min(10, len(x_LN) - 1)):
    score_L = u_LC[:, c] * s_C[c]
    # Both layers of two are as far from their mean.
    if score_L[0 if len(score_L) == 2 else np.argmax(np.abs(score_L))] < 0:
      score_L = -score_L
    scaled_L = (score_L - score_L.min()) / (score_L.max() - score_L.min())
    scaled_L = np.clip(scaled_L, 0.01, 0.99)
    found.append([int(v // (1 / num_experts)) for v in scaled_L])
  return found, s_C**2 / np.sum(s_C**2)


@pytest.mark.parametrize('layers, experts', [(2, 4), (5, 3), (16, 4)])
def test_components_are_those_of_all_tokens(layers, experts):
  rng = np.random.default_rng(3)
  # Some ways are taken by many.
  path_NL = rng.integers(0, experts, (40, layers))[rng.integers(0, 40, 300)]
  expected, variance_C = _reference(path_NL, experts)
  found_CL, part_C = pathways.components(_paths(path_NL), experts)
  assert found_CL.tolist() == expected
  np.testing.assert_allclose(part_C, variance_C[: len(part_C)])


def test_there_are_fewer_components_than_layers():
  rng = np.random.default_rng(0)
  for layers in (1, 2, 4, 24):
    path_NL = rng.integers(0, 8, (200, layers))
    found_CL, _ = pathways.components(_paths(path_NL), 8)
    assert len(found_CL) == min(layers - 1, 10)


def test_tokens_that_stay_have_no_component():
  stay_NL = np.repeat([[0], [2], [1]], 4, axis=1)
  found_CL, part_C = pathways.components(_paths(stay_NL), 3)
  assert (found_CL.shape, part_C.shape) == ((0, 4), (0,))


def test_equal_pathways_are_one_wherever_they_come_from():
  a = pathways.Paths(np.array([[1, 2], [0, 3]], np.uint8), np.array([5, 1]))
  b = pathways.Paths(np.array([[0, 3], [1, 2]], np.uint8), np.array([1, 1]))
  found = pathways.collect([a, b], 2)
  assert found.path_PL.tolist() == [[1, 2], [0, 3]]
  assert found.count_P.tolist() == [6, 2]
  nothing = pathways.views(pathways.collect([], 2), 4)
  assert (nothing.tokens, nothing.distinct) == (0, 0)
  assert nothing.top_CL.shape == nothing.component_CL.shape == (0, 2)
