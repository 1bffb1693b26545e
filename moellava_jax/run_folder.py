# SPDX-License-Identifier: Apache-2.0
"""The files of a run folder beside the arrays, on a disk or in gs://.

On a disk they are appended to, and renamed when they are complete. A store of
objects can do neither, but an object appears whole or not at all; and it has no
folders, only names with slashes. What differs for that reason is here.
"""

import contextlib
import importlib.util
import io
import json
import secrets
import shutil
from typing import Any

from etils import epath

from moellava_jax import config


def check(path: Any) -> None:
  """Prepares for `path`, which need not exist; call it before anything else.

  Raises:
    config.UserError: it is neither of this machine nor in gs://, or what reads
      gs:// is not installed.
  """
  if not _is_stored(path):
    return
  if not str(path).startswith('gs://'):
    raise config.UserError(
        f'{path}: expected a folder of this machine, or of Google Cloud Storage'
        ' as gs://BUCKET/FOLDER.'
    )
  if importlib.util.find_spec('gcsfs') is None:
    raise config.UserError(
        f"{path} needs the extra `gcs`: pip install 'moellava_jax[gcs]'."
    )
  from fsspec import config as fsspec_config

  # It would remember for good what a folder held when it was first listed,
  # whatever TensorStore and other processes write.
  fsspec_config.conf.setdefault('gcs', {})['use_listings_cache'] = False


def _is_stored(path: Any) -> bool:
  return '://' in str(path)


def absolute(path: Any) -> epath.Path:
  """The path as TensorStore wants it."""
  path = epath.Path(path)
  return path if _is_stored(path) else path.absolute()  # To CWD/gs:/...


def reason(error: Exception) -> str:
  """An error of a file system in one line; they share no base class."""
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0][:500]}'


def is_gone(folder: epath.Path) -> bool:
  """Whether a folder that was made is not there any more.

  Of a store nobody knows: there a folder begins with its first file.
  """
  return not (_is_stored(folder) or folder.exists())


def room(path: str) -> int | None:
  """Free bytes; None where there is no limit that could be asked for."""
  return None if _is_stored(path) else shutil.disk_usage(path).free


def write_text(path: Any, text: str) -> None:
  """Writes a small file so that it is either old or new, never half.

  Several threads or processes may write it at once: the last one's stays.
  """
  path = epath.Path(path)
  if _is_stored(path):
    path.write_text(text)
    return
  temporary = path.parent / f'.{path.name}.{secrets.token_hex(4)}.tmp'
  try:
    temporary.write_text(text)
    temporary.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def write_json(path: Any, value: Any) -> None:
  """Writes a small JSON file so that it is either old or new, never half."""
  write_text(path, json.dumps(value, indent=1, sort_keys=True) + '\n')


class Lines:
  """A text file that grows line by line.

  On a disk a line is in the file when `write` returns. An object is written as
  a whole: that is what `publish` does, with all lines so far.
  """

  def __init__(self, path: Any, kept: str):
    """Begins with the text `kept`, instead of what was in the file."""
    self._path = epath.Path(path)
    self._file: Any = None
    with self._explained():
      write_text(self._path, kept)
      if _is_stored(path):
        self._file = io.StringIO(kept)
        self._file.seek(0, io.SEEK_END)
      else:
        self._file = self._path.open('a')

  def write(self, line: str) -> None:
    with self._explained():
      self._file.write(line)
      self._file.flush()

  def publish(self) -> None:
    """Returns when all lines are where other machines find them."""
    if isinstance(self._file, io.StringIO):
      with self._explained():
        write_text(self._path, self._file.getvalue())

  def close(self) -> None:
    self.publish()
    if self._file is not None:
      self._file.close()

  @contextlib.contextmanager
  def _explained(self):
    """Any failure inside becomes a UserError, and the last one."""
    try:
      yield
    except Exception as error:
      if self._file is not None:
        with contextlib.suppress(OSError):
          self._file.close()  # It would fail again, with what is left to write.
        self._file = None
      raise config.UserError(
          f'{self._path} cannot be written: {reason(error)}. Make room or mend'
          ' the disk, and run the same command again to go on after the last'
          ' checkpoint.'
      ) from error
