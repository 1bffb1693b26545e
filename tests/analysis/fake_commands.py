# SPDX-License-Identifier: Apache-2.0
"""Stands in for train.main and evals.main: their flags and files, no model.

  python fake_commands.py LOG train|evaluate --config.workdir=... ...

Every call is a line of LOG. What it does beside writing files is in LOG.plan:
`{"fail": TEXT}` ends with 1 where a flag holds TEXT, and `{"stop": TEXT}`
asks the caller to stop there and waits to be told so itself.
"""

import json
import os
import pathlib
import signal
import sys

SECONDS = {'warmup': 1.5, 'pretrain': 2.5, 'finetune': 3.5, 'moe': 4.5}
QUESTIONS = 6  # Of each file; on three images.


def main():
  log, kind, *rest = sys.argv[1:]
  flags = dict(flag.removeprefix('--').split('=', 1) for flag in rest)
  with open(log, 'a') as file:
    file.write(json.dumps([kind, flags]) + '\n')
  plan_file = pathlib.Path(f'{log}.plan')
  plan = json.loads(plan_file.read_text()) if plan_file.exists() else {}
  if plan.get('fail', '?') in ' '.join(rest):
    print('first line\nno such thing')
    sys.exit(1)
  if plan.get('stop', '?') in ' '.join(rest):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
      signal.pause()
  if kind == 'train':
    train(flags)
  else:
    evaluate(flags)


def train(flags):
  run = pathlib.Path(flags['config.workdir'])
  run.mkdir(parents=True, exist_ok=True)
  before = flags.get('config.init.checkpoint')
  if before is not None:
    assert pathlib.Path(before).is_dir(), f'{before} is not trained yet'
  names = flags['config.stages'].strip('(),').replace("'", '').split(', ')
  stages = {}
  for name in names:
    (run / name / 'final').mkdir(parents=True)
    stages[name] = {
        'steps': 10,
        'seconds': SECONDS[name],
        'llm_total_parameters': 200_000,
        'llm_activated_parameters': 150_000,
    }
  (run / 'stages.json').write_text(json.dumps(stages))
  about = {'revision': 'abc', 'versions': {'jax': '1'}, 'device': '1 x cpu'}
  (run / 'environment.json').write_text(json.dumps(about))
  if flags.get('config.model.moe.top_k') == '1':
    (run / 'top_1').touch()
  if before is None:
    questions(run / 'data')


def questions(folder):
  (folder / 'images').mkdir(parents=True)
  for i in range(3):
    (folder / 'images' / f'{i}.png').write_bytes(b'png')
  rows = [
      {'question_id': i, 'image': f'images/{i // 2}.png', 'text': 'Is it?'}
      for i in range(QUESTIONS)
  ]
  pope = [
      {**row, 'category': 'random', 'label': 'no' if i % 2 else 'yes'}
      for i, row in enumerate(rows)
  ]
  exact = [
      {**row, 'category': category, 'kind': category, 'answer': '2'}
      for row, category in zip(
          rows, ('count', 'color', 'position') * 2, strict=True
      )
  ]
  lines(folder / 'questions_pope.jsonl', pope)
  lines(folder / 'questions_exact.jsonl', exact)


def evaluate(flags):
  """All right, but for the last question of a model that routes to one."""
  stage = os.path.basename(flags['model'])
  out = pathlib.Path(flags['out'])
  out.mkdir(parents=True, exist_ok=True)
  run = pathlib.Path(flags['model']).parent
  pope = ['no' if i % 2 else 'yes' for i in range(QUESTIONS)]
  exact = ['2'] * QUESTIONS
  if (run / 'top_1').exists():
    pope[-1], exact[-1] = 'yes', '3'
  for name, texts in (('pope', pope), ('exact', exact)):
    rows = [{'question_id': i, 'text': t} for i, t in enumerate(texts)]
    lines(out / f'{stage}.{name}.jsonl', rows)
  entry = {'model': flags['model'], 'questions': 2 * QUESTIONS}
  (out / 'scores.json').write_text(
      json.dumps({stage: {'none': {'shapes': entry}}})
  )


def lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


if __name__ == '__main__':
  main()
