# SPDX-License-Identifier: Apache-2.0
"""The rules of `check` for the images of a row, unopened."""

import functools
import os
import pathlib
import stat
from typing import Any

from moellava_jax.data import images, templates

MAX_IMAGES = 16  # Of a row; as in the original (MAX_IMAGE_LENGTH).
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.gif', '.webp', '.bmp', '.tif', '.tiff')


def paths(raw: dict[str, Any], notes) -> list[str]:
  paths = raw.get('image', [])
  if 'image' in raw and not paths and paths in (None, '', []):
    marks = str(raw.get('conversations')).count(templates.IMAGE)
    message = f': "image" is {paths!r}; expected a path or paths.'
    if marks:
      raise notes.bad('malformed "image"', message)
    notes.repair('no image for an empty "image"', message)
    return []
  paths = [paths] if isinstance(paths, str) else paths
  if not isinstance(paths, list) or not all(
      isinstance(p, str) and p.strip() for p in paths
  ):
    raise notes.bad(
        'malformed "image"',
        f': "image" is {repr(paths)[:60]}; expected a path or paths.',
    )
  if len(paths) > MAX_IMAGES:
    raise notes.bad(
        'more images than the original takes',
        f'has {len(paths)} images; expected at most {MAX_IMAGES}.',
    )
  return paths


def find(root: str, path: str, notes) -> str:
  """The path below `root` of the file that `path` means."""
  path = notes.text(path, '"image"')
  if _is_file(_locate(root, path, notes)):
    return path
  plain = path.strip().replace('\\', '/')
  if plain != path and _is_file(_locate(root, plain, notes)):
    notes.repair(
        'spaces and backslashes of a path corrected',
        f': image {path!r} does not exist, but {plain!r} does.',
    )
    return plain
  stem, extension = os.path.splitext(plain)
  if extension.lower() not in EXTENSIONS:
    stem = plain
  for other in ('', *EXTENSIONS, *(e.upper() for e in EXTENSIONS)):
    if _is_file(_locate(root, stem + other, notes)):
      notes.repair(
          'the file of another extension',
          f': image {path!r} does not exist, but {stem + other!r} does.',
      )
      return stem + other
  raise notes.bad(
      'missing image',
      f': image {path[:200]!r} does not exist under {root!r}, or is no file;'
      ' check --config.data.images.',
  )


def _locate(root: str, path: str, notes) -> pathlib.Path:
  try:
    return images.locate(root, path)
  except images.ImageError as error:
    raise notes.bad('image outside the image root', f': {error}') from error


@functools.lru_cache(maxsize=1 << 16)
def _is_file(path: pathlib.Path) -> bool:
  """Regular: to open a pipe would wait forever. The stages of a run share their
  images: look once."""
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except (OSError, ValueError):
    return False
