# SPDX-License-Identifier: Apache-2.0
"""What is asked: an image, a text and the turns before -> a `Request`."""

from collections.abc import Sequence
import os
from typing import NamedTuple

from PIL import Image

from moellava_jax import config
from moellava_jax.data import templates

# An image, or the path of its file.
Picture = Image.Image | str | os.PathLike[str]

Exchange = tuple[str, str]  # An earlier question and its answer.


class Request(NamedTuple):
  """A conversation that ends with a question."""

  turns: tuple[templates.Turn, ...]  # ('human', '<image>\nWhat is it?'), ...
  images: tuple[Picture, ...]  # One per `<image>`, in order.


def pictures(image: Picture | Sequence[Picture] | None) -> tuple[Picture, ...]:
  """None, one image or several as a tuple."""
  if image is None:
    return ()
  if isinstance(image, (Image.Image, str, os.PathLike)):
    return (image,)
  return tuple(image)


def conversation(
    image: Picture | Sequence[Picture] | None,
    text: str,
    history: Sequence[Exchange],
) -> Request:
  """The request that asks `text` about the images after the turns before.

  If neither `text` nor the questions before it say `<image>`, the marks are put
  in front of the first question, as in the data of training.

  Args:
    image: see `pictures`.
    text: the question.
    history: earlier (question, answer) pairs.
  """
  turns: list[templates.Turn] = []
  for question, answer in history:
    turns += [('human', question), ('gpt', answer)]
  turns.append(('human', text))
  shown = pictures(image)
  if shown and not any(templates.IMAGE in words for _, words in turns):
    marks = f'{templates.IMAGE}\n' * len(shown)
    turns[0] = ('human', marks + turns[0][1])
  return Request(tuple(turns), shown)


def conversations(
    image: Sequence[Picture | Sequence[Picture] | None] | Picture | None,
    texts: Sequence[str],
    history: Sequence[Exchange],
) -> list[Request]:
  """One request for each of `texts`, about its own image or images.

  Raises:
    UserError: not as many entries of `image` as texts, or a history, of which
      it would not be known whose it is.
  """
  if history:
    raise config.UserError(
        f'A history of {len(history)} turns goes with one text, not with a list'
        f' of {len(texts)}; make a Request of each and call Chat.generate.'
    )
  if image is None:
    return [conversation(None, text, ()) for text in texts]
  single = isinstance(image, (Image.Image, str, os.PathLike))
  if single or len(image) != len(texts):
    given = 'one image' if single else f'{len(image)} entries of images'
    raise config.UserError(
        f'{given} for {len(texts)} texts: expected a list with one entry for'
        ' each text: an image, a list of images, or None.'
    )
  return [
      conversation(shown, text, ())
      for shown, text in zip(image, texts, strict=True)
  ]
