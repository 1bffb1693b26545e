# SPDX-License-Identifier: Apache-2.0
"""A model that answers from a function, in place of `infer.chat`."""

import copy
from http import server
import json
import sys
import threading
import types
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
import pytest

from moellava_jax import config, infer
from moellava_jax.infer import tracing


class Request(NamedTuple):
  turns: tuple[tuple[str, str], ...]
  images: tuple[Any, ...]


class Answer(NamedTuple):
  text: str
  routing: Any


class FakeChat:
  """Answers each request with `reply(request)`; dies at `dies_at` of them."""

  def __init__(self, name, digest):
    self.name = name
    self.digest = digest
    self.params = {'llm': {'norm': np.zeros(5)}}
    vision = types.SimpleNamespace(image_size=336)
    cfg = types.SimpleNamespace(moe=None, vision=vision)
    self.model = types.SimpleNamespace(cfg=cfg)
    self.max_positions = None
    self.image_aspect = 'pad'
    self.unreadable = ()
    self.reply = lambda request: 'Yes'
    self.dies_at = None
    self.calls = []
    self.seen = []
    self.seeds = []
    self.aspects = []

  def _replace(self, **changes):
    changed = copy.copy(self)
    vars(changed).update(changes)
    return changed

  def positions(self, request):
    """One for each word of the question, ten for an image."""
    text = request.turns[-1][1]
    if (marks := text.count('<image>')) != len(request.images):
      raise config.UserError(f'{marks} <image> marks')
    return len(text.split()) + 9 * len(request.images)

  def encode(self, request):
    if any(image in self.unreadable for image in request.images):
      raise config.UserError('an image cannot be read')

  def answer(
      self, requests, options, *, max_new_tokens, batch_size, trace=False
  ):
    assert 0 < len(requests) == len(options) <= batch_size
    if self.dies_at is not None and len(self.seen) >= self.dies_at:
      raise KeyboardInterrupt
    for request in requests:
      self.encode(request)
      most = self.positions(request) + max_new_tokens
      assert self.max_positions is None or most <= self.max_positions
    self.aspects.extend(self.image_aspect for _ in requests)
    first = options[0]
    self.calls.append(
        (len(requests), max_new_tokens, first.temperature, first.seed)
    )
    self.seen.extend(requests)
    self.seeds.extend(one.seed for one in options)
    return [
        Answer(self.reply(r), self.routing(r) if trace else None)
        for r in requests
    ]

  def routing(self, request):
    """Three tokens, the second of an image, in one layer of four experts."""
    seed = len(request.turns[-1][1])
    choice_T = np.arange(seed, seed + 3) % 4
    return tracing.Routing(
        (0,),
        np.array([7, config.IMAGE_TOKEN, 8], np.int32),
        np.array([False, False, True]),
        np.stack([choice_T, (choice_T + 1) % 4], -1)[None].astype(np.int32),
        np.full((1, 3, 2), 0.5, np.float32),
        np.array([[[True, True], [True, False], [True, True]]]),
    )


@pytest.fixture
def chats(monkeypatch):
  """Makes `infer.chat.load(path)` return fakes; yields {path: fake}."""
  loaded = {}

  def load(path, cpu_devices=1, mesh=None):
    name = str(path).rstrip('/').rsplit('/', 1)[-1]
    return loaded.setdefault(str(path), FakeChat(name, f'digest-of-{name}'))

  module = types.ModuleType('moellava_jax.infer.chat')
  monkeypatch.setattr(module, 'Request', Request, raising=False)
  monkeypatch.setattr(module, 'load', load, raising=False)
  monkeypatch.setitem(sys.modules, 'moellava_jax.infer.chat', module)
  monkeypatch.setattr(infer, 'chat', module, raising=False)
  load.loaded = loaded
  return load


@pytest.fixture
def write_jsonl(tmp_path):
  """Writes rows to `tmp_path / name`; returns the path as a string."""

  def write(name, rows):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    path.write_text(''.join(lines), encoding='utf-8')
    return str(path)

  return write


@pytest.fixture
def images(tmp_path):
  """A root with a.png to e.png of distinct sizes."""
  root = tmp_path / 'images'
  root.mkdir()
  for i, name in enumerate('abcde'):
    Image.new('RGB', (10 + i, 20), (255, 0, 0)).save(root / f'{name}.png')
  return str(root)


@pytest.fixture
def questions():
  """Rows of a question file: five questions, each about its own image."""
  return [
      {
          'question_id': i,
          'image': f'{name}.png',
          'text': f'Is there a {name}?',
          'category': 'random',
          'label': 'yes' if i % 2 else 'no',
      }
      for i, name in enumerate('abcde')
  ]


class JudgeServer:
  """A chat completions endpoint on this machine.

  `reply(body, n)` gives the text of the n-th request, or (status, headers).
  """

  def __init__(self):
    self.reply = lambda body, n: 'ok'
    self.bodies = []
    self.keys = []
    self._lock = threading.Lock()
    outer = self

    class Handler(server.BaseHTTPRequestHandler):

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with outer._lock:
          number = len(outer.bodies)
          outer.bodies.append(body)
          outer.keys.append(self.headers.get('Authorization'))
        found = outer.reply(body, number)
        status, headers = found if isinstance(found, tuple) else (200, {})
        message = {'role': 'assistant', 'content': found}
        answer = {'model': 'exact-name', 'choices': [{'message': message}]}
        data = json.dumps(answer if status == 200 else {'error': 'busy'})
        assert self.path == '/v1/chat/completions'
        self.send_response(status)
        for name, value in headers.items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data.encode())

      def log_message(self, format, *args):
        del format, args

    self._server = server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1'
    self._thread = threading.Thread(target=self._server.serve_forever)
    self._thread.start()

  def close(self):
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


@pytest.fixture
def judge_server():
  """A `JudgeServer` for the time of a test."""
  found = JudgeServer()
  yield found
  found.close()
