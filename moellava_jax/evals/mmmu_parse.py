# SPDX-License-Identifier: Apache-2.0
"""What an answer to a question of MMMU says.

`parse_multi_choice_response`, `parse_open_response` and `eval_open` of
https://github.com/MMMU-Benchmark/MMMU, `eval/eval_utils.py`, with their
peculiarities.
"""

from collections.abc import Mapping, Sequence
import re

_STRIPPED = (',', '.', '!', '?', ';', ':', "'")
_LONG = 5  # Words beyond which the text of an option is looked for.
_KEYS = (
    'could be ',
    'so ',
    'is ',
    'thus ',
    'therefore ',
    'final ',
    'answer ',
    'result ',
)
_TRIVIAL = (':', ',', '.', '!', '?', ';', "'")
# With commas; in scientific notation; plain.
_NUMBERS = (
    r'-?\b\d{1,3}(?:,\d{3})+\b',
    r'-?\d+(?:\.\d+)?[eE][+-]?\d+',
    r'-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])',
)


def choice(text: str, options: Mapping[str, str]) -> str | None:
  """The letter that an answer names, or None.

  `(B)` before ` B `, and only in answers of more than five words the text of an
  option. Of several the last one counts; of one inside another, which end
  where they begin, the first option.
  """
  for mark in _STRIPPED:
    text = text.strip(mark)
  text = f' {text} '
  for form in ('({})', ' {} '):
    found = {
        letter: text.rfind(form.format(letter))
        for letter in options
        if form.format(letter) in text
    }
    if found:
      return max(found, key=lambda letter: found[letter])
  if len(text.split()) <= _LONG:
    return None
  lower = text.lower()
  found = {
      letter: lower.rfind(item.lower())
      for letter, item in options.items()
      if item.lower() in lower
  }
  return max(found, key=lambda letter: found[letter], default=None)


def open_answers(text: str) -> list[str | float]:
  """The strings and numbers that an open answer may mean."""
  parts = _key_parts(text)
  numbers = [
      number
      for part in parts
      for pattern in _NUMBERS
      for number in re.findall(pattern, part)
  ]
  return [value for part in [*parts, *numbers] for value in normal(part)]


def _key_parts(text: str) -> list[str]:
  """What follows `is `, `so ` and so on, line by line.

  The script means to split at sentences too, by a full stop before a capital;
  but no capital is left by then. An equals sign counts in the last line.
  """
  text = text.strip().strip('.').lower()
  lines = text.split('\n')
  found = []
  for number, line in enumerate(lines):
    keys = (*_KEYS, '=') if number == len(lines) - 1 else _KEYS
    shortest = ''
    for key in keys:
      if key in line:
        tail = line.split(key)[-1].strip()
        # An empty tail is replaced by whatever comes next.
        if not shortest or len(tail) < len(shortest):
          shortest = tail
    if shortest and shortest not in _TRIVIAL:
      found.append(shortest)
  return found or [text]


def normal(text: str) -> list[str | float]:
  """A number to two decimals, or the text in lower case.

  A single letter stands beside a space, so that it is not found in any word.
  """
  text = text.strip()
  try:
    return [round(float(text.replace(',', '')), 2)]
  except ValueError:
    text = text.lower()
    return [f' {text}', f'{text} '] if len(text) == 1 else [text]


def is_right(said: Sequence[str | float], gold: Sequence[str]) -> bool:
  """Whether a gold number is among those said, or a gold text within one."""
  golds = [value for text in gold for value in normal(text)]
  for value in said:
    if isinstance(value, str):
      if any(isinstance(g, str) and g in value for g in golds):
        return True
    elif value in golds:
      return True
  return False
