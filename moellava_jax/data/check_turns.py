# SPDX-License-Identifier: Apache-2.0
"""The rules of `check` for what is said: roles, turns and `<image>` marks."""

from typing import Any, NamedTuple

from moellava_jax.data import templates

_KNOWN = ('human', 'gpt')  # In the order in which they alternate.
_ROLES = {
    'human': 'human',
    'user': 'human',
    'gpt': 'gpt',
    'assistant': 'gpt',
    'chatgpt': 'gpt',
    'bot': 'gpt',
    'model': 'gpt',
}


class Turn(NamedTuple):
  number: int  # In the file.
  role: str
  value: str


def turns(raw: Any, notes) -> list[Turn]:
  if not isinstance(raw, list) or not raw:
    raise notes.bad(
        'no conversation',
        f': "conversations" is {str(raw)[:60]!r}; expected an array of'
        ' {"from": "human" | "gpt", "value": text}.',
    )
  turns = [_turn(number, turn, notes) for number, turn in enumerate(raw)]
  if turns[0].role == 'system':
    notes.repair(
        'a turn from "system" left out',
        'turn 0 is from \'system\'; expected "human" or "gpt".',
    )
    turns = turns[1:]
  if turns and turns[0].role == 'gpt':
    turns = turns[1:]
    if turns:
      notes.repair(
          'a first turn from "gpt" left out',
          'begins with an answer; expected human, then gpt.',
      )
  for place, (number, role, _) in enumerate(turns):
    if role != _KNOWN[place % 2]:
      raise notes.bad(
          'turns do not alternate',
          f': turn {number} is from {role!r}; human and gpt alternate.',
      )
  if len(turns) < 2:
    raise notes.bad('no answer', 'has no answer; expected human, then gpt.')
  if len(turns) % 2:
    notes.repair(
        'a last question without answer kept, not supervised',
        'ends with a question; expected an answer to it.',
    )
  return turns


def _turn(number: int, turn: Any, notes) -> Turn:
  given = turn.get('from') if isinstance(turn, dict) else None
  value = turn.get('value') if isinstance(turn, dict) else None
  if not isinstance(given, str) or not isinstance(value, str):
    raise notes.bad(
        'malformed turn',
        f'turn {number} is {str(turn)[:60]!r}; expected'
        ' {"from": "human" | "gpt", "value": text}.',
    )
  if not value.isascii():
    value = notes.text(value, f'turn {number}')
  if given in _KNOWN or (given == 'system' and not number):
    return Turn(number, given, value)
  role = _ROLES.get(given.strip().lower())
  if role is None:
    raise notes.bad(
        'unknown role',
        f'turn {number} is from {given[:60]!r}; expected "human" or "gpt".',
    )
  notes.repair(
      'human and gpt for other names of them',
      f'turn {number} is from {given!r}; expected "human" or "gpt".',
  )
  return Turn(number, role, value)


def marked(turns: list[Turn], paths: list[str], notes) -> list[Turn]:
  """Turns with as many marks as there are images."""
  mark = templates.IMAGE
  marks = sum(turn.value.count(mark) for turn in turns)
  if marks == len(paths):
    return turns
  message = (
      f'has {marks} {mark} marks and {len(paths)} images; write one mark for'
      ' each image into the human turns.'
  )
  asked = sum(turn.value.count(mark) for turn in turns if turn.role == 'human')
  if not marks:
    notes.repair('a mark for each image before the first question', message)
    first = turns[0]
    return [
        first._replace(value=f'{mark}\n' * len(paths) + first.value),
        *turns[1:],
    ]
  if asked == len(paths):
    notes.repair('no marks in answers', message)
    return [
        turn
        if turn.role == 'human'
        else turn._replace(value=turn.value.replace(mark, ''))
        for turn in turns
    ]
  raise notes.bad('images and <image> marks differ', message)


def without_empty(turns: list[Turn], notes) -> list[Turn]:
  """Turns without the exchanges of which one side says nothing."""
  if all(turn.value and not turn.value.isspace() for turn in turns):
    return turns
  kept, marks = [], ''
  for place in range(0, len(turns), 2):
    exchange = turns[place : place + 2]
    empty = next((turn for turn in exchange if not turn.value.strip()), None)
    if empty is None:
      question = exchange[0]
      kept.append(question._replace(value=marks + question.value))
      kept += exchange[1:]
      marks = ''
      continue
    kind = 'answer' if empty.role == 'gpt' else 'question'
    notes.repair(
        'exchanges with an empty side left out',
        f'turn {empty.number} is an empty {kind}; remove it.',
    )
    marks += f'{templates.IMAGE}\n' * exchange[0].value.count(templates.IMAGE)
  if len(kept) < 2 or marks:
    raise notes.bad('empty answers only', 'has no exchange that says anything.')
  return kept
