# SPDX-License-Identifier: Apache-2.0
"""Which conversations share a row: a plan made from their lengths alone.

A row has a number of positions and a number of image slots; what shares it
must fit both. The plan is best fit decreasing (Johnson et al., 1974): the
longest first, each into the fullest row that still takes it. It is made
window by window over a shuffled order, so that neighbours in a row are random
and an epoch of millions is planned in seconds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Conversations that are packed among each other: from a few thousands on, rows
# are as full as if everything were packed at once (`bench.input` says by how
# much they differ).
WINDOW = 16384


class Plan(NamedTuple):
  """Rows of an epoch: row r holds `items_N[ends_R[r - 1] : ends_R[r]]`."""

  items_N: np.ndarray  # int32, numbers of conversations.
  ends_R: np.ndarray  # int64.

  def row(self, r: int) -> np.ndarray:
    return self.items_N[self.ends_R[r - 1] if r else 0 : self.ends_R[r]]


def alone(items_N: np.ndarray) -> Plan:
  """A row for each conversation, in order."""
  return Plan(items_N, np.arange(1, len(items_N) + 1, dtype=np.int64))


def pack(
    items_N: np.ndarray,
    lengths_N: np.ndarray,
    images_N: np.ndarray,
    *,
    row_length: int,
    max_images: int,
    window: int = WINDOW,
) -> Plan:
  """Packs conversations; those of a window are near each other in the plan.

  Args:
    items_N: numbers of conversations, in the order in which windows are cut.
    lengths_N: int, positions of each of them, at least 1.
    images_N: int, images of each of them.
    row_length: positions of a row.
    max_images: image slots of a row.
    window: conversations that are packed among each other.

  Raises:
    ValueError: a conversation that no row takes.
  """
  if len(items_N) and (
      lengths_N.max() > row_length or images_N.max() > max_images
  ):
    raise ValueError(
        f'A conversation of {lengths_N.max()} positions or {images_N.max()}'
        f' images; a row has {row_length} and {max_images}.'
    )
  rows: list[list[int]] = []
  for start in range(0, len(items_N), window):
    part = slice(start, start + window)
    longest_first = np.argsort(-lengths_N[part], kind='stable')
    rows += _best_fit(
        items_N[part][longest_first].tolist(),
        lengths_N[part][longest_first].tolist(),
        images_N[part][longest_first].tolist(),
        row_length,
        max_images,
    )
  sizes_R = np.fromiter(map(len, rows), np.int64, len(rows))
  flat = (item for row in rows for item in row)
  return Plan(np.fromiter(flat, np.int32, len(items_N)), np.cumsum(sizes_R))


def shuffle(plan: Plan, order_R: np.ndarray) -> Plan:
  """The rows of `plan` in another order."""
  sizes_R = np.diff(plan.ends_R, prepend=0)[order_R]
  ends_R = np.cumsum(sizes_R)
  # Item n of the result is this much further on in the items of the plan.
  ahead_R = plan.ends_R[order_R] - ends_R
  index_N = np.arange(len(plan.items_N)) + np.repeat(ahead_R, sizes_R)
  return Plan(plan.items_N[index_N], ends_R)


def _best_fit(
    items: Sequence[int],
    lengths: Sequence[int],
    images: Sequence[int],
    row_length: int,
    max_images: int,
) -> list[list[int]]:
  """Puts each item, in order, into the fullest row that takes it.

  Rows with s image slots left and p positions left are found by bit p of
  `open_rows[s]`: the lowest one of at least the item's length is the best fit.
  """
  rows: list[list[int]] = []
  open_rows = [0] * (max_images + 1)
  by_room: dict[tuple[int, int], list[int]] = {}
  for item, length, count in zip(items, lengths, images, strict=True):
    room, slots = row_length + 1, -1
    for left in range(count, max_images + 1):
      if fitting := open_rows[left] >> length:
        found = length + (fitting & -fitting).bit_length() - 1
        if found < room:
          room, slots = found, left
          if found == length:
            break
    if slots < 0:
      row, room, slots = len(rows), row_length, max_images
      rows.append([item])
    else:
      same = by_room[slots, room]
      row = same.pop()
      if not same:
        open_rows[slots] ^= 1 << room
      rows[row].append(item)
    slots, room = slots - count, room - length
    if room:
      same = by_room.setdefault((slots, room), [])
      if not same:
        open_rows[slots] |= 1 << room
      same.append(row)
  return rows
