# SPDX-License-Identifier: Apache-2.0
"""A report says what the files of a run say, and stands alone."""

import base64
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import report, results, run_files, tally
from moellava_jax.analysis import routing as routing_lib

STAGES = ('warmup', 'pretrain', 'finetune', 'moe')
POPE = ('random', 'popular', 'adversarial')
# Category, kind, answer of the exact-match questions.
EXACT = (
    ('count', 'count', '2'),
    ('count', 'count', '3'),
    ('color', 'color', 'red'),
    ('position', 'left', 'yes'),
)
# What a model answers, per category of POPE (truths are yes, yes, no, no).
PERFECT = ('Yes', 'Yes', 'No', 'No')
EAGER = ('Yes', 'Yes', 'Yes', 'No')  # TP 2, FP 1, TN 1.
ALWAYS_NO = ('No', 'No', 'No', 'No')
GOOD = {'random': PERFECT, 'popular': PERFECT, 'adversarial': EAGER}
BLIND = dict.fromkeys(POPE, ALWAYS_NO)


def make_counts():
  """Fifty tokens with two choices in two layers, a third of them of images."""
  rng = np.random.default_rng(0)
  choice_LNk = np.argsort(rng.random((2, 50, 4)), axis=-1)[..., :2]
  part = tally.Tokens(
      5,
      np.arange(50) % 3 == 0,
      choice_LNk,
      rng.random((2, 50, 2)) < 0.9,
      rng.random((2, 50)),
  )
  return tally.tally((0, 2), 4, [part])


def make_run(path: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """A finished run of four stages with two MoE layers of four experts."""
  (path / 'data' / 'images').mkdir(parents=True)
  _json(path / 'config.json', {'seed': seed, 'stages': list(STAGES)})
  environment = {'revision': 'abc123', 'device': 'cpu', 'seed': seed}
  _json(path / 'environment.json', environment)
  parameters = {
      'trained_parameters': 10,
      'total_parameters': 4000,
      'activated_parameters': 3000,
  }
  stages = {
      s: {'seconds': 1.5 + i, 'steps': 20, **parameters}
      for i, s in enumerate(STAGES)
  }
  _json(path / 'stages.json', stages)
  rows = [metrics(s, n) for s in STAGES for n in range(1, 21)]
  _jsonl(path / 'metrics.jsonl', rows)
  _questions(path)
  for stage in STAGES:
    answer(path, stage, GOOD, ('2', '3', 'Red.', 'yes'))
  answer(path, 'warmup', BLIND, ('', '', '', ''))
  answer(path, 'moe.blank_image', BLIND, ('2', '2', 'blue', 'yes'))
  answer(path, 'moe.shuffled_image', BLIND, ('5', '5', 'red', 'no'))
  routing = {
      **routing_lib.summary(make_counts()),
      'expert_distance': [0.5, 0.6],
      'loss': 0.25,
      'loss_shuffled_experts': 1.5,
  }
  (path / 'routing').mkdir()
  _json(path / 'routing' / 'routing.json', routing)
  return path


def answer(path, name, pope, exact):
  """Writes answers: per category of POPE four, and four to EXACT."""
  (path / 'answers').mkdir(exist_ok=True)
  texts = [text for category in POPE for text in pope[category]]
  for benchmark, values in (('pope', texts), ('exact', exact)):
    rows = [{'question_id': i, 'text': text} for i, text in enumerate(values)]
    _jsonl(path / 'answers' / f'{name}.{benchmark}.jsonl', rows)


def _questions(path):
  for i in range(4):
    Image.new('RGB', (32, 32), (60 * i, 90, 0)).save(
        path / 'data' / 'images' / f'{i}.png'
    )
  pope = [
      {
          'question_id': 4 * c + i,
          'image': f'images/{i}.png',
          'text': 'Is there a <script>alert(1)</script>?',
          'category': category,
          'label': 'yes' if i < 2 else 'no',
      }
      for c, category in enumerate(POPE)
      for i in range(4)
  ]
  exact = [
      {
          'question_id': i,
          'image': f'images/{i}.png',
          'text': 'What?',
          'category': category,
          'kind': kind,
          'answer': text,
      }
      for i, (category, kind, text) in enumerate(EXACT)
  ]
  _jsonl(path / 'data' / 'questions_pope.jsonl', pope)
  _jsonl(path / 'data' / 'questions_exact.jsonl', exact)


def metrics(stage, step):
  row = {'stage': stage, 'step': step, 'loss': 3 / step, 'ce_loss': 3 / step}
  # The first step is compiled.
  row |= {'tokens': 500, 'tokens_per_s': 10.0 if step == 1 else 1200.0}
  if step % 5 == 0:
    row['eval_loss'] = 3.1 / step
  if stage == 'moe':
    layer = {'load': [0.4, 0.3, 0.2, 0.1], 'drop_rate': 0.1, 'aux_loss': 1.1}
    row['moe'] = {'0': layer, '2': {**layer, 'load': [0.25] * 4}}
  return row


def _json(path, content):
  path.write_text(json.dumps(content))


def _jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A run with its report."""
  path = make_run(tmp_path_factory.mktemp('runs') / 'run', seed=7)
  report.write(path)
  return path


def test_results_equal_hand_computed_numbers(written):
  found = json.loads((written / 'results.json').read_text())
  rates = ('accuracy', 'precision', 'recall', 'f1', 'yes_ratio')
  random = [found['pope']['random'][name] for name in rates]
  adversarial = [found['pope']['adversarial'][name] for name in rates]
  assert random == [1, 1, 1, 1, 0.5]
  assert adversarial == pytest.approx([3 / 4, 2 / 3, 1, 4 / 5, 3 / 4])
  assert found['exact_match'] == {
      'count': 1,
      'color': 1,
      'position': 1,
      'mean': 1,
  }
  assert found['stage0'] == {'pope_f1_mean': 0, 'exact_match_mean': 0}
  good = {'pope_f1_mean': 2.8 / 3, 'exact_match_mean': 1}
  assert found['stage1'] == pytest.approx(good)
  assert found['stage2'] == pytest.approx(good)
  assert found['stage3'] == {
      **found['stage2'],
      'expert_distance': [0.5, 0.6],
      'loss': 0.25,
      'loss_shuffled_experts': 1.5,
  }
  # Right are: one of two counts, no colour, the position.
  blank = {'pope_accuracy': 0.5, 'exact_match_mean': 0.5}
  shuffled = {'pope_accuracy': 0.5, 'exact_match_mean': pytest.approx(1 / 3)}
  assert found['controls'] == {'blank_image': blank, 'shuffled_image': shuffled}
  load_LE = counts_lib.load_LE(make_counts())
  assert found['expert_load'] == load_LE.tolist()
  assert found['seconds'] == {
      'warmup': 1.5,
      'pretrain': 2.5,
      'finetune': 3.5,
      'moe': 4.5,
  }
  assert found['tokens_per_s'] == dict.fromkeys(STAGES, 1200.0)
  assert (found['seed'], found['revision']) == (7, 'abc123')


def test_page_escapes_what_users_wrote(written):
  text = (written / 'report.html').read_text()
  assert '<script' not in text
  assert '&lt;script&gt;alert(1)' in text


def test_page_stands_alone(written):
  text = (written / 'report.html').read_text()
  assert 'Not in this report' not in text
  sources = re.findall(r'<img[^>]*?src="([^"]*)"', text, re.DOTALL)
  # Loss, two of training, six of routing; then the samples.
  assert len(sources) == 9 + 12
  for source in sources:
    kind, _, data = source.partition('base64,')
    assert kind == 'data:image/png;'
    Image.open(io.BytesIO(base64.b64decode(data))).verify()
  assert not re.search(r'(src|href)=(?!"data:)', text)
  assert not re.search(r'@import|url\(|<link', text)


def test_samples_show_wrong_answers_marked_in_words(written):
  text = (written / 'report.html').read_text()
  assert text.count('<p class="mark">wrong</p>') == 1  # All that there are.
  assert text.count('<p class="mark">right</p>') == 11


def test_run_without_questions_reports_training_only(tmp_path):
  path = tmp_path / 'own'
  path.mkdir()
  _json(path / 'config.json', {'seed': 3, 'stages': ['moe']})
  _jsonl(path / 'metrics.jsonl', [metrics('moe', n) for n in (1, 2, 3)])
  run, found = report.write(path)
  load = [[0.4, 0.3, 0.2, 0.1], [0.25] * 4]
  assert found.keys() == {'expert_load', 'tokens_per_s', 'seed'}
  assert found['expert_load'] == [pytest.approx(layer) for layer in load]
  text = (path / 'report.html').read_text()
  assert text.count('<figure>') == 4
  for name in ('stages.json', 'environment.json', 'questions_pope.jsonl'):
    assert any(name in line for line in run.absent)
    assert name in text


def test_missing_answers_name_the_command_that_makes_them(tmp_path):
  path = make_run(tmp_path / 'run')
  (path / 'answers' / 'moe.shuffled_image.pope.jsonl').unlink()
  run = run_files.read(path)
  found = results.collect(run)
  (line,) = run.absent
  assert line.startswith('answers/moe.shuffled_image.pope.jsonl is missing')
  assert f'moellava_jax.evals.main --model={path}/moe ' in line
  assert '--control=shuffled_image' in line
  assert found['controls'].keys() == {'blank_image'}


def test_half_written_answers_are_refused(tmp_path):
  path = make_run(tmp_path / 'run')
  file = path / 'answers' / 'moe.exact.jsonl'
  file.write_text(''.join(file.read_text().splitlines(keepends=True)[:2]))
  with pytest.raises(ValueError, match=r'answers/moe\.\*.*missing: 2'):
    results.collect(run_files.read(path))


def test_other_directories_are_refused(tmp_path):
  with pytest.raises(ValueError, match='no run directory'):
    run_files.read(tmp_path)


def test_resumed_and_killed_metrics_are_read(tmp_path):
  path = make_run(tmp_path / 'run')
  with (path / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({**metrics('moe', 20), 'ce_loss': 9.0}) + '\n')
    file.write('{"stage": "moe", "st')
  run = run_files.read(path)
  rows = run.metrics['moe']
  assert [row['step'] for row in rows] == list(range(1, 21))
  assert rows[-1]['ce_loss'] == 9.0


def test_malformed_metrics_name_the_line(tmp_path):
  path = make_run(tmp_path / 'run')
  text = (path / 'metrics.jsonl').read_text()
  (path / 'metrics.jsonl').write_text('{"stage": "moe"}\n' + text)
  with pytest.raises(ValueError, match=r'metrics\.jsonl, line 1: .*"step"'):
    run_files.read(path)


def test_several_runs_give_mean_and_sample_deviation(tmp_path):
  paths = [make_run(tmp_path / f'run{seed}', seed) for seed in range(3)]
  # Mean exact match 1, 2/3 and 1/3.
  answer(paths[1], 'moe', GOOD, ('2', '3', 'red', 'no'))
  answer(paths[2], 'moe', GOOD, ('2', '3', 'blue', 'no'))
  many = [results.collect(run_files.read(path)) for path in paths]
  compared = results.compare(many)
  values, mean, deviation, count = compared['exact_match.mean']
  assert values == pytest.approx((1, 2 / 3, 1 / 3))
  assert mean == pytest.approx(2 / 3)
  assert deviation == pytest.approx(1 / 3)  # Over n - 1.
  assert count == 3
  assert compared['pope.random.f1'][1:] == (1, 0, 3)
  assert compared['controls.blank_image.pope_accuracy'][1:] == (0.5, 0, 3)
  assert math.isnan(results.compare(many[:1])['exact_match.mean'].deviation)


def test_command_takes_both_forms_of_runs(tmp_path):
  paths = [str(make_run(tmp_path / f'run{seed}', seed)) for seed in (4, 5)]
  for path in map(pathlib.Path, paths):  # No figures: this is about flags.
    (path / 'metrics.jsonl').unlink()
    (path / 'routing' / 'routing.json').unlink()
  outputs = [
      _command(['--runs', *paths]),
      _command([f'--runs={path}' for path in paths]),
  ]
  assert outputs[0] == outputs[1]
  assert f'{paths[1]}/report.html' in outputs[0]
  assert '2 runs, seeds 4, 5' in outputs[0]


def _command(arguments):
  done = subprocess.run(
      [sys.executable, '-m', 'moellava_jax.analysis.report', *arguments],
      capture_output=True,
      text=True,
      check=False,
      cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr
  return done.stdout
