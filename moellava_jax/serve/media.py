# SPDX-License-Identifier: Apache-2.0
"""The image of a request: data URI, or where allowed an address or a file."""

import base64
import binascii
import io
import os
import stat
from typing import NamedTuple
import urllib.parse

from PIL import Image

from moellava_jax.data import images
from moellava_jax.serve import errors, remote
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
    fetch: reads http(s) addresses; None: they are refused.
  """

  pixels: int
  file_bytes: int
  square: bool
  image_root: str | None
  fetch: remote.Fetch | None


def read(url: str, param: str, limits: Limits) -> Image.Image:
  """Returns the decoded image of an `image_url`, as RGB.

  Args:
    url: `data:image/...;base64,...`; an http(s) address, a `file:` address or
      a path where `limits` allow them.
    param: the field, for messages.
    limits: see `Limits`.

  Raises:
    ApiError: 400, it is refused or no image.
  """
  scheme = url[:16].partition(':')[0].lower() if ':' in url[:16] else ''
  if scheme == 'data':
    data = _data_uri(url, param)
  elif scheme in ('http', 'https'):
    if limits.fetch is None:
      raise _refused(
          'addresses are not fetched; send the image as a data URI, or start'
          ' the server with --allow_remote_images',
          param,
      )
    data = limits.fetch(url, limits.file_bytes, param)
  elif scheme in ('file', ''):
    data = _file(url, param, limits)
  else:
    raise _refused(
        f'scheme {errors.shown(scheme)}: expected a data URI, as in'
        ' data:image/png;base64,...',
        param,
    )
  return _decode(data, param, limits)


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


def _decode(data: bytes, param: str, limits: Limits) -> Image.Image:
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      width, height = image.size
      area = max(width, height) ** 2 if limits.square else width * height
      if area > limits.pixels:
        raise _too_large(width, height, param, limits)
      image.load()
      # Pillow would warn that it drops it, which is what we want.
      image.info.pop('transparency', None)
      return image.convert('RGB')
  except ApiError:
    raise
  except Exception as error:  # Decoders raise almost anything on bad bytes.
    raise _invalid(
        f'not an image of {", ".join(FORMATS)} that can be read'
        f' ({type(error).__name__}: {errors.shown(str(error))})',
        param,
    ) from None


def _too_large(width: int, height: int, param: str, limits: Limits) -> ApiError:
  square = ' in the square around it' if limits.square else ''
  return errors.bad(
      f'{param} has {width} x {height} pixels: expected at most'
      f' {limits.pixels / 1e6:g} million{square}; scale it down.',
      param,
      'image_too_large',
  )
