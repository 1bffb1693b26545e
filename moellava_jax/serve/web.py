# SPDX-License-Identifier: Apache-2.0
"""Talk to a model in the browser; needs the extra `serve`.

  python -m moellava_jax.serve.web --model=DIR [--port=7860]

Images are uploaded into a folder that is deleted at the end; nothing else on the
disk is read, and the page loads nothing from elsewhere.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile

from absl import app, flags, logging
from starlette import middleware as middleware_lib
from starlette.datastructures import MutableHeaders
from starlette.middleware import trustedhost

from moellava_jax import config
from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import admission, command, layout, media, page

_MB = 1 << 20

# An answer may contain Markdown that would load an image from anywhere.
_HEADERS = {
    'Content-Security-Policy': (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline'"
        " 'unsafe-eval'; style-src 'self' 'unsafe-inline'; object-src 'none';"
        " base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags of the command; see `define_flags`."""

  model: str
  host: str
  port: int | None
  max_new_tokens: int
  max_upload_mb: int
  max_megapixels: int
  cpu_devices: int
  mesh: str | None


def define_flags() -> None:
  flags.DEFINE_string(
      'model', None, 'RUN, STAGE or STEP directory.', required=True
  )
  flags.DEFINE_string('host', '127.0.0.1', 'Address; 0.0.0.0: all networks.')
  flags.DEFINE_integer(
      'port',
      None,
      'Unset: the first that is free from 7860 on.',
      lower_bound=1,
      upper_bound=65535,
  )
  flags.DEFINE_integer(
      'max_new_tokens', 1024, 'The longest answer one can ask for.', 2
  )
  flags.DEFINE_integer('max_upload_mb', 20, 'Of an image file.', 1)
  flags.DEFINE_integer(
      'max_megapixels', 50, 'Of the square around an image.', 1
  )
  flags.DEFINE_integer(
      'cpu_devices', 1, 'Devices to simulate where there is only a CPU.', 1
  )
  flags.DEFINE_string(
      'mesh',
      None,
      'Split the parameters: fsdp=2,expert=2; unset: all on every device.',
  )


class _Headers:
  """ASGI: adds `_HEADERS` to every response."""

  def __init__(self, app):
    self.app = app

  async def __call__(self, scope, receive, send):
    async def send_more(message):
      if message['type'] == 'http.response.start':
        MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    http = scope['type'] == 'http'
    await self.app(scope, receive, send_more if http else send)


def launch(options: Options, chat: chat_lib.Chat, uploads: str):
  """Serves the page from threads; returns the `gradio.Blocks`, to be closed.

  Args:
    options: see `Options`.
    chat: the model.
    uploads: a folder for what browsers send.

  Raises:
    OSError: the port is taken.
  """
  uploads = os.path.realpath(uploads)
  # Gradio has no other way to be told, and reads some of it when imported.
  os.environ['GRADIO_TEMP_DIR'] = uploads
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  try:
    from gradio import themes
  except ImportError as error:
    raise config.UserError(
        f'The page needs Gradio ({error}): pip install -e .[serve]'
    ) from None
  layers = [middleware_lib.Middleware(_Headers)]
  if options.host in admission.LOOPBACK:
    # No other site's name may lead here.
    layers.append(
        middleware_lib.Middleware(
            trustedhost.TrustedHostMiddleware,
            allowed_hosts=list(admission.LOOPBACK),
        )
    )
  limits = media.Limits(
      pixels=options.max_megapixels * 1_000_000,
      file_bytes=options.max_upload_mb * _MB,
      square=True,
      image_root=uploads,
      fetcher=None,
  )
  demo = layout.blocks(
      page.Page(chat, limits, options.max_new_tokens),
      page.examples(options.model),
  )
  fonts = ['system-ui', 'sans-serif']
  demo.launch(
      share=False,
      inbrowser=False,
      quiet=True,
      prevent_thread_lock=True,
      server_name=options.host,
      server_port=options.port,
      max_file_size=options.max_upload_mb * _MB,
      allowed_paths=[],
      ssr_mode=False,
      pwa=False,
      mcp_server=False,
      run_history=False,
      enable_monitoring=False,
      footer_links=[],
      state_session_capacity=1000,
      app_kwargs={
          'middleware': layers,
          'docs_url': None,
          'redoc_url': None,
          'openapi_url': None,
      },
      theme=themes.Default(font=fonts, font_mono=['monospace']),
      css=layout.CSS,
  )
  return demo


def _serve(options: Options) -> None:
  chat = chat_lib.load(options.model, options.cpu_devices, options.mesh)
  with tempfile.TemporaryDirectory(prefix='moellava_web_') as uploads:
    try:
      demo = launch(options, chat, uploads)
    except OSError as error:
      # Gradio's words speak of its own parameters.
      raise config.UserError(
          f'--host={options.host} --port={options.port or "7860 to 7959"}: there'
          ' is no such address, or no free port. Choose another.'
      ) from error
    print(f'{chat.name}: {demo.local_url}', flush=True)
    if options.host not in (*admission.LOOPBACK, '::1'):
      logging.warning('Open to everyone on the network of --host.')
    try:
      demo.block_thread()
    finally:
      demo.close(verbose=False)


def main(argv: Sequence[str]) -> int:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
  options = Options(**command.values(Options))

  def serve() -> int:
    with contextlib.suppress(KeyboardInterrupt):
      _serve(options)
    return 0

  return command.run(argv, serve)


if __name__ == '__main__':
  define_flags()
  app.run(main)
