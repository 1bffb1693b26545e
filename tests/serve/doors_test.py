# SPDX-License-Identifier: Apache-2.0
"""A run answers alike in Python, terminal, API and page; README's Python runs.

MOELLAVA_RUN=DIR is the run, such as that of the quickstart.
"""

import contextlib
import os
import pathlib
import uuid

import httpx
import openai
from PIL import Image
import pytest

from moellava_jax import sharding
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import generate, requests, tracing
from moellava_jax.serve import cli
from moellava_jax.serve import page as page_lib
from tests import documented
from tests.serve import serving

README = pathlib.Path(__file__).parents[2] / 'README.md'
NEW = 16


def _in_python(run, path, text):
  chat = chat_lib.load(run, mesh=serving.one_device())
  asked = requests.conversation(path, text, ())
  length = generate.bucket(chat.positions(asked) + NEW)
  return chat.chat(path, text, max_new_tokens=NEW), length


def _in_api(process, path, text):
  with openai.OpenAI(
      base_url=f'{serving.address(process)}/v1', api_key='x'
  ) as client:
    (model,) = client.models.list().data
    image = serving.data_uri(Image.open(path))
    answer = client.chat.completions.create(
        **serving.body(
            serving.question(text, image), model=model.id, max_tokens=NEW
        )
    )
  return answer.choices[0].message.content


def _in_page(process, path, text):
  line = process.stdout.readline()
  assert line, process.communicate()[1]
  url = line.split()[-1].rstrip('/')
  session = uuid.uuid4().hex
  with httpx.Client(base_url=url, timeout=600) as http:
    (there,) = serving.upload(http, 'a.png', path.read_bytes()).json()
    file = {'path': there, 'meta': {'_type': 'gradio.FileData'}}
    box = {'text': text, 'files': [file]}
    serving.press(http, 'ask', session, [box, None, 0, NEW])
    shown = serving.press(http, 'trace', session, [None, None])[-1][0]
  return shown[-1]['content'][0]['text']


@pytest.mark.slow
def test_a_run_answers_alike_through_all_doors(capsys):
  run = os.environ.get('MOELLAVA_RUN')
  if not run:
    pytest.skip('MOELLAVA_RUN names no run')
  text, path = page_lib.examples(run)[0]
  model = f'--model={run}'
  asked = (model, f'--image={path}', f'--prompt={text}')
  expected, length = _in_python(run, path, text)
  assert expected
  with contextlib.ExitStack() as stack:
    # All of them now: what they do first nobody has to wait for.
    terminal, api, page = (
        stack.enter_context(
            serving.started(
                name, *flags, XLA_FLAGS='--xla_backend_optimization_level=0'
            )
        )
        for name, flags in (
            ('cli', (*asked, f'--max_new_tokens={NEW}')),
            ('api', (model, '--port=0', '--slots=2', f'--context={length}')),
            ('web', (model,)),
        )
    )
    answers = {
        'terminal': terminal.communicate(timeout=600)[0].removesuffix('\n'),
        'API': _in_api(api, path, text),
        'page': _in_page(page, pathlib.Path(path), text),
    }
  with capsys.disabled():
    print(f'\n{text} {expected!r}')
  assert answers == {
      'terminal': cli._CONTROL.sub('\ufffd', expected),
      'API': expected,
      'page': expected,
  }


@pytest.mark.slow
def test_the_python_of_the_readme_runs(
    model_dir, tmp_path, monkeypatch, capsys
):
  (code,) = documented.python(README.read_text())
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'shapes').symlink_to(model_dir)
  for seed, name in enumerate(('a.png', 'b.png')):
    serving.picture(seed).save(tmp_path / name)
  monkeypatch.chdir(tmp_path)
  # There are 8 in tests, each of which would take part in every step.
  monkeypatch.setattr(sharding, 'data_mesh', serving.one_device)
  found = {}
  exec(code, found)
  said = capsys.readouterr().out
  model = found['model']
  first = model.chat('a.png', 'How many circles are there?')
  assert said.startswith(f'{first}\n')
  assert said.endswith(model.chat('a.png', 'What is left of it?'))
  assert isinstance(found['routing'], tracing.Routing)
