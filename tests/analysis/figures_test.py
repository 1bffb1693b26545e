# SPDX-License-Identifier: Apache-2.0
"""Figures of routing show the counts, legibly, whatever the model's size."""

import csv
import math

import numpy as np
from PIL import Image
import pytest

from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import (
    exhibits,
    figures,
    figures_paths,
    routing_exhibits,
)
from tests.analysis import boxes, tally_test


def _heights(ax):
  """`[layers, parts]`."""
  return np.transpose([[b.get_height() for b in c] for c in ax.containers])


def test_load_is_stacked_to_100_percent():
  counts = tally_test.counts_of(3, 4, 2, without=(1,))
  panels = figures.load(counts).axes
  titles = ['all tokens', 'text tokens', 'image tokens']
  assert [ax.get_title('left') for ax in panels] == titles
  for ax, modality in zip(panels, (None, 0, 1), strict=True):
    load_LE = 100 * counts_lib.load_LE(counts, modality)
    np.testing.assert_allclose(_heights(ax), load_LE)
    ends = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    np.testing.assert_allclose(ends, 100)


def test_load_of_many_experts_is_a_map():
  counts = tally_test.counts_of(3, 9, 2)
  for ax, modality in zip(
      figures.load(counts).axes[:3], (None, 0, 1), strict=True
  ):
    np.testing.assert_allclose(
        ax.images[0].get_array(), 100 * counts_lib.load_LE(counts, modality).T
    )


def test_preference_marks_experts_without_tokens():
  counts = tally_test.counts_of(3, 4, 1, without=(2,))
  figure = figures.preference(counts)
  for e, ax in enumerate(figure.axes):
    image_L = 100 * counts_lib.image_part_LE(counts)[:, e]
    text_L = 100 * counts_lib.text_part_LE(counts)[:, e]
    np.testing.assert_allclose(_heights(ax), np.stack([image_L, text_L], 1))
    crosses = ax.get_lines()[0].get_xdata()
    assert crosses.tolist() == ([0, 1, 2] if e == 2 else [])
  (legend,) = figure.legends
  assert 'no token' in [text.get_text() for text in legend.get_texts()]


def test_drops_and_entropy_have_a_line_for_each_modality():
  counts = tally_test.counts_of(3, 4, 2)
  (drops,) = figures.drop_rate(counts).axes
  (entropy,) = figures.entropy(counts).axes
  for n, modality in enumerate((0, 1, None)):
    np.testing.assert_allclose(
        drops.get_lines()[n].get_ydata(),
        100 * counts_lib.drop_rate_L(counts, modality),
    )
    np.testing.assert_allclose(
        entropy.get_lines()[n].get_ydata(),
        counts_lib.entropy_L(counts, modality),
    )
  assert entropy.get_lines()[3].get_ydata()[0] == math.log(4)


def test_pairs_are_shown_once():
  counts = tally_test.counts_of(2, 4, 2)
  *panels, _ = figures_paths.coactivation(counts).axes
  for ax, pairs_EE in zip(panels, counts_lib.pairs_LEE(counts), strict=True):
    shown = ax.images[0].get_array()
    assert (~shown.mask).sum() == 6
    np.testing.assert_allclose(shown.sum(), 50 * pairs_EE.sum())


def test_pathways_stand_beside_the_components():
  counts = tally_test.counts_of(3, 4, 2, number=300)
  panels = figures_paths.pathways(counts).axes
  views = [counts.paths_M[0], counts.paths_M[1]]
  for view, top, components in zip(
      views, panels[::2], panels[1::2], strict=True
  ):
    for ax, path_CL in ((top, view.top_CL), (components, view.component_CL)):
      lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
      # The first is drawn last; lines are moved by less than half an expert.
      drawn = [np.round(line.get_ydata()) for line in lines[::-1]][
          -len(path_CL) :
      ]
      np.testing.assert_array_equal(drawn, path_CL)


def test_a_modality_without_tokens_has_no_panel():
  counts = tally_test.counts_of(3, 4, 2, image=0.0)
  assert len(figures.load(counts).axes) == 1
  assert len(figures_paths.pathways(counts).axes) == 2
  shown, absent = routing_exhibits.of_counts(counts)
  assert 'preference' not in [exhibit.name for exhibit in shown]
  assert any('no image token' in line for line in absent)
  for exhibit in shown:
    boxes.check(exhibit.figure)


def test_what_is_not_known_is_named():
  part = tally_test.tokens(1, 2, 1)._replace(entropy_LN=None)
  counts = tally_test.tally.tally([0], 2, [part])
  shown, absent = routing_exhibits.of_counts(counts)
  names = [exhibit.name for exhibit in shown]
  assert names == ['load', 'preference', 'pathways', 'drop_rate']
  assert [line.split(':')[0] for line in absent] == [
      'Router entropy',
      'Co-activation',
  ]


@pytest.mark.parametrize(
    'layers, experts, top_k, without',
    [
        (1, 1, 1, ()),
        (2, 4, 2, (3,)),
        (3, 10, 3, (5,)),
        pytest.param(24, 8, 2, (), marks=pytest.mark.slow),
    ],
)
def test_every_figure_is_legible(layers, experts, top_k, without):
  counts = tally_test.counts_of(
      layers, experts, top_k, number=400, without=without
  )
  shown, _ = routing_exhibits.of_counts(counts)
  assert len(shown) == (6 if top_k > 1 else 5)
  for exhibit in shown:
    boxes.check(exhibit.figure)


def test_a_figure_is_written_with_its_numbers(tmp_path):
  counts = tally_test.counts_of(2, 4, 2, without=(1,))
  shown, _ = routing_exhibits.of_counts(counts)
  for exhibit in shown[:2]:
    exhibits.write(exhibit, tmp_path)
    Image.open(tmp_path / f'{exhibit.name}.png').verify()
    assert '</svg>' in (tmp_path / f'{exhibit.name}.svg').read_text()
    text = (tmp_path / f'{exhibit.name}.csv').read_text()
    assert 'nan' not in text.lower()
  with (tmp_path / 'load.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 2 * 3 * 4
  for row in rows:
    n, e = int(row['layer']), int(row['expert'])
    mine = {'all': slice(None), 'text': 0, 'image': 1}[row['tokens']]
    for column, count_LME in (
        ('first_choices', counts.first_LME),
        ('choices', counts.assigned_LME),
        ('kept', counts.kept_LME),
    ):
      assert int(row[column]) == count_LME[n, mine, e].sum()
