# SPDX-License-Identifier: Apache-2.0
"""The ablations of MoE-LLaVA (arXiv 2401.15947) in its own numbers.

As printed in the first versions. The last column of its Tables 6c and 6d is
called POPE, but 88.7 is the LLaVA-W score of the default row in all other
tables; it is called "last" here. Table 6b has no rows of 4 and 8 experts; its
row of 1 expert is (c) of Table 5. Table 7 prints Phi-2's ScienceQA scores
(67.8, 68.7) in the column of TextVQA too; they are left out there. Capacity,
weight of the loss, second choice and upcycling have no table in the paper.
"""

from collections.abc import Mapping
import dataclasses

# Hours are of training on 8 V100.
HOURS = 'hours'


@dataclasses.dataclass(frozen=True)
class Paper:
  """A table of the paper.

  Attributes:
    columns: benchmarks, and hours.
    rows: key of our row -> cells; None where the paper prints nothing usable.
    claims: (key, key): the first is the better one in the paper.
  """

  columns: tuple[str, ...]
  rows: Mapping[str, tuple[float | None, ...]]
  claims: tuple[tuple[str, str], ...]


TABLES: Mapping[str, Paper] = {
    'table5': Paper(
        ('GQA', 'SQA', 'POPE', 'LLaVA-W'),
        {
            'no_stage_2': (58.4, 58.1, 81.9, 88.0),
            'moe': (61.5, 63.1, 87.0, 88.7),
            'dense': (60.9, 60.2, 86.4, 86.3),
        },
        (('moe', 'no_stage_2'), ('moe', 'dense')),
    ),
    'table6a': Paper(
        ('GQA', 'VizWiz', 'VQA-T', 'POPE', 'LLaVA-W', HOURS),
        {
            'moe': (61.5, 32.3, 48.0, 87.0, 88.7, 20),
            'all_trained': (61.3, 31.9, 47.6, 87.0, 88.1, 27),
        },
        (('moe', 'all_trained'),),
    ),
    'table6b': Paper(
        ('GQA', 'SQA', 'VQA-T', 'POPE', 'LLaVA-W', HOURS),
        {
            'dense': (60.9, 60.2, 48.3, 86.4, 86.3, 13),
            'experts_2': (61.2, 60.8, 47.0, 87.5, 86.5, 14),
        },
        (('experts_2', 'dense'),),
    ),
    'table6c': Paper(
        ('VQAv2', 'GQA', 'SQA', 'VQA-T', 'last', HOURS),
        {
            'top_1': (74.5, 58.4, 58.0, 44.0, 85.7, 19),
            'moe': (76.2, 61.5, 63.1, 48.0, 88.7, 20),
        },
        (('moe', 'top_1'),),
    ),
    'table6d': Paper(
        ('VQAv2', 'GQA', 'SQA', 'VQA-T', 'last', HOURS),
        {
            'first_half': (75.9, 61.3, 62.4, 47.0, 86.9, 20),
            'second_half': (76.3, 61.2, 62.6, 47.2, 86.9, 20),
            'moe': (76.2, 61.5, 63.1, 48.0, 88.7, 20),
            'all_layers': (74.5, 61.5, 62.1, 47.1, 87.0, 32),
        },
        (
            ('moe', 'first_half'),
            ('moe', 'second_half'),
            ('moe', 'all_layers'),
        ),
    ),
}

# Table 7, whose models are not those of Shapes: columns, (dense, MoE) by name.
TABLE_7_COLUMNS = ('VQAv2', 'SQA', 'VQA-T', 'MMB', 'LLaVA-W')
TABLE_7: Mapping[str, tuple[tuple[float | None, ...], ...]] = {
    'StableLM-1.6B': (
        (74.5, 62.0, 48.8, 58.2, 83.2),
        (76.0, 62.6, 47.8, 59.4, 85.9),
    ),
    'Qwen-1.8B': (
        (74.9, 60.2, 48.1, 60.6, 86.3),
        (76.2, 63.1, 48.0, 59.7, 88.7),
    ),
    'Phi-2 (2.7B)': (
        (75.6, 67.8, None, 65.0, 91.3),
        (77.1, 68.7, None, 65.5, 93.2),
    ),
}


def wins(
    better: tuple[float | None, ...], worse: tuple[float | None, ...]
) -> tuple[int, int, int]:
  """(higher, equal, lower) scores of the first row, where both have one."""
  pairs = [
      (a, b)
      for a, b in zip(better, worse, strict=True)
      if a is not None and b is not None
  ]
  return (
      sum(a > b for a, b in pairs),
      sum(a == b for a, b in pairs),
      sum(a < b for a, b in pairs),
  )


def scores(grid: str, row: str) -> tuple[float | None, ...]:
  """A row of a table without its hours."""
  table = TABLES[grid]
  return tuple(
      value
      for name, value in zip(table.columns, table.rows[row], strict=True)
      if name != HOURS
  )
