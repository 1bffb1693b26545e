# SPDX-License-Identifier: Apache-2.0
"""Puts requests to a language model that grades answers.

Any endpoint with OpenAI's chat completions will do (POST URL/chat/completions).
What was asked and answered is kept on disk, so that a run that is repeated, or
was stopped, costs nothing twice. Nothing is sent before its price was shown
and agreed to.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from typing import Any, NamedTuple, TypeVar
import urllib.error
import urllib.request

from moellava_jax.evals import base

TRIES = 6
_FIRST_WAIT = 1.0  # Seconds; doubled after every failure.
_LONGEST_WAIT = 60.0
_BYTES_PER_TOKEN = 4  # Of English, roughly.
_TOKENS_PER_MESSAGE = 4
_MILLION = 1e6

Item = TypeVar('Item')
Found = TypeVar('Found')


class Request(NamedTuple):
  """One chat completion."""

  messages: tuple[tuple[str, str], ...]  # (role, content), ...
  temperature: float
  max_tokens: int
  attempt: int = 0  # To ask the same again and not get the kept reply.


class Estimate(NamedTuple):
  """What requests will cost at most."""

  requests: int  # That were not answered before.
  kept: int
  prompt_tokens: int  # About.
  reply_tokens: int  # At most.
  dollars: float | None  # None without prices.


@dataclasses.dataclass(frozen=True)
class Judge:
  """A model behind an endpoint, and the replies that it gave."""

  url: str  # Such as https://api.openai.com/v1
  model: str
  key: str | None
  cache: pathlib.Path
  prices: tuple[float, float] | None  # Dollars per million tokens, in and out.
  workers: int = 8
  timeout: float = 120.0  # Seconds.
  sleep: Callable[[float], None] = time.sleep

  def estimate(self, requests: Iterable[Request]) -> Estimate:
    """Counts what is not on disk yet."""
    asked = list(requests)
    new = [r for r in dict.fromkeys(asked) if not self._path(r).exists()]
    size = sum(
        _TOKENS_PER_MESSAGE + -(-len(content.encode()) // _BYTES_PER_TOKEN)
        for request in new
        for _, content in request.messages
    )
    replies = sum(request.max_tokens for request in new)
    dollars = None
    if self.prices is not None:
      dollars = (size * self.prices[0] + replies * self.prices[1]) / _MILLION
    return Estimate(
        len(new), len(dict.fromkeys(asked)) - len(new), size, replies, dollars
    )

  def agree(self, requests: Iterable[Request], agreed: bool) -> None:
    """Prints what requests cost.

    Args:
      requests: what is asked at first.
      agreed: whether to go on (--yes).

    Raises:
      EvalError: requests have to be sent, but `agreed` is False.
    """
    found = self.estimate(requests)
    price = (
        'give --judge_prices for dollars'
        if found.dollars is None
        else f'at most ${found.dollars:.2f}'
    )
    print(
        f'{self.model} at {self.url}: {found.requests} requests, {found.kept}'
        f' kept from before; about {found.prompt_tokens} tokens in, at most'
        f' {found.reply_tokens} out; {price}. An unclear reply is asked again.'
    )
    if found.requests and not agreed:
      raise base.EvalError(
          'Nothing was sent. Repeat the command with --yes to send it.'
      )

  def map(
      self, fn: Callable[[Item], Found], items: Sequence[Item]
  ) -> list[Found]:
    """`fn` of every item, several at a time; replies are kept as they come."""
    with futures.ThreadPoolExecutor(self.workers) as pool:
      pending = [pool.submit(fn, item) for item in items]
      try:
        return [future.result() for future in pending]
      except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise

  def ask(self, request: Request) -> str:
    """The reply, from disk if there is one.

    Raises:
      EvalError: the endpoint refuses the request, does not answer after
        `TRIES` tries, or answers something that is no chat completion.
    """
    path = self._path(request)
    if path.exists():
      return base.read_json(path)['reply']
    answer = self._send(request)
    try:
      reply = answer['choices'][0]['message']['content'] or ''
    except (KeyError, IndexError, TypeError) as e:
      raise base.EvalError(
          f'{self.url}: expected a chat completion, got {answer!r:.300}.'
      ) from e
    kept = {
        'model': answer.get('model', self.model),
        'request': request._asdict(),
        'reply': reply,
        'usage': answer.get('usage'),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f'{path.name}.{os.getpid()}.{id(kept)}.tmp')
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    new.write_text(text + '\n', encoding='utf-8')
    os.replace(new, path)
    return reply

  def _path(self, request: Request) -> pathlib.Path:
    key = json.dumps([self.url, self.model, request])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return self.cache / f'{name}.json'

  def _send(self, request: Request) -> Mapping[str, Any]:
    body = {
        'model': self.model,
        'messages': [
            {'role': role, 'content': content}
            for role, content in request.messages
        ],
        'temperature': request.temperature,
        'max_tokens': request.max_tokens,
    }
    headers = {'Content-Type': 'application/json'}
    if self.key is not None:
      headers['Authorization'] = f'Bearer {self.key}'
    call = urllib.request.Request(
        f'{self.url.rstrip("/")}/chat/completions',
        json.dumps(body).encode(),
        headers,
    )
    wait, reason = _FIRST_WAIT, ''
    for attempt in range(TRIES):
      asked_to_wait = 0.0
      try:
        with urllib.request.urlopen(call, timeout=self.timeout) as response:
          return json.load(response)
      except urllib.error.HTTPError as e:
        with e:
          text = e.read(300).decode(errors='replace')
        reason = f'HTTP {e.code}: {text}'
        if e.code != 429 and e.code < 500:
          raise base.EvalError(f'{self.url}: {reason}') from e
        asked_to_wait = _seconds(e.headers.get('Retry-After'))
      except (OSError, ValueError) as e:  # No connection, or no JSON.
        reason = f'{type(e).__name__}: {e}'
      if attempt < TRIES - 1:
        self.sleep(min(max(wait, asked_to_wait), _LONGEST_WAIT))
        wait *= 2
    raise base.EvalError(
        f'{self.url}: no answer after {TRIES} tries ({reason}). The replies so'
        f' far are in {self.cache}; repeat the command to go on.'
    )


def _seconds(header: str | None) -> float:
  """Of a Retry-After header; a date counts as nothing."""
  return float(header) if header and header.isdecimal() else 0.0


def from_flags(
    url: str | None,
    model: str | None,
    key: str | None,
    prices: Sequence[str],
    out: str | None,
) -> Judge:
  """A judge that keeps its replies in `out`/judge.

  Raises:
    EvalError: a flag is missing or malformed.
  """
  if url is None or model is None:
    raise base.EvalError('Give both --judge_url and --judge_model.')
  if not url.startswith(('http://', 'https://')):
    raise base.EvalError(
        f'--judge_url={url}: expected http://... or https://...'
    )
  if out is None:
    raise base.EvalError('Give --out=DIR, where the replies are kept.')
  try:
    numbers = [float(price) for price in prices]
  except ValueError:
    numbers = [-1.0]
  if len(numbers) not in (0, 2) or any(number < 0 for number in numbers):
    raise base.EvalError(
        f'--judge_prices={",".join(prices)}: expected the dollars per million'
        ' tokens in and out, such as 30,60.'
    )
  return Judge(
      url=url,
      model=model,
      key=key,
      cache=pathlib.Path(out) / 'judge',
      prices=(numbers[0], numbers[1]) if numbers else None,
  )
