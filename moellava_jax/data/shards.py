# SPDX-License-Identifier: Apache-2.0
"""Writes the shards of a prepared directory; `records` says what they are."""

from collections import Counter
from collections.abc import Mapping, Sequence
import json
import os
from typing import Any

from moellava_jax.data import records, rows

# Grain wants records of their own; images are compressed already.
_OPTIONS = 'group_size:1,uncompressed'


class ShardWriter:
  """Writes the two files of a shard under temporary names.

  The shard exists once its description is there (`finish`), which is written
  last: a crash before leaves nothing that would be taken for one.
  """

  def __init__(self, directory: str, number: int):
    self._directory, self._number = directory, number
    self._writers: dict[str, Any] = {}
    self._counts: Counter[str] = Counter()
    self.images: list[str] = []  # Their paths.

  def add_image(self, path: str, data: bytes) -> tuple[int, int]:
    """Returns (shard, record)."""
    self._write('images', data)
    self.images.append(path)
    return self._number, len(self.images) - 1

  def add_row(self, row: rows.Row, where: Sequence[tuple[int, int]]) -> None:
    """`where`: (shard, record) of each of its images."""
    raw = {
        'where': row.where,
        'id': row.id,
        'images': [
            [str(path), *place]
            for path, place in zip(row.images, where, strict=True)
        ],
        'turns': row.turns,
        'attributes': row.attributes,
    }
    self._write('rows', json.dumps(raw, ensure_ascii=False).encode())

  def _write(self, kind: str, data: bytes) -> None:
    from array_record.python import array_record_module  # pyright: ignore

    if kind not in self._writers:
      self._writers[kind] = array_record_module.ArrayRecordWriter(
          self._path(kind) + '.tmp', _OPTIONS
      )
    self._writers[kind].write(data)
    if not self._writers[kind].ok():
      raise self._full(kind)
    self._counts[kind] += 1

  def _full(self, kind: str) -> rows.DataError:
    return rows.DataError(
        f'{self._path(kind)}.tmp cannot be written; is the disk full? The same'
        ' command goes on from here.'
    )

  def _path(self, kind: str) -> str:
    return shard_path(self._directory, kind, self._number)

  def finish(self, description: Mapping[str, Any]) -> dict[str, Any]:
    """Closes the files; returns and writes what is known of the shard."""
    files: dict[str, Any] = {}
    for kind in ('rows', 'images'):
      files[kind] = None
      if kind not in self._writers:
        continue
      path = self._path(kind)
      try:
        self._writers[kind].close()
      except RuntimeError as error:
        raise self._full(kind) from error
      files[kind] = {
          'name': os.path.basename(path),
          'records': self._counts[kind],
          'bytes': os.path.getsize(path + '.tmp'),
          'sha256': records.hash_file(path + '.tmp'),
      }
      os.replace(path + '.tmp', path)
    shard = {'number': self._number, **files, **description}
    shard['paths'] = self.images
    write_json(description_path(self._directory, self._number), shard)
    return shard


def shard_path(directory: str, kind: str, number: int) -> str:
  return os.path.join(directory, f'{kind}-{number:05d}.array_record')


def description_path(directory: str, number: int) -> str:
  return os.path.join(directory, f'shard-{number:05d}.json')


def write_json(path: str, value: Any) -> None:
  """Either the old file or the new one, on the disk and never half."""
  with open(path + '.tmp', 'w', encoding='utf-8') as file:
    json.dump(value, file, sort_keys=True, ensure_ascii=False)
    file.flush()
    os.fsync(file.fileno())
  os.replace(path + '.tmp', path)
