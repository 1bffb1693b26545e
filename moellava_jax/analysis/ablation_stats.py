# SPDX-License-Identifier: Apache-2.0
"""Scores from counts, and intervals of their differences.

The interval of a difference between two rows is a paired bootstrap on two
levels (Davison and Hinkley, Bootstrap Methods and their Application, 1997,
section 3.8: hierarchical data; percentiles as in Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13). One draw takes as many seeds
as there are, with replacement; for each seed drawn it takes as many images as
there are, with replacement, with all questions about them; both rows are
scored on that same draw, and the difference of their means over the seeds is
kept. Pairing takes out what seeds and questions have in common; drawing images,
not questions, keeps together what is not independent. The 95 % interval lies
between the 2.5th and the 97.5th percentile of all draws.

With n seeds such an interval is too short by about sqrt((n - 1) / n): by a
tenth with 5, by a fifth with 3. With a single seed only images are drawn, and
it says nothing about other seeds.

Letters: N questions, I images, K counts, R draws.
"""

from collections.abc import Sequence
import dataclasses
import statistics

import numpy as np

from moellava_jax.analysis import ablation_cell

DRAWS = 10_000
LEVEL = 0.95
_CHUNK = 1000  # Draws at a time: memory.
# Of the files of Shapes; of others the name of the file and the measure.
_NAMES = {'pope': 'POPE-style F1', 'exact': 'exact match'}
_KINDS = {'yes_no': 'F1', 'exact': 'match'}


@dataclasses.dataclass(frozen=True)
class Interval:
  """Of a difference of means, in the unit of the scores."""

  difference: float
  low: float
  high: float

  @property
  def verdict(self) -> int:
    """1 or -1 where the whole interval is above or below 0, else 0."""
    return int(self.low > 0) - int(self.high < 0)


def counts(part: ablation_cell.Part) -> np.ndarray:
  """Counts by image, float64[I, K], from which `score` makes a score.

  K is three for each category: yes_no has hits, false alarms and misses of
  `yes`; exact has right answers, questions, and nothing.
  """
  images = int(part.image_N.max()) + 1
  columns = []
  for number in range(len(part.categories)):
    mine_N = part.category_N == number
    if part.kind == 'yes_no':
      said_N = part.right_N == part.yes_N
      cases = (
          said_N & part.yes_N,
          said_N & ~part.yes_N,
          ~said_N & part.yes_N,
      )
    else:
      cases = (part.right_N, np.ones_like(mine_N), np.zeros_like(mine_N))
    columns += [
        np.bincount(part.image_N[mine_N & case_N], minlength=images)
        for case_N in cases
    ]
  return np.stack(columns, 1).astype(float)


def score(kind: str, counts_RK: np.ndarray) -> np.ndarray:
  """Mean over the categories of F1 (yes_no) or of the share of right answers.

  A category that is not in a draw is left out of its mean. An F1 without any
  yes, said or true, is 0, as in evaluation.
  """
  first, second, third = counts_RK.reshape(len(counts_RK), -1, 3).T
  if kind == 'yes_no':
    above, below = 2 * first, 2 * first + second + third
    return np.mean(above / np.maximum(below, 1), axis=0)
  with np.errstate(invalid='ignore'):
    shares = np.where(second > 0, first / np.maximum(second, 1), np.nan)
  return np.nanmean(shares, axis=0)


def of_part(part: ablation_cell.Part) -> float:
  """The score of one model."""
  return float(score(part.kind, counts(part).sum(0, keepdims=True))[0])


def paired(
    kind: str,
    ours: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
  """The interval of a row's mean minus that of another.

  Args:
    kind: of both, see `score`.
    ours: of each seed, counts float64[I, K].
    theirs: the same of the other row, for the same seeds and images.
    draws: R.
    seed: of the generator; the same arguments give the same interval.

  Raises:
    ValueError: the seeds or images of the two do not agree.
  """
  shapes = [[a.shape for a in side] for side in (ours, theirs)]
  if shapes[0] != shapes[1] or not ours:
    raise ValueError(f'Not paired: counts of {shapes[0]} and {shapes[1]}.')
  generator = np.random.default_rng(seed)
  found = []
  for begin in range(0, draws, _CHUNK):
    count = min(_CHUNK, draws - begin)
    found.append(_draw(kind, ours, theirs, count, generator))
  difference = statistics.fmean(
      _total(kind, a) - _total(kind, b)
      for a, b in zip(ours, theirs, strict=True)
  )
  return _interval(difference, np.concatenate(found))


def _total(kind: str, counts_IK: np.ndarray) -> float:
  return float(score(kind, counts_IK.sum(0, keepdims=True))[0])


def _draw(kind, ours, theirs, draws: int, generator) -> np.ndarray:
  """`draws` differences of the mean over drawn seeds, float64[R]."""
  seeds = len(ours)
  sums_R = np.zeros(draws)
  for _ in range(seeds):
    chosen_R = generator.integers(seeds, size=draws)
    for n in range(seeds):
      where = np.flatnonzero(chosen_R == n)
      if not len(where):
        continue
      weights_RI = _weights(len(where), len(ours[n]), generator)
      sums_R[where] += score(kind, weights_RI @ ours[n])
      sums_R[where] -= score(kind, weights_RI @ theirs[n])
  return sums_R / seeds


def _weights(draws: int, images: int, generator) -> np.ndarray:
  """How often each draw takes each image, float64[R, I].

  A multinomial distribution, ten times as fast as the generator's own.
  """
  drawn_RI = generator.integers(images, size=(draws, images))
  drawn_RI += images * np.arange(draws)[:, None]
  flat = np.bincount(drawn_RI.ravel(), minlength=draws * images)
  return flat.reshape(draws, images).astype(float)


def paired_by_seed(
    ours: Sequence[float],
    theirs: Sequence[float],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
  """The same where only scores are known: seeds alone are drawn."""
  if len(ours) != len(theirs) or not ours:
    raise ValueError(f'Not paired: {len(ours)} and {len(theirs)} seeds.')
  differences = np.subtract(ours, theirs)
  generator = np.random.default_rng(seed)
  chosen_RN = generator.integers(len(ours), size=(draws, len(ours)))
  return _interval(
      float(differences.mean()), differences[chosen_RN].mean(axis=1)
  )


def _interval(difference: float, found_R: np.ndarray) -> Interval:
  tail = 100 * (1 - LEVEL) / 2
  low, high = np.percentile(found_R, [tail, 100 - tail])
  return Interval(difference, float(low), float(high))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean and sample standard deviation; None for a single value."""
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return statistics.fmean(values), deviation


def name(file: str, part: ablation_cell.Part) -> str:
  """What the score of a question file is called."""
  return _NAMES.get(file, f'{file}, {_KINDS[part.kind]}')
