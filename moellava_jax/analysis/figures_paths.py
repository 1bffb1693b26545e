# SPDX-License-Identifier: Apache-2.0
"""Counts to figures: pairs of experts, pathways through the layers."""

import numpy as np

from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import figures, look


def coactivation(counts: counts_lib.Counts):
  """One panel per layer: how many tokens chose both experts of a pair.

  Needs at least two choices a token.
  """
  pairs_LEE = 100 * counts_lib.pairs_LEE(counts)
  num_layers, num_experts = len(counts.layers), counts.num_experts
  columns = min(num_layers, 4 if num_layers > 3 else 3)
  width = min(figures.WIDTH / columns, 3.6)
  figure, axes = look.grid(num_layers, columns, width, width + 0.1)
  top = max(float(pairs_LEE.max()), 1e-9)
  every = 1 + (num_experts - 1) // 8
  places = range(0, num_experts, every)
  drawn = None
  for ax, layer, pairs_EE in zip(axes, counts.layers, pairs_LEE, strict=True):
    # Each pair once: the rest of the square says the same.
    below_EE = np.tri(num_experts, k=-1, dtype=bool)
    shown_EE = np.ma.masked_array(pairs_EE, ~below_EE)
    drawn = ax.imshow(shown_EE, cmap='cividis', vmin=0, vmax=top)
    look.label(ax, f'layer {layer}', 'expert', 'expert')
    ax.grid(False)
    ax.set_xticks(places)
    ax.set_yticks(places)
    # Without the row and the column that have no pair.
    ax.set_xlim(-0.5, num_experts - 1.5)
    ax.set_ylim(num_experts - 0.5, 0.5)
    if num_experts <= 5:
      for a, b in zip(*np.nonzero(below_EE), strict=True):
        dark = pairs_EE[a, b] < 0.6 * top
        ax.text(
            b,
            a,
            f'{pairs_EE[a, b]:.0f}',
            ha='center',
            va='center',
            fontsize=9,
            color='white' if dark else 'black',
        )
  look.colour_bar(figure, axes, drawn, 'share of tokens (%)')
  return figure


def pathways(counts: counts_lib.Counts):
  """The most frequent pathways beside the paper's PCA view, by modality.

  The right panels are left out where no modality has a component.
  """
  present = counts_lib.present(counts)
  views = [counts.paths_M[m] for m in present]
  columns = 2 if any(len(v.variance_C) for v in views) else 1
  height = min(2.2 + 0.16 * counts.num_experts, 4.6)
  figure, axes = look.grid(
      columns * len(present), columns, figures.WIDTH / 2, height
  )
  for row, (modality, view) in enumerate(zip(present, views, strict=True)):
    name = counts_lib.MODALITIES[modality]
    share_C = 100 * view.top_count_C / view.tokens
    ax = axes[columns * row]
    count = f'top {len(share_C)} of {view.distinct:,}'
    if len(share_C) == view.distinct:
      count = 'all' if view.distinct > 1 else 'the only one'
    _paths(ax, counts, view.top_CL, share_C, modality, 'tokens')
    look.label(ax, f'{name}: pathways, {count}', 'MoE layer', 'expert')
    if columns == 1:
      continue
    ax = axes[columns * row + 1]
    part_C = 100 * view.variance_C
    _paths(ax, counts, view.component_CL, part_C, modality, 'variance')
    look.label(ax, f'{name}: PCA view', 'MoE layer', 'expert (from the score)')
    if not len(view.variance_C):
      ax.text(
          0.5,
          0.5,
          'no variance between layers',
          transform=ax.transAxes,
          ha='center',
          fontsize=9.5,
          color=look.INK,
      )
  return figure


def _paths(ax, counts, path_CL, share_C, modality: int, unit: str) -> None:
  """Pathways as lines, the first two stand out, the first one on top.

  `unit` says of what the shares in the legend are.
  """
  shown = len(path_CL)
  x_L = np.arange(len(counts.layers))
  for n in reversed(range(shown)):
    # Lines through the same expert lie beside each other.
    shift = 0.0 if shown == 1 else 0.6 * ((shown - 1 - n) / (shown - 1) - 0.5)
    first = n < 2
    ax.plot(
        x_L,
        path_CL[n] + shift,
        color=(figures.COLOURS[modality], '#000000')[n] if first else '#999999',
        ls='-' if n != 1 else (0, (3, 1.5)),
        lw=2.4 if first else 1.0,
        marker=('o', 's')[n] if first else '.',
        ms=5 if first else 4,
        label=f'{n + 1}: {share_C[n]:.3g} %',
        zorder=3 if first else 2,
    )
  look.layer_axis(ax, counts.layers, most=12)
  every = 1 + (counts.num_experts - 1) // 8
  ax.set_yticks(range(0, counts.num_experts, every))
  ax.set_ylim(-0.6, counts.num_experts - 0.4)
  for edge in range(1, counts.num_experts):
    ax.axhline(edge - 0.5, color='#E6E6E6', lw=0.7, zorder=0)
  if shown:
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1],
        names[::-1],
        loc='center left',
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=8,
        title=unit,
        title_fontsize=8,
        alignment='left',
        labelspacing=0.25,
        handlelength=1.8,
    )
