# SPDX-License-Identifier: Apache-2.0
"""The command: a key, a port, and an orderly end."""

import contextlib
import os
import signal
import subprocess
import sys

import openai
import pytest

from moellava_jax.infer import chat as chat_lib
from tests.serve import serving


@contextlib.contextmanager
def _started(*flags, **env):
  process = subprocess.Popen(
      [sys.executable, '-m', 'moellava_jax.serve.api', *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'XLA_FLAGS': '', **env},
  )
  try:
    yield process
  finally:
    process.kill()
    process.communicate()


def _healthy(url: str) -> bool:
  try:
    return serving.call(url, '/health').status == 200
  except OSError:  # The address is said before anybody listens.
    return False


def test_sigterm_lets_answers_end_and_exits_with_0(model_dir, alone):
  # Three programs: a text alone, of two lengths, and the step.
  flags = (
      f'--model={model_dir}',
      '--port=0',
      '--context=24',
      '--max_images=0',
  )
  with _started(*flags, '--api_key_env=KEY', KEY='s3cret') as process:
    line = process.stdout.readline()
    url = line.split()[1].removesuffix('/v1,')
    serving.until(lambda: _healthy(url), 180)
    with (
        openai.OpenAI(base_url=f'{url}/v1', api_key='no') as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
      wrong.models.list()
    messages = [{'role': 'user', 'content': 'left ?'}]
    body = serving.body(messages, max_tokens=12, stream=True)
    with openai.OpenAI(base_url=f'{url}/v1', api_key='s3cret') as client:
      stream = client.chat.completions.create(**body)
      text = next(stream).choices[0].delta.content
      process.send_signal(signal.SIGTERM)
      text += ''.join(c.choices[0].delta.content or '' for c in stream)
    _, complaints = process.communicate(timeout=60)
  assert process.returncode == 0, complaints
  request = chat_lib.Request((('human', 'left ?'),), ())
  assert text == alone(request, 12)


def test_mistakes_are_one_line(tmp_path):
  with _started(f'--model={tmp_path}/none', '--port=0') as process:
    _, complaints = process.communicate(timeout=120)
  assert process.returncode == 1
  assert complaints.startswith('error: ') and complaints.count('\n') == 1
