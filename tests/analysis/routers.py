# SPDX-License-Identifier: Apache-2.0
"""A router and its counts in plain loops, to hold the package against."""

import collections
import math

import numpy as np


def route(logits_TE, is_token_T, top_k: int, capacity: int):
  """(choice_Tk, kept_Tk) of one group: argmaxes, a queue for each expert."""
  length, experts = logits_TE.shape
  choice_Tk = np.zeros((length, top_k), int)
  kept_Tk = np.zeros((length, top_k), bool)
  queues = [0] * experts
  for n in range(top_k):  # All first choices come before all second ones.
    for t in range(length):
      best = None
      for e in range(experts):
        if e in choice_Tk[t, :n]:
          continue
        if best is None or logits_TE[t, e] > logits_TE[t, best]:
          best = e
      choice_Tk[t, n] = best
      if is_token_T[t]:
        kept_Tk[t, n] = queues[best] < capacity
        queues[best] += 1
  return choice_Tk, kept_Tk


def capacity(tokens: int, experts: int, top_k: int, factor: float) -> int:
  return math.ceil(tokens / experts * top_k * factor)


class Counted:
  """Counts of tokens that are added one at a time."""

  def __init__(self, layers: int, experts: int):
    size = (layers, 2, experts)
    self.tokens_M = [0, 0]
    self.first_LME = np.zeros(size, int)
    self.assigned_LME = np.zeros(size, int)
    self.kept_LME = np.zeros(size, int)
    self.pairs_LMEE = np.zeros((*size, experts), int)
    self.paths_M = (collections.Counter(), collections.Counter())

  def add(self, is_image: bool, choice_Lk, kept_Lk) -> None:
    m = 1 if is_image else 0
    self.tokens_M[m] += 1
    for n, (choice_k, kept_k) in enumerate(
        zip(choice_Lk, kept_Lk, strict=True)
    ):
      self.first_LME[n, m, choice_k[0]] += 1
      for e, kept in zip(choice_k, kept_k, strict=True):
        self.assigned_LME[n, m, e] += 1
        self.kept_LME[n, m, e] += bool(kept)
        for other in choice_k:
          if other != e:
            self.pairs_LMEE[n, m, e, other] += 1
    self.paths_M[m][tuple(int(choice_k[0]) for choice_k in choice_Lk)] += 1

  def check(self, counts) -> None:
    """Asserts that `counts.Counts` are exactly these."""
    np.testing.assert_array_equal(counts.tokens_M, self.tokens_M)
    np.testing.assert_array_equal(counts.first_LME, self.first_LME)
    np.testing.assert_array_equal(counts.assigned_LME, self.assigned_LME)
    np.testing.assert_array_equal(counts.kept_LME, self.kept_LME)
    np.testing.assert_array_equal(counts.pairs_LMEE, self.pairs_LMEE)
    for view, paths in zip(counts.paths_M, self.paths_M, strict=True):
      assert view.tokens == sum(paths.values())
      assert view.distinct == len(paths)
      # The most frequent first; of equal ones the lower experts.
      ranked = sorted(paths.items(), key=lambda item: (-item[1], item[0]))[:10]
      assert [tuple(path) for path in view.top_CL.tolist()] == [
          path for path, _ in ranked
      ]
      assert view.top_count_C.tolist() == [number for _, number in ranked]
