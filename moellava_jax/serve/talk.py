# SPDX-License-Identifier: Apache-2.0
"""A conversation in the browser: what was asked, shown and answered."""

from collections.abc import Iterator, Sequence
import dataclasses
import os
import secrets
import threading
from typing import NamedTuple

from PIL import Image

from moellava_jax import config
from moellava_jax.data import templates
from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import errors, experts, media, messages

_MOST_CHARACTERS = 20_000  # Of a question; to tokenise more takes seconds.
_MOST_IMAGES = 64  # Of a conversation; not all models have a limit.
_SEEDS = 31  # Bits of the seed of sampling.


@dataclasses.dataclass
class Turn:
  """A question, and what came of it."""

  text: str
  images: tuple[str, ...]  # Files in the upload folder that can be read.
  answer: str = ''
  notice: str = ''  # Why there is no answer.
  stopped: bool = False  # Nothing more is wanted.


@dataclasses.dataclass
class Talk:
  """What one browser has asked so far, and the experts of the last answer."""

  turns: list[Turn] = dataclasses.field(default_factory=list)
  routed: experts.Routed | None = None
  no_experts: str = ''  # Why they are not there, if that is an error.


class _Asked(NamedTuple):
  images: list[str]
  question: str
  history: list[tuple[str, str]]


def _asked(turns: Sequence[Turn]) -> _Asked:
  """What the last of `turns` asks.

  A turn without an answer was not asked: its images belong to the next.
  """
  images, history, new, question = [], [], 0, ''
  for turn in turns:
    images += turn.images
    new += len(turn.images)
    marks = max(new - turn.text.count(templates.IMAGE), 0)
    question = f'{templates.IMAGE}\n' * marks + turn.text
    if turn.answer and turn is not turns[-1]:
      history.append((question, turn.answer))
      new = 0
  return _Asked(images, question, history)


def _check(turn: Turn) -> None:
  """Raises UserError for a question that is too long, or none."""
  if len(turn.text) > _MOST_CHARACTERS:
    count, turn.text = len(turn.text), turn.text[:200] + ' ...'
    raise config.UserError(
        f'The question has {count} characters: expected at most'
        f' {_MOST_CHARACTERS}. Shorten it.'
    )
  if not turn.text.strip() and not turn.images:
    raise config.UserError('There is nothing to answer; type a question.')


class Talker:
  """Answers for all browsers; they take turns token by token."""

  def __init__(self, chat: chat_lib.Chat, limits: media.Limits):
    """`limits.image_root` is the folder that uploads are in."""
    self._chat = chat
    self._read = media.Reader(limits, chat.shrink)
    self._lock = threading.Lock()

  def ask(
      self,
      talk: Talk,
      text: str,
      files: Sequence[str],
      *,
      temperature: float,
      max_new_tokens: int,
  ) -> Iterator[None]:
    """Adds a turn to `talk` and writes its answer, a piece at a time.

    What cannot be answered gets a notice that says why.

    Args:
      talk: is changed before every item of the iterator.
      text: the question.
      files: uploaded images that it shows.
      temperature: 0 is greedy.
      max_new_tokens: of the answer.
    """
    turn = Turn(text, tuple(files))
    talk.turns.append(turn)
    talk.routed, talk.no_experts = None, ''
    yield
    try:
      _check(turn)
      asked = _asked(talk.turns)
      pieces = self._chat.chat(
          self._shown(turn, asked.images, max_new_tokens),
          asked.question,
          history=asked.history,
          stream=True,
          max_new_tokens=max_new_tokens,
          temperature=temperature,
          seed=secrets.randbits(_SEEDS),
      )
      while self._write(turn, pieces):
        yield
      if not turn.answer and not turn.stopped:
        turn.notice = 'The model ended its answer without a word.'
    except config.UserError as error:
      turn.notice = str(error)
    yield

  def _shown(self, turn: Turn, paths: Sequence[str], max_new_tokens: int):
    try:
      # To read them takes a second each.
      self._check_room(len(paths), max_new_tokens)
      return self._images(paths)
    except config.UserError:
      turn.images = ()  # The conversation goes on without it.
      raise

  def _check_room(self, count: int, max_new_tokens: int) -> None:
    if count > _MOST_IMAGES:
      raise config.UserError(
          f'The conversation has {count} images: expected at most'
          f' {_MOST_IMAGES}. Clear, and upload fewer.'
      )
    self._chat.check_positions(
        count * self._chat.model.cfg.vision.num_tokens + max_new_tokens,
        f'The conversation with its {count} images and {max_new_tokens} new'
        ' tokens',
    )

  def _images(self, paths: Sequence[str]) -> tuple[Image.Image, ...]:
    try:
      return self._read(
          [messages.Picture(path, os.path.basename(path)) for path in paths]
      )
    except errors.ApiError as error:
      if error.code != 'invalid_image_url':
        raise config.UserError(error.message) from None
      # Uploads are deleted after a while.
      raise config.UserError(
          f'{error.param} is not here any more. Clear, and upload it again.'
      ) from None

  def _write(self, turn: Turn, pieces: Iterator[str]) -> bool:
    """Adds the next piece to the answer; False when there is none."""
    # Not for the whole answer: whoever stops listening would keep the lock.
    with self._lock:
      piece = None if turn.stopped else next(pieces, None)
      if piece is None or turn.stopped:
        return False
      turn.answer += piece
      return True

  def stop(self, talk: Talk) -> None:
    """Ends the answer that is being written, if one is."""
    for turn in talk.turns:
      turn.stopped = True

  def clear(self, talk: Talk) -> None:
    """Forgets the conversation."""
    self.stop(talk)
    # The same object: an answer that is being written may hold it.
    talk.turns.clear()
    talk.routed, talk.no_experts = None, ''

  def trace(self, talk: Talk) -> None:
    """Finds the experts of the last answer, where there are any."""
    if self._chat.model.cfg.moe is None or not talk.turns:
      return
    turns = list(talk.turns)
    if not turns[-1].answer:
      return
    asked = _asked(turns)
    try:
      shown = self._images(asked.images)
      with self._lock:
        routing = self._chat.trace(
            shown, asked.question, turns[-1].answer, history=asked.history
        )
    except config.UserError as error:
      # A conversation that just fits is too long with its end token.
      talk.no_experts = str(error)
      return
    talk.routed = experts.of_answer(routing, self._chat)
