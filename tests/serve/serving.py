# SPDX-License-Identifier: Apache-2.0
"""A server on loopback, and what is asked of it."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

import httpx
import jax
import numpy as np
import openai
from PIL import Image
import uvicorn

from moellava_jax import sharding
from moellava_jax.infer import engine as engine_lib
from moellava_jax.serve import api
from tests import tiny

NAME = 'tiny'
# Compiling is what takes time: four lengths, with an image and without.
OPTIONS = api.Options(
    model='',
    host='127.0.0.1',
    port=0,
    name=NAME,
    slots=4,
    context=40,
    queue=256,
    max_body_mb=20,
    max_pending_mb=1024,
    max_megapixels=20,
    max_images=2,
    warm_up_images=1,
    allow_remote_images=False,
    image_root=None,
    api_key_env=None,
    api_key_file=None,
    allowed_hosts=(),
    drain_seconds=20,
    cpu_devices=1,
    mesh=None,
)


class Running(NamedTuple):
  """A server that listens."""

  service: api.Service
  url: str
  server: uvicorn.Server

  def client(self, key: str = 'none', **options) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f'{self.url}/v1',
        api_key=key,
        max_retries=0,
        timeout=60,
        **options,
    )


class Response(NamedTuple):
  status: int
  body: Any  # JSON, or bytes.
  headers: Any


def call(
    url: str,
    path: str,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
  """GET, or POST of `data`, without any client's help."""
  connection = http.client.HTTPConnection(url.removeprefix('http://'))
  given = {'Content-Type': 'application/json'} if data is not None else {}
  with contextlib.closing(connection):
    method = 'GET' if data is None else 'POST'
    connection.request(method, path, data, {**given, **(headers or {})})
    response = connection.getresponse()
    body = response.read()
  if 'json' in response.headers.get('Content-Type', ''):
    body = json.loads(body)
  return Response(response.status, body, response.headers)


def complete(url: str, body: Any, **headers: str) -> Response:
  """POST of a chat completion."""
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  return call(url, '/v1/chat/completions', data, headers)


def until(condition, seconds: float = 30) -> None:
  """Waits for what other threads are about to do."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f'it did not happen in {seconds} s'
    time.sleep(0.002)


class Gated(engine_lib.Engine):
  """An engine that waits, once `gated` is set.

  With its first prompt for `entrance`, so that all others are in the queue when
  it goes on; and with every step for a permit of `steps`.
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.gated = False
    self.entrance = threading.Event()
    self.steps = threading.Semaphore(0)

  def prefill(self, prompt, options):
    if self.gated:
      assert self.entrance.wait(60)
    return super().prefill(prompt, options)

  def step(self) -> np.ndarray:
    if self.gated:
      assert self.steps.acquire(timeout=60)
    return super().step()

  def let_in(self, scheduler, count: int) -> None:
    """Waits for `count` requests and gives slots to as many as there are."""
    until(lambda: scheduler.waiting == count - 1)
    self.entrance.set()
    until(lambda: scheduler.running == min(count, self.slots))

  def open(self) -> None:
    self.gated = False
    self.entrance.set()
    self.steps.release(10_000)


@contextlib.contextmanager
def started(name: str, *flags: str, **env: str):
  """A command of this folder as a process."""
  process = subprocess.Popen(
      [sys.executable, '-m', f'moellava_jax.serve.{name}', *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'XLA_FLAGS': '', **env},
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def address(process: subprocess.Popen[str]) -> str:
  """Where `api` listens, once it is ready."""
  assert process.stdout is not None
  line = process.stdout.readline()
  assert line, process.communicate()[1]
  url = line.split()[1].removesuffix('/v1,')

  def healthy() -> bool:
    try:
      return call(url, '/health').status == 200
    except OSError:  # The address is said before anybody listens.
      return False

  until(healthy, 600)
  return url


@contextlib.contextmanager
def listening(service: api.Service):
  """Serves on a free port for the time of the context; yields its address."""
  sock = api.bind('127.0.0.1', 0)
  server = api.http_server(service, 20)
  thread = threading.Thread(target=server.run, kwargs={'sockets': [sock]})
  thread.start()
  try:
    until(lambda: server.started or not thread.is_alive())
    yield Running(service, f'http://127.0.0.1:{sock.getsockname()[1]}', server)
  finally:
    server.should_exit = True
    thread.join()


@contextlib.contextmanager
def running(service: api.Service):
  """`listening` with an engine that is warm."""
  service.scheduler.start()
  try:
    with listening(service) as found:
      until(lambda: service.scheduler.ready, 300)
      yield found
  finally:
    assert service.close(60)


def upload(http, name: str, data: bytes) -> httpx.Response:
  """Sends a file to the page."""
  return http.post('/gradio_api/upload', files={'files': (name, data)})


def press(http, name: str, session: str, inputs) -> list:
  """What the event of a function of `Page` puts out, step by step."""
  (event,) = (
      d
      for d in http.get('/config').json()['dependencies']
      if d['api_name'].startswith(name)
  )
  joined = http.post(
      '/gradio_api/queue/join',
      json={'data': inputs, 'fn_index': event['id'], 'session_hash': session},
  )
  assert joined.status_code == 200, joined.text
  found = []
  url = f'/gradio_api/queue/data?session_hash={session}'
  with http.stream('GET', url) as stream:
    for line in stream.iter_lines():
      step = json.loads(line.removeprefix('data: ')) if line else {}
      if step.get('msg') in ('process_generating', 'process_completed'):
        assert step['success'], step
        found.append(step['output'].get('data'))
      if step.get('msg') == 'close_stream':
        return found
  raise AssertionError('the stream ended early')


def one_device() -> jax.sharding.Mesh:
  """As a command has where nobody asks for more."""
  one = dataclasses.replace(
      tiny.train_config().mesh, data=1, fsdp=1, expert=1, tensor=1
  )
  return sharding.make_mesh(one, jax.devices()[:1])


def picture(seed: int, size: int = 40) -> Image.Image:
  """Coloured noise in big blocks; another one for every seed."""
  blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
  image = Image.fromarray(blocks)
  return image.resize((size, size), Image.Resampling.NEAREST)


def data_uri(image: Image.Image, kind: str = 'PNG') -> str:
  file = io.BytesIO()
  image.save(file, kind)
  encoded = base64.b64encode(file.getvalue()).decode()
  return f'data:image/{kind.lower()};base64,{encoded}'


def question(text: str, *urls: str) -> list[dict]:
  """`messages` with one question about images."""
  parts: list[dict] = [
      {'type': 'image_url', 'image_url': {'url': url}} for url in urls
  ]
  return [{'role': 'user', 'content': [*parts, {'type': 'text', 'text': text}]}]


def body(messages: Any = None, **changes: Any) -> dict[str, Any]:
  """A request that is answered, but for `changes`; None leaves a field out."""
  given = messages or question('what is it ?', data_uri(picture(0)))
  whole = {
      'model': NAME,
      'messages': given,
      'max_tokens': 4,
      'temperature': 0,
      **changes,
  }
  return {name: value for name, value in whole.items() if value is not None}
