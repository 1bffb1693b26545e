# SPDX-License-Identifier: Apache-2.0
"""JSON files of any size, one row at a time.

Reads an array, or JSON lines (a file called .jsonl, or one whose first line is
a conversation). Only a window of the text is in memory: LLaVA's mixes have up
to 1.4 GB.
"""

from collections.abc import Callable, Iterator
import json
from typing import Any, NamedTuple

from moellava_jax.data import rows

# A quote that is never closed must not pull the rest of a file into memory.
LONGEST = 1 << 26  # Characters of a row.
_BLOCK = 1 << 20
_SPACE = ' \t\r\n'
NO_NUMBER = 'null for NaN, infinities and endless numbers'
ENCODING = 'a byte order mark left out, UTF-16 and UTF-32 decoded'
_BOMS = (
    (b'\xef\xbb\xbf', 'utf-8-sig'),
    (b'\xff\xfe\x00\x00', 'utf-32'),
    (b'\x00\x00\xfe\xff', 'utf-32'),
    (b'\xff\xfe', 'utf-16'),
    (b'\xfe\xff', 'utf-16'),
)


class Broken(NamedTuple):
  """What stands in for a row, or for the rest of a file, that is no JSON."""

  message: str


class Item(NamedTuple):
  """A row as it is (or `Broken`), and by which rules it was made readable."""

  value: Any
  rules: tuple[str, ...]


def read(
    path: str, watch: Callable[[int], object] | None = None
) -> Iterator[Item]:
  """Yields the rows of a file as they are, and `Broken` where it is no JSON.

  A broken line of JSON lines costs that line; in an array nothing says where
  the next row begins, so the rest of the file is lost. Bytes that are no UTF-8
  become lone surrogates, which `check` knows how to treat. The rule of an
  encoding is named at the first row.

  Args:
    path: of the file.
    watch: is told the number of characters of each block that is read.

  Raises:
    DataError: the file is missing or may not be read.
  """
  try:
    with open(path, 'rb') as file:
      start = file.read(4)
    encoding = next((e for bom, e in _BOMS if start.startswith(bom)), None)
    with open(
        path,
        encoding=encoding or 'utf-8',
        errors='replace'
        if encoding in ('utf-16', 'utf-32')
        else 'surrogateescape',
    ) as file:
      window = _Window(file, watch)
      if encoding:
        window.rules.append(ENCODING)
      for value in _rows(path, window):
        yield Item(value, tuple(window.rules))
        window.rules.clear()
  except OSError as error:
    what = (
        'does not exist'
        if isinstance(error, FileNotFoundError)
        else f'cannot be read: {error.strerror}'
    )
    raise rows.DataError(
        f"{path} {what}; point --config.data.json (or the stage's data.json) at"
        ' a LLaVA JSON file, or at a prepared directory.'
    ) from error


class _BadJson(Exception):
  pass


class _Window:
  """The part of a file's text that is in memory, and a place in it."""

  def __init__(self, file, watch):
    self._file, self._watch = file, watch
    self._decoder = json.JSONDecoder(
        parse_int=self._integer, parse_constant=self._no_number
    )
    self.rules: list[str] = []  # Of the value that was read last.
    self._text, self._at, self._ended = '', 0, False
    self._lines = self._column = 0  # Before `_text`.

  def _integer(self, digits: str) -> int | None:
    """Python refuses to read longer ones."""
    return int(digits) if len(digits) < 4300 else self._no_number(digits)

  def _no_number(self, _: str) -> None:
    if NO_NUMBER not in self.rules:
      self.rules.append(NO_NUMBER)

  def _more(self) -> bool:
    """Reads on, at least as much as is unread; False at the end."""
    if self._ended:
      return False
    block = self._file.read(max(_BLOCK, len(self._text) - self._at))
    if not block:
      self._ended = True
      return False
    if self._watch is not None:
      self._watch(len(block))
    before = self._text[: self._at]
    self._lines += before.count('\n')
    self._column = (
        len(before)
        - before.rfind('\n')
        - 1
        + (0 if '\n' in before else self._column)
    )
    self._text = self._text[self._at :] + block
    self._at = 0
    return True

  def peek(self) -> str:
    """The next character that is no space; '' at the end."""
    while True:
      while self._at < len(self._text):
        if (character := self._text[self._at]) not in _SPACE:
          return character
        self._at += 1
      if not self._more():
        return ''

  def skip(self) -> None:
    self._at += 1

  def skip_line(self) -> None:
    while (end := self._text.find('\n', self._at)) < 0:
      self._at = len(self._text)
      if not self._more():
        return
    self._at = end + 1

  def value(self) -> Any:
    """Reads a value; raises _BadJson, and stays where it is."""
    while True:
      try:
        value, end = self._decoder.raw_decode(self._text, self._at)
        # A number may go on in the next block.
        if end < len(self._text) or not self._more():
          self._at = end
          return value
      except RecursionError:
        raise _BadJson(f'nested too deeply {self.place(self._at)}') from None
      except json.JSONDecodeError as error:
        cut = error.msg.startswith('Unterminated')
        cut |= error.pos > len(self._text) - 16
        if len(self._text) - self._at > LONGEST:
          raise _BadJson(
              f'a row of more than {LONGEST} characters {self.place(self._at)}'
          ) from None
        if not cut or not self._more():
          raise _BadJson(f'{error.msg} {self.place(error.pos)}') from None

  def place(self, at: int | None = None) -> str:
    at = self._at if at is None else at
    line = self._lines + self._text.count('\n', 0, at) + 1
    newline = self._text.rfind('\n', 0, at)
    column = at - newline + (self._column if newline < 0 else 0)
    return f'at line {line} column {column}'


def _rows(path: str, window: _Window) -> Iterator[Any]:
  first = window.peek()
  if first == '[' and not path.endswith(('.jsonl', '.ndjson')):
    window.skip()
    yield from _array(path, window)
  elif first:
    yield from _lines(path, window)


def _broken(path: str, error: object) -> Broken:
  return Broken(
      f'{path} is not valid JSON: {error}; expected an array of conversations.'
  )


def _array(path: str, window: _Window) -> Iterator[Any]:
  if window.peek() == ']':
    window.skip()
  else:
    while True:
      try:
        if not window.peek():
          raise _BadJson(f'it ends within the array {window.place()}')
        yield window.value()
        mark = window.peek()
        if mark not in (',', ']') or not mark:
          raise _BadJson(f"expected ',' or ']' {window.place()}")
      except _BadJson as error:
        yield _broken(path, error)
        return
      window.skip()
      if mark == ']':
        break
  if window.peek():
    yield _broken(path, f'more text behind the array {window.place()}')


def _lines(path: str, window: _Window) -> Iterator[Any]:
  named = path.endswith(('.jsonl', '.ndjson'))
  while window.peek():
    try:
      value = window.value()
    except _BadJson as error:
      yield _broken(path, error)
      if not named:
        return
      window.skip_line()
      continue
    if not named and not (isinstance(value, dict) and 'conversations' in value):
      yield Broken(
          f'{path} holds a {type(value).__name__}; expected an array of'
          ' {"id", "image", "conversations"}.'
      )
      return
    yield value
