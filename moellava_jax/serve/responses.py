# SPDX-License-Identifier: Apache-2.0
"""What is sent back: completions, their chunks, the list of models.

https://platform.openai.com/docs/api-reference/chat/object and .../streaming.
"""

import json
import time
from typing import Any, NamedTuple
import uuid

DONE = b'data: [DONE]\n\n'
STREAM_HEADERS = [
    (b'content-type', b'text/event-stream; charset=utf-8'),
    (b'cache-control', b'no-cache'),
    (b'x-accel-buffering', b'no'),  # nginx would collect the pieces.
]


class Answering(NamedTuple):
  """What all objects about one answer have in common."""

  id: str
  created: int  # Seconds since 1970.
  model: str
  fingerprint: str
  prompt_tokens: int

  def usage(self, new_tokens: int) -> dict[str, int]:
    return {
        'prompt_tokens': self.prompt_tokens,
        'completion_tokens': new_tokens,
        'total_tokens': self.prompt_tokens + new_tokens,
    }

  def completion(
      self, text: str, finish_reason: str, new_tokens: int
  ) -> dict[str, Any]:
    """The whole answer."""
    message = {'role': 'assistant', 'content': text, 'refusal': None}
    choice = {
        'index': 0,
        'message': message,
        'logprobs': None,
        'finish_reason': finish_reason,
    }
    return {
        **self._head('chat.completion'),
        'choices': [choice],
        'usage': self.usage(new_tokens),
    }

  def chunk(
      self,
      delta: dict[str, Any],
      finish_reason: str | None = None,
      *,
      with_usage: bool,
  ) -> bytes:
    """An event with a piece; `with_usage` if the last event tells the usage."""
    choice = {
        'index': 0,
        'delta': delta,
        'logprobs': None,
        'finish_reason': finish_reason,
    }
    body = {**self._head('chat.completion.chunk'), 'choices': [choice]}
    return event({**body, 'usage': None} if with_usage else body)

  def usage_chunk(self, new_tokens: int) -> bytes:
    """The event behind the last piece that tells the usage."""
    head = self._head('chat.completion.chunk')
    return event({**head, 'choices': [], 'usage': self.usage(new_tokens)})

  def _head(self, kind: str) -> dict[str, Any]:
    return {
        'id': self.id,
        'object': kind,
        'created': self.created,
        'model': self.model,
        'system_fingerprint': self.fingerprint,
    }


def answering(model: str, fingerprint: str, prompt_tokens: int) -> Answering:
  name = f'chatcmpl-{uuid.uuid4().hex}'
  return Answering(name, int(time.time()), model, fingerprint, prompt_tokens)


def event(body: dict[str, Any]) -> bytes:
  return b'data: %s\n\n' % json.dumps(body, separators=(',', ':')).encode()


def model(name: str, created: int) -> dict[str, Any]:
  return {
      'id': name,
      'object': 'model',
      'created': created,
      'owned_by': 'moellava_jax',
  }
