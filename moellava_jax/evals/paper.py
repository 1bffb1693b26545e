# SPDX-License-Identifier: Apache-2.0
"""Scores of models beside those of MoE-LLaVA (arXiv 2401.15947).

The rows are those of its Tables 3 and 4, as printed in the first versions. Two
things in them are as they are: the adversarial and popular columns of the
1.6Bx4 row of Table 4 look swapped, and LLaVA-W of the MoE rows was judged by
another model than that of the rows above them.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from moellava_jax.evals import base, paper_figure, scores

# Column, benchmark, where its score is in an entry, and times what.
_COLUMNS = (
    ('VQAv2', 'vqav2', (), 1),  # On a server only, as VizWiz.
    ('GQA', 'gqa', ('accuracy',), 100),
    ('VizWiz', 'vizwiz', (), 1),
    ('SQA-I', 'scienceqa', ('accuracy_img',), 100),
    ('VQA-T', 'textvqa', ('accuracy',), 100),
    ('POPE', 'pope', (), 100),
    ('MMB', 'mmbench', ('accuracy',), 100),
    ('LLaVA-W', 'llava_bench', ('all', 'ratio'), 1),
    ('MM-Vet', 'mmvet', ('total',), 1),
)
_POPE = ('adversarial', 'popular', 'random')
_RATES = ('accuracy', 'f1', 'yes_ratio')
_BILLION = 1e9

# Table 3: activated parameters in billions, resolution, and the columns.
TABLE_3 = {
    'IDEFICS-80B': '65 224 60.0 45.2 36.0 - 30.9 - 54.5 - -',
    'BLIP-2 (V-13B)': '13 224 41.0 41.0 19.6 61.0 42.5 85.3 - 38.1 22.4',
    'InstructBLIP (V-13B)': '13 224 - 49.5 33.4 63.1 50.7 78.9 - 58.2 25.6',
    'Qwen-VL-7B': '6.7 448 78.8 59.3 35.2 67.1 63.8 - 38.2 - -',
    'LLaVA-1.5-7B': '6.7 336 78.5 62.0 50.0 66.8 58.2 85.9 64.3 63.4 30.5',
    'TinyGPT-V (P-2.7B)': '2.7 448 - 33.6 33.4 - - - - - -',
    'MobileVLM (M-2.7B)': '2.7 336 - 59.0 - 61.0 47.5 84.9 59.6 - -',
    'LLaVA-Phi (P-2.7B)': '2.7 336 71.4 - 35.9 68.4 48.6 85.0 59.8 - 28.9',
    'MoE-LLaVA-1.6Bx4': '2.0 336 76.0 60.4 37.2 62.6 47.8 84.3 59.4 85.9 26.1',
    'MoE-LLaVA-1.8Bx4': '2.2 336 76.2 61.5 32.3 63.1 48.0 87.0 59.7 88.7 25.3',
    'MoE-LLaVA-2.7Bx4': '3.6 336 77.1 61.1 43.4 68.7 50.2 85.0 65.5 93.2 31.1',
}
# Table 4: accuracy, F1 and share of yes; adversarial, popular, random.
TABLE_4 = {
    'mPLUG-Owl-7B': '82.4 81.6 45.2 85.5 84.3 42.1 86.3 85.3 42.3',
    'MM-GPT-7B': '50.0 66.7 100.0 50.0 66.7 100.0 50.0 66.7 100.0',
    'MiniGPT-4-13B': '66.6 71.4 66.7 68.3 72.2 64.1 77.8 78.9 54.8',
    'InstructBLIP-13B': '74.4 78.5 69.0 81.4 83.5 62.6 88.7 89.3 55.2',
    'LLaVA-1.5-13B': '85.5 84.4 43.3 87.4 86.2 41.3 88.0 87.1 41.7',
    'MoE-LLaVA-1.6Bx4': '85.9 84.3 39.9 84.7 83.2 41.5 86.7 85.4 39.8',
    'MoE-LLaVA-1.8Bx4': '86.1 85.4 44.9 88.6 87.7 42.3 88.6 87.9 42.8',
    'MoE-LLaVA-2.7Bx4': '85.2 83.8 41.5 86.9 84.5 40.5 87.6 86.6 40.5',
}
# Figure 1 has LLaVA-1.5-13B too: its POPE is the mean F1 of Table 4.
_FIGURE_ONLY = {'LLaVA-1.5-13B': (13.0, 85.9)}

Models = Mapping[str, Mapping[str, Mapping[str, Any]]]


def compare(
    paths: Sequence[str], server_scores: Sequence[str], out: str | None
) -> None:
  """Prints both tables and draws the figure.

  Args:
    paths: scores.json files, or directories of one; none: that of `out`.
    server_scores: `MODEL:BENCHMARK:POINTS`, to be kept in `out`/scores.json.
    out: where `pope_by_activated_parameters.png` and `.svg` are written; None:
      no figure.

  Raises:
    EvalError: a file is missing or no scores.json, or two of them have
      different scores of one model.
  """
  files = [_file(path) for path in paths]
  if out is not None:
    own = pathlib.Path(out) / 'scores.json'
    for text in server_scores:
      record(own, text)
    if own.exists() and own not in files:
      files.append(own)
  elif server_scores:
    raise base.EvalError('Give --out=DIR, where --server_score is kept.')
  if not files:
    raise base.EvalError(
        'Give --scores=DIR, or --out=DIR with a scores.json of earlier runs.'
    )
  models = read(files)
  scores.print_table(
      'Table 3 of arXiv 2401.15947 (%)',
      ('model', 'act. (B)', 'res.', *(column[0] for column in _COLUMNS)),
      {name: text.split() for name, text in TABLE_3.items()},
      {name: row_3(entries) for name, entries in models.items()},
  )
  scores.print_table(
      'Table 4: POPE (%)',
      ('model', *(f'{c[:3]}. {r[:3]}' for c in _POPE for r in _RATES)),
      {name: text.split() for name, text in TABLE_4.items()},
      {name: row_4(entries) for name, entries in models.items()},
  )
  if out is not None:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for path in paper_figure.save(published(), measured(models), folder):
      print(path)


def _file(path: str) -> pathlib.Path:
  file = pathlib.Path(path)
  if file.is_dir():
    file = file / 'scores.json'
  if not file.is_file():
    raise base.EvalError(f'--scores={path}: no such file, or no scores.json.')
  return file


def read(files: Sequence[pathlib.Path]) -> dict[str, dict[str, Any]]:
  """Model -> benchmark -> entry, of the runs without an image control."""
  found: dict[str, dict[str, Any]] = {}
  for file in files:
    for model, by_control in scores.read(file).items():
      entries = found.setdefault(model, {})
      for name, entry in by_control.get('none', {}).items():
        if entries.setdefault(name, entry) != entry:
          raise base.EvalError(
              f'{file}: {model} has other scores of {name} in another of the'
              ' files; give one of them.'
          )
  return found


def record(path: pathlib.Path, text: str) -> None:
  """Keeps the score that a server gave, `MODEL:BENCHMARK:POINTS`."""
  known = [benchmark for _, benchmark, _, _ in _COLUMNS]
  try:
    rest, points = text.rsplit(':', 1)
    model, benchmark = rest.rsplit(':', 1)
    value = float(points)
  except ValueError:
    model, benchmark, value = '', '', -1.0
  if not model or benchmark not in known or not 0 <= value <= 100:
    raise base.EvalError(
        f'--server_score={text}: expected MODEL:BENCHMARK:POINTS of 100, the'
        f' benchmark one of {", ".join(known)}.'
    )
  before = scores.read(path) if path.exists() else {}
  entry = before.get(model, {}).get('none', {}).get(benchmark, {})
  scores.merge(path, model, 'none', benchmark, {**entry, scores.SERVER: value})


def _mean_f1(entries: Mapping[str, Any]) -> float | None:
  """POPE in percent, or None unless it is of all three categories."""
  entry = entries.get('pope', {})
  whole = {*_POPE, 'f1_mean'} <= set(entry)
  return 100 * entry['f1_mean'] if whole else None


def row_3(entries: Mapping[str, Any]) -> list[str]:
  """Cells of Table 3; '-' for what is missing."""
  count, size = activated(entries), _first(entries, 'image_size')
  cells = ['-' if count is None else f'{count:.1f}', str(size or '-')]
  for _, benchmark, path, factor in _COLUMNS:
    entry = entries.get(benchmark, {})
    value = entry.get(scores.SERVER)  # Comes first.
    if value is None and benchmark == 'pope':
      value = _mean_f1(entries)
    elif value is None and path:
      found: Any = entry
      for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
      value = None if found is None else found * factor
    cells.append('-' if value is None else f'{value:.1f}')
  return cells


def row_4(entries: Mapping[str, Any]) -> list[str]:
  """Cells of Table 4; '-' for what is missing."""
  entry = entries.get('pope', {})
  return [
      f'{100 * entry[category][rate]:.1f}' if category in entry else '-'
      for category in _POPE
      for rate in _RATES
  ]


def activated(entries: Mapping[str, Any]) -> float | None:
  """Billions of parameters that a token uses."""
  count = _first(entries, 'activated_parameters')
  return None if count is None else count / _BILLION


def _first(entries: Mapping[str, Any], name: str) -> int | None:
  """A fact about the model, from any benchmark's entry."""
  values = (entry.get(name) for entry in entries.values())
  return next((value for value in values if value), None)


def published() -> dict[str, tuple[float, float]]:
  """Activated parameters in billions, and POPE, of the paper's models."""
  rows = {name: text.split() for name, text in TABLE_3.items()}
  column = 2 + [column[0] for column in _COLUMNS].index('POPE')
  found = {
      name: (float(cells[0]), float(cells[column]))
      for name, cells in rows.items()
      if cells[column] != '-'
  }
  return {**found, **_FIGURE_ONLY}


def measured(models: Models) -> dict[str, tuple[float, float]]:
  """The same of models that have both."""
  found = {}
  for name, entries in models.items():
    count, mean = activated(entries), _mean_f1(entries)
    if count is not None and mean is not None:
      found[name] = count, mean
  return found
