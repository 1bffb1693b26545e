# SPDX-License-Identifier: Apache-2.0
"""Rows -> examples -> static batches, in an order that only the seed decides.

Everything up to the batch is random access, so batch n is the same whatever
the number of threads, workers or processes, and the whole state of the
pipeline is the integer n.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
import functools
from typing import Any, NamedTuple
import zlib

import numpy as np

from moellava_jax import config
from moellava_jax.data import batch as batch_lib
from moellava_jax.data import images, parity, sources, templates
from moellava_jax.data import rows as rows_lib
from moellava_jax.data import tokenizer as tokenizer_lib

# The limit where `row_length` follows the data; the original's text length.
LONGEST_ROW = 2048


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


class ImageStore:
  """Decoded images of one root, kept in memory while there is room."""

  def __init__(self, root: str, fmt: Format, budget: int):
    self._root, self._fmt, self._budget = root, fmt, budget
    self._kept: dict[str | rows_lib.Stored, np.ndarray] = {}

  def __getitem__(self, path: str | rows_lib.Stored) -> np.ndarray:
    """uint8 `[H, W, 3]`; raises `images.ImageError` naming the file."""
    if (pixels_HWC := self._kept.get(path)) is not None:
      return pixels_HWC
    vision = self._fmt.vision
    pixels_HWC = images.preprocess(
        images.decode(path.fetch(), path.key)
        if isinstance(path, rows_lib.Stored)
        else images.load(images.resolve(self._root, path)),
        vision.image_size,
        self._fmt.data.image_aspect,
        vision.resize,
        vision.mean,
    )
    if pixels_HWC.nbytes <= self._budget:
      self._budget -= pixels_HWC.nbytes
      self._kept[path] = pixels_HWC
    return pixels_HWC


@functools.lru_cache(maxsize=4)
def image_store(root: str, vision: config.VisionConfig, data) -> ImageStore:
  """The store that all stages of a run share."""
  fmt = Format('plain', 0, 0, vision, data)
  return ImageStore(root, fmt, data.cache_mb << 20)


def encode(
    row: sources.Row, fmt: Format, tok: tokenizer_lib.Tokenizer
) -> Example:
  """Renders, tokenises and expands one conversation.

  Raises:
    sources.DataError: the row is longer than `row_length` and may not be cut.
    sources.DoesNotFitError: an image, or every answer, lies beyond the end, or
      there are more images than slots.
  """
  ids_L, supervised_L, cut, blanked = _tokens(row, fmt, tok)
  marks = int(np.sum(ids_L == config.IMAGE_TOKEN))
  paths = row.images if row.attributes is not None else row.images[:marks]
  if len(paths) > fmt.max_images:
    raise sources.DoesNotFitError(
        f'{row.where} has {len(paths)} images, but a row has'
        f" max_images={fmt.max_images} slots; raise the stage's max_images."
    )
  full = len(ids_L)
  if fmt.data.parity_truncation:
    ids_L, supervised_L = (x[: fmt.row_length] for x in (ids_L, supervised_L))
  cut |= len(ids_L) < full
  count_L = np.where(ids_L == config.IMAGE_TOKEN, fmt.vision.num_tokens, 1)
  ids_L = np.repeat(ids_L, count_L)
  supervised_L = np.repeat(supervised_L, count_L)
  if len(ids_L) > fmt.length:
    ids_L, supervised_L = _cut(row, fmt, ids_L, supervised_L)
    cut = True
  if not supervised_L[1:].any() and not blanked:
    raise sources.DoesNotFitError(
        f'{row.where} has no answer within the {fmt.length} positions of a row;'
        " raise the stage's row_length, or drop such rows with"
        ' --config.data.on_bad=skip.'
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
    raise sources.DataError(
        f'{row.where} takes {len(ids_L)} positions, but a row has {length};'
        " raise the stage's row_length, or let it be cut with"
        ' --config.data.on_long=cut.'
    )
  if np.any(ids_L[length:] == config.IMAGE_TOKEN):
    raise sources.DoesNotFitError(
        f'{row.where}: its images reach beyond the {length} positions of a'
        " row; raise the stage's row_length, or drop such rows with"
        ' --config.data.on_bad=skip.'
    )
  return ids_L[:length], supervised_L[:length]


def pad_row(example: Example | None, fmt: Format, store) -> batch_lib.Batch:
  """An example as a row (a `Batch` without its leading axis); None: empty."""
  length, vision = fmt.length, fmt.vision
  tokens_T = np.zeros(length, np.int32)
  targets_T = np.zeros(length, np.int32)
  weight_T = np.zeros(length, np.float32)
  segment_T = np.zeros(length, np.int32)
  size = vision.image_size
  images_IHWC = np.zeros((fmt.max_images, size, size, 3), np.uint8)
  attributes_IPA = np.zeros((fmt.max_images, 0, 0), np.int32)
  identity = 0
  if example is not None:
    n = len(example.tokens_L)
    tokens_T[:n] = example.tokens_L
    segment_T[:n] = 1
    weight_T[: n - 1] = example.supervised_L[1:]
    targets_T[: n - 1] = np.maximum(example.tokens_L[1:], 0)
    targets_T *= weight_T > 0
    for slot, path in enumerate(example.images):
      images_IHWC[slot] = store[path]
    if example.attributes is not None:
      attributes_IPA = example.attributes
    identity = example.id
  return batch_lib.Batch(
      tokens_T,
      targets_T,
      weight_T,
      segment_T,
      np.arange(length, dtype=np.int32),
      images_IHWC,
      attributes_IPA,
      np.asarray(identity, np.uint32),
  )


def stack(rows: Sequence[Any]) -> batch_lib.Batch:
  """Rows (each a `Batch` without its leading axis) -> batch."""
  return batch_lib.Batch(
      *(np.stack(field) for field in zip(*rows, strict=True))
  )


class Examples:
  """Random access to the rows of a stage as padded rows.

  Small data is encoded and its images are opened at once, so that every bad
  row is found before the first step. Large data is encoded on access; there, a
  row that `on_bad=skip` drops becomes an empty one, which keeps the order.
  """

  def __init__(self, rows: Sequence[sources.Row], root: str, fmt: Format, tok):
    self.dropped: Counter[str] = Counter()
    self.ignored_answers = 0
    self.cut = 0
    self.blanked = 0
    self.format = fmt  # With the row length that was found, if it was open.
    self._tok = tok
    self._store = image_store(root, fmt.vision, fmt.data)
    self._rows: Sequence = rows
    image_bytes = 3 * fmt.vision.image_size**2
    need = len(rows) * ((fmt.row_length or 256) * 5 + image_bytes)
    self.eager = need <= fmt.data.cache_mb << 20
    if fmt.row_length is None and not self.eager:
      raise sources.DataError(
          f'{len(rows)} rows do not fit into --config.data.cache_mb='
          f"{fmt.data.cache_mb}, so the longest is not known: set the stage's"
          ' row_length.'
      )
    template = templates.get(fmt.template)
    for row in rows:
      self.ignored_answers += templates.ignored_answers(template, row.turns)
    if self.eager:
      self._encode_all()

  def _encode_all(self):
    from rich import console, progress

    screen = console.Console(stderr=True)
    encoded = [
        self._encode(row)
        for row in progress.track(
            self._rows,
            'reading',
            console=screen,
            transient=True,
            disable=not screen.is_terminal,
        )
    ]
    self._rows = [example for example in encoded if example is not None]
    if not self._rows:
      raise sources.DataError(
          f'No usable row is left; dropped: {dict(self.dropped)}.'
      )
    if self.format.row_length is None:
      longest = max(len(example.tokens_L) for example in self._rows)
      self.format = self.format._replace(row_length=-(-longest // 8) * 8)

  def _encode(self, row: sources.Row) -> Example | None:
    """None: dropped and counted."""
    try:
      example = encode(row, self.format, self._tok)
      for path in example.images:
        self._store[path]
      self.cut += example.cut
      self.blanked += example.blanked
      return example
    except images.ImageError as error:
      if self.format.data.on_bad == 'error':
        raise sources.DataError(
            f'{row.where}: {error} Repair it, or drop such rows with'
            ' --config.data.on_bad=skip.'
        ) from error
      self.dropped['unreadable image'] += 1
    except sources.DoesNotFitError:
      if self.format.data.on_bad == 'error':
        raise
      self.dropped['images or answers beyond the end of the row'] += 1
    return None

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index) -> batch_lib.Batch:
    row = self._rows[index]
    example = row if isinstance(row, Example) else self._encode(row)
    return pad_row(example, self.format, self._store)


def train_batches(
    examples: Examples,
    batch_size: int,
    seed: int,
    start: int,
    *,
    share: np.ndarray,
) -> Iterator[batch_lib.Batch]:
  """Endless shuffled batches from step `start` on.

  Args:
    examples: the data of the stage.
    batch_size: rows of a global batch.
    seed: decides the order; every epoch has its own.
    start: batches to skip, without reading them.
    share: which rows of a global batch this process reads, in order. Whatever
      the number of processes, a global batch is the same.
  """
  import grain

  data = examples.format.data
  rows = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None)

  def batch(step: int) -> batch_lib.Batch:
    return stack([rows[step * batch_size + int(row)] for row in share])

  dataset = grain.MapDataset.range(len(rows) // batch_size).map(batch)
  iterator = iter(
      dataset.to_iter_dataset(
          grain.ReadOptions(
              num_threads=data.num_threads, prefetch_buffer_size=data.prefetch
          )
      )
  )
  if start:
    iterator.set_state({'next_index': start})
  return iterator


def eval_batches(
    examples: Examples, batch_size: int, count: int, *, share: np.ndarray
) -> list[batch_lib.Batch]:
  """The first `count` batches in order; the last one is filled with empties.

  Of each batch, the rows `share`.
  """
  batches = []
  for n in range(min(count, -(-len(examples) // batch_size))):
    rows = [
        examples[i]
        if i < len(examples)
        else pad_row(None, examples.format, None)
        for i in (n * batch_size + int(row) for row in share)
    ]
    batches.append(stack(rows))
  return batches
