# SPDX-License-Identifier: Apache-2.0
"""The body of a chat completion -> `ChatRequest`, or a 400 that says why.

What is read follows https://platform.openai.com/docs/api-reference/chat. A
field that would change the answer and is not supported is refused rather than
ignored, as is a field that nobody knows.
"""

from collections.abc import Callable
import json
from typing import Any, NamedTuple

from moellava_jax.data import templates
from moellava_jax.serve import errors, messages
from moellava_jax.serve.errors import ApiError

_MAX_STOPS = 16  # OpenAI takes 4; the harnesses send more.
_MAX_STOP_LENGTH = 256
_INT64 = 2**63

# They say who asks, what to keep, or how to bill: nothing about the answer.
_IGNORED = frozenset(
    {
        'metadata',
        'parallel_tool_calls',
        'prompt_cache_key',
        'safety_identifier',
        'service_tier',
        'store',
        'user',
    }
)
# Supported with the value that means "off" only.
_OFF: dict[str, tuple[Any, ...]] = {
    'frequency_penalty': (0,),
    'function_call': ('none', 'auto'),
    'functions': ([],),
    'logit_bias': ({},),
    'logprobs': (False,),
    'modalities': (['text'],),
    'n': (1,),
    'presence_penalty': (0,),
    'repetition_penalty': (1,),  # Of vLLM; VLMEvalKit has a flag for it.
    'response_format': ({'type': 'text'},),
    'tool_choice': ('none', 'auto'),
    'tools': ([],),
    'top_logprobs': (0,),
}
_READ = frozenset(
    {
        'max_completion_tokens',
        'max_tokens',
        'messages',
        'model',
        'seed',
        'stop',
        'stream',
        'stream_options',
        'temperature',
        'top_k',
        'top_p',
    }
)


class ChatRequest(NamedTuple):
  """What a client asks for."""

  model: str
  system: str | None
  turns: tuple[templates.Turn, ...]  # With one `<image>` for each image.
  images: tuple[messages.Picture, ...]
  max_tokens: int | None
  temperature: float
  top_p: float
  top_k: int
  seed: int | None
  stop: tuple[str, ...]
  stream: bool
  include_usage: bool


def parse(data: bytes) -> ChatRequest:
  """Reads the body of a request.

  Raises:
    ApiError: 400; it names the field.
  """
  body = _json(data)
  _check_fields(body)
  stream = _boolean(body, 'stream')
  system, turns, images = messages.parse(body.get('messages'))
  temperature = _number(body, 'temperature', 0, 2)
  top_p = _number(body, 'top_p', 0, 1)
  return ChatRequest(
      model=_model(body),
      system=system,
      turns=turns,
      images=images,
      max_tokens=_max_tokens(body),
      temperature=1.0 if temperature is None else temperature,
      # As far as is left of it: the likeliest token alone.
      top_p=1.0 if top_p is None else max(top_p, 1e-6),
      top_k=max(_integer(body, 'top_k', -1, 2**31 - 1) or 0, 0),
      seed=_integer(body, 'seed', -_INT64, _INT64 - 1),
      stop=_stop(body.get('stop')),
      stream=stream,
      include_usage=_include_usage(body.get('stream_options'), stream),
  )


def _json(data: bytes) -> dict[str, Any]:
  try:
    # Python would take NaN and Infinity, and bytes in UTF-16.
    body = json.loads(data.decode('utf-8'), parse_constant=_no_constant)
  except RecursionError:
    raise _not_json('it is nested too deeply') from None
  except ValueError as error:
    raise _not_json(str(error)) from None
  if not isinstance(body, dict):
    raise _not_json(f'it is a {type(body).__name__}, not an object')
  return body


def _not_json(why: str) -> ApiError:
  return ApiError(400, f'The body is not the JSON expected: {why}.')


def _no_constant(name: str) -> Any:
  raise ValueError(f'{name} is not JSON')


def _check_fields(body: dict[str, Any]) -> None:
  for name, value in body.items():
    if value is None or name in _READ or name in _IGNORED:
      continue
    if name not in _OFF:
      raise errors.bad(
          f'Unrecognized field {errors.shown(name)}; known are'
          f' {sorted(_READ | _IGNORED | _OFF.keys())}.',
          errors.shown(name),
          'unknown_parameter',
      )
    if not any(_same(value, off) for off in _OFF[name]):
      raise errors.bad(
          f'{name}={errors.shown(value)} is not supported; leave it out.',
          name,
          'unsupported_value',
      )


def _same(value: Any, other: Any) -> bool:
  """Equality in which False is not 0."""
  return value == other and isinstance(value, bool) == isinstance(other, bool)


def _model(body: dict[str, Any]) -> str:
  model = body.get('model')
  if not isinstance(model, str) or not model:
    raise errors.bad(
        f'model={errors.shown(model)}: expected the name of a model; GET'
        ' /v1/models lists them.',
        'model',
    )
  return model


def _typed(
    body: dict[str, Any],
    name: str,
    expected: str,
    fits: Callable[[Any], bool],
) -> Any:
  """The value of a field, or None where it is missing or null."""
  value = body.get(name)
  if value is not None and not fits(value):
    raise errors.bad(
        f'{name}={errors.shown(value)}: expected {expected}.', name
    )
  return value


def _boolean(body: dict[str, Any], name: str) -> bool:
  return bool(
      _typed(body, name, 'true or false', lambda v: isinstance(v, bool))
  )


def _integer(body: dict[str, Any], name: str, low: int, high: int) -> Any:
  return _typed(
      body,
      name,
      f'an integer from {low} to {high}',
      lambda v: type(v) is int and low <= v <= high,
  )


def _number(body: dict[str, Any], name: str, low: int, high: int) -> Any:
  value = _typed(
      body,
      name,
      f'a number from {low} to {high}',
      # 1e999 is JSON, and infinite.
      lambda v: type(v) in (int, float) and low <= v <= high,
  )
  return None if value is None else float(value)


def _max_tokens(body: dict[str, Any]) -> int | None:
  values = [
      _integer(body, name, 1, 2**31 - 1)
      for name in ('max_tokens', 'max_completion_tokens')
  ]
  given = [value for value in values if value is not None]
  return min(given) if given else None


def _stop(value: Any) -> tuple[str, ...]:
  if value is None:
    return ()
  stops = [value] if isinstance(value, str) else value
  if (
      not isinstance(stops, list)
      or len(stops) > _MAX_STOPS
      or not all(
          isinstance(s, str) and 0 < len(s) <= _MAX_STOP_LENGTH for s in stops
      )
  ):
    raise errors.bad(
        f'stop={errors.shown(value)}: expected a text of 1 to'
        f' {_MAX_STOP_LENGTH} characters, or up to {_MAX_STOPS} of them.',
        'stop',
    )
  return tuple(messages.text(stop, 'stop') for stop in stops)


def _include_usage(options: Any, stream: bool) -> bool:
  if options is None:
    return False
  if not stream:
    raise errors.bad(
        'stream_options is only for stream=true.', 'stream_options'
    )
  known = {'include_usage', 'include_obfuscation'}
  if not isinstance(options, dict) or not options.keys() <= known:
    raise errors.bad(
        f'stream_options={errors.shown(options)}: expected an object with'
        ' include_usage.',
        'stream_options',
    )
  return _boolean(options, 'include_usage')
