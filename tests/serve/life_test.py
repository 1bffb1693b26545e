# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, too many of them, failures, and the end of a server."""

import collections
from concurrent import futures
import dataclasses
import json
import os
import socket
import threading
import types

import openai
import pytest

from moellava_jax.serve import api, media
from tests.serve import serving


@pytest.fixture
def gated(chat, monkeypatch):
  """A server with 4 slots and 2 places to wait that steps when told to."""
  monkeypatch.setattr(api.engine_lib, 'Engine', serving.Gated)
  options = dataclasses.replace(serving.OPTIONS, queue=2)
  service = api.Service(options, chat)
  engine = service.scheduler._engine
  with serving.running(service) as found:
    engine.gated = True
    yield found, engine
    engine.open()


def _send(server, **changes) -> socket.socket:
  """Sends a request and leaves the answer unread."""
  data = json.dumps(serving.body(max_tokens=15, **changes)).encode()
  host, port = server.url.removeprefix('http://').split(':')
  sock = socket.create_connection((host, int(port)))
  sock.sendall(
      b'POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n'
      b'Content-Type: application/json\r\n'
      b'Content-Length: %d\r\n\r\n%s' % (len(data), data)
  )
  return sock


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_frees_its_slot(gated, stream):
  server, engine = gated
  scheduler = server.service.scheduler
  sent = [_send(server, stream=stream) for _ in range(4)]
  serving.until(lambda: scheduler.waiting == 3)
  queued = [_send(server, stream=stream)]
  serving.until(lambda: scheduler.waiting == 4)
  queued.append(_send(server))
  engine.let_in(scheduler, 6)
  leaving, *staying = sent
  # One that waits frees its place at once, without a step.
  queued[0].close()
  serving.until(lambda: scheduler.waiting == 1)
  leaving.close()
  gate = server.service.api._gate
  serving.until(lambda: gate.inside == 4)
  # Its slot goes to the one that waits, long before its answer would have
  # ended: 15 tokens are 14 steps.
  engine.steps.release(2)
  serving.until(lambda: not scheduler.waiting and scheduler.running == 4)
  engine.open()
  for sock in (*staying, queued[1]):
    assert b' 200 OK' in sock.recv(1000)
    sock.close()
  serving.until(lambda: gate.inside == 0 and scheduler.running == 0)


def test_one_that_leaves_before_its_body_is_sent_takes_nothing(gated):
  server, _ = gated
  host, port = server.url.removeprefix('http://').split(':')
  gate = server.service.api._gate
  sock = socket.create_connection((host, int(port)))
  sock.sendall(
      b'POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n'
      b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{'
  )
  serving.until(lambda: gate._bytes == 1)
  sock.close()
  serving.until(lambda: gate.inside == 0)
  assert gate._bytes == 0


def test_overload_is_told_and_passes(gated):
  server, engine = gated
  scheduler = server.service.scheduler
  waiting = [_send(server) for _ in range(6)]
  engine.let_in(scheduler, 6)
  with (
      server.client() as client,
      pytest.raises(openai.RateLimitError) as caught,
  ):
    client.chat.completions.create(**serving.body())
  assert int(caught.value.response.headers['Retry-After']) >= 1
  assert caught.value.code == 'rate_limit_exceeded'
  # Before its body was read.
  assert 'waiting or being answered' in str(caught.value)
  # The rest still answers.
  assert serving.call(server.url, '/health').status == 200
  engine.open()
  for sock in waiting:
    assert b' 200 OK' in sock.recv(1000)
    sock.close()
  serving.until(lambda: server.service.api._gate.inside == 0)
  assert serving.complete(server.url, serving.body()).status == 200


def test_bodies_that_take_all_memory_are_sent_away(chat):
  options = dataclasses.replace(serving.OPTIONS, max_pending_mb=1)
  service = api.Service(options, chat)
  with serving.running(service) as server:
    large = serving.body(metadata={'a': 'x' * (1 << 20)})
    found = serving.complete(server.url, large)
    assert found.status == 503 and found.headers['Retry-After']
    assert found.body['error']['code'] == 'overloaded'
    for _ in range(8):  # What was taken is given back.
      small = serving.body(metadata={'a': 'x' * (1 << 19)})
      assert serving.complete(server.url, small).status == 200
    assert service.api._gate._bytes == 0


def test_those_whose_images_are_fetched_keep_nobody_waiting(chat, monkeypatch):
  arrived, over = threading.Semaphore(0), threading.Event()
  uses = collections.Counter()

  def fetcher(seconds):
    one = object()  # Its time is that of a request.

    def fetch(url, limit, param):
      uses[one] += 1
      arrived.release()
      assert over.wait(30)
      return media._data_uri(serving.data_uri(serving.picture(0)), param)

    return fetch

  monkeypatch.setattr(api.remote, 'fetcher', fetcher)
  options = dataclasses.replace(serving.OPTIONS, allow_remote_images=True)
  service = api.Service(options, chat)
  count = 8 + 2 * max(os.cpu_count() or 1, 2)
  remote = serving.question('?', *['http://slow.example/a.png'] * 2)
  with serving.running(service) as server:
    try:
      sent = [_send(server, messages=remote) for _ in range(count)]
      for _ in range(8):
        assert arrived.acquire(timeout=60)
      text = [{'role': 'user', 'content': 'left ?'}]
      for body in (serving.body(text), serving.body()):
        assert serving.complete(server.url, body).status == 200
      # One that leaves is forgotten.
      sent.pop().close()
      gate = service.api._gate
      serving.until(lambda: gate.inside == count - 1)
    finally:
      over.set()
    for sock in sent:
      assert b' 200 OK' in sock.recv(1000)
      sock.close()
    serving.until(lambda: gate.inside == 0)
    assert gate._bytes == 0
  # One for both images of a request.
  assert len(uses) >= count - 1 and max(uses.values()) == 2


def test_a_body_is_not_kept_for_the_answer(gated, monkeypatch):
  server, engine = gated
  freed = threading.Event()

  class Body(bytes):

    def __del__(self):
      freed.set()

  async def read_body(*args):
    return Body(await read(*args))

  read = api.app_lib.admission.read_body
  monkeypatch.setattr(api.app_lib.admission, 'read_body', read_body)
  with _send(server) as sock:
    engine.let_in(server.service.scheduler, 1)
    assert freed.wait(30)
    engine.open()
    assert b' 200 OK' in sock.recv(1000)


def test_until_all_is_compiled_a_server_is_not_ready(chat, monkeypatch):
  begin = threading.Event()

  def slowly(*args):
    return [begin.wait, *warm_up(*args)]

  warm_up = api.warm_up
  monkeypatch.setattr(api, 'warm_up', slowly)
  service = api.Service(serving.OPTIONS, chat)
  service.scheduler.start()
  with serving.listening(service) as server:
    assert serving.call(server.url, '/health').status == 503
    found = serving.complete(server.url, serving.body())
    assert found.status == 503 and found.headers['Retry-After']
    begin.set()
    serving.until(lambda: serving.call(server.url, '/health').status == 200)
    assert serving.complete(server.url, serving.body()).status == 200
  assert service.close(60)


def test_usual_lengths_are_compiled_with_their_images_first():
  compiled = []
  engine = types.SimpleNamespace(
      context=4096,
      warm_up=lambda lengths, images: compiled.append((lengths, images)),
  )
  for step in api.warm_up(engine, images=1, image_tokens=576):
    step()
  usual = [16, 24, 32, 48, 64, 96, 128, 192, 256]
  assert [n for (n,), images in compiled if 0 in images] == usual
  assert [n for (n,), images in compiled if 1 in images] == [768, 1024]


def _stream(client):
  given = serving.body(max_tokens=15, stream=True)
  return client.chat.completions.create(**given)


def test_closing_finishes_what_has_begun(gated):
  server, engine = gated
  with server.client() as client, futures.ThreadPoolExecutor(2) as pool:
    stream = pool.submit(_stream, client)
    whole = pool.submit(
        client.chat.completions.create, **serving.body(max_tokens=15)
    )
    engine.let_in(server.service.scheduler, 2)
    server.server.should_exit = True
    engine.open()
    pieces = list(stream.result())
  text = ''.join(p.choices[0].delta.content or '' for p in pieces)
  assert text == whole.result().choices[0].message.content
  assert pieces[-1].choices[0].finish_reason == 'length'


def test_when_the_engine_fails_all_hear_of_it(gated, monkeypatch):
  server, engine = gated
  scheduler = server.service.scheduler
  failed = threading.Event()
  scheduler._on_failure = failed.set

  def fail(*_):
    raise RuntimeError('out of memory')

  monkeypatch.setattr(serving.Gated.__base__, 'step', fail)
  client = server.client()
  with client, futures.ThreadPoolExecutor(6) as pool:
    stream = pool.submit(_stream, client)
    serving.until(lambda: scheduler._entering)
    others = [
        pool.submit(serving.complete, server.url, serving.body(max_tokens=15))
        for _ in range(5)
    ]
    engine.let_in(scheduler, 6)
    begun = stream.result()
    engine.steps.release()
    for other in others:
      found = other.result()
      assert found.status == 500
      assert 'out of memory' not in found.body['error']['message']
    with pytest.raises(openai.APIError, match='failed'):
      list(begun)
  assert failed.wait(60)
  assert serving.call(server.url, '/health').body == {'status': 'failed'}
  assert serving.complete(server.url, serving.body()).status == 503


def test_a_prompt_that_cannot_be_read_ends_alone(gated, monkeypatch):
  server, engine = gated
  engine.open()
  prefill = engine.prefill

  def fail(prompt, options):
    if not len(prompt.images_IHWC):
      raise RuntimeError('bad prompt')
    return prefill(prompt, options)

  monkeypatch.setattr(engine, 'prefill', fail)
  text = [{'role': 'user', 'content': 'left ?'}]
  assert serving.complete(server.url, serving.body(text)).status == 500
  assert serving.complete(server.url, serving.body()).status == 200
