# SPDX-License-Identifier: Apache-2.0
"""A tiny sparse model: on disk, loaded, and behind a server on loopback."""

import dataclasses

from etils import epath
import jax
import pytest

from moellava_jax import checkpoint
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import engine as engine_lib
from moellava_jax.infer import sampling, streaming
from moellava_jax.serve import api
from tests import tiny
from tests.serve import serving


@pytest.fixture(scope='session')
def model_dir(tmp_path_factory):
  """A `final/` whose answers depend on the image, and seldom end."""
  path = tmp_path_factory.mktemp('model') / serving.NAME
  words = 'what is in the picture ? red green blue circle square left right'
  tokenizer = tokenizer_lib.train([f'USER: {words} ASSISTANT:'] * 4, 300)
  model = tiny.model_config(tiny.moe_config(), vocab_size=tokenizer.vocab_size)
  params = tiny.params_of(model)
  head = params['llm']['head']['kernel']
  params['llm']['head']['kernel'] = head.at[:, tokenizer.eos_id].set(0)
  params['projector'] = jax.tree.map(lambda x: 3 * x, params['projector'])
  cfg = dataclasses.replace(tiny.train_config(), model=model)
  checkpoint.write_final(
      epath.Path(path), params, cfg, 'moe', {}, tokenizer.save
  )
  return str(path)


@pytest.fixture(scope='session')
def chat(model_dir):
  return chat_lib.load(model_dir, mesh=serving.one_device())


@pytest.fixture(scope='session')
def alone(chat):
  """What is answered to a request when there is no other; greedy.

  On an engine of its own, with the programs that the server has compiled.
  """
  engine = engine_lib.Engine(
      chat, slots=serving.OPTIONS.slots, context=serving.OPTIONS.context
  )

  def answer(request, max_new_tokens, template=chat.template):
    prompt = chat._replace(template=template).encode(request)
    prefix = engine.prefill(prompt, sampling.Options())
    engine.insert(prefix, 0)
    stream = streaming.TextStream(
        chat.tokenizer,
        stop=chat.stop,
        max_new_tokens=min(max_new_tokens, prefix.room),
    )
    text = stream.push(prefix.token)
    while stream.finish_reason is None:
      text += stream.push(int(engine.step()[0]))
    engine.free(0)
    return text

  return answer


@pytest.fixture(scope='session')
def server(chat):
  """One server for all tests that change nothing about it."""
  with serving.running(api.Service(serving.OPTIONS, chat)) as found:
    yield found


@pytest.fixture(scope='session')
def client(server):
  with server.client() as found:
    yield found
