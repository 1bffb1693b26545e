# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen tower, kept on disk for the next time.

The tower is most of the work of stage I, and says the same about the same
pixels as long as nobody trains it. Worth it where images come again: several
epochs, or several runs.
"""

from collections.abc import Iterator
import hashlib
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from moellava_jax import config, trees
from moellava_jax.data import batch as batch_lib
from moellava_jax.model import llava

# Images that the tower looks at together: one compiled shape for any number.
_TOGETHER = 8


class Cache:
  """A file for each image, named by its pixels, in a folder for each tower."""

  def __init__(
      self, directory: str, model: llava.Llava, vision_params: Any, images: int
  ):
    """Says what the files take; `images` is how many different ones there are.

    For one process; `inputs.read` refuses it to several.

    Raises:
      UserError: there is no room for them.
    """
    vision = model.cfg.vision
    self._dtype = llava.compute_dtype(model.cfg.compute_dtype)
    self._shape = (vision.num_tokens, vision.width)
    self._params = vision_params
    self._folder = pathlib.Path(directory, _tower(model, vision_params))
    self._folder.mkdir(parents=True, exist_ok=True)
    self._tower = jax.jit(
        lambda params, images_BIHWC: model.apply(
            {'params': {'vision': params}}, images_BIHWC, method='features'
        )
    )
    _check_room(
        self._folder, images, int(np.prod(self._shape)) * self._dtype.itemsize
    )

  def through(
      self, batches: Iterator[batch_lib.Batch]
  ) -> Iterator[batch_lib.Batch]:
    """`batches` with features in the place of images."""
    for batch in batches:
      features = llava.Features(self._features(batch.images_BIHWC))
      yield batch._replace(images_BIHWC=features)

  def _features(self, images_BIHWC: np.ndarray) -> np.ndarray:
    """`[B, I, P, D]`; an unused slot, all zeros, is an image like another."""
    b, i, *pixels = images_BIHWC.shape
    images_NHWC = images_BIHWC.reshape(b * i, *pixels)
    names = [_name(image_HWC) for image_HWC in images_NHWC]
    found = {name: self._read(name) for name in set(names)}
    missing = [name for name, kept_PD in found.items() if kept_PD is None]
    for start in range(0, len(missing), _TOGETHER):
      part = missing[start : start + _TOGETHER]
      looked_at = [images_NHWC[names.index(name)] for name in part]
      looked_at += [looked_at[0]] * (_TOGETHER - len(part))
      features_NPD = np.asarray(
          self._tower(self._params, np.stack(looked_at)[:, None])[:, 0]
      )
      for name, features_PD in zip(part, features_NPD, strict=False):
        self._write(name, features_PD)
        found[name] = features_PD
    features_NPD = np.stack([np.asarray(found[name]) for name in names])
    return features_NPD.reshape(b, i, *features_NPD.shape[1:])

  def _path(self, name: str) -> pathlib.Path:
    return self._folder / name[:2] / name

  def _read(self, name: str) -> np.ndarray | None:
    """None: not there, or not whole."""
    try:
      data = self._path(name).read_bytes()
    except FileNotFoundError:
      return None
    expected = int(np.prod(self._shape)) * self._dtype.itemsize
    if len(data) != expected:
      return None
    return np.frombuffer(data, self._dtype).reshape(self._shape)

  def _write(self, name: str, features_PD: np.ndarray) -> None:
    path = self._path(name)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f'{name}.{os.getpid()}.tmp')
    temporary.write_bytes(features_PD.astype(self._dtype).tobytes())
    os.replace(temporary, path)


def _name(image_HWC: np.ndarray) -> str:
  return hashlib.blake2b(image_HWC.tobytes(), digest_size=16).hexdigest()


def _tower(model: llava.Llava, vision_params: Any) -> str:
  """Names a tower: its settings, its precision and its weights."""
  seen = hashlib.sha256(config.to_json(model.cfg.vision).encode())
  seen.update(str(llava.compute_dtype(model.cfg.compute_dtype)).encode())
  for path, leaf in sorted(trees.flatten(vision_params).items()):
    seen.update(path.encode())
    seen.update(np.asarray(leaf).tobytes())
  return seen.hexdigest()[:16]


def _check_room(folder: pathlib.Path, images: int, size: int) -> None:
  kept = sum(len(files) for _, _, files in os.walk(folder))
  need = max(images - kept, 0) * size
  free = shutil.disk_usage(folder).free
  print(
      f'Features of up to {images} images take {images * size / 1e9:.3g} GB in'
      f' {folder}; {kept} are there, {free / 1e9:.3g} GB are free.',
      flush=True,
  )
  if need > 0.95 * free:
    raise config.UserError(
        f'{need / 1e9:.3g} GB of features do not fit into the'
        f' {free / 1e9:.3g} GB free in {folder}. Name a larger disk with'
        ' config.data.feature_cache, or leave it empty.'
    )
