# SPDX-License-Identifier: Apache-2.0
"""What was dropped, repaired or cut, counted in the process that trains.

Rows are read by any thread or process. What befalls one there travels as a
`Note` beside its batch, and is counted where the batch is used: so the counts
depend on the batches alone, not on who read them.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple


class Note(NamedTuple):
  """What befell a conversation when it was read."""

  index: int
  what: Literal['dropped', 'repaired', 'cut', 'blanked']
  reason: str  # Or the rule, of `check`.
  message: str


class Counts:
  """Notes by reason; a conversation counts once, however often it is read.

  Attributes:
    dropped: conversations left out, by reason (`check.REASONS`).
    repaired: conversations of odd images, by rule.
    first: the message of the first one that was dropped for a reason.
    cut: conversations whose text was cut at the end.
    blanked: conversations that teach nothing, as in the original.
  """

  def __init__(self):
    self.dropped: Counter[str] = Counter()
    self.repaired: Counter[str] = Counter()
    self.first: dict[str, str] = {}
    self.cut = self.blanked = 0
    self._seen: set[tuple[int, str]] = set()

  def add(self, notes: Iterable[Note]) -> None:
    for note in notes:
      if (note.index, note.reason) in self._seen:
        continue
      self._seen.add((note.index, note.reason))
      if note.what == 'dropped':
        self.dropped[note.reason] += 1
        self.first.setdefault(note.reason, note.message)
      elif note.what == 'repaired':
        self.repaired[note.reason] += 1
      elif note.what == 'cut':
        self.cut += 1
      else:
        self.blanked += 1
