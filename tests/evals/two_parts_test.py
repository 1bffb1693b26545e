# SPDX-License-Identifier: Apache-2.0
"""Two processes with a model write what one does, and score it once."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.infer import conftest

ROOT = pathlib.Path(__file__).parents[2]
checkpoint_dir = conftest.checkpoint_dir


@pytest.mark.slow
def test_two_processes_answer_as_one(
    checkpoint_dir, questions, images, write_jsonl, tmp_path
):
  asked = write_jsonl('q.jsonl', questions)

  def start(folder, *flags):
    return subprocess.Popen(
        [
            *(sys.executable, '-m', 'moellava_jax.evals.main'),
            *(f'--model={checkpoint_dir}', '--benchmark=pope'),
            *(f'--questions={asked}', f'--images={images}'),
            *(f'--out={tmp_path / folder}', '--batch_size=2'),
            *('--max_new_tokens=8', *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            'XLA_FLAGS': '--xla_backend_optimization_level=0',
        },
    )

  def ended(process):
    try:
      said, _ = process.communicate(timeout=600)
    finally:
      process.kill()
    assert process.returncode == 0, said

  # One whose devices share the model, which changes nothing either.
  ended(start('alone', '--cpu_devices=2', '--mesh=expert=2'))
  for process in [start('parts', f'--shard={n}/2') for n in range(2)]:
    ended(process)
  names = sorted(path.name for path in (tmp_path / 'alone').glob('*.json*'))
  assert len(names) == 2  # Answers and scores.
  for name in names:
    alone, parts = (tmp_path / x / name for x in ('alone', 'parts'))
    assert alone.read_bytes() == parts.read_bytes()
  answers = (tmp_path / 'alone' / 'final.q.jsonl').read_text().splitlines()
  assert len(answers) == len(questions)
