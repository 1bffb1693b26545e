# SPDX-License-Identifier: Apache-2.0
"""Figure 1 of MoE-LLaVA: POPE by the parameters that a token activates."""

from collections.abc import Iterable, Mapping
import math
import pathlib
from typing import Any

NAME = 'pope_by_activated_parameters'
_SPARSE = 'MoE-LLaVA'
# Okabe and Ito's colours, which people with any colour vision tell apart.
_DENSE_COLOUR, _SPARSE_COLOUR, _OWN_COLOUR = '#0072B2', '#E69F00', '#D55E00'
_INK = '#333333'
_SIZE = (7.2, 4.4)  # Inches.
_DPI = 150
_MARKER = 8.0  # Points across.
_FONT = 8.5
# Where a label may stand: points right and up of the dot, nearest first.
_RINGS = (9, 16, 26, 38, 52, 70)
_NEAR = 16  # Beyond, a line leads to the dot.
_SIDES = (
    (1, 0),
    (0, 1),
    (0, -1),
    (-1, 0),
    (0.7, 0.7),
    (0.7, -0.7),
    (-0.7, 0.7),
    (-0.7, -0.7),
)

Points = Mapping[str, tuple[float, float]]


def save(
    published: Points, own: Points, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Writes the figure as PNG and SVG.

  Args:
    published: name -> (billions of activated parameters, POPE in percent).
    own: the same of models evaluated here.
    folder: where to.
  """
  from matplotlib import rc_context

  figure = draw(published, own)
  paths = [folder / f'{NAME}.{kind}' for kind in ('png', 'svg')]
  with rc_context({'svg.hashsalt': NAME}):  # The same file for the same points.
    for path in paths:
      dated = {'Date': None} if path.suffix == '.svg' else {}
      figure.savefig(path, dpi=_DPI, metadata=dated)
  return paths


def draw(published: Points, own: Points) -> Any:
  """The figure; labels overlap neither each other nor any dot."""
  from matplotlib import figure as mpl_figure
  from matplotlib import ticker
  from matplotlib.backends import backend_agg

  figure = mpl_figure.Figure(figsize=_SIZE)
  backend_agg.FigureCanvasAgg(figure)
  ax = figure.add_axes((0.09, 0.13, 0.88, 0.78))
  groups = (
      (
          'dense',
          _DENSE_COLOUR,
          'o',
          {k: v for k, v in published.items() if not k.startswith(_SPARSE)},
      ),
      (
          'MoE-LLaVA',
          _SPARSE_COLOUR,
          's',
          {k: v for k, v in published.items() if k.startswith(_SPARSE)},
      ),
      ('evaluated here', _OWN_COLOUR, '*', own),
  )
  for label, colour, marker, points in groups:
    if points:
      x, y = zip(*points.values(), strict=True)
      size = _MARKER * (1.5 if marker == '*' else 1)
      ax.plot(
          x, y, marker, color=colour, ms=size, mec='white', mew=0.8, label=label
      )
  every = {**published, **{f'{k} (here)': v for k, v in own.items()}}
  ax.set_xscale('log')
  _limits(ax, every.values())
  ax.xaxis.set_major_locator(ticker.FixedLocator([0.1, 0.3, 1, 2, 4, 7, 13]))
  ax.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  ax.xaxis.set_minor_locator(ticker.NullLocator())
  ax.set_xlabel('activated parameters (billions)', color=_INK)
  ax.set_ylabel('POPE, mean F1 (%)', color=_INK)
  ax.grid(alpha=0.25)
  ax.spines[['top', 'right']].set_visible(False)
  legend = figure.legend(loc='upper right', ncols=3, frameon=False, fontsize=9)
  legend.set_in_layout(False)
  _label(figure, ax, every)
  return figure


def _limits(ax: Any, points: Iterable[tuple[float, float]]) -> None:
  x, y = zip(*points, strict=True)
  ax.set_xlim(min(x) / 1.35, max(x) * 1.35)
  low, high = min(y), max(y)
  margin = max(0.8, 0.12 * (high - low))
  ax.set_ylim(low - margin, high + margin)


def _label(figure: Any, ax: Any, points: Points) -> None:
  """Puts every name at the first place around its dot that is free."""
  from matplotlib import transforms

  renderer = figure.canvas.get_renderer()
  half = _MARKER * figure.dpi / 72 / 2
  dots = {
      name: transforms.Bbox.from_bounds(x - half, y - half, 2 * half, 2 * half)
      for name, point in points.items()
      for x, y in [ax.transData.transform(point)]
  }
  frame = ax.get_window_extent(renderer)
  taken = []
  # The crowded ones first: they have the fewest places.
  for name in sorted(points, key=lambda n: -_crowd(points[n], points.values())):
    for ring in _RINGS:
      chosen = _place(
          ax, renderer, name, points[name], ring, dots, taken, frame
      )
      if chosen is not None:
        taken.append(chosen)
        break
    else:  # Nowhere: better across another label than not at all.
      ax.annotate(name, points[name], fontsize=_FONT, color=_INK)


def _crowd(
    point: tuple[float, float], points: Iterable[tuple[float, float]]
) -> int:
  return sum(
      abs(x - point[0]) < 0.3 * point[0] and abs(y - point[1]) < 1.0
      for x, y in points
  )


def _place(
    ax: Any,
    renderer: Any,
    name: str,
    point: tuple[float, float],
    ring: float,
    dots: Mapping[str, Any],
    taken: list[Any],
    frame: Any,
) -> Any:
  """The box of the label if it finds room on this ring, else None."""
  from matplotlib import text as mpl_text

  for right, up in _SIDES:
    text = ax.annotate(
        name,
        point,
        xytext=(ring * right, ring * up),
        textcoords='offset points',
        fontsize=_FONT,
        color=_INK,
        ha='center' if abs(right) < 0.1 else ('left' if right > 0 else 'right'),
        va='center' if abs(up) < 0.1 else ('bottom' if up > 0 else 'top'),
        arrowprops=(
            {'arrowstyle': '-', 'color': _INK, 'lw': 0.5, 'shrinkB': 4}
            if ring > _NEAR
            else None
        ),
    )
    text.update_positions(renderer)
    # The text alone, without the line to its dot.
    box = mpl_text.Text.get_window_extent(text, renderer)
    inside = (
        box.x0 >= frame.x0
        and box.x1 <= frame.x1
        and box.y0 >= frame.y0
        and box.y1 <= frame.y1
    )
    free = not any(box.overlaps(other) for other in (*taken, *dots.values()))
    if inside and free and (ring > _NEAR or _is_clear(box, name, dots)):
      return box
    text.remove()
  return None


def _is_clear(box: Any, name: str, dots: Mapping[str, Any]) -> bool:
  """Whether a label without a line stands nearest to its own dot.

  Dots that cover each other have their labels on different sides.
  """
  own = _gap(box, dots[name])
  return all(
      _gap(box, dot) > 3 * own
      for dot in dots.values()
      if not dot.overlaps(dots[name])
  )


def _gap(a: Any, b: Any) -> float:
  """Between two boxes."""
  right = max(a.x0 - b.x1, b.x0 - a.x1, 0)
  up = max(a.y0 - b.y1, b.y0 - a.y1, 0)
  return math.hypot(right, up)
