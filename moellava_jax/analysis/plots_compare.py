# SPDX-License-Identifier: Apache-2.0
"""Several runs in one figure: losses, balance, scores.

A run has the same colour, line and marker everywhere. N counts steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moellava_jax.analysis import look, plots, results

Row = Mapping[str, Any]
# Steps between which curves of many runs would be a single band.
_POINTS = 400


def losses(names: Sequence[str], runs: Sequence[Mapping[str, Sequence[Row]]]):
  """One panel per stage: the smoothed `ce_loss` of every run that has it.

  Args:
    names: of the runs.
    runs: as many; stage -> rows of `metrics.jsonl`, in order of steps.
  """
  stages = list(dict.fromkeys(stage for run in runs for stage in run))
  figure, axes = look.grid(len(stages), 2, 4.8, 2.9)
  for ax, stage in zip(axes, stages, strict=True):
    seen = []
    for i, run in enumerate(runs):
      rows = run.get(stage, ())
      if rows:
        seen.append(_curve(ax, rows, [row.get('ce_loss') for row in rows], i))
    look.log_if_wide(ax, np.concatenate(seen))
    look.label(ax, stage, 'step', 'cross-entropy (nats per target)')
  look.legend(figure, list(names), lines=True)
  return figure


def balance(names: Sequence[str], runs: Sequence[Sequence[Row]]):
  """Balance loss, drop rate and entropy, means over the sparse layers.

  Args:
    names: of the runs.
    runs: as many; rows of `metrics.jsonl`, none where a run is dense.
  """
  panels = [
      ('aux_loss', 1, 'load-balancing loss', 'loss (before its weight)'),
      ('drop_rate', 100, 'dropped choices', 'share of all choices (%)'),
      ('entropy', 1, 'entropy of the router', 'entropy (nats)'),
  ]
  panels = [
      panel
      for panel in panels
      if any(_mean(row, panel[0]) is not None for rows in runs for row in rows)
  ]
  figure, axes = look.grid(len(panels), 3, 3.3, 2.8)
  for ax, (key, factor, title, unit) in zip(axes, panels, strict=True):
    for i, rows in enumerate(runs):
      values = [_mean(row, key) for row in rows]
      if any(value is not None for value in values):
        _curve(ax, rows, [v if v is None else factor * v for v in values], i)
    look.label(ax, title, 'step', unit)
    if key == 'drop_rate':
      look.from_zero(ax, ax.dataLim.y1)
  look.legend(figure, list(names), lines=True)
  return figure


def scores(names: Sequence[str], compared: Mapping[str, results.Spread]):
  """A line per metric that is a share: every run, the mean, the deviation.

  Args:
    names: of the runs.
    compared: what `results.compare` says of them.
  """
  shown = {n: s for n, s in compared.items() if results.unit(n) == '%'}
  figure, (ax,) = look.grid(1, 1, 9.6, 1.6 + 0.27 * len(shown))
  for y, spread in enumerate(shown.values()):
    mean, deviation = 100 * spread.mean, 100 * np.nan_to_num(spread.deviation)
    ax.plot([mean - deviation, mean + deviation], [y, y], color='#BBBBBB', lw=5)
    ax.plot(mean, y, '|', color=look.INK, ms=13, mew=1.6)
    for i, value in enumerate(spread.values):
      if value is not None:
        ax.plot(
            100 * value,
            # Runs of the same value lie beside each other.
            y + 0.6 * ((i + 0.5) / len(names) - 0.5),
            look.marker(i),
            color=look.style(i)['color'],
            ms=6,
            mec='white',
        )
  look.label(ax, '', 'score (%)', '')
  ax.set_yticks(range(len(shown)), list(shown))
  ax.set_ylim(len(shown) - 0.4, -0.6)
  ax.set_xlim(-2, 102)
  ax.grid(axis='x', color='#DDDDDD', lw=0.7)
  look.legend(figure, list(names), lines=True)
  return figure


def _curve(ax, rows: Sequence[Row], values, i: int) -> np.ndarray:
  """Draws the running mean; returns what was drawn."""
  step_N = np.array([row['step'] for row in rows], float)
  value_N = np.array(values, float)
  smooth_N = plots.smooth(value_N, plots.window(len(rows)))
  thin = slice(None, None, max(1, len(rows) // _POINTS))
  look.curve(ax, step_N[thin], None, smooth_N[thin], i)
  return smooth_N[thin]


def _mean(row: Row, key: str) -> float | None:
  values = [layer.get(key) for layer in (row.get('moe') or {}).values()]
  values = [value for value in values if value is not None]
  return sum(values) / len(values) if values else None
