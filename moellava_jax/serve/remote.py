# SPDX-License-Identifier: Apache-2.0
"""Fetches images from the internet, and from nowhere else.

A server that fetches what strangers name must not become their way into the
network that it stands in. So a name is resolved once, every address it has
must be public, and the connection goes to the address that was checked; a
redirect goes through all of that again.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse

from moellava_jax.serve import errors
from moellava_jax.serve.errors import ApiError

# (address, most bytes, field for messages) -> content.
Fetch = Callable[[str, int, str], bytes]

_INTERNET = ipaddress.ip_network('2000::/3')
_REDIRECTS = 3
_CHUNK = 1 << 16


def is_public(address: str) -> bool:
  """Whether an IP address belongs to the internet at large."""
  found = ipaddress.ip_address(address)
  if isinstance(found, ipaddress.IPv6Address):
    # An IPv4 may be inside, and is where the way ends.
    for inner in (found.ipv4_mapped, found.sixtofour):
      if inner is not None:
        return is_public(str(inner))
    # Python calls global whatever it does not know. All addresses of the
    # internet are of this network; translations of IPv4 (NAT64) are not.
    if found not in _INTERNET or found.teredo is not None:
      return False
  return found.is_global and not found.is_multicast


def fetcher(
    seconds: float, allowed: Callable[[str], bool] = is_public
) -> Fetch:
  """Returns what fetches addresses, one after another.

  Args:
    seconds: for all that it fetches, names and redirects included.
    allowed: says of an IP address whether to connect to it.
  """
  left = seconds

  def fetch(url: str, limit: int, param: str) -> bytes:
    nonlocal left
    begin = time.monotonic()
    deadline = begin + left
    try:
      for _ in range(1 + _REDIRECTS):
        data, url = _get(url, limit, deadline, allowed)
        if data is not None:
          return data
      raise _Refused('too many redirects')
    except _Refused as error:
      raise _failed(str(error), param) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
      # Nothing of what a stranger's server said is passed on.
      raise _failed(type(error).__name__, param) from None
    finally:
      left -= time.monotonic() - begin

  return fetch


class _Refused(Exception):
  pass


def _failed(why: str, param: str) -> ApiError:
  return errors.bad(
      f'{param}.image_url could not be fetched: {why}.',
      param,
      'invalid_image_url',
  )


def _get(
    url: str,
    limit: int,
    deadline: float,
    allowed: Callable[[str], bool],
) -> tuple[bytes | None, str]:
  """(content, url), or (None, where it redirects to)."""
  parts = urllib.parse.urlsplit(url)
  if parts.scheme not in ('http', 'https') or not parts.hostname:
    raise _Refused('expected an http(s) address')
  if parts.username is not None or parts.password is not None:
    raise _Refused('an address with a password')
  if not url.isascii() or any(c <= ' ' for c in url):
    raise _Refused('the address is not encoded')
  connection = _connect(parts, deadline, allowed)
  # A timeout of the socket starts again with every byte that drips in.
  late = threading.Event()
  end = threading.Timer(_left(deadline), _hang_up, [connection.sock, late])
  end.daemon = True
  end.start()
  try:
    found = _answer(connection, parts, url, limit)
  except (OSError, http.client.HTTPException):
    if late.is_set():
      raise TimeoutError from None
    raise
  finally:
    end.cancel()
    connection.close()
  if late.is_set():  # What was cut short is no image.
    raise TimeoutError
  return found


def _answer(
    connection: http.client.HTTPConnection,
    parts: urllib.parse.SplitResult,
    url: str,
    limit: int,
) -> tuple[bytes | None, str]:
  path = urllib.parse.urlunsplit(('', '', parts.path or '/', parts.query, ''))
  connection.request('GET', path, headers={'Accept': 'image/*'})
  response = connection.getresponse()
  if response.status in (301, 302, 303, 307, 308):
    location = response.headers.get('Location', '')
    return None, urllib.parse.urljoin(url, location)
  if response.status != 200:
    raise _Refused(f'status {response.status}')
  return _read(response, limit), url


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
  late.set()
  with contextlib.suppress(OSError):
    sock.shutdown(socket.SHUT_RDWR)


def _connect(
    parts: urllib.parse.SplitResult,
    deadline: float,
    allowed: Callable[[str], bool],
) -> http.client.HTTPConnection:
  host = parts.hostname or ''
  secure = parts.scheme == 'https'
  port = parts.port or (443 if secure else 80)
  addresses = _resolve(host, port, deadline)
  if not addresses or not all(allowed(address) for address in addresses):
    raise _Refused('the host is not on the public internet')
  sock = socket.create_connection((addresses[0], port), _left(deadline))
  try:
    if secure:
      context = ssl.create_default_context()
      sock.settimeout(_left(deadline))  # Of all of the handshake.
      sock = context.wrap_socket(sock, server_hostname=host)
  except BaseException:
    sock.close()
    raise
  connection = http.client.HTTPConnection(host, port)
  connection.sock = sock  # It would resolve the name again.
  return connection


def _resolve(host: str, port: int, deadline: float) -> list[str]:
  """The addresses of a name; a look-up itself cannot be told when to end."""
  found: futures.Future[list[str]] = futures.Future()

  def ask():
    try:
      answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
      found.set_result([str(address[0]) for *_, address in answers])
    except Exception as error:
      found.set_exception(error)

  threading.Thread(target=ask, name='resolve', daemon=True).start()
  return found.result(_left(deadline))


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
  chunks, size = [], 0
  while chunk := response.read1(_CHUNK):
    size += len(chunk)
    if size > limit:
      raise _Refused(f'more than {limit} bytes')
    chunks.append(chunk)
  return b''.join(chunks)


def _left(deadline: float) -> float:
  left = deadline - time.monotonic()
  if left <= 0:
    raise TimeoutError
  return left
