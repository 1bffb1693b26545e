# SPDX-License-Identifier: Apache-2.0
"""The ASGI application: routes, and the life of a chat completion."""

import asyncio
from collections.abc import Callable
from concurrent import futures
import math
import time
from typing import Any, TypeVar

from absl import logging
from starlette import applications, exceptions, requests, responses, routing
from starlette.types import Message, Receive, Scope, Send

from moellava_jax.serve import (
    admission,
    media,
    metrics,
    prepare,
    scheduler,
    schema,
)
from moellava_jax.serve import responses as objects
from moellava_jax.serve.errors import ApiError

_CLIENT_GONE = 499  # As nginx counts it; nobody reads it.
_FETCHING = 8  # Requests whose images are fetched at a time.

_Result = TypeVar('_Result')


class Api:
  """One model behind HTTP; `asgi` is the application."""

  def __init__(
      self,
      *,
      name: str,
      fingerprint: str,
      preparer: prepare.Preparer,
      engine: scheduler.Scheduler,
      gate: admission.Gate,
      door: admission.Door,
      counts: metrics.Metrics,
      workers: int,
      body_seconds: float,
  ):
    """Puts the parts together.

    Args:
      name: of the model.
      fingerprint: of its weights.
      preparer: body -> prompt, in several threads.
      engine: answers prompts.
      gate: bounds sizes and numbers.
      door: knows keys and hosts.
      counts: what /metrics shows.
      workers: threads that read texts, and as many that decode images.
      body_seconds: in which a body has to arrive.
    """
    self._name, self._fingerprint = name, fingerprint
    self._preparer, self._scheduler = preparer, engine
    self._gate, self._door, self._counts = gate, door, counts
    self._body_seconds = body_seconds
    self._created = int(time.time())
    # Apart, so that nobody waits behind those who take longer.
    self._texts = futures.ThreadPoolExecutor(workers, 'texts')
    self._images = futures.ThreadPoolExecutor(workers, 'images')
    self._remote = futures.ThreadPoolExecutor(_FETCHING, 'remote')
    counts.watch('requests_waiting', 'For a slot.', lambda: engine.waiting)
    counts.watch('requests_running', 'In a slot.', lambda: engine.running)
    counts.watch('requests_inside', 'In all.', lambda: gate.inside)
    self.asgi = _Counted(
        applications.Starlette(
            routes=[
                _route('/health', self._health),
                _route('/metrics', self._metrics),
                _route('/v1/models', self._models),
                _route('/v1/models/{name:path}', self._model),
                _route('/v1/chat/completions', self._completions, 'POST'),
            ],
            exception_handlers={
                ApiError: _refuse,
                exceptions.HTTPException: _refuse_http,
                Exception: _refuse_bug,
            },
        ),
        counts,
    )

  def close(self) -> None:
    """Ends the threads that prepare."""
    for pool in (self._texts, self._images, self._remote):
      pool.shutdown(wait=False, cancel_futures=True)

  async def _health(self, request: requests.Request) -> responses.Response:
    self._door.check_host(request)
    if self._scheduler.ready:
      return responses.JSONResponse({'status': 'ok'})
    status = 'warming up or closing'
    if self._scheduler.failure is not None:
      status = 'failed'
    return responses.JSONResponse({'status': status}, 503)

  async def _metrics(self, request: requests.Request) -> responses.Response:
    self._check(request)
    return responses.Response(
        self._counts.text(), headers={'Content-Type': metrics.CONTENT_TYPE}
    )

  async def _models(self, request: requests.Request) -> responses.Response:
    self._check(request)
    model = objects.model(self._name, self._created)
    return responses.JSONResponse({'object': 'list', 'data': [model]})

  async def _model(self, request: requests.Request) -> responses.Response:
    self._check(request)
    name = request.path_params['name']
    if name != self._name:
      raise prepare.unknown_model(name, self._name)
    return responses.JSONResponse(objects.model(self._name, self._created))

  def _check(self, request: requests.Request) -> None:
    self._door.check_host(request)
    self._door.check_key(request)

  async def _completions(self, request: requests.Request) -> responses.Response:
    try:
      self._check(request)
      if not self._scheduler.ready:
        raise _not_ready()
      self._gate.enter(self._retry_after())
    except ApiError:
      await admission.discard_body(request, self._gate)
      raise
    return _Completion(self._complete)

  def _retry_after(self) -> int:
    seconds = self._counts.seconds * self._scheduler.waiting
    return min(max(math.ceil(seconds / 2), 1), 60)

  async def _complete(self, request: requests.Request, send: Send) -> None:
    """All of a completion, from its body to its last byte."""
    try:
      try:
        data = await admission.read_body(
            request, self._gate, self._body_seconds
        )
      except ApiError:
        await admission.discard_body(request, self._gate)
        raise
      gone = asyncio.create_task(_disconnected(request.receive))
      try:
        preparing = self._prepared(data, gone)
        del data  # It may be large, and answering takes long.
        await self._answer(await preparing, gone, send)
      finally:
        gone.cancel()
    except requests.ClientDisconnect:
      await send(_start(_CLIENT_GONE, []))
      await send({'type': 'http.response.body', 'body': b''})
    finally:
      self._gate.leave()

  async def _prepared(
      self, data: bytes, gone: asyncio.Task[None]
  ) -> prepare.Prepared:
    """The prompt of a body, whose length is given back to the gate."""
    size = len(data)
    work = self._texts.submit(self._preparer.parse, data)
    del data
    try:
      request = await _unless(gone, asyncio.wrap_future(work))
      pool = self._pool(request)
      work = pool.submit(self._preparer.prepare, request)
      del request
      return await _unless(gone, asyncio.wrap_future(work))
    finally:
      # A thread may be at it still, for a client that has gone.
      work.add_done_callback(lambda _: self._gate.release(size))

  def _pool(self, request: schema.ChatRequest) -> futures.Executor:
    if any(media.is_remote(image.url) for image in request.images):
      return self._remote
    return self._images if request.images else self._texts

  async def _answer(
      self, prepared: prepare.Prepared, gone: asyncio.Task[None], send: Send
  ) -> None:
    pieces: asyncio.Queue[scheduler.Piece] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    try:
      job = self._scheduler.submit(
          prepared.prompt,
          prepared.options,
          max_new_tokens=prepared.max_new_tokens,
          stop=prepared.stop,
          deliver=lambda piece: _hand_over(loop, pieces, piece),
      )
    except scheduler.ClosedError:
      raise _not_ready() from None
    except scheduler.FullError:
      raise ApiError(
          429,
          'The queue is full; try again later.',
          code='rate_limit_exceeded',
          retry_after=self._retry_after(),
      ) from None
    # Also when this coroutine ends in whatever way: `gone` is cancelled then.
    gone.add_done_callback(lambda _: self._scheduler.cancel(job))
    # The engine may be in the middle of a step; nobody waits for it.
    gone.add_done_callback(lambda _: pieces.put_nowait(scheduler.CANCELLED))
    about = objects.answering(
        self._name, self._fingerprint, len(prepared.prompt.tokens_L)
    )
    if prepared.request.stream:
      usage = prepared.request.include_usage
      await _stream(about, pieces, send, with_usage=usage)
    else:
      await _whole(about, pieces, send)


class _Completion(responses.Response):
  """A response that is written while it is computed."""

  def __init__(self, complete: Callable[[requests.Request, Send], Any]):
    super().__init__()
    self._complete = complete

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    await self._complete(requests.Request(scope, receive), send)


class _Counted:
  """Counts the responses of an application."""

  def __init__(self, app: applications.Starlette, counts: metrics.Metrics):
    self._app, self._counts = app, counts
    # Paths as clients spell them would be a label without bounds.
    self._paths = {r.path for r in app.routes if isinstance(r, routing.Route)}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:

    async def counted(message: Message) -> None:
      if message['type'] == 'http.response.start':
        path = scope['path'] if scope['path'] in self._paths else 'other'
        self._counts.responded(path, message['status'])
      await send(message)

    await self._app(scope, receive, counted)


def _route(path: str, endpoint: Any, method: str = 'GET') -> routing.Route:
  return routing.Route(path, endpoint, methods=[method])


async def _disconnected(receive: Receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass


async def _unless(
    gone: asyncio.Task[None], work: asyncio.Future[_Result]
) -> _Result:
  """The result of `work`, or ClientDisconnect if the client goes first."""
  try:
    await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
    if gone.done():
      raise requests.ClientDisconnect
    return work.result()
  finally:
    work.cancel()


def _hand_over(
    loop: asyncio.AbstractEventLoop,
    pieces: asyncio.Queue[scheduler.Piece],
    piece: scheduler.Piece,
) -> None:
  loop.call_soon_threadsafe(pieces.put_nowait, piece)


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
  return {'type': 'http.response.start', 'status': status, 'headers': headers}


async def _next(pieces: asyncio.Queue[scheduler.Piece]) -> scheduler.Piece:
  """The next piece.

  Raises:
    ApiError: 500, the engine failed.
    ClientDisconnect: the job was cancelled, because nobody listens.
  """
  piece = await pieces.get()
  if piece.error is not None:
    raise ApiError(500, 'The model failed; the log of the server says how.')
  if piece.finish_reason == 'cancelled':
    raise requests.ClientDisconnect
  return piece


async def _whole(
    about: objects.Answering, pieces: asyncio.Queue[scheduler.Piece], send: Send
) -> None:
  text = []
  while True:
    piece = await _next(pieces)
    text.append(piece.text)
    if piece.finish_reason is not None:
      break
  body = about.completion(''.join(text), piece.finish_reason, piece.new_tokens)
  response = responses.JSONResponse(body)
  await send(_start(200, response.raw_headers))
  await send({'type': 'http.response.body', 'body': bytes(response.body)})


async def _stream(
    about: objects.Answering,
    pieces: asyncio.Queue[scheduler.Piece],
    send: Send,
    *,
    with_usage: bool,
) -> None:
  """Server-sent events; the headers wait for the first piece.

  So a failure before it has its own status.
  """
  piece = await _next(pieces)
  await send(_start(200, objects.STREAM_HEADERS))

  async def write(data: bytes, more: bool = True) -> None:
    await send({'type': 'http.response.body', 'body': data, 'more_body': more})

  opening = {'role': 'assistant', 'content': ''}
  await write(about.chunk(opening, with_usage=with_usage))
  try:
    while True:
      if piece.text:
        delta = {'content': piece.text}
        await write(about.chunk(delta, with_usage=with_usage))
      if piece.finish_reason is not None:
        break
      piece = await _next(pieces)
  except ApiError as error:
    # The status is out; clients of OpenAI raise what such an event says.
    await write(objects.event(error.body), more=False)
    return
  except requests.ClientDisconnect:
    await write(b'', more=False)
    return
  rest = about.chunk({}, piece.finish_reason, with_usage=with_usage)
  if with_usage:
    rest += about.usage_chunk(piece.new_tokens)
  await write(rest + objects.DONE, more=False)


def _not_ready() -> ApiError:
  return ApiError(
      503,
      'The server is warming up or closing; try again later.',
      code='not_ready',
      retry_after=5,
  )


async def _refuse(_: requests.Request, error: Any) -> responses.Response:
  return responses.JSONResponse(error.body, error.status, error.headers)


async def _refuse_http(_: requests.Request, error: Any) -> responses.Response:
  found = ApiError(error.status_code, f'{error.detail}.')
  return responses.JSONResponse(found.body, found.status, error.headers)


async def _refuse_bug(_: requests.Request, error: Any) -> responses.Response:
  logging.error('A request failed: %r', error)
  found = ApiError(500, 'The server failed; its log says how.')
  return responses.JSONResponse(found.body, found.status)
