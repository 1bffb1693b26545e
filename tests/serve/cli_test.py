# SPDX-License-Identifier: Apache-2.0
"""The terminal chat, line by line."""

import io
import os
import signal
import subprocess
import sys

import pytest

from moellava_jax import config
from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import cli
from tests.serve import serving

SAMPLING = cli.Sampling(8, 0.0, 1.0, 0, 0)


@pytest.fixture
def conversation(chat):
  return cli.Conversation(chat, SAMPLING)


def _printable(text):
  return cli._CONTROL.sub('\ufffd', text)


def _talk(conversation, *lines):
  out = io.StringIO()
  cli.talk(conversation, iter(lines), out)
  return out.getvalue()


def test_turns_and_images_are_remembered_until_reset(
    conversation, chat, tmp_path
):
  paths = [str(tmp_path / f'{n}.png') for n in range(2)]
  shown = [serving.picture(n) for n in range(2)]
  for path, image in zip(paths, shown, strict=True):
    image.save(path)
  said = _talk(
      conversation,
      f'/image {paths[0]}',
      'left ?',
      f'/image {paths[1]}',
      'red ?',
      '/reset',
      'left ?',
  ).splitlines()
  first = chat.chat(shown[0], 'left ?', max_new_tokens=8)
  second = chat.chat(
      shown,
      '<image>\nred ?',
      history=[('<image>\nleft ?', first)],
      max_new_tokens=8,
  )
  third = chat.chat(None, 'left ?', max_new_tokens=8)
  answers = [_printable(answer) for answer in (first, second, third)]
  assert [said[n] for n in (1, 3, 4)] == answers
  assert '40 x 40' in said[0]


def test_commands_and_mistakes(conversation, tmp_path):
  missing = str(tmp_path / 'none.png')
  said = _talk(
      conversation,
      '/help',
      '',
      f'/image {missing}',
      '/image',
      '/imagine x',
      'an <image> without one',
      '/quit',
      'left ?',
  )
  for part in ('/reset', missing, 'No command /imagine', '1 <image> marks'):
    assert part in said
  assert said.count('error: ') == 4
  assert said.splitlines()[-1].startswith('error: ')


def test_ctrl_c_ends_the_answer_and_not_the_program(conversation, chat):
  whole = _printable(chat.chat(None, 'left ?', max_new_tokens=8))

  class Interrupting(io.StringIO):

    def write(self, text):
      done = super().write(text)
      if self.getvalue() == text:  # The first piece.
        signal.raise_signal(signal.SIGINT)
      return done

  out = Interrupting()
  cli.talk(conversation, iter(['left ?', '/reset', 'left ?']), out)
  first, second = out.getvalue().splitlines()
  assert first.endswith(' [stopped]')
  assert whole.startswith(first.removesuffix(' [stopped]'))
  assert len(first) < len(whole) + len(' [stopped]')
  assert second == whole


def test_what_was_said_before_ctrl_c_is_remembered(conversation):
  pieces = conversation.ask('left ?')
  said = next(pieces)
  pieces.close()
  assert conversation._history == [('left ?', said)]


def test_control_characters_do_not_reach_the_terminal(conversation):
  out = io.StringIO()

  class Chat:

    def chat(self, *args, **options):
      del args, options
      return iter(['a\x1b[2J', 'b\r\x9b\n\tc'])

  cli.answer(cli.Conversation(Chat(), SAMPLING), '?', out)
  assert out.getvalue() == 'a\ufffd[2Jb\ufffd\ufffd\n\tc\n'


def _run(*flags, **options):
  return subprocess.run(
      [sys.executable, '-m', 'moellava_jax.serve.cli', *flags],
      capture_output=True,
      text=True,
      check=False,
      env={**os.environ, 'XLA_FLAGS': ''},
      **options,
  )


def test_a_prompt_is_answered_and_that_is_all(model_dir, chat, tmp_path):
  path = tmp_path / 'a.png'
  serving.picture(3).save(path)
  found = _run(
      f'--model={model_dir}',
      f'--image={path}',
      '--prompt=left ?',
      '--max_new_tokens=8',
      '--cpu_devices=4',
      '--mesh=fsdp=2,expert=2',
  )
  assert found.returncode == 0, found.stderr
  expected = chat.chat(serving.picture(3), 'left ?', max_new_tokens=8)
  assert found.stdout == _printable(expected) + '\n'


def test_a_missing_model_is_one_line(tmp_path):
  found = _run(f'--model={tmp_path}/none', '--prompt=?')
  assert found.returncode == 1
  assert found.stderr.startswith('error: ')
  assert found.stderr.count('\n') == 1


def test_a_conversation_that_is_too_long_says_so(chat):
  short = chat._replace(max_positions=20)
  said = _talk(cli.Conversation(short, SAMPLING), 'left ? ' * 9, '/help')
  assert said.startswith('error: ') and 'positions' in said.splitlines()[0]
  assert isinstance(short, chat_lib.Chat)
  with pytest.raises(config.UserError):
    short.chat(None, 'left ? ' * 9)
