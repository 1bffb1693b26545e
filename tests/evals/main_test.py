# SPDX-License-Identifier: Apache-2.0
"""The command: what it writes, and one line for each mistake."""

import json
import pathlib
import subprocess
import sys

import pytest

from moellava_jax.evals import base, paper, run

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens' / 'eval' / 'pope'


def _command(*flags):
  return subprocess.run(
      [sys.executable, '-m', 'moellava_jax.evals.main', *flags],
      capture_output=True,
      text=True,
      check=False,
      cwd=ROOT,
  )


@pytest.fixture
def options(tmp_path, questions, images, write_jsonl):
  """Options to ask two models the five questions."""
  models = [tmp_path / 'run' / name for name in ('finetune', 'moe')]
  for model in models:
    model.mkdir(parents=True)

  def make(**changes):
    fields = {
        'benchmark': 'pope',
        'questions': str(tmp_path / 'q.jsonl'),
        'model': [str(model) for model in models],
        'control': ['none'],
        'protocol': 'llava',
        'answers': [],
        'images': images,
        'annotations': None,
        'out': str(tmp_path / 'out'),
        'submission': None,
        'judge_url': None,
        'judge_model': None,
        'judge_key': 'NO_KEY',
        'judge_prices': [],
        'yes': False,
        'scores': [],
        'server_score': [],
        'batch_size': 64,
        'max_new_tokens': None,
        'temperature': 0.0,
        'image_aspect': None,
        'cpu_devices': 1,
        'mesh': None,
        'shard': None,
        'routing_trace': False,
    }
    return run.Options(**{**fields, **changes})

  write_jsonl('q.jsonl', questions)
  return make


def _scores(tmp_path):
  return json.loads((tmp_path / 'out' / 'scores.json').read_text())


def _write_shapes(write_jsonl, questions):
  write_jsonl('shapes/questions_pope.jsonl', questions)
  exact = [
      {**row, 'category': category, 'kind': category, 'answer': 'yes'}
      for row, category in zip(
          questions[:3], ('count', 'color', 'position'), strict=True
      )
  ]
  for row in exact:
    row.pop('label')
  return str(
      pathlib.Path(write_jsonl('shapes/questions_exact.jsonl', exact)).parent
  )


def test_models_and_controls_are_all_scored(chats, options, tmp_path):
  moe = chats(options().model[1])
  moe.reply = (
      lambda request: 'Yes' if isinstance(request.images[0], str) else 'No'
  )
  run.evaluate(options(control=['none', 'blank_image']))
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {
      'finetune.q.jsonl',
      'finetune.blank_image.q.jsonl',
      'moe.q.jsonl',
      'moe.blank_image.q.jsonl',
      'scores.json',
  }
  scores = _scores(tmp_path)
  assert {k: list(v) for k, v in scores.items()} == {
      'finetune': ['none', 'blank_image'],
      'moe': ['none', 'blank_image'],
  }
  seen = scores['moe']['none']['pope']
  assert seen['random']['recall'] == 1.0
  assert scores['moe']['blank_image']['pope']['random']['recall'] == 0.0
  assert seen['questions'] == 5
  assert seen['model'] == options().model[1]
  assert seen['digest'] == 'digest-of-moe'
  assert moe.calls[0][1] == 128  # As LLaVA's runner.


def test_benchmarks_and_runs_share_one_scores_file(
    chats, options, questions, write_jsonl, tmp_path
):
  run.evaluate(options())
  before = _scores(tmp_path)
  folder = _write_shapes(write_jsonl, questions)
  shapes = {'benchmark': 'shapes', 'questions': folder}
  run.evaluate(options(**shapes, model=[options().model[1]]))
  scores = _scores(tmp_path)
  assert scores['finetune'] == before['finetune']
  assert scores['moe']['none']['pope'] == before['moe']['none']['pope']
  assert scores['moe']['none']['shapes']['exact_match']['mean'] == 1.0
  assert scores['moe']['none']['shapes']['questions'] == 8
  assert (tmp_path / 'out' / 'moe.exact.jsonl').exists()
  assert not list((tmp_path / 'out').glob('*.tmp'))

  # The written answers alone give the same scores.
  files = [
      str(tmp_path / 'out' / f'moe.{key}.jsonl') for key in ('exact', 'pope')
  ]
  run.evaluate(options(**shapes, model=[], answers=files, out=str(tmp_path)))
  again = json.loads((tmp_path / 'scores.json').read_text())
  expected = {**scores['moe']['none']['shapes'], 'model': None}
  # What answers do not tell.
  del expected['activated_parameters'], expected['image_size']
  assert again == {'moe': {'none': {'shapes': expected}}}


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            {'benchmark': 'mmbenc'},
            "No benchmark 'mmbenc'; there are ai2d, chartqa, gqa, llava_bench,",
        ),
        ({'questions': 'gone.jsonl'}, 'gone.jsonl: no such file'),
        ({'images': None}, 'give their root as --images'),
        ({'images': 'gone'}, r"missing: 5 \('a.png'"),
        ({'control': ['grey']}, "No control 'grey'"),
        ({'out': None}, 'Give --out=DIR'),
        ({'model': []}, 'either --model .* or --answers'),
        ({'answers': ['a.jsonl']}, 'either --model .* or --answers'),
        ({'model': ['gone/moe']}, '--model=gone/moe: no such directory'),
        ({'batch_size': 0}, '--batch_size=0'),
    ],
)
def test_a_mistake_is_found_before_a_model_is_loaded(
    chats, options, changes, message
):
  with pytest.raises(base.EvalError, match=message):
    run.evaluate(options(**changes))
  assert not chats.loaded


def test_answers_keep_their_control_when_only_scored(chats, options, tmp_path):
  run.evaluate(options(control=['shuffled_image']))
  answers = [str(tmp_path / 'out' / 'moe.shuffled_image.q.jsonl')]
  run.evaluate(options(model=[], answers=answers, out=str(tmp_path)))
  again = json.loads((tmp_path / 'scores.json').read_text())
  expected = _scores(tmp_path)['moe']['shuffled_image']['pope']
  del expected['activated_parameters'], expected['image_size']
  assert again == {
      'moe': {'shuffled_image': {'pope': {**expected, 'model': None}}}
  }


def test_scoring_again_keeps_what_answers_do_not_tell(chats, options, tmp_path):
  model = options().model[1]
  run.evaluate(options(model=[model]))
  scores_file = tmp_path / 'out' / 'scores.json'
  paper.record(scores_file, 'moe:pope:85.5')
  before = _scores(tmp_path)
  entry = before['moe']['none']['pope']
  assert (entry['server'], entry['image_size']) == (85.5, 336)
  answers = tmp_path / 'out' / 'moe.q.jsonl'
  again = options(model=[], answers=[str(answers)])
  run.evaluate(again)
  assert _scores(tmp_path) == before
  # Other answers of the same model: what the server said is not of these.
  answers.write_text(answers.read_text().replace('Yes', 'No'))
  run.evaluate(again)
  entry = _scores(tmp_path)['moe']['none']['pope']
  assert 'server' not in entry
  assert entry['activated_parameters'] == 5
  # Nothing of another model.
  text = answers.read_text().replace('digest-of-moe', 'other')
  answers.write_text(text)
  run.evaluate(again)
  entry = _scores(tmp_path)['moe']['none']['pope']
  assert entry['model'] is None
  assert not {'activated_parameters', 'image_size'} & set(entry)


def test_two_models_of_one_name_do_not_overwrite_each_other(
    chats, options, tmp_path
):
  (tmp_path / 'other' / 'moe').mkdir(parents=True)
  models = [options().model[1], str(tmp_path / 'other' / 'moe') + '/']
  with pytest.raises(base.EvalError, match="both be called 'moe'"):
    run.evaluate(options(model=models))
  assert not chats.loaded


def test_a_model_that_does_not_load_is_named(chats, options, monkeypatch):
  def load(path, cpu_devices=1, mesh=None):
    raise ValueError('no finished stage')

  monkeypatch.setattr('moellava_jax.infer.chat.load', load)
  with pytest.raises(base.EvalError, match=r'--model=.*/finetune: no finished'):
    run.evaluate(options())


def test_answers_of_several_models_are_not_mixed(
    options, questions, write_jsonl
):
  answers = write_jsonl(
      'a.jsonl',
      [
          {
              'question_id': row['question_id'],
              'text': 'Yes',
              'model_id': f'm{i // 3}',
          }
          for i, row in enumerate(questions)
      ],
  )
  with pytest.raises(base.EvalError, match='several models or controls: 2'):
    run.evaluate(options(model=[], answers=[answers]))


def test_shapes_is_scored_from_both_files(options, questions, write_jsonl):
  folder = _write_shapes(write_jsonl, questions)
  with pytest.raises(base.EvalError, match='2 times --answers'):
    run.evaluate(
        options(
            benchmark='shapes', questions=folder, model=[], answers=['a.jsonl']
        )
    )


def test_scores_of_something_else_are_left_alone(chats, options, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'scores.json').write_text('[1]')
  with pytest.raises(base.EvalError, match='expected model -> control'):
    run.evaluate(options())
  assert (tmp_path / 'out' / 'scores.json').read_text() == '[1]'


def test_the_command_scores_official_files(tmp_path):
  done = _command(
      '--benchmark=pope',
      f'--questions={GOLDENS}/questions.jsonl',
      f'--answers={GOLDENS}/answers.jsonl',
      f'--annotations={GOLDENS}/coco',
      f'--out={tmp_path}/out',
  )
  assert done.returncode == 0, done.stderr
  rows = {
      line.split()[0]: line.split() for line in done.stdout.splitlines() if line
  }
  assert rows['random'][1:] == [
      '0.5385',
      '0.4667',
      '0.6364',
      '0.5385',
      '0.5769',
      '7',
      '8',
      '7',
      '4',
  ]
  entry = _scores(tmp_path)['m']['none']['pope']
  assert entry['f1_mean'] == pytest.approx(0.5530503978779841)
  assert (entry['questions'], entry['digest']) == (78, None)


def test_the_command_shows_and_records_tables(tmp_path, write_jsonl):
  entry = {
      'isBalanced': True,
      'answer': 'red',
      'question': 'Which color?',
      'semantic': [{'operation': 'select', 'argument': 'car'}],
      'types': {'structural': 'query', 'semantic': 'attr', 'detailed': 'x'},
      'groups': {'global': None},
      'entailed': [],
  }
  row = {'question_id': '5', 'image': 'a.jpg', 'text': 'Q', 'category': 'c'}
  (tmp_path / 'test_questions.json').write_text(json.dumps({'5': entry}))
  answer = {'question_id': '5', 'prompt': 'Q', 'text': 'Red.', 'model_id': 'm'}
  done = _command(
      '--benchmark=gqa',
      f'--questions={write_jsonl("q.jsonl", [row])}',
      f'--answers={write_jsonl("a.jsonl", [answer])}',
      f'--annotations={tmp_path}/test_questions.json',
      f'--out={tmp_path}/out',
  )
  assert done.returncode == 0, done.stderr
  assert 'accuracy 1.0000' in done.stdout
  assert ['attr', '1.0000', '1'] in [x.split() for x in done.stdout.split('\n')]
  words = _scores(tmp_path)['m']['none']['gqa']['words']
  assert words == {'2': {'accuracy': 1.0, 'questions': 1}}


def test_the_command_ends_a_mistake_with_one_line():
  done = _command('--benchmark=pope', '--questions=gone', '--answers=gone')
  assert done.returncode == 1
  assert done.stderr == 'error: gone: no such file.\n'


def test_the_command_lists_all_images_that_are_missing(
    options, questions, write_jsonl, tmp_path
):
  rows = [
      {**questions[0], 'question_id': n, 'image': f'{n}.png'} for n in range(9)
  ]
  out, images = tmp_path / 'out', tmp_path / 'images'
  flags = (
      '--benchmark=pope',
      f'--model={options().model[1]}',
      f'--questions={write_jsonl("nine.jsonl", rows)}',
      f'--images={images}',
      f'--out={out}',
  )
  (images / '3.png').write_bytes(b'')
  done = _command(*flags)
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert 'of 9 images, missing: 8' in line and f'{out}/missing_images' in line
  assert (out / 'missing_images.txt').read_text().splitlines() == [
      f'{n}.png' for n in range(9) if n != 3
  ]


def test_scoring_needs_no_jax():
  code = 'import sys, moellava_jax.evals.main; assert "jax" not in sys.modules'
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
