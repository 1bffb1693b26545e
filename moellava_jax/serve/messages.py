# SPDX-License-Identifier: Apache-2.0
"""`messages` of a chat completion -> turns of a conversation and its images."""

import re
from typing import Any, NamedTuple

from moellava_jax.data import templates
from moellava_jax.serve import errors

_MAX_MESSAGES = 1024
_SIDES = {'user': 'human', 'assistant': 'gpt'}
_SYSTEM = ('system', 'developer')
_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f]')
_FIELDS = frozenset({'role', 'content', 'name', 'refusal', 'annotations'})


class Picture(NamedTuple):
  """An image as it was given."""

  url: str
  param: str  # Where, for messages.


class Conversation(NamedTuple):
  """What `messages` say."""

  system: str | None
  turns: tuple[templates.Turn, ...]
  images: tuple[Picture, ...]


def parse(value: Any) -> Conversation:
  """Reads `messages`.

  Neighbours of one role are joined by a newline, as templates alternate. The
  images of a message come before its text, in which models are trained; only
  where text stands between images, all stay where they are.

  Raises:
    ApiError: 400; it names the message.
  """
  if not isinstance(value, list) or not value:
    raise errors.bad(
        f'messages={errors.shown(value)}: expected a list of at least one'
        ' message.',
        'messages',
    )
  if len(value) > _MAX_MESSAGES:
    raise errors.too_long(
        f'{len(value)} messages: expected at most {_MAX_MESSAGES}.'
    )
  system: list[str] = []
  turns: list[templates.Turn] = []
  images: list[Picture] = []
  for i, message in enumerate(value):
    where = f'messages.{i}'
    role, content = _role_and_content(message, where)
    if role in _SYSTEM:
      if turns:
        raise errors.bad(
            f'{where} is from {role}: expected only before the first question.',
            f'{where}.role',
        )
      system.append(_only_text(content, role, where))
      continue
    if role == 'assistant':
      said = _only_text(content, role, where)
    else:
      said = _question(content, where, images)
    side = _SIDES[role]
    if turns and turns[-1][0] == side:
      said = f'{turns.pop()[1]}\n{said}'
    elif not turns and side != 'human':
      raise errors.bad(
          f'{where} is from {role}: expected a message from user first.',
          f'{where}.role',
      )
    turns.append((side, said))
  if not turns or turns[-1][0] != 'human':
    raise errors.bad(
        'The last message is not from user: expected a question there.',
        'messages',
    )
  joined = '\n'.join(part for part in system if part.strip())
  return Conversation(joined or None, tuple(turns), tuple(images))


def text(value: Any, param: str, *, of_model: bool = False) -> str:
  """Returns `value` if it is a text that a tokenizer can read.

  Args:
    value: what was given.
    param: the field, for messages.
    of_model: whether it is an answer, which may hold control characters.

  Raises:
    ApiError: 400: not a text, or one with half a surrogate pair, a control
      character other than tab and line ends, or the mark of an image.
  """
  if not isinstance(value, str):
    raise errors.bad(f'{param}={errors.shown(value)}: expected a text.', param)
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise errors.bad(
        f'{param} is not Unicode: half a surrogate pair at character'
        f' {error.start}.',
        param,
    ) from None
  found = None if of_model else _CONTROL.search(value)
  if found is not None:
    raise errors.bad(
        f'{param} has the control character {found.group()!a} at'
        f' {found.start()}; leave it out.',
        param,
    )
  if templates.IMAGE in value:
    raise errors.bad(
        f'{param} holds {templates.IMAGE!r}, which stands for an image: send'
        ' the image as a part of type image_url.',
        param,
    )
  return value


def _role_and_content(message: Any, where: str) -> tuple[str, Any]:
  if not isinstance(message, dict):
    raise errors.bad(
        f'{where}={errors.shown(message)}: expected an object with role and'
        ' content.',
        where,
    )
  role = message.get('role')
  if role not in (*_SIDES, *_SYSTEM):
    raise errors.bad(
        f'{where}.role={errors.shown(role)}: expected one of'
        f' {[*_SIDES, *_SYSTEM]}.',
        f'{where}.role',
    )
  unknown = {k for k in message if message[k] is not None} - _FIELDS
  if unknown:
    raise errors.bad(
        f'{where} has {errors.shown(min(unknown))}, which is not supported;'
        f' known are {sorted(_FIELDS)}.',
        where,
    )
  return role, message.get('content')


def _parts(content: Any, where: str) -> list[tuple[str, Any]]:
  """[('text' | 'image_url', its value)] of a content."""
  if isinstance(content, str):
    return [('text', content)]
  if not isinstance(content, list) or not content:
    raise errors.bad(
        f'{where}.content={errors.shown(content)}: expected a text or a list'
        ' of parts.',
        f'{where}.content',
    )
  parts = []
  for i, part in enumerate(content):
    kind = part.get('type') if isinstance(part, dict) else None
    if kind not in ('text', 'image_url') or kind not in part:
      raise errors.bad(
          f'{where}.content.{i}={errors.shown(part)}: expected an object of'
          ' type text or image_url, with a field of that name.',
          f'{where}.content.{i}',
      )
    parts.append((kind, part[kind]))
  return parts


def _only_text(content: Any, role: str, where: str) -> str:
  parts = _parts(content, where)
  if any(kind != 'text' for kind, _ in parts):
    raise errors.bad(
        f'{where} holds an image: expected images in messages from user.',
        f'{where}.content',
    )
  param, of_model = f'{where}.content', role == 'assistant'
  return '\n'.join(text(v, param, of_model=of_model) for _, v in parts)


def _question(content: Any, where: str, images: list[Picture]) -> str:
  """The text of a question; its images are added to `images`."""
  said = []
  for i, (kind, value) in enumerate(_parts(content, where)):
    param = f'{where}.content.{i}'
    if kind == 'text':
      said.append(text(value, param))
    else:
      images.append(Picture(_url(value, f'{param}.image_url'), param))
      said.append(templates.IMAGE)
  marks = [part for part in said if part == templates.IMAGE]
  if said[-len(marks) :] == marks:
    said = marks + said[: len(said) - len(marks)]
  return '\n'.join(said)


def _url(value: Any, param: str) -> str:
  # Some clients send the address itself.
  url = value.get('url') if isinstance(value, dict) else value
  if not isinstance(url, str) or not url:
    raise errors.bad(
        f'{param}={errors.shown(value)}: expected {{"url": "data:image/png;'
        'base64,..."}.',
        param,
    )
  return url
