# SPDX-License-Identifier: Apache-2.0
"""A run folder in a store of objects, for which a dictionary stands in.

`tests/train/gs_test.py` has gcsfs, Orbax and TensorStore do it.
"""

from concurrent import futures
import importlib.util
import io
import json
import os

from etils.epath import testing
import pytest

from moellava_jax import checkpoint, config, run_folder
from moellava_jax.train import metrics

RUN = 'gs://bucket/run'


class _Objects(dict):
  """Path -> content. Nothing can be appended to or renamed: not offered."""

  def open(self, real, path, mode):
    if not str(path).startswith('gs://'):
      return real(path, mode)
    if 'r' in mode:
      if path not in self:
        raise FileNotFoundError(path)
      file = io.BytesIO(self[path])
      return file if 'b' in mode else io.TextIOWrapper(file)
    assert mode in ('w', 'wb'), f'{mode!r} of {path}'
    return _Upload(self, path) if 'b' in mode else _TextUpload(self, path)

  def exists(self, real, path):
    if not str(path).startswith('gs://'):
      return real(path)
    return path in self or any(name.startswith(f'{path}/') for name in self)

  def listdir(self, real, path):
    if not str(path).startswith('gs://'):
      return real(path)
    inside = [n.removeprefix(f'{path}/') for n in self if n.startswith(path)]
    return sorted({name.split('/')[0] for name in inside})

  def isdir(self, real, path):
    return path not in self and self.exists(real, path)

  def rename(self, real, path, target):
    assert not str(path).startswith('gs://'), f'{path} was renamed'
    return real(path, target)


class _Upload(io.BytesIO):

  def __init__(self, objects, path):
    super().__init__()
    self._objects, self._path = objects, path

  def close(self):
    if not self.closed:
      self._objects[self._path] = self.getvalue()
    super().close()


class _TextUpload(io.StringIO):

  def __init__(self, objects, path):
    super().__init__()
    self._objects, self._path = objects, path

  def close(self):
    if not self.closed:
      self._objects[self._path] = self.getvalue().encode()
    super().close()


@pytest.fixture
def objects():
  found = _Objects()
  with testing.mock_epath(
      open=found.open,
      exists=found.exists,
      listdir=found.listdir,
      isdir=found.isdir,
      replace=found.rename,
      rename=found.rename,
  ):
    yield found


@pytest.fixture
def gcsfs_there(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util,
      'find_spec',
      lambda name, *a: find('json' if name == 'gcsfs' else name, *a),
  )


def _steps(text):
  return [json.loads(line)['step'] for line in text.splitlines()]


def test_lines_on_a_disk_are_in_the_file_at_once(tmp_path):
  path = tmp_path / 'lines'
  lines = run_folder.Lines(path, 'kept\n')
  lines.write('new\n')
  assert path.read_text() == 'kept\nnew\n'
  lines.publish()
  lines.close()
  assert path.read_text() == 'kept\nnew\n'
  assert os.listdir(tmp_path) == ['lines']  # Nothing temporary.


def test_the_history_of_a_store_is_published_as_a_whole(objects, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(  # TensorBoard has its own way to gs://.
      importlib.util,
      'find_spec',
      lambda name, *a: None if name == 'tensorboardX' else find(name, *a),
  )
  writer = metrics.Writer(RUN, 'moe', 0)
  for step in (1, 2, 3):
    if step == 3:
      writer.publish()
    writer.write({'stage': 'moe', 'step': step})
  path = f'{RUN}/metrics.jsonl'
  assert _steps(objects[path].decode()) == [1, 2]  # A kill would leave this.
  writer.close()
  assert _steps(objects[path].decode()) == [1, 2, 3]
  writer = metrics.Writer(RUN, 'moe', 2)  # On after a checkpoint.
  writer.write({'stage': 'moe', 'step': 3})
  writer.write({'stage': 'moe', 'step': 4})
  writer.close()
  assert _steps(objects[path].decode()) == [1, 2, 3, 4]
  assert list(objects) == [path]


def test_small_files_are_written_once_and_whole(objects, tmp_path):
  for run in (RUN, str(tmp_path)):
    for value in ({'a': 1}, {'b': 2}):
      run_folder.write_json(f'{run}/config.json', value)
  assert {k: json.loads(v) for k, v in objects.items()} == {
      f'{RUN}/config.json': {'b': 2}
  }
  assert os.listdir(tmp_path) == ['config.json']


def test_a_store_that_takes_nothing_more_is_explained(objects, monkeypatch):
  lines = run_folder.Lines(f'{RUN}/metrics.jsonl', '')
  lines.write('one\n')

  class HttpError(Exception):  # As that of gcsfs: no OSError.
    pass

  def refuse(*_):
    raise HttpError('Quota exceeded\nand more')

  monkeypatch.setattr(_Upload, '__init__', refuse)
  monkeypatch.setattr(_TextUpload, '__init__', refuse)
  with pytest.raises(config.UserError) as error:
    lines.publish()
  assert (
      f'{RUN}/metrics.jsonl cannot be written: HttpError: Quota exceeded. Make'
      in str(error.value)
  )
  lines.close()  # The message is not replaced by another one.


def test_what_orbax_has_not_committed_is_no_checkpoint(objects, gcsfs_there):
  final = f'{RUN}/moe/final'
  for name in ('config.json', 'params/manifest.ocdbt'):
    objects[f'{final}/{name}'] = b'{}'
  assert checkpoint.final_of(RUN, 'moe') is None
  for path in (RUN, f'{RUN}/moe', final):
    with pytest.raises(checkpoint.CheckpointError, match='no finished'):
      checkpoint.find(path)
  objects[f'{final}/params/commit_success.txt'] = b''
  assert str(checkpoint.final_of(RUN, 'moe')) == final
  for path in (RUN, f'{RUN}/moe', final):
    assert str(checkpoint.find(path)) == final


def test_a_folder_begins_with_its_first_file_in_a_store(objects, tmp_path):
  folder = run_folder.absolute(f'{RUN}/moe')
  assert str(folder) == f'{RUN}/moe'
  assert not run_folder.is_gone(folder)
  assert run_folder.room(RUN) is None
  assert run_folder.is_gone(run_folder.absolute(tmp_path / 'moe'))
  assert not run_folder.is_gone(run_folder.absolute(tmp_path))


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        (
            RUN,
            r"gs://bucket/run needs the extra `gcs`: pip install 'moell.*gcs",
        ),
        ('s3://bucket/run', 's3://bucket/run: expected .* gs://BUCKET/FOLDER'),
    ],
)
def test_what_cannot_be_reached_is_said_at_once(monkeypatch, path, message):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda *_: None)
  with pytest.raises(config.UserError, match=message):
    run_folder.check(path)
  with pytest.raises(config.UserError, match=message):
    checkpoint.find(path)
  run_folder.check('runs/local')


def test_several_may_write_a_file_at_once(tmp_path):
  path = tmp_path / 'shared.json'

  def write(n):
    for _ in range(50):
      run_folder.write_json(path, {'writer': n})

  with futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(write, range(8)))
  assert json.loads(path.read_text())['writer'] in range(8)
  assert [file.name for file in tmp_path.iterdir()] == ['shared.json']


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
  (tmp_path / 'taken').mkdir()
  with pytest.raises(OSError):
    run_folder.write_text(tmp_path / 'taken', 'text')
  assert [file.name for file in tmp_path.iterdir()] == ['taken']
