# SPDX-License-Identifier: Apache-2.0
"""JPEG bytes -> square uint8 pixels, faster than `images` and almost the same.

The decoder scales while it decodes (libjpeg-turbo through `simplejpeg`, the
extra `jpeg`), to the smallest of its sizes that has every pixel that is
needed; Pillow's bicubic filter does the rest, and padding is added last. The
mean difference to `images.preprocess`, which remains the definition, is below
one grey level (`bench.input` prints it).
"""

import functools
import importlib.util
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from moellava_jax import config

_STEPS = 8  # libjpeg scales by n/8.
_COLOURS = ('YCbCr', 'Gray', 'RGB')  # Others are Pillow's business.


def check() -> None:
  """Raises UserError if the decoder is not installed."""
  if importlib.util.find_spec('simplejpeg') is None:
    raise config.UserError(
        "config.data.decode='fast' needs the package simplejpeg: pip install"
        " 'moellava_jax[jpeg]', or set config.data.decode=exact."
    )


class _Side(NamedTuple):
  """One direction of an image: which part of it lies where in the result."""

  begin: float  # Pixels of the image.
  end: float
  first: int  # Pixels of the result.
  last: int
  before: float  # How much of the pixel before `first` is image.
  after: float


def preprocess(
    data: bytes,
    size: int,
    aspect: str,
    resize: str,
    mean: tuple[float, float, float],
) -> np.ndarray | None:
  """`images.preprocess` of the bytes of a file, roughly: pixels_HWC, uint8.

  None: not a JPEG file, or one that is better left to `images` (broken, of
  too many pixels, in inks, a strip): take that instead.
  """
  import simplejpeg

  if data[:2] != b'\xff\xd8':
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    height, width = int(height), int(width)
    if colours not in _COLOURS or not _is_usual(width, height):
      return None
    sides = _sides((width, height), size, aspect, resize)
    scale = max(
        (side.last - side.first) / (side.end - side.begin) for side in sides
    )
    decoded_HWC = simplejpeg.decode_jpeg(
        data,
        'RGB',
        min_height=math.ceil(height * scale),
        min_width=math.ceil(width * scale),
        min_factor=1,
    )
  except ValueError:
    return None
  return _place(decoded_HWC, (width, height), sides, size, mean)


def _is_usual(width: int, height: int) -> bool:
  limit = Image.MAX_IMAGE_PIXELS or 0
  return 0 < width * height <= limit and max(width, height) <= 16 * min(
      width, height
  )


def _sides(
    shape: tuple[int, int], size: int, aspect: str, resize: str
) -> tuple[_Side, _Side]:
  """Width and height: the geometry of `images.preprocess`."""
  if aspect == 'pad':
    square = max(shape)
    return _padded(shape[0], square, size), _padded(shape[1], square, size)
  if resize == 'exact':
    return _whole(shape[0], size), _whole(shape[1], size)
  short = min(shape)
  return _cropped(shape[0], short, size), _cropped(shape[1], short, size)


def _whole(length: int, size: int) -> _Side:
  return _Side(0, length, 0, size, 0, 0)


def _padded(length: int, square: int, size: int) -> _Side:
  """In the middle of `square`, which becomes `size`."""
  ratio = size / square
  offset = (square - length) // 2
  begin, end = offset * ratio, (offset + length) * ratio
  first, last = math.ceil(begin), math.floor(end)
  if last <= first:  # Thinner than a pixel.
    first, last = math.floor(begin), math.floor(begin) + 1
    return _Side(0, length, first, last, 0, 0)
  return _Side(
      first / ratio - offset,
      min(last / ratio - offset, length),
      first,
      last,
      first - begin,
      end - last,
  )


def _cropped(length: int, short: int, size: int) -> _Side:
  """The middle `size` of what `length` becomes when `short` becomes `size`."""
  scaled = size if length == short else int(size * length / short)
  offset = (scaled - size) // 2
  ratio = length / scaled
  return _Side(offset * ratio, (offset + size) * ratio, 0, size, 0, 0)


def _place(
    decoded_HWC: np.ndarray,
    shape: tuple[int, int],
    sides: tuple[_Side, _Side],
    size: int,
    mean: tuple[float, float, float],
) -> np.ndarray:
  """Resizes what was decoded, and puts it where it belongs."""
  across, down = sides
  scale_x = _scale(decoded_HWC.shape[1], shape[0])
  scale_y = _scale(decoded_HWC.shape[0], shape[1])
  box = (
      across.begin * scale_x,
      down.begin * scale_y,
      min(across.end * scale_x, decoded_HWC.shape[1]),
      min(down.end * scale_y, decoded_HWC.shape[0]),
  )
  new = (across.last - across.first, down.last - down.first)
  pixels_HWC = np.asarray(
      Image.fromarray(decoded_HWC).resize(
          new, Image.Resampling.BICUBIC, box=box
      )
  )
  if new == (size, size):
    return pixels_HWC
  canvas_HWC = _canvas(size, mean).copy()
  columns = slice(across.first, across.last)
  canvas_HWC[down.first : down.last, columns] = pixels_HWC
  # Pixels that are part image, part padding.
  if down.before:
    _mix(canvas_HWC[down.first - 1, columns], pixels_HWC[0], down.before)
  if down.after:
    _mix(canvas_HWC[down.last, columns], pixels_HWC[-1], down.after)
  rows = slice(down.first, down.last)
  if across.before:
    _mix(canvas_HWC[rows, across.first - 1], pixels_HWC[:, 0], across.before)
  if across.after:
    _mix(canvas_HWC[rows, across.last], pixels_HWC[:, -1], across.after)
  return canvas_HWC


def _scale(decoded: int, original: int) -> float:
  """n/8: a decoder rounds the size up, but not the grid of its pixels."""
  return max(round(_STEPS * decoded / original), 1) / _STEPS


def _mix(line: np.ndarray, edge: np.ndarray, part: float) -> None:
  line[:] = np.rint(part * edge + (1 - part) * line)


@functools.lru_cache(maxsize=8)
def _canvas(size: int, mean: tuple[float, float, float]) -> np.ndarray:
  colour = np.array([int(channel * 255) for channel in mean], np.uint8)
  return np.broadcast_to(colour, (size, size, 3)).copy()
