# SPDX-License-Identifier: Apache-2.0
"""The judge: what is sent, kept, retried and estimated."""

import dataclasses
import json
import urllib.request

import pytest

from moellava_jax.evals import base, judge

REQUEST = judge.Request((('system', 's'), ('user', 'Grade: ä')), 0.2, 16)


@pytest.fixture
def judged(judge_server, tmp_path):
  """A judge at the local server, whose waits are listed and not slept."""
  waits = []
  found = judge.Judge(
      url=judge_server.url,
      model='gpt',
      key='secret',
      cache=tmp_path / 'judge',
      prices=(30.0, 60.0),
      sleep=waits.append,
  )
  return found, waits


def test_a_reply_is_paid_for_once(judged, judge_server):
  judge_server.reply = lambda body, n: f'reply {n}'
  ours, _ = judged
  assert ours.ask(REQUEST) == 'reply 0'
  assert ours.ask(REQUEST) == 'reply 0'
  assert ours.ask(REQUEST._replace(attempt=1)) == 'reply 1'
  assert dataclasses.replace(ours, model='other').ask(REQUEST) == 'reply 2'
  assert judge_server.bodies[0] == {
      'model': 'gpt',
      'messages': [
          {'role': 'system', 'content': 's'},
          {'role': 'user', 'content': 'Grade: ä'},
      ],
      'temperature': 0.2,
      'max_tokens': 16,
  }
  assert set(judge_server.keys) == {'Bearer secret'}
  kept = [json.loads(path.read_text()) for path in ours.cache.iterdir()]
  assert {row['model'] for row in kept} == {'exact-name'}
  assert 'secret' not in str(kept)


def test_a_busy_server_is_asked_again(judged, judge_server):
  busy = {0: (429, {'Retry-After': '7'}), 1: (503, {})}
  judge_server.reply = lambda body, n: busy.get(n, 'at last')
  ours, waits = judged
  assert ours.ask(REQUEST) == 'at last'
  assert waits == [7.0, 2.0]


def test_a_server_that_stays_away_is_an_error(judged, judge_server):
  judge_server.reply = lambda body, n: (500, {})
  ours, waits = judged
  with pytest.raises(base.EvalError, match='no answer after 6 tries .HTTP 500'):
    ours.ask(REQUEST)
  assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
  nobody = dataclasses.replace(ours, url='http://127.0.0.1:1/v1')
  with pytest.raises(base.EvalError, match='repeat the command to go on'):
    nobody.ask(REQUEST)


def test_a_refusal_is_not_repeated(judged, judge_server):
  judge_server.reply = lambda body, n: (401, {})
  ours, waits = judged
  with pytest.raises(base.EvalError, match='HTTP 401: {"error": "busy"}'):
    ours.ask(REQUEST)
  assert (len(judge_server.bodies), waits) == (1, [])


def test_replies_before_a_failure_are_kept(judged, judge_server):
  judge_server.reply = lambda body, n: 'ok' if n < 2 else (401, {})
  ours = dataclasses.replace(judged[0], workers=1)
  requests = [REQUEST._replace(attempt=n) for n in range(4)]
  with pytest.raises(base.EvalError, match='HTTP 401'):
    ours.map(ours.ask, requests)
  assert ours.estimate(requests)[:2] == (2, 2)


def test_what_is_not_a_completion_is_shown(judged, monkeypatch):
  class Response:

    def __enter__(self):
      return self

    def __exit__(self, *args):
      pass

    def read(self):
      return b'{"choices": []}'

  monkeypatch.setattr(
      urllib.request, 'urlopen', lambda call, timeout: Response()
  )
  with pytest.raises(base.EvalError, match="completion, got {'choices': .."):
    judged[0].ask(REQUEST)


def test_nothing_is_sent_before_its_price_is_agreed_to(
    judged, judge_server, capsys
):
  ours, _ = judged
  requests = [REQUEST, REQUEST, REQUEST._replace(max_tokens=984)]
  # 4 + 1 and 4 + 3 tokens in each of two requests; 16 + 984 out:
  # 24 * 30 + 1000 * 60 dollars per million.
  assert ours.estimate(requests) == (2, 0, 24, 1000, pytest.approx(0.06072))
  with pytest.raises(base.EvalError, match='Nothing was sent.*--yes'):
    ours.agree(requests, False)
  assert judge_server.bodies == []
  assert 'about 24 tokens in, at most 1000 out; at most $0.06' in (
      capsys.readouterr().out
  )
  for request in requests:
    ours.ask(request)
  ours.agree(requests, False)  # Nothing is left to be sent.
  assert '0 requests, 2 kept from before' in capsys.readouterr().out
  without = dataclasses.replace(ours, prices=None, model='other')
  assert without.estimate(requests).dollars is None
