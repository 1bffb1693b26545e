# SPDX-License-Identifier: Apache-2.0
"""Google Cloud Storage in memory, as far as gcsfs, Orbax and TensorStore use it.

The JSON API on the loopback interface, with the generations and preconditions
on which TensorStore relies. There are no folders, and nothing can be renamed.

python -m tests.object_store 9023
"""

import contextlib
from http import server
import itertools
import json
import re
import sys
import threading
from typing import Any
from urllib import parse

_OBJECTS = re.compile(r'(?:/upload|/download)?/storage/v1/b/([^/]+)/o/?(.*)')
_BUCKET = re.compile(r'/storage/v1/b/([^/]+)')


class Store:
  """The objects of one bucket.

  Attributes:
    objects: name -> (generation, content).
    names: of the objects in the order in which they were written.
    refuse: objects whose names hold one of these texts are not taken.
  """

  def __init__(self, bucket: str):
    self.bucket = bucket
    self.objects: dict[str, tuple[int, bytes]] = {}
    self.names: list[str] = []
    self.refuse: set[str] = set()
    self._lock = threading.Lock()
    self._numbers = itertools.count(1)
    self._begun: dict[str, tuple[str, bytes]] = {}  # Uploads in pieces.

  def request(
      self, method: str, url: str, headers: Any, body: bytes
  ) -> tuple[int, dict[str, str], bytes]:
    """Returns (status, headers, body)."""
    path, _, query = url.partition('?')
    asked = dict(parse.parse_qsl(query, keep_blank_values=True))
    with self._lock:
      if path.startswith('/batch/'):
        return self._batch(headers, body)
      if found := _OBJECTS.fullmatch(path):
        if found[1] != self.bucket:
          return _error(404, 'The specified bucket does not exist.')
        name = parse.unquote(found[2]) or asked.get('name', '')
        if method == 'POST':
          return self._upload(asked, name, headers, body)
        if not found[2]:
          return self._list(asked)
        return self._object(method, name, asked, headers)
      found = _BUCKET.fullmatch(path)
      if found and found[1] == self.bucket:
        return _json({'kind': 'storage#bucket', 'name': self.bucket})
      return _error(404, 'The specified bucket does not exist.')

  def _describe(self, name: str) -> dict[str, Any]:
    generation, content = self.objects[name]
    return {
        'kind': 'storage#object',
        'bucket': self.bucket,
        'name': name,
        'generation': str(generation),
        'size': str(len(content)),
        'updated': '2026-01-01T00:00:00.000Z',
        'timeCreated': '2026-01-01T00:00:00.000Z',
    }

  def _refused(self, name: str, asked: dict[str, str]) -> int | None:
    """The status of a precondition that does not hold."""
    generation = str(self.objects.get(name, (0,))[0])
    if asked.get('ifGenerationMatch', generation) != generation:
      return 412
    return 304 if asked.get('ifGenerationNotMatch') == generation else None

  def _upload(self, asked, name, headers, body):
    if asked['uploadType'] == 'multipart':
      # Two parts: a description in JSON, and the content.
      boundary = headers['Content-Type'].split('boundary=')[1].strip('"\'')
      parts = body.split(f'--{boundary}'.encode())
      described, content = (
          re.split(rb'\r?\n\r?\n', part, maxsplit=1)[1] for part in parts[1:3]
      )
      name = json.loads(described)['name']
      body = re.sub(rb'\r?\n$', b'', content)
    elif 'upload_id' in asked:
      name, before = self._begun.pop(asked['upload_id'])
      body = before + body
      if headers['Content-Range'].endswith('/*'):  # More will come.
        self._begun[asked['upload_id']] = (name, body)
        return 308, {'Range': f'bytes=0-{len(body) - 1}'}, b''
    elif asked['uploadType'] == 'resumable':
      number = str(next(self._numbers))
      self._begun[number] = (name, b'')
      here = f'http://{headers["Host"]}/upload/storage/v1/b/{self.bucket}/o'
      where = f'{here}?uploadType=resumable&upload_id={number}'
      return 200, {'Location': where}, b''
    if any(text in name for text in self.refuse):
      return _error(403, f'No permission to write {name}.')
    if status := self._refused(name, asked):
      return _error(status, 'Precondition failed.')
    self.objects[name] = (next(self._numbers), body)
    self.names.append(name)
    return _json(self._describe(name))

  def _list(self, asked):
    prefix, end = asked.get('prefix', ''), asked.get('delimiter')
    items, prefixes = [], set()
    for name in sorted(self.objects):
      if not name.startswith(prefix) or name < asked.get('startOffset', ''):
        continue
      if 'endOffset' in asked and name >= asked['endOffset']:
        continue
      rest = name.removeprefix(prefix)
      if end and end in rest:
        prefixes.add(prefix + rest.split(end)[0] + end)
      else:
        items.append(self._describe(name))
    return _json({'items': items, 'prefixes': sorted(prefixes)})

  def _object(self, method, name, asked, headers):
    if status := self._refused(name, asked):
      return status, {}, b''
    if name not in self.objects:
      return _error(404, f'No such object: {self.bucket}/{name}')
    if method == 'DELETE':
      del self.objects[name]
      return 204, {}, b''
    if asked.get('alt') != 'media':
      return _json(self._describe(name))
    generation, content = self.objects[name]
    known = {'x-goog-generation': str(generation)}
    wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', headers.get('Range') or '')
    if not wanted or not content:
      return 200, known, content
    first = int(wanted[1])
    last = min(int(wanted[2] or len(content)), len(content) - 1)
    known['Content-Range'] = f'bytes {first}-{last}/{len(content)}'
    return 206, known, content[first : last + 1]

  def _batch(self, headers, body):
    """Deletions, each a part with a request line."""
    boundary = headers['Content-Type'].split('boundary=')[1].strip('"\'')
    answers = []
    for method, url in re.findall(
        r'^(\w+) (/\S+|http\S+)', body.decode(), re.M
    ):
      path = re.sub(r'^https?://[^/]+', '', url.partition('?')[0])
      found = _OBJECTS.fullmatch(path)
      assert found and method == 'DELETE', (method, url)
      name = parse.unquote(found[2])
      status, _, _ = self._object(method, name, {}, {})
      answers.append(
          f'--{boundary}\r\nContent-Type: application/http\r\n\r\n'
          f'HTTP/1.1 {status} -\r\n\r\n'
      )
    text = ''.join(answers) + f'--{boundary}--\r\n'
    kind = {'Content-Type': f'multipart/mixed; boundary={boundary}'}
    return 200, kind, text.encode()


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
  return (
      status,
      {'Content-Type': 'application/json'},
      json.dumps(value).encode(),
  )


def _error(status: int, message: str) -> tuple[int, dict[str, str], bytes]:
  return _json({'error': {'code': status, 'message': message}}, status)


def _handler(store: Store) -> type[server.BaseHTTPRequestHandler]:
  class Handler(server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # Head and content are sent one by one.

    def handle(self):
      with contextlib.suppress(ConnectionError):  # Clients come and go.
        super().handle()

    def _serve(self):
      body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
      status, headers, content = store.request(
          self.command, self.path, self.headers, body
      )
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      if status not in (204, 304):
        self.send_header('Content-Length', str(len(content)))
      self.end_headers()
      self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format, *args):
      pass

  return Handler


@contextlib.contextmanager
def serving(store: Store, port: int = 0):
  """Yields the address of a server of `store`."""
  http = server.ThreadingHTTPServer(('127.0.0.1', port), _handler(store))
  thread = threading.Thread(target=http.serve_forever, daemon=True)
  thread.start()
  try:
    yield f'http://127.0.0.1:{http.server_port}'
  finally:
    http.shutdown()
    http.server_close()
    thread.join()


if __name__ == '__main__':
  with serving(Store('bucket'), int(sys.argv[1])) as address:
    print(address, flush=True)
    threading.Event().wait()
