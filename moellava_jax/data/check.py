# SPDX-License-Identifier: Apache-2.0
r"""What a row must be, and the rules that repair one.

The same rules hold for training from JSON and for `prepare`. With
`on_bad=error` the first row that is dropped or repaired stops the run, with
its file and number; with `on_bad=skip` it is counted, and no row stops it.

Read as it is, in both modes:

  ids that are numbers, other fields not looked at
  ./ and ../ in a path               if it stays below the image root
  links in the image root            wherever they lead
  any image file that Pillow reads   palettes and transparency as the original
                                     does; text behind its end

Repaired:

  a byte order mark, UTF-16, UTF-32  left out; decoded
  NaN, infinities, endless numbers   null in their place, in any field
  lone surrogates, bytes not UTF-8   U+FFFD in their place
  an id that is no text or number,   the number of the row
  or longer than 256 characters
  an id that a row before it has     the number of the row behind it
  user, assistant, Human, GPT, ...   human, gpt
  a first turn from system, or gpt   left out, the latter as in the original
  a last question without answer     kept, not supervised
  an empty question or answer        the exchange is left out, its `<image>`
                                     marks go to the next question
  more than 131072 characters        kept; cut where its row ends, or dropped
                                     (`on_long`)
  "image": null, "" or []            no image, if there is no mark either
  images, but no mark at all         a mark each, before the first question
  marks beyond the images, in        removed there: they are text
  answers
  X.jpg is missing, X.gif or X.png   that file (OCR-VQA is like this); also
  is there; X has no extension       other capitals
  a\b.jpg, spaces around a path      a/b.jpg
  a PNG called X.jpg                 read as what it is
  an animation                       its first frame
  CMYK; grey of more than 8 bits     RGB; clipped at 255: as in the original

Dropped, by reason: see `REASONS`. An image is opened by `prepare`, or when
training first needs it (`images.examine`); one of more than 89 million pixels,
or of a single one, is unreadable. What `prepare` or `builders` wrote was
checked then. Training stops after all if, before it begins, more than half of
the rows of a source are dropped, or all of those with images.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
import re
from typing import Any, NamedTuple

from moellava_jax.data import check_images, check_turns, rows, stream

REASONS = (
    'not JSON',
    'not an object',
    'no conversation',
    'malformed turn',
    'unknown role',
    'turns do not alternate',
    'no answer',
    'empty answers only',
    'malformed "image"',
    'more images than the original takes',
    'video',
    'images and <image> marks differ',
    'image outside the image root',
    'missing image',
    'unreadable image',
    'malformed attributes',
    # When it is made a row of training (`examples`):
    'more images than max_images',
    'images or answers beyond the end of the row',
    'longer than the row',
)
_SURROGATE = re.compile('[\ud800-\udfff]')
_LONGEST_ID = 256
_LONGEST_ROW = 1 << 17  # Characters; some 30,000 tokens.


class Dropped(NamedTuple):
  """A row that was left out."""

  where: str
  reason: str
  message: str


class Raw(NamedTuple):
  """A row of a file, before anything about it is known."""

  value: Any  # Or `stream.Broken`.
  path: str
  number: int
  rules: tuple[str, ...]  # By which its text was made readable.
  first: int | None  # The row before it that has its id.


def read(
    path: str, watch: Callable[[int], object] | None = None
) -> Iterator[Raw]:
  """Yields the rows of a file, see `stream.read`."""
  seen: dict[int, int] = {}  # Hashes of ids: of millions, in little memory.
  for number, (value, rules) in enumerate(stream.read(path, watch)):
    first = None
    if isinstance(value, dict) and (identity := _usable_id(value)) is not None:
      first = seen.setdefault(hash(identity), number)
    yield Raw(value, path, number, rules, None if first == number else first)


class Checker:
  """Raw rows -> rows, by the rules above.

  Attributes:
    dropped: what was left out, in order.
    repaired: number of rows by rule.
    with_images: number of rows that name an image, used or not.
  """

  def __init__(self, root: str, on_bad: str, attributes: bool):
    """See `sources.read` for the arguments."""
    self._root, self._attributes = root, attributes
    self._strict = on_bad == 'error'
    self.dropped: list[Dropped] = []
    self.repaired: Counter[str] = Counter()
    self.with_images = 0

  @property
  def reasons(self) -> Counter[str]:
    return Counter(drop.reason for drop in self.dropped)

  def row(self, raw: Raw) -> rows.Row | None:
    """The row; None: it is dropped.

    Raises:
      DataError: `on_bad=error`, and the row is not as it should be.
    """
    if isinstance(raw.value, dict) and raw.value.get('image'):
      self.with_images += 1
    notes = _Notes(f'{raw.path} row {raw.number}', self._strict)
    try:
      row = _row(raw, self._root, self._attributes, notes)
    except rows.BadRowError as error:
      self.drop(notes.where, error.reason, str(error))
      return None
    self.repaired.update(notes.rules)
    return row

  def drop(self, where: str, reason: str, message: str) -> None:
    """Counts a row that cannot be used, or stops."""
    if self._strict:
      raise rows.DataError(
          f'{message} Repair it, or drop such rows with'
          ' --config.data.on_bad=skip.'
      )
    self.dropped.append(Dropped(where, reason, message))

  def image(self, where: str, path: str, rules: Sequence[str]) -> None:
    """Counts by which rules an image of a row was opened, or stops."""
    if rules and self._strict:
      raise rows.DataError(odd_image(where, path, rules[0]))
    self.repaired.update(set(rules) - set(self.repaired))


def odd_image(where: str, path: str, rule: str) -> str:
  """The message that stops at an image which a rule would repair."""
  return (
      f'{where}: image {path!r} is not what it should be. With'
      f' --config.data.on_bad=skip: {rule}.'
  )


class _Notes:
  """Where a row is, and by which rules it was repaired."""

  def __init__(self, where: str, strict: bool):
    self.where, self._strict = where, strict
    self.rules: set[str] = set()

  def repair(self, rule: str, message: str) -> None:
    if self._strict:
      raise rows.DataError(
          f'{self._at(message)} With --config.data.on_bad=skip: {rule}.'
      )
    self.rules.add(rule)

  def bad(self, reason: str, message: str) -> rows.BadRowError:
    return rows.BadRowError(reason, self._at(message))

  def _at(self, message: str) -> str:
    return self.where + ('' if message.startswith(':') else ' ') + message

  def text(self, value: str, what: str) -> str:
    if value.isascii() or not _SURROGATE.search(value):
      return value
    self.repair(
        'U+FFFD for what is no Unicode text',
        f'{what} holds lone surrogates, or bytes that are no UTF-8.',
    )
    return _SURROGATE.sub('\ufffd', value)


def _row(raw: Raw, root: str, with_attributes: bool, notes) -> rows.Row:
  value = raw.value
  if isinstance(value, stream.Broken):
    raise rows.BadRowError('not JSON', value.message)
  for rule in raw.rules:
    notes.repair(rule, 'is not written as JSON is.')
  if not isinstance(value, dict):
    raise notes.bad(
        'not an object', f'is a {type(value).__name__}; expected an object.'
    )
  identity = _identity(raw, notes)
  notes.where += f' (id {identity})'
  if value.get('video'):
    raise notes.bad('video', 'has a "video"; only images are supported.')
  turns = check_turns.turns(value.get('conversations'), notes)
  length = sum(len(turn.value) for turn in turns)
  if length > _LONGEST_ROW:
    notes.repair(
        f'more than {_LONGEST_ROW} characters: cut at the end of its row',
        f'has {length} characters; expected at most {_LONGEST_ROW}.',
    )
  paths = check_images.paths(value, notes)
  attributes = None
  if with_attributes:  # Whose questions are empty, and have no marks.
    attributes = _attributes(value, notes)
  else:
    turns = check_turns.marked(turns, paths, notes)
    turns = check_turns.without_empty(turns, notes)
  return rows.Row(
      notes.where,
      identity,
      tuple(check_images.find(root, path, notes) for path in paths),
      tuple((turn.role, turn.value) for turn in turns),
      attributes,
  )


def _usable_id(row: dict[str, Any]) -> str | None:
  value = row.get('id')
  if isinstance(value, str | int | float) and len(str(value)) <= _LONGEST_ID:
    return str(value)
  return None


def _identity(raw: Raw, notes) -> str:
  if 'id' not in raw.value:
    return str(raw.number)
  if (identity := _usable_id(raw.value)) is None:
    notes.repair(
        'the number of the row for an "id" that is none',
        f': "id" is {str(raw.value["id"])[:60]!r}; expected a text of at most'
        f' {_LONGEST_ID} characters.',
    )
    return str(raw.number)
  identity = notes.text(identity, '"id"')
  if raw.first is None:
    return identity
  notes.repair(
      'the number of the row behind an "id" that repeats',
      f': "id" is {identity!r}, as of row {raw.first}.',
  )
  return f'{identity}#{raw.number}'


def _attributes(raw: dict[str, Any], notes) -> list[list[int]]:
  values = raw.get('attributes')
  if (
      not isinstance(values, list)
      or not values
      or not all(isinstance(v, list) for v in values)
      or len({len(v) for v in values}) != 1
      or not all(type(x) is int for v in values for x in v)
  ):
    raise notes.bad(
        'malformed attributes',
        f': "attributes" is {str(values)[:60]!r}; expected as many class'
        ' numbers for each patch of the image.',
    )
  return values
