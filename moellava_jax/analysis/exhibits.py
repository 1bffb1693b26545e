# SPDX-License-Identifier: Apache-2.0
"""Figures with their numbers and with how to read them."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import pathlib
from typing import Any

from moellava_jax.analysis import html, look, plots

ALL = 'all'  # Tokens of both modalities, in tables.


@dataclasses.dataclass(frozen=True, eq=False)
class Exhibit:
  """A figure, its table, and a text for those who see it first."""

  name: str  # Of its files.
  title: str
  reading: str
  figure: Any  # Of matplotlib.
  columns: tuple[str, ...]
  rows: Sequence[tuple[Any, ...]]


def write(exhibit: Exhibit, out: pathlib.Path) -> html.Figure:
  """Writes NAME.png, NAME.svg and NAME.csv; returns what a page shows.

  Shares are parts of 1 in the table, percentages in the figure.
  """
  text = io.StringIO(newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(exhibit.columns)
  writer.writerows(exhibit.rows)
  shown = on_page(exhibit)
  base = out / exhibit.name
  base.with_suffix('.csv').write_text(text.getvalue(), encoding='utf-8')
  base.with_suffix('.png').write_bytes(shown.png)
  base.with_suffix('.svg').write_bytes(look.svg(exhibit.figure))
  return shown


def on_page(exhibit: Exhibit) -> html.Figure:
  return html.Figure(exhibit.title, exhibit.reading, look.png(exhibit.figure))


def of_training(rows: Sequence[Mapping[str, Any]]) -> list[Exhibit]:
  """What is to be seen of rows of `metrics.jsonl`; none without MoE layers."""
  rows = [row for row in rows if row.get('moe')]
  if not rows:
    return []
  layers = sorted(rows[0]['moe'], key=int)
  experts = range(len(rows[0]['moe'][layers[0]]['load']))
  names = ('aux_loss', 'drop_rate', 'entropy')
  return [
      Exhibit(
          'balance_over_steps',
          'Load balancing during stage moe',
          'Left: about 1.0 where all experts of a layer are used evenly; more'
          ' is less even. Next: choices dropped because an expert was full; a'
          ' dropped choice leaves the token to its other expert, or to none.'
          ' Right: ln E where the router does not tell the E experts apart, 0'
          ' where it is certain. Faint: each step; bold: running mean. Many'
          ' layers are shown as maps of the running means, one below the other.',
          plots.moe_training(rows),
          ('step', 'layer', 'aux_loss', 'drop_rate', 'entropy_nats'),
          [
              (row['step'], n, *(row['moe'][n].get(name) for name in names))
              for row in rows
              for n in layers
          ],
      ),
      Exhibit(
          'load_over_steps',
          'Expert load during stage moe',
          "Share of the tokens' choices that each expert receives. Lines near"
          ' the dashed one (even use) are balanced; a line that falls to zero is'
          ' an expert that dies. Faint: each step; bold: running mean. Many'
          ' experts are shown as maps; there a row that gets dark is one that dies.',
          plots.load_over_steps(rows),
          ('step', 'layer', 'tokens', *(f'expert_{e}' for e in experts)),
          [
              (row['step'], n, name, *row['moe'][n][key])
              for row in rows
              for n in layers
              for name, key in (
                  (ALL, 'load'),
                  ('text', 'load_text'),
                  ('image', 'load_image'),
              )
              if key in row['moe'][n]
          ],
      ),
  ]
