# SPDX-License-Identifier: Apache-2.0
"""Talk to a model in the terminal.

  python -m moellava_jax.serve.cli --model=DIR [--image=F] [--prompt=...]

With --prompt the answer is printed, and that is all. Otherwise every line is a
question or a command (/help). Ctrl-C ends an answer, Ctrl-D the program.
"""

from collections.abc import Iterator, Sequence
import contextlib
import os
import re
import sys
from typing import NamedTuple, TextIO

from absl import app, flags

from moellava_jax import config
from moellava_jax.data import images as images_lib
from moellava_jax.data import templates
from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import command

HELP = """\
/image FILE  shows an image with the next question
/reset       forgets the conversation and its images
/help        says this
/quit        ends, as does Ctrl-D
Ctrl-C       ends the answer that is being written
Everything else is a question."""

# A terminal would obey them; a model may have learnt them from anywhere.
_CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f]')


class Sampling(NamedTuple):
  """How answers are written; see `Chat.chat`."""

  max_new_tokens: int
  temperature: float
  top_p: float
  top_k: int
  seed: int


class Conversation:
  """The turns so far and their images."""

  def __init__(self, chat: chat_lib.Chat, sampling: Sampling):
    self._chat, self._sampling = chat, sampling
    self._history: list[tuple[str, str]] = []
    self._images = []
    self._new = 0  # Images that no question has shown yet.

  def show(self, path: str) -> tuple[int, int]:
    """Adds an image to the next question; returns its width and height.

    Raises:
      ImageError: it cannot be read.
    """
    image = images_lib.load(os.path.expanduser(path))
    self._images.append(image)
    self._new += 1
    return image.size

  def reset(self) -> None:
    self._history.clear()
    self._images.clear()
    self._new = 0

  def ask(self, text: str) -> Iterator[str]:
    """Pieces of the answer; what was read of it becomes part of the turns.

    Raises:
      UserError: the conversation is too long, or a mark without an image.
    """
    question = f'{templates.IMAGE}\n' * self._new + text
    pieces = self._chat.chat(
        list(self._images),
        question,
        history=tuple(self._history),
        stream=True,
        **self._sampling._asdict(),
    )
    answer = []
    try:
      for piece in pieces:
        answer.append(piece)
        yield piece
    finally:
      # Also where the reader has had enough: the next question is about what
      # there is. A question without any answer was not asked.
      if answer:
        self._history.append((question, ''.join(answer)))
        self._new = 0


def answer(conversation: Conversation, text: str, out: TextIO) -> None:
  """Writes an answer as it comes; Ctrl-C ends it."""
  with contextlib.closing(_pieces(conversation, text)) as pieces:
    try:
      for piece in pieces:
        out.write(_CONTROL.sub('\ufffd', piece))
        out.flush()
    except KeyboardInterrupt:
      out.write(' [stopped]')
  out.write('\n')
  out.flush()


def _pieces(conversation: Conversation, text: str):
  # A generator, so that it can be closed.
  yield from conversation.ask(text)


def _lines(prompt: str) -> Iterator[str]:
  """Lines that are typed; Ctrl-C clears one."""
  while True:
    try:
      yield input(prompt)
    except KeyboardInterrupt:
      print()
    except EOFError:
      return


def talk(conversation: Conversation, lines: Iterator[str], out: TextIO) -> None:
  """Answers lines until they end or one says /quit."""
  for line in lines:
    try:
      if not _obey(conversation, line.strip(), out):
        return
    except config.UserError as error:
      out.write(f'error: {error}\n')
    out.flush()


def _obey(conversation: Conversation, line: str, out: TextIO) -> bool:
  """Does what a line says; False if it is the end."""
  word, _, rest = line.partition(' ')
  if word == '/quit':
    return False
  if word == '/help':
    out.write(f'{HELP}\n')
  elif word == '/reset':
    conversation.reset()
  elif word == '/image':
    if not rest.strip():
      raise config.UserError('/image FILE: expected the path of an image.')
    width, height = conversation.show(rest.strip())
    out.write(f'{rest.strip()}: {width} x {height} pixels\n')
  elif word.startswith('/') and word[1:].isalpha():
    raise config.UserError(f'No command {word}; /help lists them.')
  elif line:
    answer(conversation, line, out)
  return True


def define_flags() -> None:
  flags.DEFINE_string(
      'model', None, 'RUN, STAGE or STEP directory.', required=True
  )
  flags.DEFINE_multi_string('image', [], 'Of the first question.')
  flags.DEFINE_string('prompt', None, 'Ask this, print the answer, end.')
  flags.DEFINE_integer('max_new_tokens', 512, 'Of an answer.', 1)
  flags.DEFINE_float('temperature', 0.0, '0: the likeliest tokens.', 0.0)
  flags.DEFINE_float('top_p', 1.0, 'Share of the tokens sampled.', 0.0, 1.0)
  flags.DEFINE_integer('top_k', 0, 'Number of the tokens sampled; 0: all.', 0)
  flags.DEFINE_integer('seed', 0, 'Of sampling.')
  flags.DEFINE_integer(
      'cpu_devices', 1, 'Devices to simulate where there is only a CPU.', 1
  )
  flags.DEFINE_string(
      'mesh',
      None,
      'Split the parameters: fsdp=2,expert=2; unset: all on every device.',
  )


def _run() -> None:
  values = flags.FLAGS
  chat = chat_lib.load(values.model, values.cpu_devices, values.mesh)
  conversation = Conversation(
      chat,
      Sampling(
          values.max_new_tokens,
          values.temperature,
          values.top_p,
          values.top_k,
          values.seed,
      ),
  )
  for path in values.image:
    conversation.show(path)
  if values.prompt is not None:
    answer(conversation, values.prompt, sys.stdout)
  elif sys.stdin.isatty():
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401  Editing and history for `input`.
    print(f'{chat.name} ({chat.stage}). /help lists the commands.')
    talk(conversation, _lines('> '), sys.stdout)
  else:
    talk(conversation, _lines(''), sys.stdout)


def _quietly() -> int:
  """`_run`, where the one at the other end may leave early."""
  try:
    _run()
  except BrokenPipeError:  # `| head` has read enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except KeyboardInterrupt:
    return 130
  return 0


def main(argv: Sequence[str]) -> int:
  return command.run(argv, _quietly)


if __name__ == '__main__':
  define_flags()
  app.run(main)
