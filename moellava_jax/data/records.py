# SPDX-License-Identifier: Apache-2.0
"""Prepared directories: rows and images in ArrayRecord shards, and a manifest.

  DIR/manifest.json              what is there; `FORMAT` and `VERSION`
  DIR/rows-00000.array_record    a record is a row, as JSON in UTF-8:
                                   {"where", "id", "turns": [[role, text]],
                                    "images": [[path, shard, record]],
                                    "attributes"}
  DIR/images-00000.array_record  a record is an image file: its bytes as they
                                 were found, or a JPEG or PPM of model size
  DIR/lengths-<hash>.npz         positions of every row (`lengths`)

Text and images are apart, so that going over all texts does not read the
images; an image that several rows show is stored once. ArrayRecord keeps a
hash of every record and compares it when it reads.
"""

from collections import Counter
from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

from moellava_jax.data import rows

MANIFEST = 'manifest.json'
FORMAT = 'moellava_jax rows'
VERSION = 1


def is_prepared(path: str) -> bool:
  return os.path.exists(os.path.join(path, MANIFEST))


@dataclasses.dataclass
class _File:
  """A shard's file, so that ArrayRecord need not open it to count."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


class Prepared(rows.Rows):
  """The rows of a prepared directory."""

  def __init__(self, directory: str):
    """Reads the manifest and looks at the files, without opening them.

    Raises:
      DataError: it is of another version, was changed, or files are missing or
        of another size.
    """
    self.origin = directory
    self.manifest = read_manifest(directory)
    for entry in _files(self.manifest):
      path = os.path.join(directory, entry['name'])
      found = os.path.getsize(path) if os.path.exists(path) else None
      if found != entry['bytes']:
        raise rows.DataError(
            f'{path} '
            + ('is missing' if found is None else f'has {found} bytes')
            + f'; {MANIFEST} says {entry["bytes"]} bytes. Copy the directory'
            ' again, or prepare it again.'
        )
    self.dropped, self.repaired = Counter(), Counter()  # When it was made.
    made = self.manifest['stored_as']
    self.stored_as = made and rows.StoredAs(
        **{**made, 'mean': tuple(made['mean'])}
    )
    self._shards = self.manifest['shards']
    self._rows = self._source('rows')
    self._images = self._source('images')
    self._starts = {}  # Of the images of a shard, among all.
    start = 0
    for shard in self._shards:
      self._starts[shard['number']] = start
      start += shard['images']['records'] if shard['images'] else 0

  def _source(self, kind: str) -> Any:
    from array_record.python import array_record_data_source

    files = [
        _File(os.path.join(self.origin, file['name']), 0, n, n)
        for shard in self._shards
        if (file := shard[kind]) and (n := file['records'])
    ]
    if not files:
      return ()
    return array_record_data_source.ArrayRecordDataSource(files)

  @property
  def directory(self) -> str:
    return self.origin

  @property
  def digest(self) -> str:
    return self.manifest['digest']

  def __len__(self) -> int:
    return self.manifest['rows']

  def __getitem__(self, index):
    number = self._index(index)
    raw = json.loads(self._read(self._rows, number, 'row'))
    return rows.Row(
        raw['where'],
        raw['id'],
        tuple(
            rows.Stored(
                f'{self.origin}:{path}',
                functools.partial(self._image, shard, record),
            )
            for path, shard, record in raw['images']
        ),
        tuple((role, value) for role, value in raw['turns']),
        raw['attributes'],
    )

  def _image(self, shard: int, record: int) -> bytes:
    return self._read(self._images, self._starts[shard] + record, 'image')

  def _read(self, source: Any, number: int, what: str) -> bytes:
    try:
      return source[number]
    except (RuntimeError, ValueError, OSError) as error:
      raise rows.DataError(
          f'{self.origin}: {what} {number} cannot be read: {error}. Copy the'
          ' directory again, or prepare it again.'
      ) from error


def read_manifest(directory: str) -> dict[str, Any]:
  """Raises DataError if it is not one of ours, or was changed."""
  path = os.path.join(directory, MANIFEST)
  try:
    with open(path, encoding='utf-8') as file:
      manifest = json.load(file)
    kind, version = manifest['format'], manifest['version']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise rows.DataError(
        f'{path} cannot be read ({type(error).__name__}: {error}); expected'
        ' what data.prepare wrote. Prepare the directory again.'
    ) from error
  if kind != FORMAT or version != VERSION:
    raise rows.DataError(
        f'{path} is of format {kind!r}, version {version!r}; this program reads'
        f' {FORMAT!r}, version {VERSION}. Prepare the directory again, or use'
        ' the program that wrote it.'
    )
  if manifest.get('digest') != digest(manifest):
    raise rows.DataError(
        f'{path} was changed after it was written; prepare the directory again.'
    )
  return manifest


def digest(manifest: Mapping[str, Any]) -> str:
  """The hash of everything else in it."""
  rest = {k: v for k, v in manifest.items() if k != 'digest'}
  text = json.dumps(rest, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _files(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [
      shard[kind]
      for shard in manifest['shards']
      for kind in ('rows', 'images')
      if shard[kind]
  ]


def verify(directory: str) -> int:
  """Reads all files and compares their hashes; returns their bytes.

  Raises:
    DataError: it names the first file that is not as it was written.
  """
  manifest = Prepared(directory).manifest
  for entry in _files(manifest):
    path = os.path.join(directory, entry['name'])
    if (found := hash_file(path)) != entry['sha256']:
      raise rows.DataError(
          f'{path} has the SHA-256 {found}; {MANIFEST} says'
          f' {entry["sha256"]}. Copy it again, or prepare the directory again.'
      )
  return sum(entry['bytes'] for entry in _files(manifest))


def hash_file(path: str) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
