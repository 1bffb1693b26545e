# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server for one model.

  python -m moellava_jax.serve.api --model=DIR [--port=8000]

POST /v1/chat/completions, GET /v1/models, /health (503 until usual lengths are
compiled) and /metrics (Prometheus). Concurrent requests are answered together.
Images come as data URIs. SIGTERM and Ctrl-C let it finish what it has begun.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
import signal
import socket
import sys

from absl import app, flags, logging
import uvicorn

from moellava_jax import config
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import engine as engine_lib
from moellava_jax.infer import generate
from moellava_jax.serve import (
    admission,
    command,
    media,
    metrics,
    prepare,
    remote,
    scheduler,
)
from moellava_jax.serve import app as app_lib

_CONTEXT = 4096
_REMOTE_SECONDS = 10.0  # For all images of a request.
_BODY_SECONDS = 60.0
_MB = 1 << 20
_WARM_UP_TEXT = 256  # Positions beside the images.


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of the command; see `define_flags`."""

  model: str
  host: str
  port: int
  name: str | None
  slots: int
  context: int | None
  queue: int
  max_body_mb: int
  max_pending_mb: int
  max_megapixels: int
  max_images: int
  warm_up_images: int
  allow_remote_images: bool
  image_root: str | None
  api_key_env: str | None
  api_key_file: str | None
  allowed_hosts: tuple[str, ...]
  drain_seconds: int
  cpu_devices: int
  mesh: str | None


def define_flags() -> None:
  flags.DEFINE_string(
      'model', None, 'RUN, STAGE or STEP directory.', required=True
  )
  flags.DEFINE_string('host', '127.0.0.1', 'Address; 0.0.0.0: all networks.')
  flags.DEFINE_integer('port', 8000, '0: a free one.', 0, 65535)
  flags.DEFINE_string('name', None, 'Of the model; unset: its directory.')
  flags.DEFINE_integer('slots', 8, 'Requests answered together.', 1)
  flags.DEFINE_integer(
      'context',
      None,
      f'Positions of a prompt and its answer; unset: at most {_CONTEXT}.',
      lower_bound=2,
  )
  flags.DEFINE_integer('queue', 256, 'Requests that may wait; then 429.', 0)
  flags.DEFINE_integer('max_body_mb', 20, 'Of a request; then 413.', 1)
  flags.DEFINE_integer(
      'max_pending_mb', 1024, 'Of bodies being read; then 503.', 1
  )
  flags.DEFINE_integer(
      'max_megapixels',
      50,
      'Of an image; of the square around it where the model pads.',
      lower_bound=1,
  )
  flags.DEFINE_integer('max_images', 8, 'Of a request.', 0)
  flags.DEFINE_integer(
      'warm_up_images', 1, 'Compile for up to so many before ready.', 0
  )
  _define_access_flags()
  flags.DEFINE_integer(
      'drain_seconds', 60, 'For open requests, after SIGTERM.', 0
  )
  flags.DEFINE_integer(
      'cpu_devices', 1, 'Devices to simulate where there is only a CPU.', 1
  )
  flags.DEFINE_string(
      'mesh',
      None,
      'Split the parameters: fsdp=2,expert=2; unset: all on every device.',
  )


def _define_access_flags() -> None:
  flags.DEFINE_bool(
      'allow_remote_images',
      False,
      'Fetch http(s) images, from public addresses only.',
  )
  flags.DEFINE_string(
      'image_root', None, 'Read image files below this; unset: none.'
  )
  flags.DEFINE_string(
      'api_key_env', None, 'Environment variable with the key of clients.'
  )
  flags.DEFINE_string('api_key_file', None, 'File with the key of clients.')
  flags.DEFINE_list(
      'allowed_hosts',
      [],
      'Names by which the server may be addressed; unset: those of this'
      ' machine if --host is one of them, else any.',
  )


def read_key(env: str | None, path: str | None) -> str | None:
  """The key of clients, or None where none is asked for.

  Raises:
    UserError: both are given, or there is no key in what is.
  """
  if env is not None and path is not None:
    raise config.UserError(
        '--api_key_env and --api_key_file are both given: expected one.'
    )
  if env is not None:
    key, source = os.environ.get(env, ''), f'the environment variable {env}'
  elif path is not None:
    with open(path, encoding='utf-8') as file:
      key, source = file.read(), path
  else:
    return None
  if not key.strip():
    raise config.UserError(f'No API key in {source}: expected one.')
  return key.strip()


def _hosts(options: Options) -> tuple[str, ...] | None:
  given = tuple(host.lower() for host in options.allowed_hosts)
  local = options.host in (*admission.LOOPBACK, '::1')
  return (*given, *admission.LOOPBACK) if given or local else None


def _context(options: Options, chat: chat_lib.Chat) -> int:
  return options.context or min(chat.max_positions or _CONTEXT, _CONTEXT)


def _limits(options: Options, chat: chat_lib.Chat) -> media.Limits:
  fetcher = None
  if options.allow_remote_images:
    fetcher = functools.partial(remote.fetcher, _REMOTE_SECONDS)
  if options.image_root is not None and not os.path.isdir(options.image_root):
    raise config.UserError(
        f'--image_root={options.image_root!r}: expected a directory.'
    )
  return media.Limits(
      options.max_megapixels * 1_000_000,
      options.max_body_mb * _MB,
      _pads(chat),
      options.image_root,
      fetcher,
  )


def _pads(chat: chat_lib.Chat) -> bool:
  """Whether any stage pads images to a square."""
  stages = (chat.config.stage(stage) for stage in config.STAGES)
  found = {chat.config.data.image_aspect, *(s.image_aspect for s in stages)}
  return 'pad' in found


def warm_up(
    engine: engine_lib.Engine, images: int, image_tokens: int
) -> list[Callable[[], None]]:
  """Compiles one length each, so that closing need not wait for all.

  Longer texts than `_WARM_UP_TEXT` are compiled when the first of them comes.
  """
  lengths = {generate.bucket(n) for n in range(1, engine.context)}
  counts = sorted({generate.image_slots(n) for n in range(images + 1)})
  steps = []
  for length in sorted(lengths):
    usual = [
        n
        for n in counts
        if n * image_tokens
        < length
        <= generate.bucket(n * image_tokens + _WARM_UP_TEXT)
    ]
    if usual:
      steps.append(functools.partial(engine.warm_up, [length], usual))
  return steps


class Service:
  """The model, its engine and the application around them."""

  def __init__(self, options: Options, chat: chat_lib.Chat):
    """Puts the parts together; `scheduler.start()` begins to warm up.

    Raises:
      UserError: options that cannot be.
    """
    key = read_key(options.api_key_env, options.api_key_file)
    name = options.name or chat.name
    context = _context(options, chat)
    preparer = prepare.Preparer(
        chat,
        name=name,
        context=context,
        max_images=options.max_images,
        limits=_limits(options, chat),
    )
    engine = engine_lib.Engine(chat, slots=options.slots, context=context)
    counts = metrics.Metrics()
    self.scheduler = scheduler.Scheduler(
        engine,
        chat.tokenizer,
        queue=options.queue,
        warm_up=warm_up(
            engine,
            min(options.warm_up_images, options.max_images),
            chat.model.cfg.vision.num_tokens,
        ),
        observer=counts,
    )
    self.api = app_lib.Api(
        name=name,
        fingerprint=chat.digest,
        preparer=preparer,
        engine=self.scheduler,
        gate=admission.Gate(
            requests=options.slots + options.queue,
            body_bytes=options.max_body_mb * _MB,
            all_bytes=options.max_pending_mb * _MB,
        ),
        door=admission.Door(key, _hosts(options)),
        counts=counts,
        workers=max(os.cpu_count() or 1, 2),
        body_seconds=_BODY_SECONDS,
    )
    self.name = name

  def close(self, seconds: float) -> bool:
    """Finishes what has a slot; False if that takes longer."""
    self.api.close()
    return self.scheduler.close(seconds)


def http_server(service: Service, drain_seconds: int) -> uvicorn.Server:
  """A server that is yet to run: `run(sockets=[...])`."""
  return uvicorn.Server(
      uvicorn.Config(
          service.api.asgi,
          http='h11',
          loop='asyncio',
          ws='none',
          lifespan='off',
          log_level='warning',
          access_log=False,
          server_header=False,
          timeout_graceful_shutdown=drain_seconds,
      )
  )


def bind(host: str, port: int) -> socket.socket:
  """A socket with an address, on which nobody listens yet.

  Raises:
    OSError: the port is taken, or there is no such address.
  """
  sock = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
  try:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
  except BaseException:
    sock.close()
    raise
  return sock


def serve(options: Options) -> int:
  """Runs until a signal or a failure; returns the exit status.

  Raises:
    UserError, OSError: the model cannot be loaded or served.
  """
  sock = bind(options.host, options.port)
  chat = chat_lib.load(options.model, options.cpu_devices, options.mesh)
  service = Service(options, chat)
  server = http_server(service, options.drain_seconds)
  service.scheduler.start(
      on_failure=functools.partial(setattr, server, 'should_exit', True)
  )
  host, port = sock.getsockname()[:2]
  host = f'[{host}]' if ':' in host else host
  print(
      f'{service.name}: http://{host}:{port}/v1, ready once'
      f' http://{host}:{port}/health says so.',
      flush=True,
  )
  if options.host not in (*admission.LOOPBACK, '::1') and not (
      options.api_key_env or options.api_key_file
  ):
    logging.warning('Open to the network of --host without an API key.')
  # uvicorn raises the signal that ended it again when it is done.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
  server.run(sockets=[sock])
  ended = service.close(options.drain_seconds)
  status = 0 if service.scheduler.failure is None else 1
  if not ended:
    # A program is being compiled, which nothing can stop. To end Python under
    # it may crash, and there is nothing left to lose.
    logging.flush()
    sys.stdout.flush()
    os._exit(status)
  return status


def main(argv: Sequence[str]) -> int:
  # Until the server runs there is nothing to finish.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  values = command.values(Options)
  values['allowed_hosts'] = tuple(values['allowed_hosts'])
  return command.run(argv, lambda: serve(Options(**values)))


if __name__ == '__main__':
  define_flags()
  app.run(main)
