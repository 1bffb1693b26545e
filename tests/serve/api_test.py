# SPDX-License-Identifier: Apache-2.0
"""The server, asked by the official client."""

from concurrent import futures
import dataclasses
import json

import openai
import pytest

from moellava_jax.data import templates
from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import prepare
from tests.serve import serving

TEXT = 'left ?'


def _ask(client, messages, **options):
  given = {'max_tokens': 12, 'temperature': 0, **options}
  return client.chat.completions.create(
      model=serving.NAME, messages=messages, **given
  )


def _text(completion) -> str:
  return completion.choices[0].message.content


def test_the_answer_is_what_python_answers(client, chat):
  image = serving.picture(0)
  messages = serving.question(TEXT, serving.data_uri(image))
  found = _ask(client, messages)
  assert _text(found) == chat.chat(image, TEXT, max_new_tokens=12)
  assert found.choices[0].finish_reason == 'length'
  prompt = chat.encode(
      chat_lib.Request((('human', f'<image>\n{TEXT}'),), (image,))
  )
  assert found.usage.prompt_tokens == len(prompt.tokens_L)
  assert found.usage.completion_tokens == 12
  assert found.usage.total_tokens == 12 + len(prompt.tokens_L)
  assert (found.model, found.object) == (serving.NAME, 'chat.completion')


@pytest.mark.parametrize('temperature', [0, 0.9])
def test_a_stream_equals_the_whole_answer(client, temperature):
  messages = serving.question(TEXT, serving.data_uri(serving.picture(1)))
  options = {'temperature': temperature, 'seed': 5}
  whole = _ask(client, messages, **options)
  usage = {'include_usage': True}
  chunks = list(
      _ask(client, messages, stream=True, stream_options=usage, **options)
  )
  *pieces, last, total = chunks
  deltas = [chunk.choices[0].delta for chunk in pieces]
  assert deltas[0].role == 'assistant' and deltas[0].content == ''
  assert len(deltas) > 4
  assert ''.join(delta.content for delta in deltas) == _text(whole)
  assert last.choices[0].finish_reason == 'length'
  assert last.choices[0].delta.content is None
  assert total.choices == [] and total.usage == whole.usage
  assert {chunk.usage for chunk in chunks[:-1]} == {None}
  assert len({chunk.id for chunk in chunks}) == 1
  (bare,) = {
      chunk.usage for chunk in _ask(client, messages, stream=True, **options)
  }
  assert bare is None


def test_turns_and_images_arrive_in_their_places(client, alone):
  first, second = serving.picture(2), serving.picture(3)
  url = {'url': serving.data_uri(second)}
  messages = [
      *serving.question(TEXT, serving.data_uri(first)),
      {'role': 'assistant', 'content': [{'type': 'text', 'text': 'red'}]},
      {
          'role': 'user',
          'content': [
              {'type': 'text', 'text': 'in ?'},
              {'type': 'image_url', 'image_url': url},
          ],
      },
  ]
  turns = (
      ('human', f'<image>\n{TEXT}'),
      ('gpt', 'red'),
      ('human', '<image>\nin ?'),
  )
  expected = alone(chat_lib.Request(turns, (first, second)), 6)
  assert _text(_ask(client, messages, max_tokens=6)) == expected
  swapped = alone(chat_lib.Request(turns, (second, first)), 6)
  assert swapped != expected, 'the order of images is not seen'


def test_text_alone_and_a_system_prompt(client, chat, alone):
  system = 'in the picture'
  messages = [
      {'role': 'system', 'content': system},
      {'role': 'user', 'content': TEXT},
  ]
  template = dataclasses.replace(chat.template, system=system)
  request = chat_lib.Request((('human', TEXT),), ())
  expected = alone(request, 12, template=template)
  assert _text(_ask(client, messages)) == expected
  assert _text(_ask(client, messages[1:])) == alone(request, 12) != expected


def test_mpt_keeps_the_marks_of_its_system_prompt():
  found = prepare.with_system(templates.get('mpt'), 'Be brief.')
  assert found.system == '<|im_start|>system\nBe brief.'


def test_a_stop_string_ends_the_answer(client):
  messages = serving.question(TEXT, serving.data_uri(serving.picture(1)))
  whole = _text(_ask(client, messages))
  stop = next(c for c in whole[3:] if c.isprintable() and c != '\ufffd')
  for stops in (stop, ['never said', stop]):
    found = _ask(client, messages, stop=stops)
    assert _text(found) == whole[: whole.index(stop)].rstrip()
    assert found.choices[0].finish_reason == 'stop'
    assert found.usage.completion_tokens < 12


def test_the_seed_decides_what_is_sampled(client):
  messages = serving.question(TEXT, serving.data_uri(serving.picture(0)))

  def draw(**options):
    return _text(_ask(client, messages, temperature=1.0, **options))

  assert draw(seed=7) == draw(seed=7)
  assert draw(seed=7) != draw(seed=-1)
  assert len({draw(seed=None) for _ in range(4)}) > 1
  greedy = _text(_ask(client, messages))
  assert draw(top_p=0) == greedy
  assert draw(extra_body={'top_k': 1}) == greedy


def test_the_length_of_an_answer_is_bounded(client):
  messages = serving.question(TEXT)
  assert _ask(client, messages, max_tokens=3).usage.completion_tokens == 3
  found = _ask(client, messages, max_tokens=None, max_completion_tokens=2)
  assert found.usage.completion_tokens == 2
  # Without a bound, and beyond what fits: as far as the context goes.
  for most in (None, 100_000):
    found = _ask(client, messages, max_tokens=most)
    assert found.usage.total_tokens == serving.OPTIONS.context
    assert found.choices[0].finish_reason == 'length'


def test_every_answer_belongs_to_its_own_image(client, alone):
  pictures = [serving.picture(seed) for seed in range(24)]
  turns = (('human', f'<image>\n{TEXT}'),)
  expected = [
      alone(chat_lib.Request(turns, (image,)), 12) for image in pictures
  ]
  assert len(set(expected)) > 12, 'the model does not look at its images'

  def ask(image):
    messages = serving.question(TEXT, serving.data_uri(image))
    return _text(_ask(client, messages))

  with futures.ThreadPoolExecutor(24) as pool:
    assert list(pool.map(ask, pictures)) == expected


def test_models_are_listed(client):
  (model,) = client.models.list().data
  assert model.id == serving.NAME
  assert client.models.retrieve(serving.NAME).id == serving.NAME
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('org/another')


def test_an_unknown_model_is_not_found(client):
  with pytest.raises(openai.NotFoundError) as caught:
    client.chat.completions.create(
        model='gpt-4o', messages=serving.question('?')
    )
  assert caught.value.code == 'model_not_found'
  assert caught.value.param == 'model'


def test_health_and_metrics(server):
  assert serving.call(server.url, '/health').status == 200

  def numbers():
    text = serving.call(server.url, '/metrics').body.decode()
    lines = [line for line in text.splitlines() if line[0] != '#']
    return {k: float(v) for k, v in (line.rsplit(' ', 1) for line in lines)}

  before = numbers()
  answered = serving.complete(server.url, serving.body(max_tokens=5))
  after = numbers()
  path = 'path="/v1/chat/completions"'
  for name, more in (
      ('moellava_generated_tokens_total', 5),
      (
          'moellava_prompt_tokens_total',
          answered.body['usage']['prompt_tokens'],
      ),
      ('moellava_time_to_first_token_seconds_count', 1),
      (f'moellava_http_responses_total{{{path},status="200"}}', 1),
  ):
    assert after[name] - before.get(name, 0) == more, name
  assert after['moellava_requests_running'] == 0


def test_events_are_those_of_server_sent_events(server):
  found = serving.complete(server.url, serving.body(stream=True))
  assert found.headers['Content-Type'].startswith('text/event-stream')
  *events, done, end = found.body.split(b'\n\n')
  assert (done, end) == (b'data: [DONE]', b'')
  for event in events:
    assert 'usage' not in json.loads(event.removeprefix(b'data: '))
