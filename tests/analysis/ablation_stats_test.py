# SPDX-License-Identifier: Apache-2.0
"""Scores and intervals against what can be counted."""

import dataclasses
import itertools

import numpy as np
import pytest

from moellava_jax.analysis import (
    ablation_cell,
    ablation_figure,
    ablation_paper,
    ablation_stats,
    ablation_table,
)
from moellava_jax.evals import base, pope, shapes


def _exact(right_by_image):
  """Counts of one category: an image each, one question with it."""
  right_I = np.array(right_by_image, float)
  return np.stack([right_I, np.ones_like(right_I), np.zeros_like(right_I)], 1)


def test_counts_give_the_scores_of_evaluation():
  rng = np.random.default_rng(0)
  categories = ('random', 'popular', 'adversarial')
  questions = [
      base.Question(
          i,
          f'{rng.integers(40)}.png',
          'Is it?',
          categories[i % 3],
          ('yes', 'no')[rng.integers(2)],
          {},
      )
      for i in range(300)
  ]
  texts = [('Yes', 'No.', '')[rng.integers(3)] for _ in questions]
  answers = [base.Answer(i, '', t, '', '', {}) for i, t in enumerate(texts)]
  (part,) = ablation_cell.parts_of(
      'pope', {'q': questions}, {'q': answers}
  ).values()
  expected = pope.rates(questions, answers)['f1_mean']
  assert ablation_stats.of_part(part) == pytest.approx(expected, abs=1e-12)
  images = len({question.image for question in questions})
  assert ablation_stats.counts(part).shape == (images, 3 * 3)

  exact = [
      base.Question(
          i, 'a.png', 'How?', shapes.CATEGORIES[i % 3], '2', {'kind': 'k'}
      )
      for i in range(100)
  ]
  texts = [('2.', '3')[rng.integers(2)] for _ in exact]
  found = [base.Answer(i, '', t, '', '', {}) for i, t in enumerate(texts)]
  parts = ablation_cell.parts_of(
      'shapes',
      {'pope': questions, 'exact': exact},
      {'pope': answers, 'exact': found},
  )
  scores = shapes.score(
      {'pope': questions, 'exact': exact}, {'pope': answers, 'exact': found}
  )
  assert ablation_stats.of_part(parts['exact']) == pytest.approx(
      scores['exact_match']['mean'], abs=1e-12
  )


def test_packed_values_come_back():
  bits_N = np.array([True, False, True] * 7)
  numbers_N = np.array([0, 3, 65_535, 3])
  packed = ablation_cell.pack(bits_N)
  np.testing.assert_array_equal(ablation_cell.unpack(packed, 21), bits_N)
  packed = ablation_cell.pack(numbers_N)
  np.testing.assert_array_equal(ablation_cell.unpack(packed, None), numbers_N)
  with pytest.raises(ValueError, match='70000 is no uint16'):
    ablation_cell.pack(np.array([0, 70_000]))


def _close(interval, all_differences):
  """Whether an interval is that of equally likely differences."""
  low, high = np.percentile(all_differences, [2.5, 97.5])
  assert interval.low == pytest.approx(low, abs=0.02)
  assert interval.high == pytest.approx(high, abs=0.02)


def test_interval_of_one_seed_is_that_of_all_resamples():
  # Shares of right answers; odd ones, lest draws coincide.
  ours, theirs = np.random.default_rng(4).random((2, 5))
  gaps = ours - theirs
  every = [
      sum(drawn) / 5 for drawn in itertools.product(gaps.tolist(), repeat=5)
  ]
  found = ablation_stats.paired('exact', [_exact(ours)], [_exact(theirs)])
  assert found.difference == pytest.approx(np.mean(gaps))
  _close(found, every)


def test_interval_of_several_seeds_draws_seeds_and_then_images():
  rng = np.random.default_rng(3)
  ours, theirs = rng.random((2, 2, 3))
  gaps = np.subtract(ours, theirs)
  by_seed = [
      [sum(drawn) / 3 for drawn in itertools.product(row, repeat=3)]
      for row in gaps.tolist()
  ]
  every = [
      sum(values) / 2
      for seeds in itertools.product(range(2), repeat=2)
      for values in itertools.product(*(by_seed[s] for s in seeds))
  ]
  sides = [[_exact(row) for row in side] for side in (ours, theirs)]
  found = ablation_stats.paired('exact', *sides)
  assert found.difference == pytest.approx(np.mean(gaps))
  _close(found, every)
  # Seeds that agree: all that is left comes from the images.
  found = ablation_stats.paired_by_seed([0.5, 0.5], [0.25, 0.25])
  assert (found.low, found.high) == (0.25, 0.25)


def test_what_rows_have_in_common_cancels():
  rng = np.random.default_rng(1)
  same = [_exact(rng.integers(2, size=30)) for _ in range(3)]
  found = ablation_stats.paired('exact', same, same)
  assert (found.difference, found.low, found.high) == (0, 0, 0)
  assert found.verdict == 0
  f1 = [rng.integers(1, 5, size=(20, 9)).astype(float) for _ in range(3)]
  better = [c + np.array([1.0, 0, 0] * 3) for c in f1]
  assert ablation_stats.paired('yes_no', better, f1).verdict == 1
  assert ablation_stats.paired('yes_no', f1, better).verdict == -1


def test_questions_about_one_image_are_drawn_together():
  rng = np.random.default_rng(2)
  gap_I = rng.integers(2, size=40)
  alone = ablation_stats.paired(
      'exact', [_exact(np.repeat(gap_I, 4))], [_exact([0] * 160)]
  )
  four = _exact(gap_I) * 4
  together = ablation_stats.paired('exact', [four], [four * [0, 1, 1]])
  # Four equal answers are worth one: twice the width.
  ratio = (together.high - together.low) / (alone.high - alone.low)
  assert ratio == pytest.approx(2, abs=0.2)


def test_unpaired_rows_are_refused():
  with pytest.raises(ValueError, match='Not paired'):
    ablation_stats.paired('exact', [_exact([1, 0])], [_exact([1])])
  with pytest.raises(ValueError, match='Not paired'):
    ablation_stats.paired_by_seed([1.0], [1.0, 2.0])


def test_the_paper_claims_what_its_numbers_say():
  for name, table in ablation_paper.TABLES.items():
    assert {len(row) for row in table.rows.values()} == {len(table.columns)}
    for better, worse in table.claims:
      above, _, below = ablation_paper.wins(
          ablation_paper.scores(name, better),
          ablation_paper.scores(name, worse),
      )
      assert above > below, (name, better, worse)
  for dense, sparse in ablation_paper.TABLE_7.values():
    above, _, below = ablation_paper.wins(sparse, dense)
    assert above > below


def test_the_figure_shows_every_interval_and_failed_rows():
  def line(key, low, high, seeds=(0, 1)):
    middle = (low + high) / 2
    gap = ablation_stats.Interval(middle, low, high)
    values = {'F1': ablation_table.Value(0.9 + middle, 0.1, (0.8, 1.0), gap)}
    return ablation_table.Line(
        key,
        key,
        'base',
        seeds,
        values if seeds else {},
        1,
        1,
        1.0,
        1.0,
        {} if seeds else {0: 'why'},
    )

  base = dataclasses.replace(line('base', 0, 0, ()), against=None)
  lines = (
      line('a', 0.01, 0.03),
      line('b', -0.1, 0.2),
      line('c', 0, 0, ()),
      base,
  )
  table = ablation_table.Table('g', 'title', 'shapes', 'c.py', lines)
  scores, gaps = ablation_figure.draw(table).axes
  drawn = [
      tuple(artist.get_xdata())
      for artist in gaps.get_lines()
      if len(artist.get_xdata()) == 2 and artist.get_linestyle() == '-'
  ]
  assert drawn == [pytest.approx((1, 3)), pytest.approx((-10, 20))]
  # Filled where 0 is outside, hollow where it is not.
  marks = [a for a in gaps.get_lines() if a.get_marker() not in ('None', '')]
  assert [a.get_markerfacecolor() != 'white' for a in marks] == [True, False]
  labels = [text.get_text() for text in scores.get_yticklabels()]
  assert labels == ['a', 'b', 'c (failed)', 'base (failed)']
