# SPDX-License-Identifier: Apache-2.0
"""The original's text and ids of a conversation, for `parity`.

It repeats `get_prompt` of `moellava/conversation.py`, `tokenizer_image_token`
and the stop keywords of `moellava/mm_utils.py`, and `preprocess_multimodal` of
`moellava/train/train.py`, their odd cases included.
"""

from collections.abc import Sequence

from moellava_jax import config
from moellava_jax.data import templates
from moellava_jax.data import tokenizer as tokenizer_lib

MAX_IMAGES = 16
ROLES = ('human', 'gpt')
_VIDEO = '<video>'


def prompt(
    template: templates.Template, turns: Sequence[tuple[str, str | None]]
) -> str:
  """Renders as `get_prompt` does: an empty turn is left open, without a stop.

  Roles need not alternate; an answer's separator goes by its position. The
  template's own example has to be among the turns if it is wanted.

  Raises:
    UserError: a caption-only template and an answer, for which the original
      has no separator; `llama_2` without a first question; an unknown role.
  """
  names = [template.roles[side(role)] for role, _ in turns]
  messages = [message for _, message in turns]
  if template.style == 'plain':
    if any(messages[1::2]):
      raise config.UserError(
          'The original cannot render an answer with a caption-only template.'
      )
    return ''.join(m + template.sep for m in messages[0::2] if m)
  if template.style == 'llama_2':
    return _llama_2(template, messages)
  colon, space = ('', '') if template.style == 'mpt' else (':', ' ')
  ends = (template.sep, template.stop)
  text = template.system + template.sep
  for i, (name, message) in enumerate(zip(names, messages, strict=True)):
    text += name + colon
    if message:
      text += space + message + ends[i % 2]
  return text


def image_token_ids(text: str, tok: tokenizer_lib.Tokenizer) -> list[int]:
  """`tokenizer_image_token`: ids with one `config.IMAGE_TOKEN` per `<image>`.

  If the first piece begins with the BOS id, even one that stands in the text,
  every other piece loses its first id.
  """
  pieces = [tok.backend.encode(p).ids for p in text.split(templates.IMAGE)]
  skip = int(pieces[0][:1] == [tok.bos_id])
  ids = pieces[0]
  for piece in pieces[1:]:
    ids = [*ids, config.IMAGE_TOKEN, *piece[skip:]]
  return ids


def keyword_ids(keyword: str, tok: tokenizer_lib.Tokenizer) -> list[int]:
  """The ids by which `KeywordsStoppingCriteria` knows the end of an answer."""
  ids = tok.backend.encode(keyword).ids
  return ids[1:] if len(ids) > 1 and ids[0] == tok.bos_id else ids


def marks(template: templates.Template, value: str, im_start_end: bool) -> str:
  """A turn's text with its `<image>` marks wrapped and limited."""
  mark = templates.IMAGE
  if _VIDEO in value:
    raise config.UserError(f'{value[:60]!r} has a video; there is no tower.')
  if value.startswith(mark):
    value = templates.wrapped(template, value)
    if (count := value.count(mark)) > MAX_IMAGES:
      value = value.replace(mark * count, mark * MAX_IMAGES).strip()
  wrapped = f'<im_start>{mark}<im_end>' if im_start_end else mark
  return value.replace(mark, wrapped)


def side(role: str) -> int:
  if role not in ROLES:
    raise config.UserError(f'A turn is from {role!r}; expected one of {ROLES}.')
  return ROLES.index(role)


def _llama_2(
    template: templates.Template, messages: Sequence[str | None]
) -> str:
  text = ''
  for i, message in enumerate(messages):
    if i == 0:
      if not message:
        raise config.UserError('A llama_2 conversation begins with a question.')
      message = f'<<SYS>>\n{template.system}\n<</SYS>>\n\n{message}'
    if message and i % 2 == 0:
      text += f'{template.sep}[INST] {message} [/INST]'
    elif message:
      text += f' {message} {template.stop}'
  return text.lstrip(template.sep)  # A set of characters.
