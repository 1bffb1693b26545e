# SPDX-License-Identifier: Apache-2.0
"""Slots: requests that come and go do not change each other's tokens."""

import numpy as np
from PIL import Image
import pytest

from moellava_jax import config
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import engine as engine_lib
from moellava_jax.infer import generate, requests, sampling

NEW = 8
COLOURS = ('red', 'green', 'blue', 'white', 'black')
OPTIONS = (
    sampling.Options(),
    sampling.Options(temperature=1.5, seed=4),
    sampling.Options(temperature=1.0, top_k=20, seed=1),
    sampling.Options(temperature=1.0, top_p=0.8, seed=2),
    sampling.Options(),
)


@pytest.fixture(scope='module')
def engine(chat):
  """A slot on each of the 8 devices."""
  return engine_lib.Engine(chat, slots=8, context=64)


@pytest.fixture
def split(checkpoint_dir):
  """A slot on each of 4 pairs of devices, that also split the parameters."""
  chat = chat_lib.load(checkpoint_dir, mesh='fsdp=2,expert=2,tensor=2')
  return engine_lib.Engine(chat, slots=4, context=64)


@pytest.fixture(scope='module')
def prompts(chat):
  """Of one bucket; each about its own image."""
  return [
      chat.encode(
          requests.conversation(
              Image.new('RGB', (9, 7), colour),
              'Which colour is it?'[n:],
              (),
          )
      )
      for n, colour in enumerate(COLOURS)
  ]


@pytest.fixture(scope='module')
def alone(chat, prompts):
  """The tokens of each prompt, generated offline by itself."""
  found = []
  for prompt, options in zip(prompts, OPTIONS, strict=True):
    batch = generate.Batch(
        chat.model,
        chat.params,
        [prompt],
        [options],
        max_new_tokens=NEW,
        ends=(),
        rows=1,
        mesh=chat.mesh,
    )
    batch.advance(NEW, np.zeros(1, bool))
    found.append(batch.tokens()[0].tolist())
  return found


@pytest.mark.parametrize('placed', ['engine', 'split'])
def test_slots_that_come_and_go_equal_each_one_alone(
    placed, prompts, alone, request
):
  engine = request.getfixturevalue(placed)
  rows = engine._state.token_B.addressable_shards
  assert {shard.data.size for shard in rows} == {1}
  assert len({tuple(tokens) for tokens in alone}) == len(alone)
  tokens: dict[int, list[int]] = {}
  slot_of: dict[int, int] = {}
  waiting = list(range(len(prompts)))
  steps = 0
  while waiting or slot_of:
    # One comes every second step, into the lowest slot that is free.
    if waiting and steps % 2 == 0 and len(slot_of) < engine.slots:
      n = waiting.pop(0)
      prefix = engine.prefill(prompts[n], OPTIONS[n])
      slot = min(set(range(engine.slots)) - set(slot_of.values()))
      engine.insert(prefix, slot)
      tokens[n], slot_of[n] = [prefix.token], slot
    found = engine.step()
    assert found.shape == (engine.slots,) and found.dtype == np.int32
    steps += 1
    for n, slot in list(slot_of.items()):
      tokens[n].append(int(found[slot]))
      if len(tokens[n]) == NEW:
        engine.free(slot)
        del slot_of[n]
  assert [tokens[n] for n in range(len(prompts))] == alone


def test_nothing_is_compiled_again(engine, prompts):
  engine.warm_up([len(prompts[0].tokens_L)], images=(1,))
  before = [
      program._cache_size()
      for program in (engine_lib._prefill, engine_lib._insert, engine_lib._step)
  ]
  for n, (prompt, options) in enumerate(zip(prompts, OPTIONS, strict=True)):
    engine.insert(engine.prefill(prompt, options), n % engine.slots)
    engine.step()
  for slot in range(engine.slots):
    engine.free(slot)
  after = [
      program._cache_size()
      for program in (engine_lib._prefill, engine_lib._insert, engine_lib._step)
  ]
  assert after == before


def test_a_slot_has_the_room_it_says(engine, prompts):
  prefix = engine.prefill(prompts[0], OPTIONS[0])
  assert prefix.room == engine.context - len(prompts[0].tokens_L)
  engine.insert(prefix, 2)
  for _ in range(prefix.room):
    engine.step()
  with pytest.raises(ValueError, match=r'Slots \[2\] have used all 64'):
    engine.step()
  engine.free(2)
  engine.step()


def test_a_prompt_that_fills_a_slot_is_refused(engine, prompts):
  long = prompts[0]._replace(tokens_L=np.ones(64, np.int32))
  with pytest.raises(config.UserError, match='64 positions .* larger context'):
    engine.prefill(long, OPTIONS[0])
  with pytest.raises(config.UserError, match='top_p=0'):
    engine.prefill(prompts[0], sampling.Options(top_p=0))


def test_a_context_that_the_model_was_not_made_for_is_refused(chat):
  short = chat._replace(max_positions=32)
  with pytest.raises(config.UserError, match='takes 64 .* was made for 32'):
    engine_lib.Engine(short, slots=1, context=64)
