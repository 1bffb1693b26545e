# SPDX-License-Identifier: Apache-2.0
"""Counts of what `inspection` found: rows, images, drops and repairs."""

from collections import Counter
from typing import Any

from moellava_jax.data import check, inspection


class Census:
  """Counts of what was inspected, by source; adds up, and travels as JSON."""

  def __init__(self):
    self.sources: dict[str, Counter[str]] = {}
    self.dropped: list[check.Dropped] = []
    self.repaired: Counter[str] = Counter()
    self.lengths: list[int] = []  # Of the rows that are kept.

  def add(self, found: inspection.Inspected) -> None:
    counts = self.sources.setdefault(found.source, Counter())
    counts['rows'] += 1
    self.repaired.update(found.repaired)
    counts['repaired'] += bool(found.repaired)
    if found.dropped is not None:
      self.dropped.append(found.dropped)
      counts['dropped'] += 1
      return
    assert found.row is not None
    counts['kept'] += 1
    counts['images'] += len(found.row.images)
    counts['text only'] += not found.row.images
    self.lengths.append(found.length)

  def merge(self, other: 'Census') -> None:
    for source, counts in other.sources.items():
      self.sources.setdefault(source, Counter()).update(counts)
    self.dropped += other.dropped
    self.repaired.update(other.repaired)
    self.lengths += other.lengths

  def total(self, what: str) -> int:
    return sum(counts[what] for counts in self.sources.values())

  @property
  def reasons(self) -> Counter[str]:
    return Counter(drop.reason for drop in self.dropped)

  def to_json(self) -> dict[str, Any]:
    return {
        'sources': self.sources,
        'dropped': self.dropped,
        'repaired': self.repaired,
        'lengths': self.lengths,
    }

  @classmethod
  def from_json(cls, raw: dict[str, Any]) -> 'Census':
    census = cls()
    census.sources = {k: Counter(v) for k, v in raw['sources'].items()}
    census.dropped = [check.Dropped(*drop) for drop in raw['dropped']]
    census.repaired = Counter(raw['repaired'])
    census.lengths = raw['lengths']
    return census
