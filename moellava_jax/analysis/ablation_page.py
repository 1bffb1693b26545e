# SPDX-License-Identifier: Apache-2.0
r"""The results of all grids as one page, from the cells' JSON files.

  python -m moellava_jax.analysis.ablation_page --config=configs/shapes.py \
      --cells=runs/ablations --out=docs/ablations/shapes

copies the finished cells of all grids to OUT/cells, and writes OUT/README.md,
OUT/GRID.png and OUT/GRID.csv; where the runs are there too, also OUT/samples.
With --cells and --out the same folder it writes the page again from what is
kept. Each grid has the seeds that `grids.py` gives it, those of them that are
finished.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import shutil
import sys
from typing import Any

from absl import app, flags

from moellava_jax import config
from moellava_jax.analysis import (
    ablation_cell,
    ablation_claims,
    ablation_figure,
    ablation_files,
    ablation_plan,
    ablation_samples,
    ablation_table,
    grids,
    look,
)

# Of the embedded task.
_SMALL = """\
The paper ([arXiv 2401.15947](https://arxiv.org/abs/2401.15947)) trains models
of 1.6 to 2.7 billion parameters on 2.2 million conversations; this is a decoder
of a tenth of a million on coloured shapes. Where an ordering of the paper is not
reproduced here, that does not refute it.

"""
_SAMPLE_ROWS = ('moe', 'dense', 'no_stage_2')  # The first chooses.


def write(source: ablation_claims.Source, out: str) -> pathlib.Path:
  """Writes the page and what it shows; returns its path.

  Raises:
    UserError: a file is malformed, or no cell is finished.
  """
  raw = ablation_plan.load(source.config, {})
  all_grids = grids.grids(raw.data.shapes is not None)
  _copy(source, all_grids, out)
  kept = dataclasses.replace(source, cells=out)
  sections, absent = [], []
  for grid in all_grids.values():
    table = ablation_table.collect(
        grid, source.config, range(grid.seeds), out, source.benchmark, {}
    )
    if any(v.interval for line in table.lines for v in line.metrics.values()):
      sections.append(_section(grid, table, kept, pathlib.Path(out)))
    else:
      absent.append(grid.name)
  if not sections:
    raise config.UserError(
        f'--cells={source.cells}: no two rows of a grid of {source.config} are'
        ' finished there; run one with that --out first.'
    )
  if absent:
    sections.append(f'Not run yet: {", ".join(absent)}.\n')
  embedded = raw.data.shapes is not None
  parts = [_head(kept, all_grids, embedded), *sections]
  if embedded:
    parts.append(_samples(source, out))
  text = '\n'.join(parts)
  path = pathlib.Path(out) / 'README.md'
  path.write_text(text.rstrip() + '\n', encoding='utf-8')
  return path


def _copy(
    source: ablation_claims.Source,
    all_grids: Mapping[str, grids.Grid],
    out: str,
) -> None:
  """The finished cells of all grids, and their questions, to OUT/cells."""
  if pathlib.Path(source.cells).resolve() == pathlib.Path(out).resolve():
    return
  for grid in all_grids.values():
    for row in grid.rows:
      for seed in range(grid.seeds):
        name = f'{row.key}.seed{seed}'
        content = ablation_cell.read(source.cells, name, source.benchmark)
        if content is None:
          continue
        questions = content['benchmarks'][source.benchmark].get('questions')
        for file in (name, *([questions] if questions else [])):
          target = ablation_cell.path_of(out, file)
          target.parent.mkdir(parents=True, exist_ok=True)
          shutil.copyfile(ablation_cell.path_of(source.cells, file), target)


def _contents(source: ablation_claims.Source) -> list[dict[str, Any]]:
  """All cells that are kept."""
  paths = sorted((pathlib.Path(source.cells) / 'cells').glob('*.seed*.json'))
  return [ablation_cell.read_json(path) for path in paths]


def _head(
    source: ablation_claims.Source,
    all_grids: Mapping[str, grids.Grid],
    embedded: bool,
) -> str:
  cells = _contents(source)
  revisions = sorted({str(c['revision']) for c in cells})
  devices = sorted({str(c['device']) for c in cells})
  versions = sorted(
      {
          ', '.join(
              f'{k} {v}' for k, v in sorted((c['versions'] or {}).items())
          )
          for c in cells
      }
  )
  seconds = sum(
      next(reversed(ablation_table.seconds_by_stage(c).values())) for c in cells
  )
  return f"""# Ablations on {source.config}

{len(cells)} finished cells (a row and a seed each), benchmark
`{source.benchmark}`. Mean ± sample standard deviation over the seeds, which
change data, initialisation and training. "Difference" is to the row that has
none, with a paired 95 % bootstrap interval (seeds, then images, are drawn with
replacement; bold: 0 is outside). With 5 seeds such an interval is about a
tenth too short, with 3 a fifth, with fewer it says little of other seeds, and no
correction is made for looking at many rows. Parameters are the decoder's, as the paper counts them; "own time" is that
of the last stage, "before it" that of the stages before, which rows share.
Times are of a machine that may have had other work.

{_SMALL if embedded else ''}```
python -m moellava_jax.analysis.ablation --config={source.config} \\
    --out=runs/ablations --grid=NAME    # {', '.join(all_grids)}
python -m moellava_jax.analysis.ablation_page --config={source.config} \\
    --cells=runs/ablations --out=DIR
```

Device: {'; '.join(devices)}. Versions: {'; '.join(versions)}. Revision:
{', '.join(r[:12] + ('+' if r.endswith('+') else '') for r in revisions)}. Last
stages of all cells together: {ablation_files.duration(seconds)}.
"""


def _section(
    grid: grids.Grid,
    table: ablation_table.Table,
    source: ablation_claims.Source,
    out: pathlib.Path,
) -> str:
  image = f'{grid.name}.png'
  (out / image).write_bytes(look.png(ablation_figure.draw(table)))
  (out / f'{grid.name}.csv').write_text(
      ablation_files.to_csv(table), encoding='utf-8'
  )
  parts = [
      f'## {grid.title}\n',
      ablation_files.markdown(table),
      f'![{grid.title}]({image})\n',
      ablation_claims.text(grid, table, source),
  ]
  absent = [line.label for line in table.lines if not line.seeds]
  if absent:
    parts.insert(2, f'Not finished: {", ".join(absent)}.\n')
  return '\n'.join(part for part in parts if part)


def _samples(source: ablation_claims.Source, out: str) -> str:
  """Questions and answers of the first seed; '' if none were kept."""
  known = {row.key: row for row in grids.get('table5', True).rows}
  wanted = grids.Grid(
      'samples', '', tuple(known[key] for key in _SAMPLE_ROWS), {}
  )
  cells = ablation_plan.cells(wanted, source.config, [0], source.overrides)
  ablation_samples.collect(cells, source.cells, out)
  path = pathlib.Path(out) / 'samples' / 'samples.json'
  if not path.exists():
    return ''
  content = ablation_cell.read_json(path)
  labels = [known[key].label for key in _SAMPLE_ROWS]
  rows = [['image', 'question', 'truth', *labels], ['---'] * (3 + len(labels))]
  for sample in content['samples']:
    cells_of = [
        f'<img src="samples/{sample["image"]}" width="84">',
        f'{sample["question"]} ({sample["category"]})',
        sample['truth'],
        *(_marked(sample, key) for key in _SAMPLE_ROWS),
    ]
    rows.append([cell.replace('|', '\\|') for cell in cells_of])
  lines = ''.join(f'| {" | ".join(row)} |\n' for row in rows)
  return (
      f'## Questions and answers (seed {content["seed"]})\n\nOf every category'
      f' the first question that {labels[0]} answers rightly, and the first'
      f' that it does not.\n\n{lines}'
  )


def _marked(sample: Mapping[str, Any], row: str) -> str:
  text = sample['answers'][row]
  right = ablation_samples.is_right(sample['file'], sample['truth'], text)
  shown = text.strip() or '(nothing)'
  return shown if right else f'{shown} ✗'


def define_flags() -> None:
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
      'config', None, 'As for the grids.', lock_config=True
  )
  flags.DEFINE_string('cells', None, '--out of the grids.', required=True)
  flags.DEFINE_string('out', None, 'Folder of the page.', required=True)
  flags.DEFINE_string('benchmark', 'shapes', 'Whose scores.')


def main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  from ml_collections import config_flags

  values = flags.FLAGS
  if values['config'].value is None:
    raise app.UsageError('--config=FILE is required.')
  source = ablation_claims.Source(
      config_flags.get_config_filename(values['config']),
      values.cells,
      values.benchmark,
      config_flags.get_override_values(values['config']),
  )
  try:
    print(f'Written: {write(source, values.out)}')
  except config.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  define_flags()
  app.run(main)
