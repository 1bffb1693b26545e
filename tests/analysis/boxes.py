# SPDX-License-Identifier: Apache-2.0
"""What a reader would see go wrong in a figure."""

import itertools
import math


def check(figure) -> None:
  """Asserts that texts neither overlap nor are cut, and panels not empty."""
  boxes = _text_boxes(figure)
  assert len(boxes) > 5
  for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
    assert not _overlap(box_a, box_b), f'{a!r} covers {b!r}'
  width, height = figure.bbox.size
  for name, box in boxes:
    inside = box.x0 >= -1 and box.x1 <= width + 1
    assert inside and box.y0 >= -1 and box.y1 <= height + 1, name
  for ax in figure.axes:
    if ax.axison:
      assert ax.lines or ax.patches or ax.images or ax.collections
      # The scale of a map has one axis, names of metrics need no other.
      named = ax.get_xlabel() and (ax.get_ylabel() or _words(ax.yaxis))
      assert named or ax.get_label() == '<colorbar>', ax.get_title('left')


def _words(axis) -> bool:
  return all(len(tick.get_text()) > 3 for tick in axis.get_ticklabels())


def _text_boxes(figure):
  from matplotlib import text as mpl_text

  figure.draw_without_rendering()
  found = []
  for ax in figure.axes:
    if not ax.axison:
      continue
    ticks = [
        tick
        for axis in (ax.xaxis, ax.yaxis)
        # Ticks beyond the limits exist but are not drawn.
        for tick in axis.get_ticklabels(which='both')
    ]
    low_x, high_x = sorted(ax.get_xlim())
    low_y, high_y = sorted(ax.get_ylim())
    drawn = set()
    for tick in ticks:
      x, y = tick.get_position()
      on_x = tick in ax.xaxis.get_ticklabels(which='both')
      value, low, high = (x, low_x, high_x) if on_x else (y, low_y, high_y)
      if low <= value <= high:
        drawn.add(tick)
    found += [
        artist
        for artist in ax.findobj(mpl_text.Text)
        if artist not in ticks or artist in drawn
    ]
  for legend in figure.legends:
    found += legend.get_texts()
  return [
      (artist.get_text(), artist.get_window_extent())
      for artist in found
      if artist.get_visible() and artist.get_text().strip()
  ]


def _overlap(a, b):
  """Whether two boxes share more than a rim of a pixel."""
  across = min(a.x1, b.x1) - max(a.x0, b.x0)
  along = min(a.y1, b.y1) - max(a.y0, b.y0)
  return min(across, along) > 1 and not math.isnan(across)
