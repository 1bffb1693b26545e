# SPDX-License-Identifier: Apache-2.0
"""Small LLaVA JSON files with images, and what reads them."""

import dataclasses
import json
import pathlib

import numpy as np
from PIL import Image

from moellava_jax.data import pipeline, sources
from moellava_jax.data import tokenizer as tokenizer_lib
from tests import tiny

TOKENIZER = tokenizer_lib.train(
    ['USER: What is it? ASSISTANT: A red dog.<|endoftext|>'] * 3, 300
)


def row(number: int, images: tuple[str, ...] = (), words: int = 3) -> dict:
  """A question of so many words with its answer; ids are `row0`, `row1`, ..."""
  question = '<image>\n' * len(images) + 'What is it? ' * (words // 3)
  return {
      'id': f'row{number}',
      **({'image': list(images)} if images else {}),
      'conversations': [
          {'from': 'human', 'value': question},
          {'from': 'gpt', 'value': f'A dog {number}.'},
      ],
  }


def write(folder: pathlib.Path, rows: list[dict], name='rows.json') -> str:
  path = folder / name
  path.write_text(json.dumps(rows), encoding='utf-8')
  return str(path)


def mixed(folder: pathlib.Path, count: int, name='rows.json', first=0) -> str:
  """Every third row has no image, every fifth of the others two."""
  rng = np.random.default_rng(first)
  for n in range(4):
    pixels = rng.integers(0, 256, (40 + n, 60, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{n}.png')
  rows = []
  for n in range(first, first + count):
    paths = tuple(f'{(n + i) % 4}.png' for i in range(1 + (n % 5 == 4)))
    rows.append(row(n, () if n % 3 == 2 else paths, int(rng.integers(3, 40))))
  return write(folder, rows, name)


def format_of(row_length=160, max_images=2, **data) -> pipeline.Format:
  cfg = tiny.train_config()
  settings = dataclasses.replace(cfg.data, **data)
  return pipeline.Format(
      'bare', row_length, max_images, cfg.model.vision, settings
  )


def read(folder: pathlib.Path, path: str, **changes):
  rows = sources.read(path, str(folder))
  fmt = format_of(**changes)
  return pipeline.Examples(rows, str(folder), fmt, TOKENIZER)


def batches(data, count, start=0, seed=7, size=4, process=0, processes=1):
  """So many batches of a process, as a list."""
  share = np.split(np.arange(size), processes)[process]
  found = pipeline.train_batches(data, size, seed, start, share=share)
  try:
    return [next(found) for _ in range(count)]
  finally:
    found.close()  # pyright: ignore[reportAttributeAccessIssue]


def same(one, other) -> None:
  """Asserts that two lists of batches are equal to the bit."""
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)
