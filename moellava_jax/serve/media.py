# SPDX-License-Identifier: Apache-2.0
"""The images of a request: data URIs, or where allowed addresses and files."""

import base64
import binascii
from collections.abc import Callable, Iterator, Sequence
import contextlib
import io
import os
import stat
import threading
from typing import NamedTuple
import urllib.parse

from PIL import Image

from moellava_jax.data import images
from moellava_jax.serve import errors, messages, remote
from moellava_jax.serve.errors import ApiError

# Pillow reads dozens of formats; some of them run other programs (EPS).
FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')


class Limits(NamedTuple):
  """What an image may be.

  Attributes:
    pixels: of an image; where the model pads it, of the square around it.
    file_bytes: of a file or a download.
    square: whether the model pads images to a square.
    image_root: the directory below which files may be read; None: none.
    fetcher: makes what reads the http(s) addresses of one request; None: they
      are refused.
  """

  pixels: int
  file_bytes: int
  square: bool
  image_root: str | None
  fetcher: Callable[[], remote.Fetch] | None


class Reader:
  """Reads images; thread-safe.

  A file of kilobytes may be an image of hundreds of megabytes. So each is made
  small before the next is decoded, and only so many pixels are decoded at a
  time, whoever asks for them.
  """

  def __init__(
      self, limits: Limits, shrink: Callable[[Image.Image], Image.Image]
  ):
    """Bounds.

    Args:
      limits: see `Limits`; pixels for two of the largest images are decoded at
        a time, or for more that are smaller.
      shrink: makes of an image, RGB, the one to keep.
    """
    self._limits, self._shrink = limits, shrink
    self._budget = _Budget(2 * limits.pixels)

  def __call__(
      self, pictures: Sequence[messages.Picture]
  ) -> tuple[Image.Image, ...]:
    """Returns the images of one request, shrunk.

    Args:
      pictures: of which an `url` is `data:image/...;base64,...`; an http(s)
        address, a `file:` address or a path where the limits allow them.

    Raises:
      ApiError: 400, one is refused or no image.
    """
    fetch = self._limits.fetcher and self._limits.fetcher()
    return tuple(
        self._decode(_content(url, param, self._limits, fetch), param)
        for url, param in pictures
    )

  def _decode(self, data: bytes, param: str) -> Image.Image:
    with _decoding(param):
      image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    with self._budget.spent(_area(image, param, self._limits)):
      with _decoding(param):
        image.load()
        # Pillow would warn that it drops it, which is what we want.
        image.info.pop('transparency', None)
        image = image.convert('RGB')
      try:
        return self._shrink(image)
      except images.ImageError as error:
        raise _invalid(str(error).removesuffix('.'), param) from None


class _Budget:
  """What all threads together may take of something."""

  def __init__(self, most: int):
    self._free = most
    self._turn = threading.Lock()
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def spent(self, count: int) -> Iterator[None]:
    """Waits until there is as much; gives it back after the context."""
    # In turn, or those who want little would pass by without an end.
    with self._turn, self._changed:
      self._changed.wait_for(lambda: self._free >= count)
      self._free -= count
    try:
      yield
    finally:
      with self._changed:
        self._free += count
        self._changed.notify()


def is_remote(url: str) -> bool:
  """Whether `url` is on another machine."""
  return _scheme(url) in ('http', 'https')


def _scheme(url: str) -> str:
  return url[:16].partition(':')[0].lower() if ':' in url[:16] else ''


def _content(
    url: str, param: str, limits: Limits, fetch: remote.Fetch | None
) -> bytes:
  scheme = _scheme(url)
  if scheme == 'data':
    return _data_uri(url, param)
  if is_remote(url):
    if fetch is None:
      raise _refused(
          'addresses are not fetched; send the image as a data URI, or start'
          ' the server with --allow_remote_images',
          param,
      )
    return fetch(url, limits.file_bytes, param)
  if scheme in ('file', ''):
    return _file(url, param, limits)
  raise _refused(
      f'scheme {errors.shown(scheme)}: expected a data URI, as in'
      ' data:image/png;base64,...',
      param,
  )


def _refused(why: str, param: str) -> ApiError:
  return errors.bad(f'{param}.image_url: {why}.', param, 'invalid_image_url')


def _invalid(why: str, param: str) -> ApiError:
  return errors.bad(f'{param}: {why}.', param, 'invalid_image')


def _data_uri(url: str, param: str) -> bytes:
  head, comma, payload = url.partition(',')
  kind, *options = head[len('data:') :].split(';')
  if not comma or not kind.lower().startswith('image/'):
    raise _refused(
        f'{errors.shown(head[:60])}: expected data:image/png;base64,...', param
    )
  if not options or options[-1].lower() != 'base64':
    raise _refused('expected a data URI in base64', param)
  try:
    return base64.b64decode(payload, validate=True)
  except (binascii.Error, ValueError) as error:
    raise _refused(f'bad base64: {error}', param) from None


def _file(url: str, param: str, limits: Limits) -> bytes:
  if limits.image_root is None:
    raise _refused(
        'files are not read; send the image as a data URI, or start the server'
        ' with --image_root',
        param,
    )
  path = url
  if url[:5].lower() == 'file:':
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ('', 'localhost'):
      raise _refused('a file on another machine', param)
    path = urllib.parse.unquote(parts.path)
  try:
    root = os.path.realpath(limits.image_root)
    if os.path.isabs(path):
      path = os.path.relpath(path, root)
    found = images.resolve(root, path)
    # Opening a pipe would wait for someone to write into it.
    about = os.stat(found)
    if not stat.S_ISREG(about.st_mode):
      raise _refused('not a file', param)
    if about.st_size > limits.file_bytes:
      raise _invalid(f'larger than {limits.file_bytes} bytes', param)
    return found.read_bytes()
  except (images.ImageError, OSError, ValueError):
    # The same words whether it is outside or missing: no probing of the disk.
    raise _refused('no such file below --image_root', param) from None


@contextlib.contextmanager
def _decoding(param: str) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Decoders raise almost anything on bad bytes.
    raise _invalid(
        f'not an image of {", ".join(FORMATS)} that can be read'
        f' ({type(error).__name__}: {errors.shown(str(error))})',
        param,
    ) from None


def _area(image: Image.Image, param: str, limits: Limits) -> int:
  """The pixels that an image takes; raises ApiError if they are too many."""
  width, height = image.size
  area = max(width, height) ** 2 if limits.square else width * height
  if area <= limits.pixels:
    return area
  square = ' in the square around it' if limits.square else ''
  raise errors.bad(
      f'{param} has {width} x {height} pixels: expected at most'
      f' {limits.pixels / 1e6:g} million{square}; scale it down.',
      param,
      'image_too_large',
  )
