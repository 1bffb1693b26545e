# SPDX-License-Identifier: Apache-2.0
"""What the server does not take, and what it says then."""

import base64
import io
import json
import os
import random

from PIL import Image
import pytest

from moellava_jax import config
from moellava_jax.data import images, templates
from moellava_jax.serve import admission, api, media, messages, schema
from moellava_jax.serve.errors import ApiError
from tests.serve import serving


def _refusal(url, body, **headers):
  """(status, message, param, code) of a refused request."""
  found = serving.complete(url, body, **headers)
  error = found.body['error']
  assert error.keys() == {'message', 'type', 'param', 'code'}, found
  assert isinstance(error['type'], str) and error['message']
  return found.status, error['message'], error['param'], error['code']


def _user(content):
  return [{'role': 'user', 'content': content}]


def _image(url):
  return serving.question('?', url)


@pytest.mark.parametrize(
    'changes, param',
    [
        ({'messages': []}, 'messages'),
        ({'messages': 'hello'}, 'messages'),
        ({'messages': [7]}, 'messages.0'),
        ({'messages': _user(None)}, 'messages.0.content'),
        ({'messages': _user([])}, 'messages.0.content'),
        ({'messages': _user([{'type': 'audio'}])}, 'messages.0.content.0'),
        ({'messages': [{'role': 'tool', 'content': ''}]}, 'messages.0.role'),
        ({'messages': [{'role': [], 'content': ''}]}, 'messages.0.role'),
        (
            {'messages': [{'role': 'assistant', 'content': 'a'}]},
            'messages.0.role',
        ),
        (
            {
                'messages': [
                    *_user('a'),
                    {'role': 'assistant', 'content': 'b'},
                ]
            },
            'messages',
        ),
        (
            {'messages': [*_user('a'), {'role': 'system', 'content': 'b'}]},
            'messages.1.role',
        ),
        ({'messages': _user('a \x00')}, 'messages.0.content.0'),
        ({'messages': _user('half \ud83d')}, 'messages.0.content.0'),
        ({'messages': _user('<image> ?')}, 'messages.0.content.0'),
        ({'model': 3}, 'model'),
        ({'temperature': 'hot'}, 'temperature'),
        ({'temperature': 2.1}, 'temperature'),
        ({'temperature': True}, 'temperature'),
        ({'top_p': -0.1}, 'top_p'),
        ({'max_tokens': 0}, 'max_tokens'),
        ({'max_tokens': 2.5}, 'max_tokens'),
        ({'max_completion_tokens': 2**40}, 'max_completion_tokens'),
        ({'seed': 2**64}, 'seed'),
        ({'stop': ''}, 'stop'),
        ({'stop': ['a'] * 17}, 'stop'),
        ({'stop': [None]}, 'stop'),
        ({'stream': 1}, 'stream'),
        ({'stream_options': {'include_usage': True}}, 'stream_options'),
        ({'n': 2}, 'n'),
        ({'n': True}, 'n'),
        ({'logprobs': True}, 'logprobs'),
        ({'tools': [{'type': 'function'}]}, 'tools'),
        ({'response_format': {'type': 'json_object'}}, 'response_format'),
        ({'temprature': 0}, "'temprature'"),
    ],
)
def test_a_wrong_field_is_named(changes, param):
  given = {'model': 'm', 'messages': _user('?'), **changes}
  with pytest.raises(ApiError) as caught:
    schema.parse(json.dumps(given).encode())
  assert caught.value.status == 400
  assert caught.value.param == param


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'{',
        b'[]',
        b'null',
        b'"text"',
        b'\xff\xfe{\x00}\x00',
        b'{"model": "m", "messages": [{"role": "user", "content": "?"}],'
        b' "user": NaN}',
        b'{"temperature": 1e999, "model": "m", "messages": []}',
        b'{"model": "a\x01"}',
        b'[' * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b'9' * 10_000 + b'}',
        b'{"model": "m", "messages": ' + b'[' * 500 + b']' * 500 + b'}',
    ],
)
def test_a_body_that_is_no_request(data):
  with pytest.raises(ApiError) as caught:
    schema.parse(data)
  assert caught.value.status == 400


def test_what_means_nothing_here_or_off_is_taken():
  given = {
      'model': 'm',
      'messages': _user('?'),
      'user': 'me',
      'n': 1,
      'logprobs': False,
      'frequency_penalty': 0.0,
      'response_format': {'type': 'text'},
      'tools': None,
      'top_k': -1,
  }
  found = schema.parse(json.dumps(given).encode())
  assert (found.temperature, found.top_p, found.top_k) == (1.0, 1.0, 0)
  assert found.seed is None and found.max_tokens is None


def test_images_come_before_the_text_unless_text_is_between_them():
  text = {'type': 'text', 'text': 'a'}
  image = {'type': 'image_url', 'image_url': {'url': 'data:'}}

  def said(*parts):
    return messages.parse(_user(list(parts))).turns[0][1]

  mark = templates.IMAGE
  assert said(text, image) == said(image, text) == f'{mark}\na'
  assert said(text, image, image) == f'{mark}\n{mark}\na'
  assert said(image, text, image) == f'{mark}\na\n{mark}'
  assert said(text, text) == 'a\na'
  found = messages.parse(
      [
          {'role': 'system', 'content': 'x'},
          {'role': 'developer', 'content': 'y'},
          *_user('a'),
          *_user('b'),
          {'role': 'assistant', 'content': 'c\x1f'},
          *_user('d'),
      ]
  )
  assert found.system == 'x\ny'
  assert found.turns == (('human', 'a\nb'), ('gpt', 'c\x1f'), ('human', 'd'))


def _bomb(side: int) -> str:
  """A few kilobytes that are `side` x `side` pixels."""
  return serving.data_uri(Image.new('1', (side, side)))


def _cut() -> str:
  head, data = serving.data_uri(serving.picture(0)).split(',')
  return f'{head},{data[: len(data) // 8 * 4]}'


def test_images_that_are_none_are_refused(server):
  text = base64.b64encode(b'no image').decode()
  for url, code in (
      ('data:image/png;base64,', 'invalid_image'),
      (f'data:image/png;base64,{text}', 'invalid_image'),
      ('data:image/png;base64,@@@', 'invalid_image_url'),
      ('data:image/png,abc', 'invalid_image_url'),
      (f'data:text/plain;base64,{text}', 'invalid_image_url'),
      (_cut(), 'invalid_image'),
      # Pillow reads it; it also reads EPS, for which it runs a program.
      (serving.data_uri(serving.picture(0), 'TIFF'), 'invalid_image'),
      (_bomb(4500), 'image_too_large'),
      # A strip of few pixels in a square of many.
      (serving.data_uri(Image.new('1', (5000, 10))), 'image_too_large'),
  ):
    status, _, param, found = _refusal(server.url, serving.body(_image(url)))
    assert (status, found) == (400, code), url[:60]
    assert param == 'messages.0.content.0'


def test_an_image_that_cannot_be_shrunk_is_named():
  def shrink(image):
    raise images.ImageError('It is too thin.')

  reader = media.Reader(media.Limits(10**4, 10**4, False, None, None), shrink)
  uri = serving.data_uri(serving.picture(0))
  with pytest.raises(ApiError, match='messages.3: It is too thin.') as caught:
    reader([messages.Picture(uri, 'messages.3')])
  assert caught.value.status == 400 and caught.value.param == 'messages.3'


def test_neither_addresses_nor_files_are_read(server, tmp_path):
  file = tmp_path / 'a.png'
  serving.picture(0).save(file)
  for url in (
      'http://127.0.0.1:9/a.png',
      'HTTPS://example.org/a.png',
      'ftp://example.org/a.png',
      f'file://{file}',
      str(file),
      'a.png',
      '/dev/zero',
      'javascript:alert(1)',
  ):
    status, message, _, code = _refusal(server.url, serving.body(_image(url)))
    assert (status, code) == (400, 'invalid_image_url'), url
    assert str(file) not in message


def test_too_many_images_or_words(server):
  uri = serving.data_uri(serving.picture(0))
  found = _refusal(
      server.url, serving.body(serving.question('?', uri, uri, uri))
  )
  assert found[0] == 400 and found[3] == 'too_many_images'
  for text in ('left right ' * 40, 'x' * 10_000_000):
    found = _refusal(server.url, serving.body(_user(text)))
    assert found[0] == 400 and found[3] == 'context_length_exceeded'
    assert str(serving.OPTIONS.context) in found[1]


def test_a_body_that_is_too_large(server):
  limit = serving.OPTIONS.max_body_mb << 20
  assert _refusal(server.url, b' ' * (limit + 1))[0] == 413
  # Without a length in front.
  chunks = (b' ' * (1 << 20) for _ in range(serving.OPTIONS.max_body_mb + 1))
  found = serving.call(server.url, '/v1/chat/completions', chunks)
  assert found.status == 413
  assert found.body['error']['code'] == 'request_too_large'


def test_paths_methods_and_types(server):
  for path, data, status in (
      ('/v1/completions', b'{}', 404),
      ('/', None, 404),
      ('/v1/chat/completions', None, 405),
      ('/health', b'{}', 405),
  ):
    found = serving.call(server.url, path, data)
    assert found.status == status and 'message' in found.body['error']
  # What a page of another origin may send without asking.
  found = _refusal(server.url, serving.body(), **{'Content-Type': 'text/plain'})
  assert found[0] == 415
  assert _refusal(server.url, serving.body(), Host='evil.example')[0] == 403
  port = server.url.rpartition(':')[2]
  found = serving.complete(server.url, serving.body(), Host=f'localhost:{port}')
  assert found.status == 200


def test_keys(tmp_path, monkeypatch):
  file = tmp_path / 'key'
  file.write_text('s3cret\n')
  monkeypatch.setenv('THE_KEY', 'other')
  assert api.read_key(None, None) is None
  assert api.read_key(None, str(file)) == 's3cret'
  assert api.read_key('THE_KEY', None) == 'other'
  monkeypatch.setenv('THE_KEY', ' ')
  for env, path in (('THE_KEY', None), ('NONE', None), ('A', 'b')):
    with pytest.raises(config.UserError):
      api.read_key(env, path)


class _Asked:
  """A request of which only the headers matter."""

  def __init__(self, **headers):
    self.headers = headers


def test_only_the_key_opens_the_door():
  door = admission.Door('s3cret', None)
  door.check_key(_Asked(authorization='Bearer s3cret'))
  for given in ('Bearer s3cre', 'Basic s3cret', 'Bearer', '', 'Bearer ä'):
    with pytest.raises(ApiError) as caught:
      door.check_key(_Asked(authorization=given))
    assert caught.value.status == 401
    assert caught.value.code == 'invalid_api_key'


def _fuzzed(rng: random.Random) -> bytes:
  """A request that must not be answered."""
  body = serving.body()
  parts = body['messages'][0]['content']
  noise = rng.randbytes(rng.randrange(1, 3000))
  strange = rng.choice(
      [None, True, -1, 1e308, 2**70, '', 'x', [], {}, [[]], {'a': {'b': []}}]
  )
  kind = rng.randrange(12)
  if kind == 0:
    return noise
  if kind == 1:
    data = json.dumps(body).encode()
    return data[: rng.randrange(len(data) - 1)]
  if kind == 2:
    return b'[' * rng.randrange(1, 200_000)
  if kind == 3:
    encoded = base64.b64encode(noise).decode()
    parts[0]['image_url']['url'] = f'data:image/png;base64,{encoded}'
  elif kind == 4:
    file = io.BytesIO()
    serving.picture(0).save(file, rng.choice(['PNG', 'JPEG', 'GIF', 'WEBP']))
    cut = file.getvalue()[: rng.randrange(1, len(file.getvalue()) // 2)]
    encoded = base64.b64encode(cut).decode()
    parts[0]['image_url']['url'] = f'data:image/png;base64,{encoded}'
  elif kind == 5:
    parts[0]['image_url']['url'] = _bomb(rng.randrange(4473, 6000))
  elif kind == 6:
    parts[1]['text'] = rng.choice('ab ') * rng.randrange(100_000, 10_000_000)
  elif kind == 7:
    parts[1]['text'] = rng.choice(['\ud800', '\udfff', '\x00', '\x1b[2J'])
  elif kind == 8:
    body['messages'] = strange
  elif kind == 9:
    name = rng.choice(['model', 'temperature', 'stop', 'seed', 'max_tokens'])
    body[name] = {'a': strange}
  elif kind == 10:
    name = rng.choice(['role', 'content'])
    body['messages'][0][name] = [] if isinstance(strange, str) else strange
  else:
    url = rng.choice(['file:///etc/passwd', 'http://[::1]/', '//x', 'data:,'])
    parts[0]['image_url'] = {'url': url + noise.decode('latin-1')}
  return json.dumps(body).encode()


def test_two_hundred_fuzzed_requests_are_refused(server):
  rng = random.Random(20)
  for n in range(200):
    data = _fuzzed(rng)
    found = serving.complete(server.url, data)
    assert 400 <= found.status < 500, (n, found, data[:300])
    assert found.body['error']['message']
  assert serving.call(server.url, '/health').status == 200
  assert serving.complete(server.url, serving.body()).status == 200


def _read(url, limits):
  (found,) = media.Reader(limits, lambda image: image)(
      [messages.Picture(url, 'p')]
  )
  return found


def test_files_below_the_root_are_read_and_no_others(tmp_path):
  root = tmp_path / 'images'
  root.mkdir()
  serving.picture(0).save(root / 'a b.png')
  serving.picture(1).save(tmp_path / 'outside.png')
  (root / 'link.png').symlink_to(tmp_path / 'outside.png')
  os.mkfifo(root / 'pipe.png')
  limits = media.Limits(10**6, 10**6, False, str(root), None)
  for url in ('a b.png', f'file://{root}/a%20b.png', str(root / 'a b.png')):
    assert _read(url, limits).size == (40, 40)
  for url in (
      '../outside.png',
      'link.png',
      'pipe.png',
      'missing.png',
      '.',
      f'file://{tmp_path}/outside.png',
      f'file://{root}/%2e%2e/outside.png',
      f'file://elsewhere{root}/a%20b.png',
      'a\x00b.png',
  ):
    with pytest.raises(ApiError) as caught:
      _read(url, limits)
    assert caught.value.code == 'invalid_image_url', url
  small = limits._replace(file_bytes=10)
  with pytest.raises(ApiError, match='larger than 10'):
    _read('a b.png', small)
