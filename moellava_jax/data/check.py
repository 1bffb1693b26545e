# SPDX-License-Identifier: Apache-2.0
r"""What a row must be, and the rules that repair one.

The same rules hold for training from JSON and for `prepare`. With
`on_bad=error` the first row that is dropped or repaired stops the run, with
its file and number; with `on_bad=skip` it is counted, and no row stops it.

Read as it is, in both modes:

  a byte order mark, UTF-16          decoded
  ids that repeat, or are numbers    kept: LLaVA's mixes are full of them
  NaN, or anything, in other fields  not looked at
  a first turn from gpt              left out, as in the original
  a last question without answer     kept, not supervised
  any image file that Pillow reads   whatever its name says; the first frame
                                     of an animation, CMYK and palettes as RGB,
                                     grey of 16 bits clipped at 255: all this as
                                     in the original

Repaired:

  lone surrogates, bytes not UTF-8   U+FFFD in their place
  an id that is no text or number,   the number of the row
  or longer than 256 characters
  user, assistant, Human, GPT, ...   human, gpt
  a first turn from system           left out
  an empty question or answer        the exchange is left out, its `<image>`
                                     marks go to the next question
  "image": null, "" or []            no image, if there is no mark either
  images, but no mark at all         a mark each, before the first question
  marks beyond the images, in        removed there: they are text
  answers
  X.jpg is missing, X.gif or X.png   that file (OCR-VQA is like this); also
  is there; X has no extension       other capitals
  a\b.jpg, spaces around a path      a/b.jpg

Dropped, by reason: see `REASONS`. An image is opened by `prepare`, or when
training first needs it (`images.decode`).
"""

from collections import Counter
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
)
_SURROGATE = re.compile('[\ud800-\udfff]')
_LONGEST_ID = 256


class Dropped(NamedTuple):
  """A row that was left out."""

  where: str
  reason: str
  message: str


class Checker:
  """Raw rows -> rows, by the rules above.

  Attributes:
    dropped: what was left out, in order.
    repaired: number of rows by rule.
  """

  def __init__(self, root: str, on_bad: str, attributes: bool):
    """See `sources.read` for the arguments."""
    self._root, self._attributes = root, attributes
    self._strict = on_bad == 'error'
    self.dropped: list[Dropped] = []
    self.repaired: Counter[str] = Counter()

  @property
  def reasons(self) -> Counter[str]:
    return Counter(drop.reason for drop in self.dropped)

  def row(self, raw: Any, path: str, number: int) -> rows.Row | None:
    """The row `number` of the file `path`; None: it is dropped.

    Raises:
      DataError: `on_bad=error`, and the row is not as it should be.
    """
    notes = _Notes(f'{path} row {number}', self._strict)
    try:
      row = _row(raw, number, self._root, self._attributes, notes)
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


def _row(raw: Any, number, root, with_attributes: bool, notes) -> rows.Row:
  if isinstance(raw, stream.Broken):
    raise rows.BadRowError('not JSON', raw.message)
  if not isinstance(raw, dict):
    raise notes.bad(
        'not an object', f'is a {type(raw).__name__}; expected an object.'
    )
  identity = _identity(raw, number, notes)
  notes.where += f' (id {identity})'
  if raw.get('video'):
    raise notes.bad('video', 'has a "video"; only images are supported.')
  turns = check_turns.turns(raw.get('conversations'), notes)
  paths = check_images.paths(raw, notes)
  attributes = None
  if with_attributes:  # Whose questions are empty, and have no marks.
    attributes = _attributes(raw, notes)
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


def _identity(raw: dict[str, Any], number: int, notes) -> str:
  value = raw.get('id', number)
  if isinstance(value, str | int | float) and len(str(value)) <= _LONGEST_ID:
    return notes.text(str(value), '"id"')
  notes.repair(
      'the number of the row for an "id" that is none',
      f': "id" is {str(value)[:60]!r}; expected a text of at most'
      f' {_LONGEST_ID} characters.',
  )
  return str(number)


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
