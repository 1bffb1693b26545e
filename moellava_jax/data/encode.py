# SPDX-License-Identifier: Apache-2.0
"""A row of data -> token ids with a loss mask, and decoded images."""

import functools
from typing import NamedTuple
import zlib

import numpy as np

from moellava_jax import config
from moellava_jax.data import images, jpeg, parity, sources, templates
from moellava_jax.data import rows as rows_lib
from moellava_jax.data import tokenizer as tokenizer_lib

# The limit where `row_length` follows the data; the original's text length.
LONGEST_ROW = 2048
_BEYOND = 'images or answers beyond the end of the row'
_SLOTS = 'more images than max_images'


class Example(NamedTuple):
  """One conversation, ready to be put in a row; L positions."""

  tokens_L: np.ndarray  # int32, IMAGE_TOKEN repeated per patch.
  supervised_L: np.ndarray  # bool.
  images: tuple[str | rows_lib.Stored, ...]
  attributes: np.ndarray | None
  id: int
  cut: bool  # Text at the end was left out.
  blanked: bool  # The original's label mask failed: nothing is supervised.


class Format(NamedTuple):
  """What decides how a row becomes arrays."""

  template: str
  row_length: int | None  # As configured; see `length`.
  max_images: int
  vision: config.VisionConfig
  data: config.DataConfig

  @property
  def length(self) -> int:
    """Positions of a batch row (T).

    The original cuts the text before it expands the images, so its rows grow
    by the expansion.
    """
    if not self.data.parity_truncation:
      return self.text_length
    return self.text_length + self.max_images * (self.vision.num_tokens - 1)

  @property
  def text_length(self) -> int:
    """The original's `model_max_length`: tokens while an image counts 1."""
    return LONGEST_ROW if self.row_length is None else self.row_length


class Decoded(NamedTuple):
  """An image as the tower takes it."""

  pixels_HWC: np.ndarray  # uint8.
  rules: tuple[str, ...]  # See `images.Opened`.


class ImageStore:
  """Decoded images of one root, kept in memory while there is room."""

  def __init__(
      self,
      root: str,
      vision: config.VisionConfig,
      aspect: str,
      decode: str,
      budget: int,
  ):
    """Args: `decode` is 'exact' or 'fast'; `budget` is in bytes."""
    self._root, self._fast, self._budget = root, decode == 'fast', budget
    self._how = (vision.image_size, aspect, vision.resize, vision.mean)
    self._kept: dict[str | rows_lib.Stored, Decoded] = {}
    if self._fast:
      jpeg.check()

  def __getstate__(self):
    """For worker processes: each opens what it needs, and keeps none."""
    return {**self.__dict__, '_kept': {}, '_budget': 0}

  def __getitem__(self, path: str | rows_lib.Stored) -> Decoded:
    """Raises `images.ImageError` naming the file."""
    if (decoded := self._kept.get(path)) is not None:
      return decoded
    decoded = self._read(path)
    if decoded.pixels_HWC.nbytes <= self._budget:
      self._budget -= decoded.pixels_HWC.nbytes
      self._kept[path] = decoded
    return decoded

  def _read(self, path: str | rows_lib.Stored) -> Decoded:
    if isinstance(path, rows_lib.Stored):  # Checked when it was stored.
      return self._decode(path.fetch(), path.key)._replace(rules=())
    file = images.locate(self._root, path)
    return self._decode(images.content(file), str(file))

  def _decode(self, data: bytes, name: str) -> Decoded:
    if self._fast:
      pixels_HWC = jpeg.preprocess(data, *self._how)
      if pixels_HWC is not None:
        return Decoded(pixels_HWC, images.misnamed(name, 'JPEG'))
    opened = images.examine(data, name)
    pixels_HWC = images.preprocess(opened.image, *self._how)
    return Decoded(pixels_HWC, opened.rules)


@functools.lru_cache(maxsize=4)
def image_store(
    root: str,
    vision: config.VisionConfig,
    aspect: str,
    decode: str,
    cache_mb: int,
) -> ImageStore:
  """The store that all stages of a run share."""
  return ImageStore(root, vision, aspect, decode, cache_mb << 20)


def encode(
    row: sources.Row, fmt: Format, tok: tokenizer_lib.Tokenizer
) -> Example:
  """Renders, tokenises and expands one conversation.

  Raises:
    sources.DataError: `parity_mask` knows no mask for it.
    sources.BadRowError: the row is longer than `row_length` and may not be
      cut; an image, or every answer, lies beyond the end; there are more
      images than slots.
  """
  ids_L, supervised_L, cut, blanked = _tokens(row, fmt, tok)
  marks = int(np.sum(ids_L == config.IMAGE_TOKEN))
  paths = row.images if row.attributes is not None else row.images[:marks]
  if len(paths) > fmt.max_images:
    raise sources.BadRowError(
        _SLOTS,
        f'{row.where} has {len(paths)} images, but a row has'
        f" max_images={fmt.max_images} slots; raise the stage's max_images.",
    )
  full = len(ids_L)
  if fmt.data.parity_truncation:
    ids_L, supervised_L = (x[: fmt.text_length] for x in (ids_L, supervised_L))
  cut |= len(ids_L) < full
  count_L = np.where(ids_L == config.IMAGE_TOKEN, fmt.vision.num_tokens, 1)
  ids_L = np.repeat(ids_L, count_L)
  supervised_L = np.repeat(supervised_L, count_L)
  if len(ids_L) > fmt.length:
    ids_L, supervised_L = _cut(row, fmt, ids_L, supervised_L)
    cut = True
  if not supervised_L[1:].any() and not blanked:
    raise sources.BadRowError(
        _BEYOND,
        f'{row.where} has no answer within the {fmt.length} positions of a row;'
        " raise the stage's row_length, or drop such rows with"
        ' --config.data.on_bad=skip.',
    )
  attributes = None
  if row.attributes is not None:
    attributes = np.array(row.attributes, np.int32)[None]
  identity = zlib.crc32(row.id.encode('utf-8', 'surrogatepass'))
  return Example(ids_L, supervised_L, paths, attributes, identity, cut, blanked)


def _tokens(row: sources.Row, fmt: Format, tok: tokenizer_lib.Tokenizer):
  """Ids and mask of a row before expansion; whether it is cut, or blanked."""
  template = templates.get(fmt.template)
  # The warm-up has no counterpart in the original.
  if not fmt.data.parity_mask or row.attributes is not None:
    segments = templates.render(template, row.turns)
    return *tokenizer_lib.tokenize(segments, tok), False, False
  try:
    found = parity.encode(
        template,
        row.turns,
        tok,
        has_image=bool(row.images),
        max_length=fmt.text_length,
    )
  except config.UserError as error:
    raise sources.DataError(f'{row.where}: {error}') from error
  supervised_L = found.labels_T != parity.IGNORE
  supervised_L &= found.ids_T != config.IMAGE_TOKEN
  return found.ids_T, supervised_L, found.cut, found.mismatch is not None


def _cut(row, fmt, ids_L, supervised_L):
  """Cuts text at the end of an overlong conversation, never an image."""
  length = fmt.length
  if fmt.data.on_long == 'error':
    raise sources.BadRowError(
        'longer than the row',
        f'{row.where} takes {len(ids_L)} positions, but a row has {length};'
        " raise the stage's row_length, or let it be cut with"
        ' --config.data.on_long=cut.',
    )
  if np.any(ids_L[length:] == config.IMAGE_TOKEN):
    raise sources.BadRowError(
        _BEYOND,
        f'{row.where}: its images reach beyond the {length} positions of a'
        " row; raise the stage's row_length, or drop such rows with"
        ' --config.data.on_bad=skip.',
    )
  return ids_L[:length], supervised_L[:length]
