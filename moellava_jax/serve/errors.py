# SPDX-License-Identifier: Apache-2.0
"""Refusals, in the form in which the OpenAI API states them.

https://platform.openai.com/docs/guides/error-codes/api-errors
"""

from typing import Any


class ApiError(Exception):
  """A request that gets an error as its answer.

  Attributes:
    status: of HTTP.
    message: what was given, what was expected, what to do.
    param: the path of the field that is wrong, as `messages.0.content`.
    code: for programs; None where OpenAI has none either.
    retry_after: seconds after which it may work.
  """

  def __init__(
      self,
      status: int,
      message: str,
      *,
      param: str | None = None,
      code: str | None = None,
      retry_after: int | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.message = message
    self.param = param
    self.code = code
    self.retry_after = retry_after

  @property
  def body(self) -> dict[str, Any]:
    return {
        'error': {
            'message': self.message,
            'type': _TYPES.get(self.status, _kind(self.status)),
            'param': self.param,
            'code': self.code,
        }
    }

  @property
  def headers(self) -> dict[str, str]:
    headers = {}
    if self.retry_after is not None:
      headers['Retry-After'] = str(self.retry_after)
    if self.status == 401:
      headers['WWW-Authenticate'] = 'Bearer'
    return headers


_TYPES = {
    401: 'authentication_error',
    429: 'rate_limit_error',
    503: 'service_unavailable_error',
}


def _kind(status: int) -> str:
  return 'server_error' if status >= 500 else 'invalid_request_error'


def bad(message: str, param: str, code: str | None = None) -> ApiError:
  """The 400 of a field that is wrong."""
  return ApiError(400, message, param=param, code=code)


def too_long(message: str) -> ApiError:
  """The 400 of a conversation that does not fit into the model."""
  return bad(message, 'messages', 'context_length_exceeded')


def shown(value: Any) -> str:
  """`value` for a message: short, and without anything unprintable."""
  if isinstance(value, (list, dict)):  # It may be nested too deeply to print.
    return f'a {type(value).__name__} of {len(value)}'
  return ascii(value) if len(ascii(value)) <= 80 else ascii(value)[:77] + '...'
