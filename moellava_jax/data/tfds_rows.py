# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset that TensorFlow Datasets wrote (`builders`).

TensorFlow itself is not needed, and not imported.
"""

from collections import Counter
import functools
import hashlib
import os
from typing import Any

from moellava_jax.data import rows


def is_dataset(path: str) -> bool:
  return os.path.exists(os.path.join(path, 'dataset_info.json'))


class Dataset(rows.Rows):
  """One split; examples are as `builders` describes them."""

  stored_as = None

  def __init__(self, directory: str, split: str):
    """Raises DataError if it is no dataset of conversations."""
    self.origin, self._split = directory, split
    self.dropped, self.repaired = Counter(), Counter()
    self._source = _source(directory, split)
    self._length = len(self._source)

  @property
  def directory(self) -> str:
    return self.origin

  @functools.cached_property
  def digest(self) -> str:
    with open(os.path.join(self.origin, 'dataset_info.json'), 'rb') as file:
      return hashlib.sha256(self._split.encode() + file.read()).hexdigest()

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index):
    number = self._index(index)
    try:
      example = self._source[number]
    except RuntimeError as error:
      raise rows.DataError(
          f'{self.origin} row {number} cannot be read: {error}. Prepare the'
          ' dataset again.'
      ) from error
    identity = example['id'].decode()
    names = [path.decode() for path in example['paths']]
    turns = example['conversations']
    return rows.Row(
        f'{self.origin} row {number} (id {identity})',
        identity,
        tuple(
            rows.Stored(f'{self.origin}:{name}', functools.partial(bytes, data))
            for name, data in zip(names, example['images'], strict=True)
        ),
        tuple(
            (role.decode(), value.decode())
            for role, value in zip(turns['from'], turns['value'], strict=True)
        ),
        None,
    )

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, '_source': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._source = _source(self.origin, self._split)


def _source(directory: str, split: str) -> Any:
  import tensorflow_datasets as tfds

  class Bytes(tfds.decode.SkipDecoding):
    """The image files themselves, of a sequence of images too."""

    def decode_batch_example_np(self, serialized):
      return serialized

  try:
    builder: Any = tfds.builder_from_directory(directory)
  except Exception as error:  # Whatever its parsers raise.
    raise rows.DataError(
        f'{directory} cannot be opened: {type(error).__name__}: {error}.'
        ' Prepare the dataset again.'
    ) from error
  wanted = {'id', 'paths', 'images', 'conversations'}
  features: Any = builder.info.features
  if features is None or wanted - set(features):
    raise rows.DataError(
        f'{directory} is no dataset of conversations; expected the features'
        f' {sorted(wanted)}, as data.builders writes them.'
    )
  if split not in builder.info.splits:
    raise rows.DataError(
        f'{directory} has no split {split!r}; it has'
        f' {sorted(builder.info.splits)}.'
    )
  decoders: Any = {'images': Bytes()}
  return builder.as_data_source(split, decoders=decoders)
