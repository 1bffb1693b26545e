# SPDX-License-Identifier: Apache-2.0
"""Figures draw the numbers they are given, and every label is legible."""

import numpy as np
import pytest

from moellava_jax.analysis import plots
from tests.analysis import boxes


def _moe_rows(layers, num_experts, steps=30):
  rng = np.random.default_rng(0)
  return [
      {
          'step': step,
          'moe': {
              str(layer): {
                  'load': rng.dirichlet(np.ones(num_experts)).tolist(),
                  'aux_loss': 1.1,
                  'drop_rate': 0.02,
                  'entropy': 0.5,
              }
              for layer in layers
          },
      }
      for step in range(1, steps + 1)
  ]


def test_smoothing_averages_neighbours_and_skips_nan():
  values_N = np.array([1.0, np.nan, 3.0, 5.0, np.inf])
  smooth_N = plots.smooth(values_N, 3)
  np.testing.assert_allclose(smooth_N, [1.0, 2.0, 4.0, 4.0, 5.0])
  assert len(plots.smooth(values_N, 99)) == 5


def test_loss_curves_have_a_panel_per_stage_with_held_out_dots():
  rows = [{'step': n, 'ce_loss': 10.0 / n} for n in range(1, 101)]
  rows[49]['eval_loss'] = 0.3
  figure = plots.loss_curves({'pretrain': rows, 'moe': rows[:3]})
  first, second = figure.axes
  raw, _, dots = first.get_lines()
  np.testing.assert_allclose(raw.get_ydata(), [10.0 / n for n in range(1, 101)])
  assert (dots.get_xdata(), dots.get_ydata()) == (50, 0.3)
  assert len(second.get_lines()) == 2  # Nothing held out: no dots.
  assert [ax.get_title('left') for ax in figure.axes] == ['pretrain', 'moe']
  assert (first.get_yscale(), second.get_yscale()) == ('log', 'linear')


def test_load_over_steps_follows_each_expert():
  rows = _moe_rows((0, 10, 2), num_experts=4)
  figure = plots.load_over_steps(rows)
  titles = [ax.get_title('left') for ax in figure.axes]
  assert titles == ['layer 0', 'layer 2', 'layer 10']  # By number, not text.
  raw_of_expert_1 = figure.axes[2].get_lines()[2]
  expected = [100 * row['moe']['10']['load'][1] for row in rows]
  np.testing.assert_allclose(raw_of_expert_1.get_ydata(), expected)


def test_drop_rate_is_in_percent():
  _, drops, _ = plots.moe_training(_moe_rows((0,), 4)).axes
  np.testing.assert_allclose(drops.get_lines()[0].get_ydata(), 2.0)


def test_bars_are_the_loads_with_lines_at_even_use_and_5_percent():
  load_LE = [[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.46, 0.04]]
  (ax,) = plots.expert_load([0, 2], load_LE).axes
  heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
  np.testing.assert_allclose(np.transpose(heights), 100 * np.array(load_LE))
  assert [line.get_ydata()[0] for line in ax.get_lines()] == [25, 5]


def test_entropy_has_its_own_panel_where_it_was_logged():
  rows = _moe_rows((0,), 4)
  *_, entropy = plots.moe_training(rows).axes
  raw, _, even = entropy.get_lines()
  np.testing.assert_allclose(raw.get_ydata(), 0.5)
  np.testing.assert_allclose(even.get_ydata(), np.log(4))
  for row in rows:
    del row['moe']['0']['entropy']
  assert len(plots.moe_training(rows).axes) == 2


def test_many_experts_or_layers_become_maps():
  rows = _moe_rows(range(9), num_experts=9, steps=20)
  *panels, _ = plots.load_over_steps(rows).axes
  shown = [ax.images[0].get_array() for ax in panels if ax.axison]
  load_LEN = 100 * np.array(
      [[row['moe'][str(n)]['load'] for row in rows] for n in range(9)]
  ).transpose(0, 2, 1)
  np.testing.assert_allclose(shown, load_LEN)  # 20 steps: nothing averaged.
  balance = plots.moe_training(rows).axes[0]
  assert balance.images[0].get_array().shape == (9, 20)


@pytest.mark.parametrize('num_layers, num_experts', [(1, 2), (2, 4), (9, 20)])
def test_no_texts_overlap(num_layers, num_experts):
  layers = list(range(num_layers))
  even_LE = np.full((num_layers, num_experts), 1 / num_experts)
  rows = [
      {**row, 'stage': 'moe', 'ce_loss': 5.0 / row['step']}
      for row in _moe_rows(layers, num_experts, steps=4)
  ]
  wide = [{**row, 'ce_loss': 8 * 0.1 ** row['step']} for row in rows]
  for figure in (
      plots.loss_curves({'pretrain': rows, 'finetune': wide, 'moe': rows}),
      plots.moe_training(rows),
      plots.load_over_steps(rows),
      plots.expert_load(layers, even_LE),
  ):
    boxes.check(figure)
