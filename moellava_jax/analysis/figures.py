# SPDX-License-Identifier: Apache-2.0
"""Counts to figures: load, modalities, drops, entropy.

Every function takes `counts.Counts` and returns a matplotlib `Figure`; none
reads a file. They hold for any number of layers, experts and choices; what a
figure needs is in its docstring. See `figures_paths` for what layers and
experts have to do with each other, `routing_exhibits` for how to read them.
"""

import math
from typing import Any

import numpy as np

from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import look

WIDTH = 9.6  # Inches; what a page or a sheet of paper is wide.
TEXT, IMAGE = range(2)
# The modalities' colours, and that of both together.
COLOURS = (look.COLOURS[1], look.COLOURS[0], look.COLOURS[2])
_MARKERS = ('s', 'o', '^')
_LAYER = 'MoE layer (number in the decoder)'
_FEW_LAYERS = 6  # So many fit side by side.


def load(counts: counts_lib.Counts):
  """Every expert's share per layer, of all choices and of each modality's.

  Bars that add up to 100 %; beyond eight experts a map, whose parts have room.
  """
  present = counts_lib.present(counts)
  shown: list[int | None] = [None, *present] if len(present) > 1 else [*present]
  few = len(counts.layers) <= _FEW_LAYERS
  columns = len(shown) if few else 1
  width = (3.2 if len(shown) > 1 else 5.0) if few else WIDTH
  figure, axes = look.grid(len(shown), columns, width, 3.0 if few else 2.5)
  loads = [100 * counts_lib.load_LE(counts, modality) for modality in shown]
  if counts.num_experts > len(look.COLOURS):
    _maps(figure, axes, counts, loads, [_modality(m) for m in shown])
    return figure
  for ax, modality, load_LE in zip(axes, shown, loads, strict=True):
    _stacked(ax, load_LE, range(counts.num_experts))
    for e in range(1, counts.num_experts):
      even = 100 * e / counts.num_experts
      ax.axhline(even, color='black', lw=0.7, ls=(0, (5, 4)))
    look.label(ax, _modality(modality), _LAYER, 'share of choices (%)')
    look.layer_axis(ax, counts.layers, most=24)
    ax.set_ylim(0, 100)
    ax.grid(False)
  names = [f'expert {e}' for e in range(counts.num_experts)]
  look.legend(figure, names, lines=False)
  return figure


def preference(counts: counts_lib.Counts):
  """One panel per expert: image and text in its choices, by layer.

  Needs tokens of both modalities.
  """
  part_LEM = 100 * np.stack(
      [counts_lib.image_part_LE(counts), counts_lib.text_part_LE(counts)], -1
  )
  columns = 4 if counts.num_experts % 3 == 1 else 3
  columns = min(columns, counts.num_experts)
  width = min(WIDTH / columns, 4.0)
  figure, axes = look.grid(counts.num_experts, columns, width, 2.4)
  idle = False
  for e, ax in enumerate(axes):
    _stacked(ax, part_LEM[:, e], (IMAGE, TEXT), modalities=True)
    none_L = np.flatnonzero(part_LEM[:, e].sum(-1) == 0)
    idle = idle or len(none_L) > 0
    ax.plot(none_L, 0 * none_L + 4, 'x', color=look.INK, ms=6)
    ax.axhline(50, color='black', lw=0.8, ls=(0, (5, 4)))
    look.label(ax, f'expert {e}', 'MoE layer', 'share of choices (%)')
    look.layer_axis(ax, counts.layers, most=8)
    ax.set_ylim(0, 100)
    ax.set_yticks(range(0, 101, 25))
    ax.grid(False)
  from matplotlib import lines as mpl_lines

  handles: list[Any] = [_patch(IMAGE), _patch(TEXT)]
  names = ['image tokens', 'text tokens']
  if idle:
    handles.append(mpl_lines.Line2D([], [], ls='', marker='x', color=look.INK))
    names.append('no token')
  figure.legend(
      handles,
      names,
      loc='outside lower center',
      ncols=len(names),
      frameon=False,
      fontsize=9.5,
  )
  return figure


def drop_rate(counts: counts_lib.Counts):
  """Choices that found their expert full, by layer and modality."""
  figure, ax = _by_layer(
      counts,
      lambda modality: 100 * counts_lib.drop_rate_L(counts, modality),
      'dropped choices (%)',
  )
  top = 100 * max(
      float(counts_lib.drop_rate_L(counts, m).max())
      for m in (None, *counts_lib.present(counts))
  )
  look.from_zero(ax, top)
  return figure


def entropy(counts: counts_lib.Counts):
  """Mean entropy of the router by layer and modality; needs `entropy_LM`."""
  figure, ax = _by_layer(
      counts,
      lambda modality: counts_lib.entropy_L(counts, modality),
      'entropy of the router (nats)',
  )
  most = math.log(counts.num_experts)
  look.level(
      ax, most, f'ln {counts.num_experts} = {most:.2f}', '--', above=False
  )
  ax.set_ylim(0, 1.08 * max(most, 0.1))
  return figure


def _maps(figure, axes, counts, loads, titles) -> None:
  """Layers to the right, experts upwards, the share as brightness."""
  top = max(float(load_LE.max()) for load_LE in loads)
  drawn = None
  for ax, load_LE, title in zip(axes, loads, titles, strict=True):
    drawn = ax.imshow(
        load_LE.T,
        cmap='cividis',
        vmin=0,
        vmax=max(top, 1e-9),
        aspect='auto',
        origin='lower',
    )
    look.label(ax, title, _LAYER, 'expert')
    look.layer_axis(ax, counts.layers, most=24)
    ax.set_xlim(-0.5, len(counts.layers) - 0.5)
    ax.set_yticks(range(0, counts.num_experts, 1 + counts.num_experts // 9))
    ax.grid(False)
  look.colour_bar(figure, axes, drawn, 'share of choices (%)')


def _by_layer(counts: counts_lib.Counts, values_of, unit: str):
  """A line for each modality, and for both together, over the layers."""
  few = len(counts.layers) <= _FEW_LAYERS
  figure, (ax,) = look.grid(1, 1, 5.6 if few else 8.0, 3.0)
  present = counts_lib.present(counts)
  shown: list[int | None] = [*present, None] if len(present) > 1 else [*present]
  spread = min(0.14, 0.02 * len(counts.layers))
  for place, modality in enumerate(shown):
    n = len(COLOURS) - 1 if modality is None else modality
    # Beside each other, as values are often the same.
    shift = 0.0 if len(shown) == 1 else spread * (place - 1)
    ax.plot(
        np.arange(len(counts.layers)) + shift,
        values_of(modality),
        color=COLOURS[n],
        ls=('--', ':', '-')[n],
        marker=_MARKERS[n],
        ms=6,
        mec='white',
        lw=1.8,
        label=_modality(modality),
    )
  look.label(ax, '', _LAYER, unit)
  look.layer_axis(ax, counts.layers, most=24)
  figure.legend(
      loc='outside lower center',
      ncols=len(shown),
      frameon=False,
      fontsize=9.5,
  )
  return figure, ax


def _stacked(
    ax, share_LN: np.ndarray, styles, modalities: bool = False
) -> None:
  """Bars of 100 %, the parts on top of each other."""
  x_L = np.arange(len(share_LN))
  bottom_L = np.zeros(len(share_LN))
  for n, share_L in zip(styles, share_LN.T, strict=True):
    patch = _patch(n) if modalities else None
    ax.bar(
        x_L,
        share_L,
        0.84,
        bottom=bottom_L,
        color=COLOURS[n] if patch else look.style(n)['color'],
        hatch=patch.get_hatch() if patch else look.hatch(n),
        edgecolor='white',
        lw=0.6,
    )
    bottom_L = bottom_L + share_L


def _patch(modality: int):
  """Image tokens are plain, text tokens hatched: it shows without colour."""
  from matplotlib import patches

  return patches.Patch(
      fc=COLOURS[modality],
      hatch='///' if modality == TEXT else None,
      ec='white',
  )


def _modality(modality: int | None) -> str:
  if modality is None:
    return 'all tokens'
  return f'{counts_lib.MODALITIES[modality]} tokens'
