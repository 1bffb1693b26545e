# SPDX-License-Identifier: Apache-2.0
"""LLaVA JSON and images for tests, and the parts of a pipeline that reads them."""

import dataclasses
import io
import json

import numpy as np
from PIL import Image

from moellava_jax.data import encode, inspection, pipeline, rows
from moellava_jax.data import tokenizer as tokenizer_lib
from tests import tiny

TOKENIZER = tokenizer_lib.train(
    ['USER: What is it? ASSISTANT: A red dog.<|endoftext|>'] * 3, 300
)
IMAGE_TOKENS = tiny.train_config().model.vision.num_tokens


def picture(number: int, kind='png', size=(60, 40)) -> bytes:
  rng = np.random.default_rng(number)
  file = io.BytesIO()
  pixels_HWC = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  Image.fromarray(pixels_HWC).save(file, kind)
  return file.getvalue()


def row(number: int, *images: str):
  """A conversation of one or two exchanges."""
  marks = '<image>\n' * len(images)
  turns = []
  for turn in range(1 + number % 2):
    turns += [
        {'from': 'human', 'value': marks * (not turn) + f'What {turn}?'},
        {'from': 'gpt', 'value': f'A dog {number}.'},
    ]
  raw = {'id': f'row{number}', 'conversations': turns}
  if images:
    raw['image'] = images[0] if len(images) == 1 else list(images)
  return raw


def write(folder, count: int, name='rows.json'):
  """Rows of one, two or no images; every image is in two rows."""
  raws = []
  for number in range(count):
    path = f'coco/{number // 2}.png'
    raws.append(row(number, *([path] * (0, 1, 1, 2)[number % 4])))
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(picture(number // 2))
  (folder / name).write_text(json.dumps(raws), encoding='utf-8')
  return str(folder / name)


def settings(folder, **changes) -> inspection.Settings:
  plain = inspection.Settings(
      images=str(folder),
      on_bad='error',
      attributes=False,
      stored_as=None,
      tokenizer=None,
      family=None,
      template='bare',
      image_tokens=IMAGE_TOKENS,
  )
  return plain._replace(**changes)


def stored_as(encoding='raw', **changes) -> rows.StoredAs:
  vision = tiny.train_config().model.vision
  made = rows.StoredAs(
      vision.image_size, 'pad', vision.resize, vision.mean, encoding
  )
  return made._replace(**changes)


def examples(found, folder, cache_mb=64, on_bad='error') -> pipeline.Examples:
  cfg = tiny.train_config()
  data = dataclasses.replace(
      cfg.data, cache_mb=cache_mb, image_aspect='pad', on_bad=on_bad
  )
  fmt = pipeline.Format('bare', 96, 2, cfg.model.vision, data)
  encode.image_store.cache_clear()
  return pipeline.Examples(found, str(folder), fmt, TOKENIZER)
