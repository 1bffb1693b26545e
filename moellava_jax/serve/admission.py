# SPDX-License-Identifier: Apache-2.0
"""Who may come in, and how much of them: keys, hosts, sizes, numbers.

Everything here is decided before a body is in memory.
"""

import asyncio
import hmac
import threading

from starlette import requests

from moellava_jax.serve.errors import ApiError

_DISCARD_SECONDS = 10
LOOPBACK = ('localhost', '127.0.0.1', '[::1]')


class Gate:
  """Bounds what all requests together take; thread-safe.

  Attributes:
    inside: requests that are being read, prepared, queued or answered.
  """

  def __init__(self, *, requests: int, body_bytes: int, all_bytes: int):
    """Bounds.

    Args:
      requests: at a time.
      body_bytes: of one body.
      all_bytes: of all bodies that are not prepared yet.
    """
    self.inside = 0
    self.body_bytes = body_bytes
    self._requests, self._all_bytes = requests, all_bytes
    self._bytes = 0
    self._lock = threading.Lock()

  def enter(self, retry_after: int) -> None:
    """Counts one in; `leave` counts it out.

    Raises:
      ApiError: 429.
    """
    with self._lock:
      if self.inside >= self._requests:
        raise ApiError(
            429,
            f'{self.inside} requests are waiting or being answered, which is'
            ' all that this server takes; try again later.',
            code='rate_limit_exceeded',
            retry_after=retry_after,
        )
      self.inside += 1

  def leave(self) -> None:
    with self._lock:
      self.inside -= 1

  def reserve(self, count: int) -> None:
    """Takes memory for a body; `release` gives it back.

    Raises:
      ApiError: 503.
    """
    with self._lock:
      if self._bytes + count > self._all_bytes:
        raise ApiError(
            503,
            'The requests that are being read take all memory there is for'
            ' them; try again later.',
            code='overloaded',
            retry_after=1,
        )
      self._bytes += count

  def release(self, count: int) -> None:
    with self._lock:
      self._bytes -= count


async def read_body(
    request: requests.Request, gate: Gate, seconds: float
) -> bytes:
  """Returns the body; its length stays reserved in `gate`.

  Args:
    request: of which nothing has been read.
    gate: has the limits.
    seconds: for all of it.

  Raises:
    ApiError: 408, 413, 415 or 503.
    ClientDisconnect: by Starlette.
  """
  _check_type(request)
  declared = request.headers.get('content-length', '')
  if declared.isdecimal() and int(declared) > gate.body_bytes:
    raise _too_large(gate)
  reserved = 0
  chunks = []
  try:
    async with asyncio.timeout(seconds):
      async for chunk in request.stream():
        if reserved + len(chunk) > gate.body_bytes:
          raise _too_large(gate)
        gate.reserve(len(chunk))
        reserved += len(chunk)
        chunks.append(chunk)
    return b''.join(chunks)
  except BaseException as error:
    gate.release(reserved)
    if isinstance(error, TimeoutError):
      raise ApiError(408, f'No whole body in {seconds:g} seconds.') from None
    raise


async def discard_body(request: requests.Request, gate: Gate) -> None:
  """Reads what a client still sends, as far as it is no more than allowed.

  One that is told off while it sends would see a broken connection, and not
  the answer.
  """
  size = 0
  try:
    async with asyncio.timeout(_DISCARD_SECONDS):
      async for chunk in request.stream():
        size += len(chunk)
        if size > 2 * gate.body_bytes:
          return
  except (TimeoutError, requests.ClientDisconnect, RuntimeError):
    return  # RuntimeError: the stream was read to its end or its failure.


def _check_type(request: requests.Request) -> None:
  kind = request.headers.get('content-type', '')
  # A page of another origin can send text/plain without being asked.
  if kind.partition(';')[0].strip().lower() != 'application/json':
    raise ApiError(
        415,
        'Expected a body of Content-Type application/json.',
        code='unsupported_media_type',
    )


def _too_large(gate: Gate) -> ApiError:
  return ApiError(
      413,
      f'The body is larger than {gate.body_bytes} bytes; send fewer or smaller'
      ' images.',
      code='request_too_large',
  )


class Door:
  """Checks the host and the key of a request."""

  def __init__(self, key: str | None, hosts: tuple[str, ...] | None):
    """Who may enter.

    Args:
      key: that clients have to send; None: nobody needs one.
      hosts: by which the server may be addressed; None: any. Without it, a
        page that has its name resolve to 127.0.0.1 could talk to a server on
        the machine of its reader.
    """
    self._key = None if key is None else key.encode()
    self._hosts = hosts

  def check_host(self, request: requests.Request) -> None:
    """Raises ApiError 403 for an unknown host."""
    if self._hosts is None:
      return
    host = request.headers.get('host', '')
    name = host if host.endswith(']') else host.rpartition(':')[0] or host
    if name.lower() not in self._hosts:
      raise ApiError(
          403,
          'This server is not addressed by that name; see --allowed_hosts.',
          code='unknown_host',
      )

  def check_key(self, request: requests.Request) -> None:
    """Raises ApiError 401 for a missing or wrong key."""
    if self._key is None:
      return
    scheme, _, given = request.headers.get('authorization', '').partition(' ')
    same = hmac.compare_digest(given.strip().encode(), self._key)
    if scheme.lower() != 'bearer' or not same:
      raise ApiError(
          401,
          'Missing or wrong API key: expected the header Authorization: Bearer'
          ' KEY.',
          code='invalid_api_key',
      )
