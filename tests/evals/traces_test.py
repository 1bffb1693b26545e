# SPDX-License-Identifier: Apache-2.0
"""`--routing_trace`: every token's experts on disk, with every answer."""

import dataclasses
import statistics
import time
import types

from etils import epath
import jax
import numpy as np
from PIL import Image
import pytest

from moellava_jax import checkpoint, sharding
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.evals import ask, base, parts, run, traces
from moellava_jax.infer import chat as chat_lib
from tests import tiny
from tests.evals import main_test

options = main_test.options

SETTINGS = ask.Settings(
    max_new_tokens=4, temperature=0.0, batch_size=2, routing_trace=True
)
MOE = types.SimpleNamespace(num_experts=4, top_k=2)


@pytest.fixture
def ask_all(chats, questions, images, write_jsonl, tmp_path):
  asked = base.read_questions(write_jsonl('q.jsonl', questions))

  def run(model='moe', shard=None, settings=SETTINGS):
    chats(model).model.cfg.moe = MOE
    return ask.run(
        chats(model),
        asked,
        images,
        tmp_path / 'a.jsonl',
        'none',
        settings,
        model_id=model,
        shard=shard,
    )

  run.where = tmp_path / 'a.routing'
  return run


def _arrays(where):
  return [tuple(map(np.ndarray.tolist, t[2:])) for t in traces.read(where)]


def test_what_was_routed_is_read_again(ask_all, chats, questions):
  ask_all()
  found = list(traces.read(ask_all.where))
  assert [t.question for t in found] == [0, 1, 2, 3, 4]
  assert [t.question_id for t in found] == [0, 1, 2, 3, 4]
  for traced, request in zip(found, chats('moe').seen, strict=True):
    expected = chats('moe').routing(request)
    np.testing.assert_array_equal(traced.tokens_T, expected.tokens_T)
    np.testing.assert_array_equal(traced.choice_LTk, expected.choice_MTk)
    np.testing.assert_array_equal(traced.kept_LTk, expected.kept_MTk)
    assert traced.is_image_T.tolist() == [False, True, False]
    assert traced.is_answer_T.tolist() == [False, False, True]


def test_counts_are_sums_by_modality(ask_all, chats):
  ask_all()
  counts = traces.count(ask_all.where)
  assert counts.layers == (0,)
  assert counts.tokens_M.tolist() == [10, 5]
  expected = np.zeros((2, 4))
  for request in chats('moe').seen:
    routing = chats('moe').routing(request)
    for choice_k, is_image in zip(
        routing.choice_MTk[0], routing.is_image_T, strict=True
    ):
      expected[int(is_image), choice_k] += 1
  np.testing.assert_array_equal(counts.assigned_LME[0], expected)
  assert (counts.assigned_LME - counts.kept_LME).sum(-1).tolist() == [[0, 5]]


def test_a_killed_run_has_every_trace_once(ask_all, chats):
  ask_all()
  whole = _arrays(ask_all.where)
  for path in ask_all.where.iterdir():
    path.unlink()
  ask_all.where.with_suffix('.jsonl').unlink()
  chats('moe').seen.clear()
  chats('moe').dies_at = 4
  with pytest.raises(KeyboardInterrupt):
    ask_all()
  chats('moe').dies_at = None
  # Other batches: the last question again, with the one before it.
  answers = ask_all.where.with_suffix('.jsonl')
  lines = answers.read_bytes().splitlines(keepends=True)
  answers.write_bytes(b''.join(lines[:3]))
  ask_all()
  assert _arrays(ask_all.where) == whole


def test_shards_write_the_traces_of_one_process(ask_all):
  ask_all()
  whole = _arrays(ask_all.where)
  for path in ask_all.where.iterdir():
    path.unlink()
  ask_all.where.with_suffix('.jsonl').unlink()
  for index in (1, 0):
    ask_all(shard=parts.Shard(index, 2))
  assert _arrays(ask_all.where) == whole


def test_answers_without_traces_are_not_continued(ask_all):
  ask_all(settings=SETTINGS._replace(routing_trace=False))
  with pytest.raises(base.EvalError, match='missing: 5 .* without --routing'):
    ask_all()


def test_traces_of_another_model_are_not_continued(ask_all):
  ask_all()
  ask_all.where.with_suffix('.jsonl').unlink()
  with pytest.raises(base.EvalError, match="digest 'digest-of-moe'"):
    ask_all(model='other')


def test_a_torn_trace_is_named(ask_all):
  ask_all()
  torn = ask_all.where / '0000002.npz'
  torn.write_bytes(torn.read_bytes()[:100])
  with pytest.raises(base.EvalError, match='0000002.npz: cannot be read'):
    traces.count(ask_all.where)
  with pytest.raises(base.EvalError, match='no expert choices'):
    list(traces.read(ask_all.where.parent / 'gone'))


def test_a_dense_model_has_no_trace(chats, options):
  with pytest.raises(base.EvalError, match='is a dense model, which routes no'):
    run.evaluate(options(routing_trace=True))


def test_scoring_alone_refuses_flags_of_generation(options):
  for flags in ({'routing_trace': True}, {'shard': '0/2'}, {'mesh': 'fsdp=2'}):
    with pytest.raises(base.EvalError, match='goes with --model'):
      run.evaluate(options(model=[], answers=['a.jsonl'], **flags))


@pytest.mark.slow
@pytest.mark.large
def test_a_trace_takes_little_time(tmp_path, capsys):
  """At most 1.2 x the time without it + 5 ms a batch, medians of turns.

  The model of Shapes, not trained, so that no answer ends early.
  """
  words = 'how many circles are left of the red square ?'
  tokenizer = tokenizer_lib.train([f'USER: {words} ASSISTANT:'] * 4, 300)
  cfg = tiny.train_config(model__llm__vocab_size=tokenizer.vocab_size)
  params = tiny.params_of(cfg.stage_model('moe'))
  head = params['llm']['head']['kernel']
  params['llm']['head']['kernel'] = head.at[:, tokenizer.eos_id].set(0)
  model = tmp_path / 'moe'
  checkpoint.write_final(
      epath.Path(model), params, cfg, 'moe', {}, tokenizer.save
  )
  one = dataclasses.replace(cfg.mesh, data=1, fsdp=1, expert=1, tensor=1)
  mesh = sharding.make_mesh(one, jax.devices()[:1])
  chat = chat_lib.load(str(model), mesh=mesh)
  colours = np.random.default_rng(0).integers(0, 256, (256, 3))
  questions = []
  for n, colour in enumerate(colours.tolist()):
    Image.new('RGB', (42, 42), tuple(colour)).save(tmp_path / f'{n}.png')
    questions.append(base.Question(n, f'{n}.png', words, 'c', None, {}))
  batches, turns = 4, 9
  seconds, files = {False: [], True: []}, set()
  for turn in range(turns + 1):
    for trace in (False, True) if turn % 2 else (True, False):
      answers = tmp_path / f'{turn}_{trace}.jsonl'
      settings = ask.Settings(16, 0.0, len(questions) // batches, trace)
      begin = time.perf_counter()
      ask.ask(
          chat,
          questions,
          str(tmp_path),
          answers,
          'none',
          settings,
          model_id='moe',
      )
      seconds[trace].append(time.perf_counter() - begin)
      files.add(answers.read_bytes())
  assert len(files) == 1
  # The first turn compiles.
  without, traced = (
      statistics.median(seconds[trace][1:]) for trace in (False, True)
  )
  with capsys.disabled():
    print(
        f'\n{len(questions)} questions: {without:.3f} s, with their expert'
        f' choices {traced:.3f} s, {traced / without - 1:+.1%}'
    )
  assert traced <= 1.2 * without + 0.005 * batches
