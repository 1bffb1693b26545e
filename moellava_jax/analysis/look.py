# SPDX-License-Identifier: Apache-2.0
"""The look of the figures: colours, panels, labels, legends.

matplotlib is imported on the first figure, without pyplot, so nothing needs a
display and no figure outlives its caller.
"""

from collections.abc import Sequence
import io
import math
from typing import Any

import numpy as np

# Okabe and Ito's colours, which people with any colour vision tell apart
# (https://jfly.uni-koeln.de/color/). Yellow is last: it is faint on white.
COLOURS = (
    '#0072B2',  # Blue.
    '#E69F00',  # Orange.
    '#009E73',  # Bluish green.
    '#CC79A7',  # Reddish purple.
    '#D55E00',  # Vermillion.
    '#56B4E9',  # Sky blue.
    '#000000',
    '#F0E442',
)
# What tells experts apart where colours are not seen, or not enough of them.
LINE_STYLES = ('-', '--', ':', '-.')
HATCHES = (None, '///', '...', '\\\\\\', 'xxx', '---', 'ooo', '+++')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
INK = '#333333'
SHARPNESS = 1.5  # Pixels of a PNG per pixel of the page, for fine screens.
_CSS_DPI = 96


def png(figure) -> bytes:
  """The figure as PNG, to be shown `SHARPNESS` times smaller."""
  _settle(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=SHARPNESS * _CSS_DPI)
  return buffer.getvalue()


def svg(figure) -> bytes:
  """The figure as SVG, letters as outlines, so that it needs no font."""
  _settle(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  return buffer.getvalue()


def _settle(figure) -> None:
  """Keeps the layout for other formats: to find it takes as long as to draw."""
  if figure.get_layout_engine() is not None:
    figure.draw_without_rendering()
    figure.set_layout_engine('none')


def grid(count: int, columns: int, width: float, height: float):
  """A figure and `count` panels of width x height inches, row by row."""
  from matplotlib import figure as mpl_figure
  from matplotlib import layout_engine

  columns = min(columns, count)
  rows = math.ceil(count / columns)
  figure = mpl_figure.Figure(
      figsize=(columns * width, rows * height),
      layout=layout_engine.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
  )
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax in axes[count:]:
    ax.set_axis_off()
  return figure, axes[:count]


def label(ax, title: str, x: str, y: str) -> None:
  """Names the axes with their units and gives a panel the house look."""
  ax.set_title(title, loc='left', fontsize=11, fontweight='bold', color=INK)
  ax.set_xlabel(x, fontsize=9.5, color=INK)
  ax.set_ylabel(y, fontsize=9.5, color=INK)
  ax.tick_params(which='both', labelsize=9, colors=INK, labelcolor=INK)
  ax.spines[['top', 'right']].set_visible(False)
  ax.grid(axis='y', color='#DDDDDD', lw=0.7)
  ax.set_axisbelow(True)


def legend(figure, names: list[str], lines: bool) -> None:
  """One legend for all panels, below them, where it covers no data."""
  from matplotlib import lines as mpl_lines
  from matplotlib import patches

  if lines:
    handles = [
        mpl_lines.Line2D([], [], lw=2, ms=6, marker=marker(i), **style(i))
        for i in range(len(names))
    ]
  else:
    handles = [
        patches.Patch(
            fc=style(i)['color'],
            hatch=hatch(i),
            ec='white',
        )
        for i in range(len(names))
    ]
  figure.legend(
      handles,
      names,
      loc='outside lower center',
      ncols=min(len(names), 8),
      frameon=False,
      fontsize=9.5,
  )


def curve(
    ax, x_N: np.ndarray, raw_N: np.ndarray | None, smooth_N: np.ndarray, i: int
) -> None:
  """Curve number `i` of a panel: its steps faint, its running mean bold."""
  drawn = style(i)
  # Markers of curves that run together lie at different steps.
  every = max(1, len(x_N) // 6)
  if raw_N is not None:
    ax.plot(x_N, raw_N, alpha=0.2, lw=0.7, color=drawn['color'])
  ax.plot(
      x_N,
      smooth_N,
      lw=1.7,
      marker=marker(i),
      ms=5,
      mec='white',
      markevery=(i * every // 6 % every, every),
      **drawn,
  )


def level(ax, height: float, text: str, style: str, above: bool) -> None:
  """A horizontal line whose name stands right of the panel, at its end."""
  ax.axhline(height, color=INK, lw=1.1, ls=style)
  ax.annotate(
      text,
      (1.01, height),
      xycoords=ax.get_yaxis_transform(),
      va='bottom' if above else 'top',
      fontsize=9,
      color=INK,
      annotation_clip=False,
  )


def colour_bar(figure, axes, drawn, unit: str) -> None:
  """The scale of the maps of some panels, right of them."""
  rows = len({ax.get_subplotspec().rowspan.start for ax in axes})
  bar = figure.colorbar(
      drawn,
      ax=list(axes),
      shrink=0.95 if rows == 1 else 0.7,
      aspect=12 + 8 * (rows - 1),
      pad=0.02,
  )
  bar.set_label(unit, fontsize=9.5, color=INK)
  bar.ax.tick_params(labelsize=9, colors=INK)
  bar.outline.set_visible(False)


def layer_axis(ax, layers: Sequence[int], most: int) -> None:
  """Numbers layers below places 0, 1, ..., at most about `most` of them."""
  every = -(-len(layers) // most)
  places = range(0, len(layers), every)
  ax.set_xticks(places, [str(layers[n]) for n in places])
  ax.set_xticks(range(len(layers)), minor=True)
  ax.set_xlim(-0.6, len(layers) - 0.4)


def from_zero(ax, top: float) -> None:
  """Limits of a percentage whose curve may lie on 0 and be seen there."""
  top = max(top, 1.0)
  ax.set_ylim(-0.04 * top, 1.15 * top)


def log_if_wide(ax, values_N: np.ndarray) -> None:
  """A logarithmic y axis with plain numbers if values span a factor of 20."""
  from matplotlib import ticker

  good = values_N[np.isfinite(values_N)]
  if len(good) and good.min() > 0 and good.max() > 20 * good.min():
    ax.set_yscale('log')
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def hatch(i: int) -> str | None:
  """The pattern of bars of expert number `i`.

  Patterns shift against colours, so that both together repeat after 64.
  """
  return HATCHES[(i + 3 * (i // len(COLOURS))) % len(HATCHES)]


def marker(i: int) -> str:
  """The marker of expert, layer or run number `i`; shifted as `hatch` is."""
  return MARKERS[(i + 3 * (i // len(COLOURS))) % len(MARKERS)]


def style(i: int) -> dict[str, Any]:
  """Colour and line style of expert or layer number `i`."""
  return {
      'color': COLOURS[i % len(COLOURS)],
      'linestyle': LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)],
  }
