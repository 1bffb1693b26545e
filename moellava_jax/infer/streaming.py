# SPDX-License-Identifier: Apache-2.0
"""Tokens of an answer, one by one -> pieces of its text."""

from collections.abc import Sequence
from typing import Literal

from moellava_jax.data import tokenizer as tokenizer_lib

_INCOMPLETE = '\ufffd'  # What the bytes of half a character decode to.


def end_tokens(
    tokenizer: tokenizer_lib.Tokenizer, stop: Sequence[str]
) -> tuple[int, ...]:
  """The end token, and those of `stop` that are special tokens themselves.

  A special token has no text, so that no search would find it.
  """
  special = tokenizer.backend.get_added_tokens_decoder()
  known = {token.content: i for i, token in special.items()}
  ids = [tokenizer.eos_id, *(known[s] for s in stop if s in known)]
  return tuple(dict.fromkeys(ids))


class TextStream:
  """The text of an answer as far as it is certain.

  All pieces together are the answer, without white space at its two ends, up to
  its end token or the first stop string.

  Attributes:
    finish_reason: 'stop' after the end token or a stop string, 'length' after
      `max_new_tokens`; None before.
    new_tokens: those given so far, without the end token.
  """

  def __init__(
      self,
      tokenizer: tokenizer_lib.Tokenizer,
      *,
      stop: Sequence[str] = (),
      max_new_tokens: int,
  ):
    """`stop` are strings that end an answer; special tokens may be among them."""
    self.finish_reason: Literal['stop', 'length'] | None = None
    self.new_tokens = 0
    self._tokenizer = tokenizer
    self._stop = tuple(s for s in stop if s)
    self._ends = end_tokens(tokenizer, self._stop)
    self._most = max_new_tokens
    self._ids: list[int] = []
    self._read = 0  # Tokens whose text is in `_text`.
    self._context = 0  # The first that is decoded again with what follows.
    self._text = ''
    self._sent = 0  # Characters of it that have been returned, or passed over.
    self._begun = False  # Whether anything has been returned.

  def push(self, token: int) -> str:
    """The text that is certain with this token, and was not before.

    It is '' while a character or what may become a stop string is incomplete,
    and once the answer is finished.
    """
    if self.finish_reason is not None:
      return ''
    if int(token) in self._ends:
      return self._finish('stop')
    self._ids.append(int(token))
    self.new_tokens += 1
    new = self._decode()
    if not new.endswith(_INCOMPLETE) and self._take(new):
      self.finish_reason = 'stop'
      return self._return(len(self._text))
    if self.new_tokens >= self._most:
      return self._finish('length')
    return self._return(len(self._text) - self._doubtful())

  def close(self) -> str:
    """The rest, where tokens end before the answer does."""
    return '' if self.finish_reason is not None else self._finish('length')

  def _finish(self, reason: Literal['stop', 'length']) -> str:
    self.finish_reason = 'stop' if self._take(self._decode()) else reason
    return self._return(len(self._text))

  def _decode(self) -> str:
    """Text of the tokens that were not read yet.

    Some tokens before them are decoded too: the first of a text loses its
    space in some vocabularies.
    """
    known = self._tokenizer.decode(self._ids[self._context : self._read])
    return self._tokenizer.decode(self._ids[self._context :])[len(known) :]

  def _take(self, new: str) -> bool:
    """Adds complete text; cuts it at a stop string and returns whether one is."""
    longest = max(map(len, self._stop), default=1)
    start = max(len(self._text) - longest + 1, 0)
    self._text += new
    self._context, self._read = self._read, len(self._ids)
    found = [self._text.find(stop, start) for stop in self._stop]
    found = [at for at in found if at >= 0]
    if found:
      self._text = self._text[: min(found)]
    return bool(found)

  def _doubtful(self) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    most = 0
    for stop in self._stop:
      for length in range(min(len(stop) - 1, len(self._text)), most, -1):
        if self._text.endswith(stop[:length]):
          most = length
          break
    return most

  def _return(self, end: int) -> str:
    """What is new before `end`, but for white space at its end."""
    new = self._text[self._sent : end]
    if not self._begun:
      self._sent += len(new) - len(new.lstrip())
      new = new.lstrip()
    new = new.rstrip()
    self._sent += len(new)
    self._begun = self._begun or bool(new)
    return new
