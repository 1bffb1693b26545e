# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figure, with rows of our own."""

import hashlib
import itertools
import json
import re

from matplotlib import text as mpl_text
import pytest

from moellava_jax.evals import base, paper, paper_figure

POPE = {
    category: {'accuracy': 0.85, 'f1': f1, 'yes_ratio': 0.4}
    for category, f1 in zip(
        ('adversarial', 'popular', 'random'), (0.8, 0.85, 0.9), strict=True
    )
}
ENTRIES = {
    'pope': {**POPE, 'f1_mean': 0.85, 'activated_parameters': 2_059_849_728},
    'gqa': {'accuracy': 0.6144, 'binary': 0.7, 'image_size': 384},
    'scienceqa': {'accuracy': 0.7, 'accuracy_img': 0.6255},
    'llava_bench': {'all': {'ratio': 88.7}},
    'mmvet': {'total': 26.1},
    'vqav2': {'accuracy': 0.7},  # Of the validation set: not the paper's.
}


@pytest.fixture
def scores(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'scores.json').write_text(
      json.dumps({'moe': {'none': ENTRIES, 'blank_image': {'pope': {}}}})
  )
  return tmp_path / 'a'


def _rows(text, name):
  return [
      re.split(r'\s{2,}', line.strip())
      for line in text.splitlines()
      if line.startswith(name)
  ]


def test_our_rows_stand_below_the_published_ones(scores, tmp_path, capsys):
  paper.compare([str(scores)], [], str(tmp_path / 'out'))
  printed = capsys.readouterr().out
  assert _rows(printed, 'moe') == [
      ['moe', '2.1', '384', '-', '61.4', '-', '62.5', '-', '85.0', '-', '88.7']
      + ['26.1'],
      ['moe', '85.0', '80.0', '40.0', '85.0', '85.0', '40.0']
      + ['85.0', '90.0', '40.0'],
  ]
  three, four = _rows(printed, 'MoE-LLaVA-1.8Bx4')
  assert three[1:] == paper.TABLE_3['MoE-LLaVA-1.8Bx4'].split()
  assert four[1:] == paper.TABLE_4['MoE-LLaVA-1.8Bx4'].split()
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {
      'pope_by_activated_parameters.png',
      'pope_by_activated_parameters.svg',
  }


def test_every_published_row_is_complete_and_frozen():
  assert {len(row.split()) for row in paper.TABLE_3.values()} == {11}
  assert {len(row.split()) for row in paper.TABLE_4.values()} == {9}
  tables = json.dumps([paper.TABLE_3, paper.TABLE_4])
  assert hashlib.sha256(tables.encode()).hexdigest()[:32] == (
      'fac71a57791ca273eedf251d9b82319f'
  )
  # POPE of Table 3 is the mean F1 of Table 4, as printed, but for the last.
  for name, row in paper.TABLE_4.items():
    if name in paper.TABLE_3:
      f1 = [float(cell) for cell in row.split()[1::3]]
      printed = float(paper.TABLE_3[name].split()[7])
      assert sum(f1) / 3 == pytest.approx(printed, abs=0.06)


def test_pope_of_one_category_is_no_pope():
  part = {'pope': {'random': POPE['random'], 'f1_mean': 0.9}}
  part['pope']['activated_parameters'] = 2e9
  assert paper.row_3(part)[7] == '-'
  assert paper.row_4(part) == [*6 * '-', '85.0', '90.0', '40.0']
  assert paper.measured({'m': part}) == {}
  assert paper.measured({'m': ENTRIES}) == {'m': (2.059849728, 85.0)}


def test_a_servers_score_is_kept_and_comes_first(scores, capsys):
  record = ['moe:vqav2:76.2', 'moe:gqa:60']
  paper.compare([], record, str(scores))
  assert _rows(capsys.readouterr().out, 'moe')[0][3:5] == ['76.2', '60.0']
  kept = json.loads((scores / 'scores.json').read_text())['moe']['none']
  assert kept['vqav2'] == {'accuracy': 0.7, 'server': 76.2}
  paper.compare([], [], str(scores))
  assert _rows(capsys.readouterr().out, 'moe')[0][3] == '76.2'


@pytest.mark.parametrize(
    'text', ['moe:vqav2', 'moe:mme:5', 'moe:gqa:x', ':gqa:5', 'moe:gqa:101']
)
def test_a_bad_server_score_is_an_error(scores, text):
  before = (scores / 'scores.json').read_text()
  with pytest.raises(base.EvalError, match='expected MODEL:BENCHMARK:POINTS'):
    paper.compare([], [text], str(scores))
  assert (scores / 'scores.json').read_text() == before


def test_files_that_disagree_are_an_error(scores, tmp_path):
  other = tmp_path / 'scores.json'
  other.write_text(json.dumps({'moe': {'none': {'mmvet': {'total': 1.0}}}}))
  with pytest.raises(base.EvalError, match='moe has other scores of mmvet'):
    paper.compare([str(scores), str(other)], [], None)
  with pytest.raises(base.EvalError, match='no such file, or no scores.json'):
    paper.compare([str(tmp_path / 'gone')], [], None)
  with pytest.raises(base.EvalError, match='Give --scores=DIR, or --out=DIR'):
    paper.compare([], [], str(tmp_path / 'empty'))
  other.write_text('{"moe": 3}')
  with pytest.raises(base.EvalError, match='expected model -> control'):
    paper.compare([str(other)], [], None)


@pytest.mark.parametrize(
    'own',
    [
        {},
        {'shapes': (0.0021, 97.0)},
        {
            'moe-llava-phi2': (3.6, 85.2),
            'stablelm': (2.06, 84.4),
            'q': (2.2, 87),
        },
    ],
)
def test_labels_overlap_neither_each_other_nor_dots(own):
  figure = paper_figure.draw(paper.published(), own)
  (ax,) = figure.axes
  renderer = figure.canvas.get_renderer()
  figure.draw(renderer)
  boxes = [
      mpl_text.Text.get_window_extent(label, renderer) for label in ax.texts
  ]
  assert len(boxes) == len(paper.published()) + len(own)
  frame = ax.get_window_extent(renderer)
  assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 for b in boxes)
  assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
  dots = [
      ax.transData.transform((x, y))
      for line in ax.lines
      for x, y in zip(*line.get_data(), strict=True)
  ]
  assert len(dots) == len(boxes)
  assert not any(box.contains(*dot) for box in boxes for dot in dots)
