# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval and VLMEvalKit send is answered, and as they read it."""

import base64
import contextlib
import http.server
import io
import json
import os
import pathlib
import subprocess
import sys
import threading

from PIL import Image
import pytest

from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import schema
from moellava_jax.serve.errors import ApiError
from tests.serve import serving

ROOT = pathlib.Path(__file__).parents[2]
GOLDENS = ROOT / 'tests' / 'goldens' / 'harness'
CLIENTS = ('lmms_openai', 'vlmevalkit_base_url', 'vlmevalkit_gpt4v')
# Of these depends what is answered; the others tell versions.
HEADERS = ('accept', 'authorization', 'content-type')
TEXT = 'left ?'
HARNESSES = os.environ.get('MOELLAVA_HARNESSES')


def _golden(client):
  """{'headers', 'body'} of a request as its client wrote it."""
  return json.loads((GOLDENS / f'{client}.json').read_text('utf-8'))


def _expected(alone, image):
  turns = (('human', f'<image>\n{TEXT}'),)
  return alone(chat_lib.Request(turns, (image,)), 6)


def _image_of(body):
  """The one image of a body, decoded."""
  (part,) = [
      part
      for message in body['messages']
      for part in message['content']
      if part['type'] == 'image_url'
  ]
  data = base64.b64decode(part['image_url']['url'].partition(',')[2])
  return Image.open(io.BytesIO(data)).convert('RGB')


@pytest.mark.parametrize('client', CLIENTS)
def test_a_recorded_request_is_answered(server, alone, client):
  golden = _golden(client)
  expected = _expected(alone, _image_of(golden['body']))
  found = serving.complete(server.url, golden['body'], **golden['headers'])
  assert found.status == 200, found.body
  assert found.headers['Content-Type'] == 'application/json'
  (choice,) = found.body['choices']
  assert choice['message']['content'] == expected != ''
  assert choice['finish_reason'] == 'length'
  usage = found.body['usage']
  assert usage['completion_tokens'] == 6 and usage['prompt_tokens'] > 0


def test_a_penalty_that_is_one_is_none():
  given = {'model': 'm', 'messages': serving.question('?')}
  parsed = schema.parse(json.dumps(given).encode())
  off = {**given, 'repetition_penalty': 1.0}
  assert schema.parse(json.dumps(off).encode()) == parsed
  for value in (1.1, True, 0):
    with pytest.raises(ApiError) as caught:
      schema.parse(json.dumps({**given, 'repetition_penalty': value}).encode())
    assert caught.value.param == 'repetition_penalty'


@contextlib.contextmanager
def _recording(url, requests):
  """Hands requests on to `url` and keeps them; yields its own address."""

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_POST(self):
      data = self.rfile.read(int(self.headers['Content-Length']))
      headers = {k.lower(): v for k, v in self.headers.items()}
      requests.append({'headers': headers, 'body': json.loads(data)})
      kept = {name: headers[name] for name in HEADERS}
      found = serving.call(url, self.path, data, kept)
      body = json.dumps(found.body).encode()
      self.send_response(found.status)
      self.send_header('Content-Type', found.headers['Content-Type'])
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as recorder:
    thread = threading.Thread(target=recorder.serve_forever)
    thread.start()
    try:
      yield f'http://127.0.0.1:{recorder.server_port}'
    finally:
      recorder.shutdown()
      thread.join()


def _without_bytes(body):
  """`body` with images as their kind: encoders may change their bytes."""
  copied = json.loads(json.dumps(body))
  for message in copied['messages']:
    for part in message['content']:
      if part['type'] == 'image_url':
        url = part['image_url']
        url['url'] = url['url'].partition(',')[0]
  return copied


@pytest.mark.slow
@pytest.mark.skipif(
    HARNESSES is None,
    reason='MOELLAVA_HARNESSES names no folder of harnesses. With torch in this'
    ' environment: pip install --no-deps --target DIR -r .ci/harnesses.txt',
)
@pytest.mark.parametrize('client', CLIENTS)
def test_the_client_of_a_harness_gets_its_answers(
    server, alone, client, tmp_path
):
  pictures = [serving.picture(seed, 100) for seed in range(2)]
  paths = [str(tmp_path / f'{i}.png') for i in range(len(pictures))]
  for picture, path in zip(pictures, paths, strict=True):
    picture.save(path)
  requests = []
  with _recording(server.url, requests) as url:
    done = subprocess.run(
        [
            sys.executable,
            str(pathlib.Path(__file__).with_name('harness_client.py')),
            client,
            url,
            TEXT,
            *paths,
        ],
        cwd=tmp_path,  # Some write where they are.
        env={
            **os.environ,
            'PYTHONPATH': str(HARNESSES),
            'HOME': str(tmp_path),
            'HF_HUB_OFFLINE': '1',
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
  assert done.returncode == 0, done.stderr
  answers = json.loads(done.stdout.splitlines()[-1])
  assert len(requests) == len(pictures), 'it asked again'
  golden = _golden(client)
  expected = {}
  for request in requests:
    for name in HEADERS:
      sent = {k.lower(): v for k, v in golden['headers'].items()}
      assert request['headers'][name] == sent[name]
    assert _without_bytes(request['body']) == _without_bytes(golden['body'])
    # Those of VLMEvalKit are JPEGs, so near the picture and not equal to it.
    sent = _image_of(request['body'])
    which = min(range(2), key=lambda i: _distance(sent, pictures[i]))
    expected[which] = _expected(alone, sent)
  assert expected[0] != expected[1], 'the model does not look at its images'
  assert [answer.strip() for answer in answers] == [
      expected[i].strip() for i in range(len(pictures))
  ]


def _distance(one, other):
  a, b = one.resize((8, 8)).tobytes(), other.resize((8, 8)).tobytes()
  return sum(abs(x - y) for x, y in zip(a, b, strict=True))
