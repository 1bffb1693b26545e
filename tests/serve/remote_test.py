# SPDX-License-Identifier: Apache-2.0
"""Fetching: from the internet alone, and with an end to everything."""

import contextlib
from http import server
import socket
import threading
import time

import pytest

from moellava_jax.serve import remote
from moellava_jax.serve.errors import ApiError


class _Pages(server.BaseHTTPRequestHandler):
  """/N: N bytes; /to/URL: a redirect; /drip: a byte now and then."""

  def do_GET(self):
    kind, _, rest = self.path[1:].partition('/')
    if kind == 'to':
      self.send_response(302)
      self.send_header('Location', rest)
      self.end_headers()
    elif kind == 'drip':
      self.send_response(200)
      self.end_headers()
      with contextlib.suppress(OSError):
        while not self.server.over.wait(0.05):
          self.wfile.write(b'x')
    elif kind.isdecimal():
      self.send_response(200)
      self.end_headers()
      self.wfile.write(b'x' * int(kind))
    else:
      self.send_error(404)

  def log_message(self, format, *args):
    del format, args


@pytest.fixture(scope='module')
def pages():
  found = server.ThreadingHTTPServer(('127.0.0.1', 0), _Pages)
  found.over = threading.Event()
  thread = threading.Thread(target=found.serve_forever)
  thread.start()
  yield f'http://127.0.0.1:{found.server_port}'
  found.over.set()
  found.shutdown()
  found.server_close()
  thread.join()


def _anywhere(address):
  del address
  return True


@pytest.mark.parametrize(
    'address, public',
    [
        ('93.184.216.34', True),
        ('2606:2800:220:1:248:1893:25c8:1946', True),
        ('127.0.0.1', False),
        ('10.1.2.3', False),
        ('192.168.0.1', False),
        ('169.254.169.254', False),  # Where clouds keep their secrets.
        ('100.64.0.1', False),
        ('0.0.0.0', False),
        ('224.0.0.1', False),
        ('::1', False),
        ('::ffff:127.0.0.1', False),
        ('fe80::1', False),
        ('fc00::1', False),
        ('64:ff9b::7f00:1', False),
        ('2002:7f00:1::', False),
        ('2002:5db8:d822::', True),
        ('::ffff:10.0.0.1', False),
        ('::ffff:93.184.216.34', True),
        ('::10.0.0.1', False),
        ('64:ff9b::a00:1', False),
        ('64:ff9b:1::a00:1', False),
        ('64:ff9b:1:ffff:a:0:1:0', False),
        ('2001:0:5db8:d822:0:0:f5ff:fffe', False),
        ('fec0::1', False),
        ('ff0e::1', False),
    ],
)
def test_what_is_public(address, public):
  assert remote.is_public(address) == public


def test_content_and_redirects(pages):
  fetch = remote.fetcher(20, _anywhere)
  assert fetch(f'{pages}/5', 5, 'p') == b'xxxxx'
  assert fetch(f'{pages}/to/{pages}/to/{pages}/7', 99, 'p') == b'x' * 7
  assert fetch(f'{pages}/to//3', 99, 'p') == b'xxx'


def test_what_is_not_fetched(pages):
  fetch = remote.fetcher(20, _anywhere)
  for url, why in (
      (f'{pages}/6', 'more than 5 bytes'),
      (f'{pages}/none', 'status 404'),
      (f'{pages}/to/{pages}/to/{pages}/to/{pages}/to/{pages}/1', 'redirects'),
      (f'{pages}/to/file:///etc/passwd', 'http'),
      (f'{pages}/a b', 'not encoded'),
      (pages.replace('//', '//me:pw@') + '/1', 'password'),
      ('http://127.0.0.1:1/', 'ConnectionRefused'),
      ('http://[::1', 'ValueError'),
      ('http://127.0.0.1:99999/', 'ValueError'),
  ):
    with pytest.raises(ApiError, match=why) as caught:
      fetch(url, 5, 'p')
    assert caught.value.status == 400, url


def test_a_redirect_into_the_network_is_not_followed(pages):
  asked = []

  def first_only(address):
    asked.append(address)
    return len(asked) == 1

  with pytest.raises(ApiError, match='public internet'):
    remote.fetcher(20, first_only)(f'{pages}/to/{pages}/1', 5, 'p')
  with pytest.raises(ApiError, match='public internet'):
    remote.fetcher(20)(f'{pages}/1', 5, 'p')


def test_one_who_drips_is_left(pages):
  begin = time.monotonic()
  with pytest.raises(ApiError, match='Timeout'):
    remote.fetcher(0.5, _anywhere)(f'{pages}/drip', 10**6, 'p')
  assert time.monotonic() - begin < 10


def test_a_name_that_is_not_found_in_time(monkeypatch):
  over = threading.Event()

  def look_up(*_, **__):
    over.wait(20)
    raise socket.gaierror

  monkeypatch.setattr(socket, 'getaddrinfo', look_up)
  try:
    with pytest.raises(ApiError, match='Timeout'):
      remote.fetcher(0.2, _anywhere)('http://slow.example/', 10, 'p')
  finally:
    over.set()


def test_the_images_of_a_request_share_its_time(pages):
  fetch = remote.fetcher(1, _anywhere)
  for path in ('drip', '5'):
    with pytest.raises(ApiError, match='Timeout'):
      fetch(f'{pages}/{path}', 10**6, 'p')


@pytest.mark.parametrize('reset', [True, False])
def test_what_comes_after_the_hang_up_is_late(pages, monkeypatch, reset):
  """Whether the other side sees a reset, or an end, or clocks disagree."""
  hung_up = threading.Event()

  def hang_up(sock, late):
    late.set()
    hung_up.set()

  def answer(*_):
    assert hung_up.wait(10)
    if reset:
      raise ConnectionResetError
    return b'half', 'url'

  monkeypatch.setattr(remote, '_hang_up', hang_up)
  monkeypatch.setattr(remote, '_answer', answer)
  with pytest.raises(ApiError, match='Timeout'):
    remote.fetcher(0.1, _anywhere)(f'{pages}/1', 10, 'p')
