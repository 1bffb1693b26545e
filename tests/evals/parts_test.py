# SPDX-License-Identifier: Apache-2.0
"""Several processes write the very file of one, and score it once."""

import itertools
import json

import pytest

from moellava_jax.evals import ask, base, parts
from moellava_jax.evals import run as run_lib
from tests.evals import main_test

options = main_test.options

SETTINGS = ask.Settings(
    max_new_tokens=4, temperature=0.7, batch_size=2, routing_trace=False
)


@pytest.fixture
def ask_shard(chats, questions, images, write_jsonl, tmp_path):
  """Asks the five questions as process I of N, or alone."""
  asked = base.read_questions(write_jsonl('q.jsonl', questions))
  chats('moe').reply = lambda request: request.turns[0][1][-2:]

  def run(shard=None, folder='out', **changes):
    return ask.run(
        chats('moe'),
        asked,
        images,
        tmp_path / folder / 'a.jsonl',
        'none',
        SETTINGS._replace(**changes),
        model_id='moe',
        shard=shard,
    )

  return run


def test_shards_write_the_bytes_and_seeds_of_one_process(
    ask_shard, chats, tmp_path
):
  alone = ask_shard(folder='alone')
  chats('moe').seeds.clear()
  assert ask_shard(parts.Shard(1, 2)) is None
  assert chats('moe').seeds == [2, 3]  # The second batch of three.
  assert not (tmp_path / 'out' / 'a.jsonl').exists()
  assert ask_shard(parts.Shard(0, 2)) == alone
  assert chats('moe').seeds == [2, 3, 0, 1, 4]
  files = [tmp_path / name / 'a.jsonl' for name in ('alone', 'out')]
  assert files[0].read_bytes() == files[1].read_bytes()


def test_every_question_has_one_process():
  for total in (1, 7, 64):
    for batch_size in (1, 3, 8):
      shares = [parts.Shard(i, 3).mine(total, batch_size) for i in range(3)]
      assert sorted(itertools.chain(*shares)) == list(range(total))


def test_a_killed_shard_goes_on_and_another_reads_its_torn_line(
    ask_shard, chats, tmp_path
):
  alone = ask_shard(folder='alone')
  chats('moe').seen.clear()
  chats('moe').dies_at = 2
  with pytest.raises(KeyboardInterrupt):
    ask_shard(parts.Shard(0, 2))
  chats('moe').dies_at = None
  part = tmp_path / 'out' / 'a.parts' / '0-of-2.jsonl'
  with part.open('ab') as file:
    file.write(b'{"question_id": 4, "pro')
  assert ask_shard(parts.Shard(1, 2)) is None  # Nor is anything merged.
  assert not (tmp_path / 'out' / 'a.jsonl').exists()
  chats('moe').seen.clear()
  assert ask_shard(parts.Shard(0, 2)) == alone
  assert len(chats('moe').seen) == 1


def test_one_process_completes_what_shards_have_left(
    ask_shard, chats, tmp_path
):
  ask_shard(folder='alone')
  ask_shard(parts.Shard(1, 2))
  chats('moe').seen.clear()
  ask_shard()
  assert len(chats('moe').seen) == 3
  files = [tmp_path / name / 'a.jsonl' for name in ('alone', 'out')]
  assert files[0].read_bytes() == files[1].read_bytes()


def test_parts_of_other_settings_are_not_merged(ask_shard):
  ask_shard(parts.Shard(1, 2))
  with pytest.raises(base.EvalError, match='1-of-2.jsonl, line 1: answered wi'):
    ask_shard(parts.Shard(0, 2), max_new_tokens=9)


def test_parts_that_contradict_each_other_are_an_error(ask_shard, tmp_path):
  ask_shard(parts.Shard(1, 2))
  part = tmp_path / 'out' / 'a.parts' / '1-of-2.jsonl'
  row = json.loads(part.read_text().splitlines()[0])
  row['text'] = 'other'
  (part.parent / '2-of-3.jsonl').write_text(json.dumps(row) + '\n')
  with pytest.raises(base.EvalError, match='question 2 is answered otherwise'):
    ask_shard(parts.Shard(0, 2))


def test_only_the_last_process_scores(chats, options, tmp_path, capsys):
  run_lib.evaluate(options(shard='0/2', batch_size=1))
  assert 'shard 0/2 is answered' in capsys.readouterr().out
  assert not (tmp_path / 'out' / 'scores.json').exists()
  run_lib.evaluate(options(shard='1/2', batch_size=1))
  sharded = json.loads((tmp_path / 'out' / 'scores.json').read_text())
  run_lib.evaluate(options(out=str(tmp_path / 'alone')))
  alone = json.loads((tmp_path / 'alone' / 'scores.json').read_text())
  assert sharded == alone
  assert len(chats(options().model[0]).seen) == 10


@pytest.mark.parametrize('flag', ['2/2', '1', 'a/b', '-1/2', '0/0'])
def test_a_shard_that_is_none_is_refused(chats, options, flag):
  with pytest.raises(base.EvalError, match='expected I/N for process I of N'):
    run_lib.evaluate(options(shard=flag))
  assert not chats.loaded
