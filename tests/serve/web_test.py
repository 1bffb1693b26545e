# SPDX-License-Identifier: Apache-2.0
"""The page: what its controls do, through HTTP, and in a browser."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import uuid

import httpx
import numpy as np
from PIL import Image
from playwright import sync_api
import pytest

from moellava_jax.model import llava
from moellava_jax.serve import experts, media
from moellava_jax.serve import page as page_lib
from moellava_jax.serve import talk as talk_lib
from tests import tiny
from tests.serve import serving

MODULE = 'moellava_jax.serve.web'
LONGEST = 12
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def _limits(root) -> media.Limits:
  return media.Limits(10**6, 10**6, True, str(root), None)


@pytest.fixture
def page(chat, tmp_path):
  return page_lib.Page(chat, _limits(tmp_path), 16)


def _save(folder, seed: int) -> str:
  path = pathlib.Path(folder) / f'{seed}.png'
  serving.picture(seed).save(path)
  return str(path)


def _ask(page, told, text, files=(), tokens=LONGEST, temperature=0.0):
  """The messages of every step."""
  message = {'text': text, 'files': list(files)}
  steps = page.ask(message, told, temperature, tokens)
  return [shown for _, shown, *_ in steps]


def _words(message) -> str:
  return ''.join(part.get('text', '') for part in message['content'])


# What the controls do.


def test_turns_are_those_of_python(page, chat, tmp_path):
  told = talk_lib.Talk()
  steps = _ask(page, told, 'what is it ?', [_save(tmp_path, 0)])
  pieces = [_words(s[-1]) for s in steps if s[-1]['role'] == 'assistant']
  assert len(set(pieces)) > 3
  assert all(b.startswith(a) for a, b in itertools.pairwise(pieces))
  image = serving.picture(0)
  first = chat.chat(image, 'what is it ?', max_new_tokens=LONGEST)
  assert pieces[-1] == first
  user, _ = steps[-1]
  assert user['content'][0] == {'path': _save(tmp_path, 0)}
  # A second turn, with a second image.
  last = _ask(page, told, 'left ?', [_save(tmp_path, 1)])[-1]
  second = chat.chat(
      [image, serving.picture(1)],
      '<image>\nleft ?',
      history=[('<image>\nwhat is it ?', first)],
      max_new_tokens=LONGEST,
  )
  assert [_words(m) for m in last[1:]] == [first, 'left ?', second]
  assert second != chat.chat(
      serving.picture(1), 'left ?', max_new_tokens=LONGEST
  )


def test_temperature_changes_answers(page, tmp_path):
  file = _save(tmp_path, 0)
  found = {
      _words(_ask(page, talk_lib.Talk(), 'left ?', [file], 12, 2.0)[-1][-1])
      for _ in range(3)
  }
  assert len(found) > 1


@pytest.mark.parametrize('bad', ['not_an_image', 'too_large', 'outside'])
def test_a_bad_image_is_said_in_the_chat(page, chat, tmp_path, bad):
  file, expected = tmp_path / 'bad.png', 'not an image of PNG'
  if bad == 'not_an_image':
    file.write_bytes(b'\x89PNG no')
  elif bad == 'too_large':
    Image.new('1', (1001, 1000)).save(file)
    expected = '1001 x 1000 pixels'
  else:
    file = pathlib.Path(page_lib.__file__)
    expected = 'page.py is not here'
  told = talk_lib.Talk()
  user, reply = _ask(page, told, 'what ?', [str(file)])[-1]
  assert expected in _words(reply) and reply['metadata']['title']
  assert user['content'] == [{'type': 'text', 'text': 'what ?'}]
  # And the conversation goes on, as if it had not been asked.
  shown = _ask(page, told, 'left ?', [_save(tmp_path, 2)])[-1]
  assert _words(shown[-1]) == chat.chat(
      serving.picture(2), 'left ?', max_new_tokens=LONGEST
  )


@pytest.mark.parametrize(
    'limit, count, expected',
    [(100, 60, 'was made for 100'), (None, 65, '65 images: expected at most')],
)
def test_too_many_images_are_refused_before_they_are_read(
    chat, tmp_path, monkeypatch, limit, count, expected
):
  page = page_lib.Page(
      chat._replace(max_positions=limit), _limits(tmp_path), 16
  )
  decoded = []
  monkeypatch.setattr(
      media.Reader, '_decode', lambda self, *_: decoded.append(self)
  )
  told = talk_lib.Talk()
  file = _save(tmp_path, 0)
  for _ in range(2):  # They are not of the next question.
    user, reply = _ask(page, told, 'what ?', [file] * count)[-1][-2:]
    assert expected in _words(reply) and f'{count} images' in _words(reply)
    assert user['content'] == [{'type': 'text', 'text': 'what ?'}]
  assert not decoded


@pytest.mark.parametrize(
    'text, expected',
    [
        ('a ' * 20_000, '40000 characters'),
        ('see <image>', '1 <image> marks'),
        (' ', 'nothing to answer'),
    ],
)
def test_a_bad_question_is_said_in_the_chat(page, text, expected):
  told = talk_lib.Talk()
  shown = _ask(page, told, text)[-1]
  assert expected in _words(shown[-1])
  assert len(_words(shown[0])) < 300


def test_the_image_of_a_question_without_answer_is_kept(page, chat, tmp_path):
  told = talk_lib.Talk()
  _ask(page, told, 'two <image> <image>', [_save(tmp_path, 3)])
  shown = _ask(page, told, 'left ?')[-1]
  assert _words(shown[-1]) == chat.chat(
      serving.picture(3), 'left ?', max_new_tokens=LONGEST
  )


def test_stop_ends_an_answer_and_clear_forgets_it(page, chat, tmp_path):
  told = talk_lib.Talk()
  message = {'text': 'what ?', 'files': [_save(tmp_path, 0)]}
  whole = chat.chat(serving.picture(0), 'what ?', max_new_tokens=LONGEST)
  steps = page.ask(message, told, 0.0, LONGEST)
  for _, shown, *_ in steps:
    if shown[-1]['role'] == 'assistant':
      break
  page.stop(told)
  (_, shown, *_), *more = list(steps)
  assert not more
  short = _words(shown[-1])
  assert whole.startswith(short) and 0 < len(short) < len(whole)
  # The experts of what was written.
  page.trace(told, None)
  assert told.routed is not None
  steps = page.ask(message, told, 0.0, LONGEST)
  next(steps)
  assert page.clear(told)[0] == []
  assert [shown for _, shown, *_ in steps] == [[]] and not told.turns
  last = _ask(page, told, 'what ?', message['files'])[-1]
  assert [_words(m) for m in last] == ['what ?', whole]


def test_the_panel_is_the_routing_of_the_answer(page, chat, tmp_path):
  told = talk_lib.Talk()
  _ask(page, told, 'first ?', [_save(tmp_path, 1)])
  before = told.turns[0].answer
  _, _, bars, _ = list(page.ask({'text': 'left ?', 'files': []}, told, 0.0, 8))[
      -1
  ][1:]
  assert 'being written' in bars
  answer = told.turns[1].answer
  _, _, bars, chips = page.trace(told, None)
  routing = chat.trace(
      serving.picture(1), 'left ?', answer, history=[('first ?', before)]
  )
  is_end_T = routing.tokens_T == chat.tokenizer.eos_id
  at_N = np.flatnonzero(routing.is_answer_T & ~is_end_T)
  assert len(at_N) and told.routed is not None
  tokens = routing.tokens_T[at_N].tolist()
  words = tuple(chat.tokenizer.decode([token]) for token in tokens)
  assert told.routed.texts == words
  chosen = routing.choice_MTk[:, at_N]
  np.testing.assert_array_equal(told.routed.choice_MNk, chosen)
  shares_ME = experts.shares_ME(told.routed)
  for m, layer in enumerate(routing.layers):
    count_E = np.bincount(chosen[m].ravel(), minlength=shares_ME.shape[1])
    np.testing.assert_allclose(shares_ME[m], count_E / count_E.sum())
    assert f'layer {layer}<' in bars
  assert chips.count('class="token"') == len(at_N)


def test_full_experts_are_marked_and_not_counted():
  routed = experts.Routed(
      layers=(3,),
      num_experts=9,
      texts=('<b>', '\n', ''),
      choice_MNk=np.array([[[0, 8], [8, 0], [1, 0]]]),
      weight_MNk=np.array([[[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]]]),
      kept_MNk=np.array([[[True, True], [True, False], [False, False]]]),
  )
  expected_E = np.array([1, 0, 0, 0, 0, 0, 0, 0, 2]) / 3
  np.testing.assert_allclose(experts.shares_ME(routed), [expected_E])
  shown = experts.tokens(routed, 3)
  assert '<b>' not in shown and '&lt;b&gt;' in shown and '⏎' in shown
  assert 'expert 0 counts 75 %, expert 8 counts 25 %' in shown
  assert 'expert 1 was full, expert 0 was full' in shown
  assert shown.count('class="full"') == 3


def test_a_dense_model_has_nothing_to_show(chat, tmp_path):
  model = llava.Llava(
      tiny.model_config(vocab_size=chat.model.cfg.llm.vocab_size)
  )
  dense = page_lib.Page(chat._replace(model=model), _limits(tmp_path), 16)
  assert 'dense model' in dense.empty()[0]
  assert (
      dense.trace(talk_lib.Talk([talk_lib.Turn('a', (), 'b')]), None)[3] == ''
  )


def test_examples_are_of_the_run(tmp_path):
  data = tmp_path / 'run' / 'data'
  data.mkdir(parents=True)
  stage = tmp_path / 'run' / 'moe' / 'final'
  stage.mkdir(parents=True)
  assert page_lib.examples(str(stage)) == []
  serving.picture(0).save(data / 'a.png')
  serving.picture(1).save(data / 'b.png')
  rows = [
      ('a.png', 'count', 'one ?'),
      ('a.png', 'where', 'same image ?'),
      ('b.png', 'count', 'same kind ?'),
      ('c.png', 'color', 'no such image ?'),
      ('b.png', 'where', 'two ?'),
  ]
  with open(data / 'questions_exact.jsonl', 'w', encoding='utf-8') as file:
    for image, kind, text in rows:
      file.write(
          json.dumps({'image': image, 'kind': kind, 'text': text}) + '\n'
      )
  found = page_lib.examples(str(stage))
  assert [(text, os.path.basename(path)) for text, path in found] == [
      ('one ?', 'a.png'),
      ('two ?', 'b.png'),
  ]


# Through HTTP.


@pytest.fixture(scope='module')
def site(model_dir, tmp_path_factory):
  """The address of the command's page."""
  folder = tmp_path_factory.mktemp('site')
  flags = ['--max_new_tokens=16', '--max_upload_mb=1', '--max_megapixels=1']
  flags += ['--cpu_devices=2', '--mesh=fsdp=2']
  with open(folder / 'stderr', 'wb') as stderr:
    process = subprocess.Popen(
        [sys.executable, '-m', MODULE, f'--model={model_dir}', *flags],
        env={**os.environ, 'XLA_FLAGS': '', 'TMPDIR': str(folder)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
  try:
    assert process.stdout is not None
    line = process.stdout.readline()
    name, _, url = line.partition(': ')
    assert name == serving.NAME, (folder / 'stderr').read_text()
    yield url.strip().rstrip('/')
  finally:
    process.terminate()
    rest, _ = process.communicate(timeout=60)
  assert (process.returncode, rest) == (0, '')
  # What Gradio refuses it reports; nothing of ours has failed.
  assert 'moellava_jax/serve' not in (folder / 'stderr').read_text()
  # With all that was uploaded.
  assert not list(folder.glob('moellava_web_*'))


@pytest.fixture
def http(site):
  with httpx.Client(base_url=site, timeout=60) as client:
    yield client


def _png(seed: int) -> bytes:
  uri = serving.data_uri(serving.picture(seed))
  return media._data_uri(uri, 'image')


def test_answers_come_in_pieces_and_the_experts_after_them(http, chat):
  (path,) = serving.upload(http, 'a.png', _png(4)).json()
  session = uuid.uuid4().hex
  file = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
  box = {'text': 'what ?', 'files': [file]}
  steps = serving.press(http, 'ask', session, [box, None, 0, LONGEST])
  assert len(steps) > 5
  # The first is whole, the others are differences; the trace is whole again.
  shown, _, bars, chips = serving.press(http, 'trace', session, [None, None])[
      -1
  ]
  answer = chat.chat(serving.picture(4), 'what ?', max_new_tokens=LONGEST)
  assert shown[-1]['content'][0]['text'] == answer
  assert 'layer 0<' in bars and 'class="token"' in chips
  other = serving.press(http, 'trace', uuid.uuid4().hex, [None, None])[-1]
  assert other[0] == [] and 'class="token"' not in other[3]


def test_nothing_but_uploads_is_read(http, model_dir):
  for path in ('/etc/passwd', f'{model_dir}/config.json', experts.__file__):
    assert http.get(f'/gradio_api/file={path}').status_code == 403
  file = {'path': '/etc/passwd', 'meta': {'_type': 'gradio.FileData'}}
  box = {'text': 'what ?', 'files': [file]}
  with pytest.raises(AssertionError, match='success'):
    serving.press(http, 'ask', uuid.uuid4().hex, [box, None, 0, 4])
  (path,) = serving.upload(http, 'a.png', _png(0)).json()
  assert http.get(f'/gradio_api/file={path}').content == _png(0)


def test_uploads_have_a_limit(http):
  assert serving.upload(http, 'a.png', bytes(1 << 21)).status_code == 413
  assert serving.upload(http, 'a.png', bytes(1 << 10)).status_code == 200


def test_the_page_is_for_this_machine(http):
  assert http.get('/').status_code == 200
  answer = http.get('/', headers={'Host': 'elsewhere.example'})
  assert answer.status_code == 400
  config = http.get('/config').json()
  assert not config['analytics_enabled'] and not config['run_history']
  policy = http.get('/').headers['Content-Security-Policy']
  assert "default-src 'self'" in policy and 'http' not in policy


# In a browser.


@pytest.fixture(scope='module')
def tab(site):
  found = os.environ.get('CHROMIUM') or next(
      filter(None, map(shutil.which, BROWSERS)), None
  )
  if found is None:
    pytest.skip(
        f'no browser: none of {", ".join(BROWSERS)} is on the PATH, and the'
        ' environment variable CHROMIUM names none'
    )
  with contextlib.ExitStack() as stack:
    driver = stack.enter_context(sync_api.sync_playwright())
    browser = driver.chromium.launch(
        # Containers run as root, where its sandbox does not work.
        executable_path=found,
        args=['--no-sandbox'],
    )
    stack.callback(browser.close)
    page = browser.new_page()
    page.set_default_timeout(120_000)  # Of slow machines that compile.
    yield page


def test_in_a_browser(tab, site, tmp_path):
  requests, errors = [], []
  tab.on('request', lambda request: requests.append(request.url))
  tab.on('pageerror', lambda error: errors.append(str(error)))
  tab.goto(site)
  tab.evaluate("""() => {
    window.lengths = new Set();
    new MutationObserver(() => {
      const answer = document.querySelector('[data-testid=bot]');
      if (answer) window.lengths.add(answer.textContent.trim().length);
    }).observe(document.body,
               {childList: true, subtree: true, characterData: true});
  }""")
  tab.set_input_files('#box input[type=file]', _save(tmp_path, 5))
  tab.wait_for_selector('#box img')
  tab.fill('#box textarea', 'what ?')
  tab.press('#box textarea', 'Enter')
  tab.wait_for_selector('#chips .token')
  assert tab.locator('#bars .layer').count() == 1
  assert len(tab.evaluate('[...window.lengths]')) >= 3
  # The image is shown as what was uploaded.
  image = tab.locator('#chat [data-testid=user] img')
  assert image.evaluate('e => e.naturalWidth') == 40
  tab.click('#clear')
  tab.wait_for_selector('#chat [data-testid=bot]', state='detached')
  tab.wait_for_selector('#chips .token', state='detached')
  elsewhere = [
      url for url in requests if not url.startswith((site, 'data:', 'blob:'))
  ]
  assert requests and not elsewhere and not errors


def test_a_bad_image_in_a_browser(tab, site, tmp_path):
  bad = tmp_path / 'bad.png'
  bad.write_bytes(b'no image')
  tab.goto(site)
  tab.set_input_files('#box input[type=file]', str(bad))
  tab.fill('#box textarea', 'what ?')
  tab.wait_for_selector('#box button.submit-button:not([disabled])')
  tab.press('#box textarea', 'Enter')
  tab.wait_for_selector('#chat >> text=not an image of PNG')
