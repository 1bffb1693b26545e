# SPDX-License-Identifier: Apache-2.0
"""The body of a request -> what the engine needs; all that can be refused is."""

import dataclasses
import secrets
from typing import NamedTuple

from moellava_jax import config
from moellava_jax.data import templates
from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import generate, sampling
from moellava_jax.serve import errors, media, schema
from moellava_jax.serve.errors import ApiError


class Prepared(NamedTuple):
  """A request that may be queued."""

  request: schema.ChatRequest  # Without its images.
  prompt: generate.Prompt
  options: sampling.Options
  max_new_tokens: int
  stop: tuple[str, ...]


class Preparer:
  """Reads bodies for one model: `parse`, then `prepare`; thread-safe."""

  def __init__(
      self,
      chat: chat_lib.Chat,
      *,
      name: str,
      context: int,
      max_images: int,
      limits: media.Limits,
  ):
    """What is asked for, and how much of it.

    Args:
      chat: the model.
      name: what clients call it.
      context: positions of prompt and answer.
      max_images: of a request.
      limits: of an image.
    """
    self._chat, self._name, self._context = chat, name, context
    self._max_images = max_images
    self._read = media.Reader(limits, chat.shrink)
    vocabulary = chat.tokenizer.backend.get_vocab()
    # No text of more characters can fit, and reading it takes seconds.
    self._most_characters = context * max(map(len, vocabulary))

  def parse(self, data: bytes) -> schema.ChatRequest:
    """Reads a body; only its images remain to be seen.

    Raises:
      ApiError: 400 or 404.
    """
    request = schema.parse(data)
    if request.model != self._name:
      raise unknown_model(request.model, self._name)
    self._check_size(request)
    return request

  def prepare(self, request: schema.ChatRequest) -> Prepared:
    """Decodes the images, tokenises.

    Raises:
      ApiError: 400.
    """
    pictures = self._read(request.images)
    chat = self._chat
    if request.system is not None:
      template = with_system(chat.template, request.system)
      chat = chat._replace(template=template)
    try:
      prompt = chat.encode(chat_lib.Request(request.turns, pictures))
    except config.UserError as error:
      raise errors.bad(str(error), 'messages') from None
    length = len(prompt.tokens_L)
    if length >= self._context:
      raise self._too_long(f'{length} tokens')
    seed = secrets.randbits(32) if request.seed is None else request.seed
    return Prepared(
        request._replace(images=()),
        prompt,
        sampling.Options(
            request.temperature, request.top_p, request.top_k, seed % 2**32
        ),
        request.max_tokens or self._context,
        (*self._chat.stop, *request.stop),
    )

  def _check_size(self, request: schema.ChatRequest) -> None:
    images = len(request.images)
    if images > self._max_images:
      raise errors.bad(
          f'{images} images: expected at most {self._max_images}.',
          'messages',
          'too_many_images',
      )
    positions = images * self._chat.model.cfg.vision.num_tokens
    if positions >= self._context:
      raise self._too_long(f'{positions} positions of {images} images')
    characters = sum(len(text) for _, text in request.turns)
    characters += len(request.system or '')
    if characters > self._most_characters:
      raise self._too_long(f'{characters} characters')

  def _too_long(self, what: str) -> ApiError:
    return errors.too_long(
        f'The messages have {what}, but the model takes {self._context} tokens,'
        ' the answer included; shorten them.'
    )


def unknown_model(model: str, name: str) -> ApiError:
  return ApiError(
      404,
      f'The model {errors.shown(model)} does not exist; here is {name!r}.',
      param='model',
      code='model_not_found',
  )


def with_system(
    template: templates.Template, system: str
) -> templates.Template:
  """`template` with another system prompt."""
  if template.style == 'mpt':  # Whose system prompt brings its own marks.
    marks, _, _ = template.system.partition('\n')
    system = f'{marks}\n{system}'
  return dataclasses.replace(template, system=system)
