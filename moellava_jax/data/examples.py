# SPDX-License-Identifier: Apache-2.0
"""The conversations of a stage, in rows of a batch: random access to both."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from moellava_jax import config
from moellava_jax.data import (
    assemble,
    check,
    counts,
    encode,
    images,
    lengths,
    order,
    packing,
    sources,
    templates,
)
from moellava_jax.data import batch as batch_lib
from moellava_jax.data import rows as rows_lib


class Examples:
  """Random access to the conversations of a stage, encoded.

  Small data is encoded and its images are opened at once, so that every bad
  row is found before the first step. Large data is encoded on access; there, a
  row that `on_bad=skip` drops leaves its place empty, which keeps the order.

  Attributes:
    format: with the row length that was found, if it was open.
    eager: whether the data is small.
    counts: of what was read so far; for large data that grows with the batches
      that `pipeline` has handed out.
    ignored_answers: answers that the template leaves out.
  """

  def __init__(
      self,
      rows: Sequence[sources.Row],
      root: str,
      fmt: encode.Format,
      tok,
      *,
      weights: tuple[float, ...] | None = None,
  ):
    """Args:
    rows: of all sources, one after the other.
    root: where the paths of images begin.
    fmt: see `Format`.
    tok: the tokenizer.
    weights: how its sources are mixed; None: every row once an epoch.
    """
    self.counts = counts.Counts()
    self.ignored_answers = 0
    self.format = fmt
    self._tok = tok
    self._store = encode.image_store(
        root,
        fmt.vision,
        fmt.data.image_aspect,
        fmt.data.decode,
        fmt.data.cache_mb,
    )
    self._rows: Sequence = rows
    self._weights = weights
    parts = rows.parts if isinstance(rows, rows_lib.Rows) else (rows,)
    source_N = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    self._layouts: dict[tuple[int, int], order.Layout] = {}
    image_bytes = 3 * fmt.vision.image_size**2
    need = len(rows) * ((fmt.row_length or 256) * 5 + image_bytes)
    self.eager = need <= fmt.data.cache_mb << 20
    if fmt.row_length is None and not self.eager:
      raise sources.DataError(
          f'{len(rows)} rows do not fit into --config.data.cache_mb='
          f"{fmt.data.cache_mb}, so the longest is not known: set the stage's"
          ' row_length.'
      )
    names, self._dropped_before = ('rows',), (Counter[str](),)
    if isinstance(rows, rows_lib.Rows):
      names = tuple(part.origin for part in rows.parts)
      self._dropped_before = tuple(part.dropped for part in rows.parts)
    self._known = order.Known(names, source_N, None, None, None)
    self._look_through()
    if self.eager:
      self._encode_all()
    elif fmt.data.arrangement == 'packed':
      self._measure_all()

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index) -> batch_lib.Batch:
    """One conversation as a row."""
    row, notes = self.read([index])
    self.counts.add(notes)
    return row

  def read(
      self, items: Iterable[int]
  ) -> tuple[batch_lib.Batch, list[counts.Note]]:
    """A row of these conversations; changes nothing, so that any process may.

    `counts` does not know the notes yet.
    """
    notes: list[counts.Note] = []
    loaded = [self._load(int(item), notes) for item in items]
    kept = [x for x in loaded if x is not None]
    return assemble.fill_row(kept, self.format), notes

  @property
  def positions(self) -> int:
    """Positions of all conversations, where their lengths are known."""
    lengths_N = self._known.lengths_N
    return 0 if lengths_N is None else int(lengths_N.sum())

  @property
  def images(self) -> int:
    """Images of all conversations, at most."""
    images_N = self._known.images_N
    slots = len(self) * self.format.max_images
    return slots if images_N is None else int(images_N.sum())

  def layout(self, seed: int, batch_size: int) -> order.Layout:
    """Which conversations stand in which row; `seed` decides."""
    key = (seed, batch_size)
    if key not in self._layouts:
      data, fmt = self.format.data, self.format
      plan = order.Plan(
          data.arrangement,
          self._weights,
          batch_size,
          data.grouped_world,
          fmt.length,
          fmt.max_images,
      )
      self._layouts[key] = order.Layout(plan, self._known, seed)
    return self._layouts[key]

  def in_order(self) -> packing.Plan:
    """Rows of each conversation once, not shuffled, for evaluation."""
    every_N = np.arange(len(self), dtype=np.int32)
    if self.format.data.arrangement != 'packed':
      return packing.alone(every_N)
    lengths_N, images_N = self._known.lengths_N, self._known.images_N
    assert lengths_N is not None and images_N is not None
    used = lengths_N > 0
    return packing.pack(
        every_N[used],
        lengths_N[used],
        images_N[used],
        row_length=self.format.length,
        max_images=self.format.max_images,
    )

  def __getstate__(self):
    """For worker processes, which are sent the layout that they follow."""
    return {**self.__dict__, '_layouts': {}, 'counts': counts.Counts()}

  def _look_through(self):
    """Finds what needs neither tokens nor pixels."""
    template = templates.get(self.format.template)
    arrangement = self.format.data.arrangement
    if not template.caption_only and arrangement == 'shuffled':
      return  # Records are not read for nothing.
    words, images_of = [], []
    for row in self._rows:
      self.ignored_answers += templates.ignored_answers(template, row.turns)
      words.append(_words(row))
      images_of.append(len(row.images))
    self._known = self._known._replace(
        images_N=np.array(images_of, np.int32), words_N=np.array(words)
    )

  def _encode_all(self):
    notes: list[counts.Note] = []
    encoded, has_image = [], []
    for index, row in enumerate(_progress(self._rows)):
      encoded.append(self._try(index, row, notes, pixels=True))
      has_image.append(bool(row.images))
    self.counts.add(notes)
    kept_N = np.array([found is not None for found in encoded], bool)
    self._check_left(kept_N, np.array(has_image, bool), notes)
    self._rows = [found.example for found in encoded if found is not None]
    lengths_N = np.array([len(x.tokens_L) for x in self._rows], np.int32)
    words_N = self._known.words_N
    self._known = self._known._replace(
        source_N=self._known.source_N[kept_N],
        lengths_N=lengths_N,
        images_N=np.array([len(x.images) for x in self._rows], np.int32),
        words_N=None if words_N is None else words_N[kept_N],
    )
    if self.format.row_length is None:
      longest = max(_row_length(x, self.format) for x in self._rows)
      self.format = self.format._replace(row_length=-(-longest // 8) * 8)

  def _measure_all(self):
    """Finds lengths without opening an image."""
    fmt = self.format
    if fmt.data.parity_mask:  # It has other tokens.
      lengths_N = np.full(len(self), fmt.length + 1, np.int32)
    else:
      lengths_N = lengths.count(
          self._rows,
          self._tok,
          fmt.template,
          fmt.vision.num_tokens,
          workers=fmt.data.num_workers,
      ).copy()
    images_N = self._known.images_N
    assert images_N is not None
    odd_N = (lengths_N > fmt.length) | (images_N > fmt.max_images)
    notes: list[counts.Note] = []
    has_image_N = images_N > 0
    for n in np.flatnonzero(odd_N):  # What is cut or dropped, `encode` decides.
      found = self._try(int(n), self._rows[int(n)], notes, pixels=False)
      lengths_N[n] = 0 if found is None else len(found.example.tokens_L)
      images_N[n] = 0 if found is None else len(found.example.images)
    self.counts.add(notes)
    self._check_left(lengths_N > 0, has_image_N, notes)
    self._known = self._known._replace(lengths_N=lengths_N, images_N=images_N)

  def _check_left(
      self,
      kept_N: np.ndarray,
      has_image_N: np.ndarray,
      notes: list[counts.Note],
  ) -> None:
    """Raises DataError if there are too few rows left of a source."""
    if not len(kept_N):
      raise sources.DataError('There are no rows; expected at least one.')
    for number, name in enumerate(self._known.sources):
      mine_N = self._known.source_N == number
      kept, has_image = kept_N[mine_N], has_image_N[mine_N]
      before = self._dropped_before[number]
      now = Counter(
          note.reason
          for note in notes
          if note.what == 'dropped' and mine_N[note.index]
      )
      rows_lib.check_left(
          name,
          (int(kept.sum()), len(kept) + before.total()),
          (int((kept & has_image).sum()), int(has_image.sum())),
          before + now,
      )

  def _load(
      self, index: int, notes: list[counts.Note]
  ) -> assemble.Loaded | None:
    found = self._rows[index]
    if isinstance(found, encode.Example):  # Small data, and noted before.
      pixels = [self._store[path].pixels_HWC for path in found.images]
      return assemble.Loaded(found, pixels)
    return self._try(index, found, notes, pixels=True)

  def _try(
      self,
      index: int,
      row: sources.Row,
      notes: list[counts.Note],
      *,
      pixels: bool,
  ) -> assemble.Loaded | None:
    """Encodes a row; None: dropped. Says what befell it in `notes`."""
    strict = self.format.data.on_bad == 'error'
    decoded = []
    try:
      example = encode.encode(row, self.format, self._tok)
      if pixels:
        decoded = [self._store[path] for path in example.images]
    except images.ImageError as error:
      message = f'{row.where}: {error}'
      if strict:
        raise sources.DataError(
            f'{message} Repair it, or drop such rows with'
            ' --config.data.on_bad=skip.'
        ) from error
      notes.append(counts.Note(index, 'dropped', 'unreadable image', message))
      return None
    except sources.BadRowError as error:
      if strict:
        raise
      notes.append(counts.Note(index, 'dropped', error.reason, str(error)))
      return None
    for path, found in zip(example.images, decoded, strict=False):
      for rule in found.rules:
        message = check.odd_image(row.where, str(path), rule)
        if strict:
          raise sources.DataError(message)
        notes.append(counts.Note(index, 'repaired', rule, message))
    if example.cut:
      notes.append(counts.Note(index, 'cut', 'cut', row.where))
    if example.blanked:
      notes.append(counts.Note(index, 'blanked', 'blanked', row.where))
    return assemble.Loaded(example, [found.pixels_HWC for found in decoded])


def _words(row: sources.Row) -> int:
  """The original's length of a conversation."""
  return sum(len(value.split()) for _, value in row.turns)


def _row_length(example: encode.Example, fmt: encode.Format) -> int:
  """The `row_length` that this conversation needs."""
  positions = len(example.tokens_L)
  if not fmt.data.parity_truncation:
    return positions
  patches = int(np.sum(example.tokens_L == config.IMAGE_TOKEN))
  return positions - patches + patches // fmt.vision.num_tokens


def _progress(rows: Sequence[sources.Row]) -> Iterable[sources.Row]:
  from rich import console, progress

  screen = console.Console(stderr=True)
  return progress.track(
      rows,
      'reading',
      console=screen,
      transient=True,
      disable=not screen.is_terminal,
  )
