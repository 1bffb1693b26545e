# SPDX-License-Identifier: Apache-2.0
"""Training to figures: losses, balance and load over the steps.

Every function takes plain rows or arrays and returns a matplotlib `Figure`;
none reads a file.

Letters: L MoE layers, E experts, N steps.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import numpy as np

from moellava_jax.analysis import look

RARE = 0.05  # An expert below this share of its layer is hardly used.
_CURVES = 8  # More in a panel are not told apart: a map shows them.
_PIXELS = 300  # Steps that a map shows.

Row = Mapping[str, Any]


def smooth(values_N: np.ndarray, window: int) -> np.ndarray:
  """Centred running mean of up to `window` steps that skips NaN and inf."""
  good_N = np.isfinite(values_N)
  kernel = np.ones(min(window, len(values_N)))
  total_N = np.convolve(np.where(good_N, values_N, 0.0), kernel, 'same')
  count_N = np.convolve(good_N.astype(float), kernel, 'same')
  return np.where(count_N > 0, total_N / np.maximum(count_N, 1), np.nan)


def window(steps: int) -> int:
  """Steps that `smooth` averages in a curve of `steps` steps: one in thirty."""
  return max(1, round(steps / 30))


def loss_curves(rows_by_stage: Mapping[str, Sequence[Row]]):
  """One panel per stage: `ce_loss` of the steps, `eval_loss` where present.

  Args:
    rows_by_stage: stage name -> rows of `metrics.jsonl`, in order of steps.
  """
  figure, axes = look.grid(len(rows_by_stage), columns=2, width=5.2, height=3.0)
  for ax, (stage, rows) in zip(axes, rows_by_stage.items(), strict=True):
    step_N, loss_N = _series(rows, 'step'), _series(rows, 'ce_loss')
    smooth_N = smooth(loss_N, window(len(rows)))
    ax.plot(step_N, loss_N, color=look.COLOURS[0], alpha=0.3, lw=0.7)
    ax.plot(step_N, smooth_N, color=look.COLOURS[0], lw=1.8, label='train')
    held_out = [row for row in rows if row.get('eval_loss') is not None]
    if held_out:
      x, y = _series(held_out, 'step'), _series(held_out, 'eval_loss')
      # White rims keep dots apart from the curve below them.
      ax.plot(
          x, y, 'o', ms=6, color=look.COLOURS[4], mec='white', label='held out'
      )
    look.log_if_wide(ax, loss_N)
    look.label(ax, stage, 'step', 'cross-entropy (nats per target)')
    ax.legend(frameon=False, fontsize=9, loc='upper right')
  return figure


def moe_training(rows: Sequence[Row]):
  """Load-balancing loss, drop rate and entropy of every MoE layer.

  Curves, or maps of many layers. The panel of the entropy is left out where it
  was not logged.

  Args:
    rows: rows of `metrics.jsonl`; those without `moe` are left out.
  """
  rows = [row for row in rows if row.get('moe')]
  layers = _layers(rows)
  panels = [
      ('aux_loss', 1, 'load-balancing loss', 'loss (before its weight)'),
      ('drop_rate', 100, 'dropped choices', 'share of all choices (%)'),
      ('entropy', 1, 'entropy of the router', 'entropy (nats)'),
  ]
  first = rows[0]['moe'][layers[0]]
  panels = [panel for panel in panels if panel[0] in first]
  if len(layers) > _CURVES:
    return _training_maps(rows, layers, panels)
  figure, axes = look.grid(len(panels), 3, 3.3, 2.8)
  step_N = _series(rows, 'step')
  for ax, (key, factor, title, unit) in zip(axes, panels, strict=True):
    for i, layer in enumerate(layers):
      value_N = factor * _series([row['moe'][layer] for row in rows], key)
      look.curve(ax, step_N, value_N, smooth(value_N, window(len(rows))), i)
    look.label(ax, title, 'step', unit)
    if key == 'drop_rate':
      look.from_zero(ax, ax.dataLim.y1)
    if key == 'entropy':
      num_experts = len(first['load'])
      even = math.log(num_experts)
      look.level(ax, even, f'ln {num_experts}', '--', above=False)
  look.legend(figure, [f'layer {n}' for n in layers], lines=True)
  return figure


def _training_maps(rows, layers, panels):
  figure, axes = look.grid(len(panels), 1, 9.6, 1.4 + 0.07 * len(layers))
  step_N = _series(rows, 'step')
  for ax, (key, factor, title, unit) in zip(axes, panels, strict=True):
    value_NL = factor * np.stack(
        [_series([row['moe'][n] for row in rows], key) for n in layers], 1
    )
    top = max(float(np.nanmax(value_NL)), 1.0) if key == 'drop_rate' else None
    drawn = _map(ax, step_N, value_NL, top)
    look.label(ax, title, 'step', 'MoE layer')
    ax.grid(False)
    every = -(-len(layers) // 8)
    ax.set_yticks(range(0, len(layers), every), layers[::every])
    look.colour_bar(figure, [ax], drawn, unit)
  return figure


def _map(ax, step_N: np.ndarray, value_NR: np.ndarray, top: float | None):
  """Steps to the right, rows upwards, the running mean as brightness."""
  steps = len(step_N)
  smooth_NR = np.stack([smooth(v_N, window(steps)) for v_N in value_NR.T], 1)
  shown = smooth_NR[:: max(1, steps // _PIXELS)].T
  drawn = ax.imshow(
      shown,
      cmap='cividis',
      aspect='auto',
      origin='lower',
      interpolation='nearest',
      extent=(step_N[0], step_N[-1] + 1, -0.5, len(shown) - 0.5),
      vmin=None if top is None else 0,
      vmax=top,
  )
  return drawn


def load_over_steps(rows: Sequence[Row]):
  """One panel per MoE layer: the share of every expert over the steps.

  Curves, or maps of many experts.

  Args:
    rows: rows of `metrics.jsonl`; those without `moe` are left out.
  """
  rows = [row for row in rows if row.get('moe')]
  layers = _layers(rows)
  columns = 3 if len(layers) <= 9 else 4
  width = min(9.6 / min(columns, len(layers)), 4.4)
  figure, axes = look.grid(len(layers), columns, width, 2.5)
  step_N = _series(rows, 'step')
  load_LNE = 100 * np.array(
      [[row['moe'][layer]['load'] for row in rows] for layer in layers], float
  )
  num_experts = load_LNE.shape[-1]
  top, drawn = 1.08 * float(np.nanmax(load_LNE)), None
  for ax, layer, load_NE in zip(axes, layers, load_LNE, strict=True):
    if num_experts > _CURVES:
      drawn = _map(ax, step_N, load_NE, top)
      look.label(ax, f'layer {layer}', 'step', 'expert')
      ax.set_yticks(range(0, num_experts, 1 + num_experts // 9))
      ax.grid(False)
      continue
    for e, load_N in enumerate(load_NE.T):
      look.curve(ax, step_N, load_N, smooth(load_N, window(len(rows))), e)
    ax.axhline(
        100 / num_experts, color=look.INK, lw=1, ls=(0, (4, 3)), zorder=1
    )
    look.label(ax, f'layer {layer}', 'step', 'share of choices (%)')
    ax.set_ylim(0, top)
  if drawn is not None:
    look.colour_bar(figure, axes, drawn, 'share of choices (%)')
  else:
    names = [f'expert {e}' for e in range(num_experts)]
    look.legend(figure, names, lines=True)
  return figure


def expert_load(layers: Sequence[int], load_LE: np.ndarray):
  """Bars of every expert's share per layer, with the lines of 1/E and 5 %."""
  load_LE = 100 * np.asarray(load_LE, float)
  num_layers, num_experts = load_LE.shape
  width = min(14.0, max(7.0, 2.0 + 0.22 * num_layers * (num_experts + 1)))
  figure, (ax,) = look.grid(1, columns=1, width=width, height=3.4)
  bar = 0.8 / num_experts
  for e in range(num_experts):
    x_L = np.arange(num_layers) + (e - (num_experts - 1) / 2) * bar
    ax.bar(
        x_L,
        load_LE[:, e],
        0.9 * bar,
        color=look.style(e)['color'],
        hatch=look.hatch(e),
        edgecolor='white',
    )
  even = 100 / num_experts
  # Names stand on opposite sides of their lines, which may be close.
  above = even > 100 * RARE
  look.level(ax, even, f'even: {even:.3g} %', '--', above)
  look.level(ax, 100 * RARE, f'{100 * RARE:.0f} %', ':', not above)
  ax.set_xticks(range(num_layers), [str(n) for n in layers])
  ax.set_ylim(0, 1.12 * max(np.nanmax(load_LE), even, 100 * RARE))
  look.label(
      ax, '', 'MoE layer (number in the decoder)', 'share of choices (%)'
  )
  look.legend(figure, [f'expert {e}' for e in range(num_experts)], lines=False)
  return figure


def _series(rows: Sequence[Row], key: str) -> np.ndarray:
  """float64 values of `key`; None and absent become NaN."""
  return np.array([row.get(key) for row in rows], float)


def _layers(rows: Sequence[Row]) -> list[str]:
  """Keys of the MoE layers in the order of the decoder."""
  return sorted(rows[0]['moe'], key=int)
