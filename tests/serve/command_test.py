# SPDX-License-Identifier: Apache-2.0
"""The command: a key, a port, and an orderly end."""

import signal

import openai
import pytest

from moellava_jax.infer import chat as chat_lib
from tests.serve import serving


def test_sigterm_lets_answers_end_and_exits_with_0(model_dir, alone):
  # Three programs: a text alone, of two lengths, and the step.
  flags = (
      f'--model={model_dir}',
      '--port=0',
      '--context=24',
      '--warm_up_images=0',
      '--cpu_devices=2',
      '--mesh=expert=2',
  )
  with serving.started('api', *flags, '--api_key_env=KEY', KEY='s3') as process:
    url = serving.address(process)
    with (
        openai.OpenAI(base_url=f'{url}/v1', api_key='no') as wrong,
        pytest.raises(openai.AuthenticationError),
    ):
      wrong.models.list()
    # By default it is for this machine, and neither fetches nor reads.
    assert url.startswith('http://127.0.0.1:')
    elsewhere = {
        'http://127.0.0.1:9/a.png': 'start the server with --allow_remote_ima',
        '/etc/passwd': 'or start the server with --image_root',
    }
    for image, message in elsewhere.items():
      asked = serving.body(serving.question('left ?', image))
      refused = serving.complete(url, asked, Authorization='Bearer s3')
      assert refused.status == 400
      assert message in refused.body['error']['message']
    messages = [{'role': 'user', 'content': 'left ?'}]
    body = serving.body(messages, max_tokens=12, stream=True)
    with openai.OpenAI(base_url=f'{url}/v1', api_key='s3') as client:
      stream = client.chat.completions.create(**body)
      text = next(stream).choices[0].delta.content
      process.send_signal(signal.SIGTERM)
      text += ''.join(c.choices[0].delta.content or '' for c in stream)
    _, complaints = process.communicate(timeout=60)
  assert process.returncode == 0, complaints
  request = chat_lib.Request((('human', 'left ?'),), ())
  assert text == alone(request, 12)


def test_mistakes_are_one_line(tmp_path):
  flags = (f'--model={tmp_path}/none', '--port=0')
  with serving.started('api', *flags) as process:
    _, complaints = process.communicate(timeout=120)
  assert process.returncode == 1
  assert complaints.startswith('error: ') and complaints.count('\n') == 1
