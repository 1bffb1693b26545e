# SPDX-License-Identifier: Apache-2.0
"""Rows and their images, checked and made ready to be stored, in processes.

`prepare` and `builders` share this: a chunk of raw rows goes to a process,
which applies the rules of `check`, opens every image once and counts tokens.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import io
import itertools
import multiprocessing
from typing import Any, NamedTuple

from PIL import Image

from moellava_jax.data import (
    check,
    images,
    lengths,
    processes,
    published,
    rows,
)
from moellava_jax.data import tokenizer as tokenizer_lib

CHUNK = 16  # Rows.


class Settings(NamedTuple):
  """What decides the outcome; goes to every process."""

  images: str  # The image root.
  on_bad: str
  attributes: bool
  stored_as: rows.StoredAs | None
  tokenizer: str | None  # A directory; None: words are counted.
  family: str | None  # Of the tokenizer, see `tokenizer.load`.
  template: str
  image_tokens: int


class Inspected(NamedTuple):
  """What became of a raw row."""

  row: rows.Row | None
  files: dict[str, bytes]  # Images that were not known, by path, to be stored.
  dropped: check.Dropped | None
  repaired: tuple[str, ...]  # Rules.
  source: str
  length: int  # Positions, or words; 0 for dropped rows.


class Inspector:
  """The work of one process."""

  def __init__(self, settings: Settings):
    self._settings = settings
    self._tok = None
    if settings.tokenizer is not None:
      self._tok = tokenizer_lib.load(settings.tokenizer, settings.family)

  def chunk(self, raws: Sequence[check.Raw], known: frozenset[str]):
    """Inspects rows; images in `known` were opened before."""
    seen: dict[str, bytes] = {}
    return [self._inspect(raw, known, seen) for raw in raws]

  def _inspect(
      self, raw: check.Raw, known, seen: dict[str, bytes]
  ) -> Inspected:
    settings = self._settings
    checker = check.Checker(
        settings.images, settings.on_bad, settings.attributes
    )
    row = checker.row(raw)
    files: dict[str, bytes] = {}
    if row is not None:
      try:
        for path in map(str, row.images):
          if path not in known and path not in seen:
            seen[path], rules = self._file(path)
            checker.image(row.where, path, rules)
          if path in seen:
            files[path] = seen[path]
      except images.ImageError as error:
        checker.drop(row.where, 'unreadable image', f'{row.where}: {error}')
        row, files = None, {}
    return Inspected(
        row,
        files,
        checker.dropped[0] if checker.dropped else None,
        tuple(checker.repaired),
        published.source_of(_first_image(raw.value)),
        0 if row is None else self._length(row),
    )

  def _file(self, path: str) -> tuple[bytes, tuple[str, ...]]:
    """The bytes to store of an image, which is decoded in full, and by which
    rules."""
    file = images.locate(self._settings.images, path)
    data = images.content(file)
    opened = images.examine(data, str(file))
    if (stored_as := self._settings.stored_as) is not None:
      data = _resized(opened.image, stored_as)
    return data, opened.rules

  def _length(self, row: rows.Row) -> int:
    settings = self._settings
    if self._tok is None:
      words = sum(len(value.split()) for _, value in row.turns)
      return words + len(row.images) * settings.image_tokens
    return lengths.of_row(
        row, self._tok, settings.template, settings.image_tokens
    )


def _resized(image: Image.Image, as_: rows.StoredAs) -> bytes:
  pixels_HWC = images.preprocess(
      image, as_.size, as_.aspect, as_.resize, as_.mean
  )
  file = io.BytesIO()
  small = Image.fromarray(pixels_HWC)
  if as_.encoding == 'raw':
    small.save(file, 'ppm')
  else:
    small.save(file, 'jpeg', quality=95, subsampling=0)
  return file.getvalue()


def _first_image(raw: Any) -> str | None:
  """The path by which a row is counted, however broken the row is."""
  value = raw.get('image') if isinstance(raw, dict) else None
  value = value[0] if isinstance(value, list) and value else value
  return value if isinstance(value, str) and value else None


_inspector: list[Inspector] = []  # One in each process.


def _start(settings: Settings) -> None:
  processes.end_with_parent()
  _inspector.append(Inspector(settings))


def _chunk(raws: Sequence[check.Raw], known: frozenset[str]) -> list[Inspected]:
  return _inspector[0].chunk(raws, known)


class Pool:
  """Processes that inspect chunks; none for `workers=0`, only this one."""

  def __init__(self, settings: Settings, workers: int):
    self._executor = self._inspector = None
    if not workers:
      self._inspector = Inspector(settings)
      return
    self._executor = futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context('spawn'),
        initializer=_start,
        initargs=(settings,),
    )
    self._window = 2 * workers + 2  # Chunks; bounds the memory.

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_) -> None:
    if self._executor is not None:
      self._executor.shutdown(cancel_futures=True)

  def inspect(
      self, raws: Iterable[check.Raw], is_known: Callable[[str], bool]
  ) -> Iterator[Inspected]:
    """Yields in order; all are done when it ends.

    Args:
      raws: rows.
      is_known: whether an image was opened, and is not wanted again.
    """
    iterator = iter(raws)
    pending: deque[Any] = deque()
    while chunk := list(itertools.islice(iterator, CHUNK)):
      known = frozenset(
          path for raw in chunk for path in _paths(raw.value) if is_known(path)
      )
      if self._executor is None:
        assert self._inspector is not None
        yield from self._inspector.chunk(chunk, known)
        continue
      pending.append(self._executor.submit(_chunk, chunk, known))
      if len(pending) >= self._window:
        yield from pending.popleft().result()
    while pending:
      yield from pending.popleft().result()


def _paths(raw: Any) -> list[str]:
  value = raw.get('image') if isinstance(raw, dict) else None
  values = value if isinstance(value, list) else [value]
  return [v for v in values if isinstance(v, str)]
