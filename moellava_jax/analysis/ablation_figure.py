# SPDX-License-Identifier: Apache-2.0
"""A table of an ablation as a figure: scores left, differences right."""

from moellava_jax.analysis import ablation_table, look

_ROW = 0.5  # Inches of a row of the table.
_MARKERS = ('o', 's', 'D', '^')


def draw(table: ablation_table.Table):
  """One panel pair for each metric, a line of each panel for each row.

  Left the mean as a bar mark, with one dot for each seed; right the difference
  to the baseline with its 95 % interval. An interval that holds 0 is hollow.
  """
  metrics = table.metrics
  height = 1.5 + _ROW * len(table.lines)
  figure, axes = look.grid(
      2 * len(metrics), columns=2, width=4.6, height=height
  )
  for i, metric in enumerate(metrics):
    _scores(axes[2 * i], table, metric, i)
    _differences(axes[2 * i + 1], table, metric, i)
  return figure


def _rows(ax, table) -> None:
  """Names of the rows, the first on top; failed ones say so."""
  labels = [
      line.label
      + ('' if line.seeds else ' (failed)' if line.failed else ' (-)')
      for line in table.lines
  ]
  ax.set_yticks(range(len(labels)), labels)
  ax.set_ylim(len(labels) - 0.5, -0.5)


def _scores(ax, table, metric: str, i: int) -> None:
  colour = look.COLOURS[i % len(look.COLOURS)]
  marker = _MARKERS[i % len(_MARKERS)]
  for y, line in enumerate(table.lines):
    if (value := line.metrics.get(metric)) is None:
      continue
    seeds = [100 * v for v in value.by_seed]
    ax.plot(
        seeds, [y] * len(seeds), marker, ms=5, mfc='none', mec=colour, alpha=0.8
    )
    ax.plot([100 * value.mean], [y], '|', ms=22, mew=2.5, color=look.INK)
  look.label(ax, metric, 'score (%); line: mean, marks: seeds', '')
  ax.grid(axis='x', color='#DDDDDD', lw=0.7)
  _rows(ax, table)


def _differences(ax, table, metric: str, i: int) -> None:
  colour = look.COLOURS[i % len(look.COLOURS)]
  marker = _MARKERS[i % len(_MARKERS)]
  labels = {line.row: line.label for line in table.lines}
  bases = {line.against for line in table.lines if line.against}
  for y, line in enumerate(table.lines):
    value = line.metrics.get(metric)
    if value is None or (gap := value.interval) is None:
      continue
    ax.plot([100 * gap.low, 100 * gap.high], [y, y], lw=2.2, color=colour)
    ax.plot(
        [100 * gap.difference],
        [y],
        marker,
        ms=8,
        mec=colour,
        mew=1.6,
        color=colour if gap.verdict else 'white',
    )
  ax.axvline(0, color=look.INK, lw=1.1, ls='--', zorder=1)
  against = labels[bases.pop()] if len(bases) == 1 else 'the dense model'
  look.label(ax, f'{metric}: difference', f'points more than {against}', '')
  ax.grid(axis='x', color='#DDDDDD', lw=0.7)
  _rows(ax, table)
  ax.tick_params(axis='y', labelleft=False)
