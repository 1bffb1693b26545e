# SPDX-License-Identifier: Apache-2.0
"""Image file -> square uint8 pixels, bit-exact with the original.

What `CLIPImageProcessor` and `SiglipImageProcessor` of Hugging Face do up to
their division by 255; the model normalises on the device. As in the original,
EXIF orientation is not applied, transparency is dropped (not composed), and
of an animation the first frame is taken. What is not as in the original: it
takes the rows of an image 1 or 3 pixels high for channels.
"""

from collections.abc import Iterator
import contextlib
import io
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from moellava_jax import config

# To crop the middle of a longer strip takes many seconds, for a picture of
# almost none of it.
_MAX_ASPECT = 2000
_BLOCK = 1 << 24  # Pixels that resizing may hold at a time.


class ImageError(config.UserError):
  """An image that cannot be used; the message names the file."""


class Opened(NamedTuple):
  """An image file that was read completely.

  Attributes:
    image: RGB.
    rules: by which of the rules of `check` it became that.
  """

  image: Image.Image
  rules: tuple[str, ...]


def locate(root: str, relative: str) -> pathlib.Path:
  """Returns the path of `relative` below `root`, for images of the user's own.

  Links are followed wherever they lead, as in the original: a data set is
  often linked into the root. For what others ask for there is `resolve`.

  Raises:
    ImageError: `relative` is absolute, or leads out of `root` by `..`.
  """
  if os.path.isabs(relative):
    raise ImageError(
        f'Image path {relative!r} is absolute; expected a path relative to the'
        f' image root {root!r}.'
    )
  if '\0' in relative:
    raise ImageError(f'Image path {relative!r} is no path: it has a null byte.')
  path = os.path.normpath(relative)
  if path.split(os.sep)[0] == os.pardir:
    raise ImageError(
        f'Image path {relative!r} leads out of the image root {root!r}; move'
        ' the file below the root.'
    )
  return pathlib.Path(root, path)


def resolve(root: str, relative: str) -> pathlib.Path:
  """Returns the absolute path of `relative` below `root`, without links.

  Raises:
    ImageError: as `locate`; or a link leads out of `root`. (`root` itself may
      be a link.)
  """
  top = os.path.realpath(root)
  path = os.path.realpath(locate(root, relative))
  if os.path.commonpath([top, path]) != top:
    raise ImageError(
        f'Image path {relative!r} leads to {path!r}, out of the image root'
        f' {root!r}; move the file below the root.'
    )
  return pathlib.Path(path)


def load(path: str | os.PathLike[str]) -> Image.Image:
  """Reads an image file completely, as RGB.

  Raises:
    ImageError: the file is missing, empty, cut short, not an image, or of more
      than `Image.MAX_IMAGE_PIXELS` (89 million pixels): it may be an attack,
      and Pillow itself refuses only twice as many.
  """
  data, name = content(path), os.fspath(path)
  with _opened(data, name) as image:
    return _rgb(image)


def content(path: str | os.PathLike[str]) -> bytes:
  """The bytes of an image file; raises ImageError if they cannot be read."""
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    what = 'cannot be read: ' + str(error.strerror)
    if isinstance(error, FileNotFoundError):
      what = 'does not exist'
    raise ImageError(f'Image {os.fspath(path)!r} {what}.') from error


def examine(data: bytes, name: str) -> Opened:
  """`load` for the bytes of a file, which are to be trained on.

  Args:
    data: the content of the file.
    name: the path, which stands for the file in messages.

  Raises:
    ImageError: as `load`; or it is a single pixel, which is what servers send
      in the place of an image that is lost.
  """
  with _opened(data, name) as image:
    if image.size == (1, 1):
      raise ImageError(f'Image {name!r} is a single pixel.')
    rules = _rules(image, name)
    return Opened(_rgb(image), rules)


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
  if not data:
    raise ImageError(f'Image {name!r} is an empty file.')
  try:
    with Image.open(io.BytesIO(data)) as image:
      pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
      if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(
            f'{pixels} pixels; expected at most {limit}'
        )
      yield image
  except ImageError:
    raise
  except Exception as error:  # Decoders raise almost anything on bad bytes.
    raise ImageError(
        f'Image {name!r} cannot be read: {type(error).__name__}: {error}'
    ) from error


def _rgb(image: Image.Image) -> Image.Image:
  image.load()
  # Pillow would warn that it drops it, which is what we want.
  image.info.pop('transparency', None)
  return image.convert('RGB')


def _rules(image: Image.Image, name: str) -> tuple[str, ...]:
  rules = misnamed(name, image.format or '')
  # A photograph with a preview beside it (MPO) is no animation.
  if image.format != 'MPO' and getattr(image, 'is_animated', False):
    rules += ('the first frame of an animation',)
  if image.mode == 'CMYK':
    rules += ('colours of CMYK as RGB',)
  if image.mode.startswith(('I', 'F')):
    rules += ('grey beyond 8 bits clipped at 255',)
  return rules


def misnamed(name: str, kind: str) -> tuple[str, ...]:
  """The rule for a file whose extension says another format than `kind`."""
  extension = os.path.splitext(name)[1].lower()
  said = Image.registered_extensions().get(extension, kind)
  same = {said, kind} == {'JPEG', 'MPO'} or said == kind
  return () if same else ('a format that is not what the name says',)


def preprocess(
    image: Image.Image,
    size: int,
    aspect: str,
    resize: str,
    mean: tuple[float, float, float],
) -> np.ndarray:
  """Returns pixels_HWC, uint8, H = W = `size`.

  Args:
    image: RGB.
    size: pixels a side.
    aspect: 'pad' first pastes the image on the middle of a square of the
      colour `mean`; 'square' does not.
    resize: 'short_edge' (CLIP) scales the shorter side to `size` and crops the
      middle; 'exact' (SigLIP) scales both sides to `size`.
    mean: RGB in [0, 1].

  Raises:
    ImageError: the image is a strip that 'short_edge' cannot scale sensibly,
      or 'pad' only to a square of gigabytes.
  """
  if aspect not in ('pad', 'square'):
    raise ValueError(f"aspect={aspect!r}: expected 'pad' or 'square'.")
  if resize not in ('short_edge', 'exact'):
    raise ValueError(f"resize={resize!r}: expected 'short_edge' or 'exact'.")
  if aspect == 'pad':
    _check_square(image)
    image = pad_to_square(image, mean)
  if resize == 'exact':
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
  return _resize_and_crop(image, size)


def _check_square(image: Image.Image) -> None:
  """A strip within Pillow's limit may still become a square of gigabytes."""
  limit = Image.MAX_IMAGE_PIXELS
  if limit is not None and max(image.size) ** 2 > 2 * limit:
    raise ImageError(
        f'An image of {image.width} x {image.height} pixels is too long to pad'
        f' to a square (limit {2 * limit} pixels).'
    )


def pad_to_square(
    image: Image.Image, mean: tuple[float, float, float]
) -> Image.Image:
  """Returns `image` in the middle of a square of the colour `mean`."""
  width, height = image.size
  side = max(width, height)
  red, green, blue = (int(channel * 255) for channel in mean)
  canvas = Image.new('RGB', (side, side), (red, green, blue))
  canvas.paste(image, ((side - width) // 2, (side - height) // 2))
  return canvas


def _resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
  short, long = min(image.size), max(image.size)
  if long > _MAX_ASPECT * short:
    raise ImageError(
        f'An image of {image.width} x {image.height} pixels is too thin to'
        f" crop (limit 1:{_MAX_ASPECT}); use aspect='pad'."
    )
  # `CLIPImageProcessor` rounds down, here and in its centre crop.
  width, height = (
      size if side == short else int(size * side / short) for side in image.size
  )
  if width * height > _BLOCK:
    # Pillow resizes rows and then columns, with 8 bits between. Cropping in
    # between changes no bit, and the strip is never there as a whole.
    turn = Image.Transpose.TRANSPOSE
    image = _middle_columns(image, width, size).transpose(turn)
    return np.asarray(_middle_columns(image, height, size).transpose(turn))
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return np.asarray(image.crop((left, top, left + size, top + size)))


def _middle_columns(image: Image.Image, width: int, size: int) -> Image.Image:
  """The middle `size` columns of `image` resized to `width`."""
  result = Image.new('RGB', (size, image.height))
  left = (width - size) // 2
  rows = max(_BLOCK // max(width, image.width), 1)
  for top in range(0, image.height, rows):
    bottom = min(top + rows, image.height)
    block = image.crop((0, top, image.width, bottom))
    block = block.resize((width, bottom - top), Image.Resampling.BICUBIC)
    result.paste(block.crop((left, 0, left + size, bottom - top)), (0, top))
  return result
