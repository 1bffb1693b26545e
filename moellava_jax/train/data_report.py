# SPDX-License-Identifier: Apache-2.0
"""Says what was read, what was left out of it and why, and what was repaired.

Small data is known before the first step; of large data, a stage learns while
it reads.
"""

from collections.abc import Iterator

import jax

from moellava_jax.data import batch as batch_lib
from moellava_jax.data import pipeline
from moellava_jax.train import cluster


def print_summary(stage: str, examples: pipeline.Examples, path: str) -> None:
  """Says what was read, and counts what was left out and why."""
  length = examples.format.length
  cluster.say(
      f'{stage}: {len(examples)} rows of {length} positions from {path}'
  )
  if examples.format.data.arrangement == 'packed':
    _print_packing(stage, examples)
  for line in _counted(examples):
    cluster.say(f'{stage}: {line}')
  if examples.ignored_answers:
    cluster.say(
        f'{stage}: the {examples.format.template!r} template keeps the first'
        f' exchange of a row; {examples.ignored_answers} answers are left out'
    )


def _print_packing(stage: str, examples: pipeline.Examples) -> None:
  plan, length = examples.in_order(), examples.format.length
  rows = max(len(plan.ends_R), 1)
  fill = examples.positions / (rows * length)
  slots = examples.images / (rows * examples.format.max_images)
  cluster.say(
      f'{stage}: packed into about {len(plan.ends_R)} rows, {fill:.1%} of'
      f' their positions and {slots:.1%} of their image slots filled'
  )
  if fill < 0.9 and slots > 0.9:
    cluster.say(
        f"{stage}: more would fit into a row with more slots: raise the stage's"
        f' max_images={examples.format.max_images}, and its row_length if rows'
        ' are as short as one conversation'
    )


def _counted(examples: pipeline.Examples) -> Iterator[str]:
  """What was left out, and why, and what was repaired or cut."""
  counts = examples.counts
  for reason, number in counts.dropped.items():
    first = counts.first.get(reason)
    yield f'dropped {number} rows: {reason}' + (
        f'; the first: {first}' if first else ''
    )
  for rule, number in counts.repaired.items():
    yield f'repaired {number} rows: {rule}'
  if counts.cut:
    yield f'cut {counts.cut} rows at position {examples.format.length}'
  if counts.blanked:
    yield (
        f'{counts.blanked} rows teach nothing, as in the original:'
        ' config.data.parity_mask counts another number of tokens than they'
        ' have'
    )


def aloud(
    stage: str,
    examples: pipeline.Examples,
    batches: Iterator[batch_lib.Batch],
) -> Iterator[batch_lib.Batch]:
  """`batches`, naming the first row that is dropped for each reason."""
  said = set(examples.counts.first)
  for batch in batches:
    for reason in examples.counts.first.keys() - said:
      print(f'{stage}: dropped {examples.counts.first[reason]}', flush=True)
      said.add(reason)
    yield batch


def print_read(stage: str, examples: pipeline.Examples) -> None:
  """What became of the rows of large data, of which only a stage that has read
  them knows. Each process says what it read itself.
  """
  if not examples.eager:
    for line in _counted(examples):
      print(
          f'{stage}, read by process {jax.process_index()}: {line}', flush=True
      )


def no_targets(examples: pipeline.Examples, empty: int, rows: int) -> str:
  """Why a batch teaches nothing, and what to do.

  Args:
    examples: of the stage.
    empty: rows of the batch without any conversation.
    rows: of the batch.
  """
  if empty == rows:
    text = (
        f'all of its {rows} rows are empty, as what belongs there was dropped.'
        ' Repair that, or take it out of the data.'
    )
  else:
    also = f' {empty} rows are empty, as all was dropped.' if empty else ''
    text = (
        f'no answer of its {rows} rows lies within the'
        f' {examples.format.length} positions of a row.{also} Check the'
        ' template and the row_length.'
    )
  found = '; '.join(_counted(examples))
  return f'{text} Process {jax.process_index()} has {found}.' if found else text
