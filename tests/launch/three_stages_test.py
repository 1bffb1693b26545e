# SPDX-License-Identifier: Apache-2.0
"""three_stages.sh runs the stages of the paper in order."""

import pytest

from tests.launch import shell

CONFIG = 'configs/phi2.py'
STAGES = ('pretrain', 'finetune', 'moe')
_NOTE = "open(os.environ['SEEN'], 'a').write('|'.join(sys.argv[1:]) + '\\n')"


def test_stages_run_in_order_with_their_flags(tmp_path):
  seen = tmp_path / 'seen'
  env = shell.environment(tmp_path, {0: _NOTE}) | {'SEEN': str(seen)}
  done = shell.run(
      'three_stages.sh',
      CONFIG,
      '--moe=--config.mesh.expert=4',
      '--moe=--config.moe.lr=1e-5',
      '--',
      '--config.data.json=a b.json',
      env=env,
  )
  assert done.returncode == 0, done.stderr
  assert [line.split('|') for line in seen.read_text().splitlines()] == [
      [f'--config={CONFIG}:pretrain', '--config.data.json=a b.json'],
      [f'--config={CONFIG}:finetune', '--config.data.json=a b.json'],
      [
          f'--config={CONFIG}:moe',
          '--config.data.json=a b.json',
          '--config.mesh.expert=4',
          '--config.moe.lr=1e-5',
      ],
  ]


@pytest.mark.parametrize(
    ('codes', 'options', 'expected', 'runs'),
    [
        ((0, 75), (), 75, 2),
        ((0, 75, 0, 0), ('--restarts=1',), 0, 4),
        ((3,), ('--restarts=1',), 3, 1),
    ],
)
def test_a_stage_that_does_not_end_ends_all(
    tmp_path, codes, options, expected, runs
):
  env = shell.environment(tmp_path, {0: f'sys.exit({list(codes)}[attempt])'})
  done = shell.run('three_stages.sh', CONFIG, *options, env=env)
  assert done.returncode == expected, done.stderr
  assert len((tmp_path / 'attempts-0').read_text()) == runs


def test_dry_run_prints_what_would_run(tmp_path):
  done = shell.run(
      'three_stages.sh',
      CONFIG,
      '--cpu-devices=4',
      '--dry-run',
      '--finetune=--config.workdir=a b',
      env=shell.environment(tmp_path),
  )
  assert done.returncode == 0, done.stderr
  scripts = shell.commands(done.stdout, 'local.sh')
  assert [words[2] for words in scripts] == [f'{CONFIG}:{s}' for s in STAGES]
  runs = shell.commands(done.stdout, 'moellava_jax.train.main')
  assert [words[3] for words in runs] == [
      f'--config={CONFIG}:{s}' for s in STAGES
  ]
  assert '--config.workdir=a b' in runs[1]
  assert '--config.workdir=a b' not in runs[0] + runs[2]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((), 'which CONFIG?'),
        (('configs/phi2.py:moe',), 'names a stage already'),
        ((CONFIG, '--stages=warm'), "'warm' is not pretrain, finetune or moe"),
        ((CONFIG, '--config.moe.lr=1'), 'flags of training come after --'),
    ],
)
def test_bad_arguments(tmp_path, args, message):
  done = shell.run('three_stages.sh', *args, env=shell.environment(tmp_path))
  assert done.returncode and message in done.stderr
