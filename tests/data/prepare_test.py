# SPDX-License-Identifier: Apache-2.0
"""The command, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

from PIL import Image
import psutil
import pytest

from moellava_jax.data import (
    conversion,
    inspection,
    lengths,
    published,
    rows,
    sources,
)
from moellava_jax.data import tokenizer as tokenizer_lib
from tests import tiny
from tests.data import llava_files

_COMMAND = [sys.executable, '-m', 'moellava_jax.data.prepare']
_CONFIG = '--config=configs/shapes.py:moe'


def _command(path, images, out, *more):
  return [
      *_COMMAND,
      _CONFIG,
      f'--json={path}',
      f'--images={images}',
      f'--out={out}',
      *more,
  ]


def _run(*args):
  return subprocess.run(args, capture_output=True, text=True, timeout=300)


def _options(path, out, **changes):
  plain = conversion.Options((str(path),), str(out), False, 0, 5, None)
  return plain._replace(**changes)


def test_the_command_writes_what_training_reads(tmp_path):
  path = llava_files.write(tmp_path, 40)
  llava_files.TOKENIZER.save(str(tmp_path / 'tok'))
  out = tmp_path / 'out'
  done = _run(
      *_command(path, tmp_path, out, '--workers=2', '--shard_rows=16'),
      f'--config.init.tokenizer={tmp_path}/tok',
  )
  assert done.returncode == 0, done.stderr
  assert sorted(p.name for p in out.iterdir() if 'lengths-' not in p.name) == [
      'dropped.jsonl',
      *(f'images-{n:05d}.array_record' for n in range(3)),
      'lengths.png',
      'manifest.json',
      'report.json',
      *(f'rows-{n:05d}.array_record' for n in range(3)),
  ]
  found = sources.read(str(out), '')
  assert [row.id for row in found] == [f'row{n}' for n in range(40)]
  assert 'coco' in done.stdout and '364100' in done.stdout
  # The lengths are those that training looks for.
  cfg = tiny.train_config()
  tok = tokenizer_lib.load(str(tmp_path / 'tok'))
  key = lengths.key_of(tok, cfg.moe.template, cfg.model.vision.num_tokens)
  assert lengths.read(found, key) is not None
  again = _run(
      *_command(path, tmp_path, out, '--shard_rows=16'),
      f'--config.init.tokenizer={tmp_path}/tok',
  )
  assert again.returncode == 0 and 'nothing to do' in again.stdout
  verified = _run(*_COMMAND, f'--out={out}', '--verify')
  assert 'as they were written' in verified.stdout


def test_a_report_never_stops_and_writes_no_shards(tmp_path):
  path = llava_files.write(tmp_path, 30)
  (tmp_path / 'coco/5.png').write_bytes(b'')  # Rows 10 and 11.
  (tmp_path / 'coco/9.png').rename(tmp_path / 'coco/9.gif')  # 18 and 19.
  out = tmp_path / 'out'
  done = _run(*_command(path, tmp_path, out, '--report', '--workers=0'))
  assert done.returncode == 0, done.stderr
  assert sorted(p.name for p in out.iterdir()) == [
      'dropped.jsonl',
      'lengths.png',
      'report.json',
  ]
  report = json.loads((out / 'report.json').read_text())
  assert report['dropped'] == {'unreadable image': 2}
  assert report['repaired'] == {
      'the file of another extension': 2,
      'a format that is not what the name says': 1,  # Once for each image.
  }
  assert (report['rows'], report['kept'], report['text_only']) == (30, 28, 8)
  coco = report['sources']['coco']
  assert (coco['rows'], coco['kept'], coco['dropped']) == (22, 20, 2)
  assert coco['published']['difference'] == str(22 - 364_100)
  dropped = (out / 'dropped.jsonl').read_text().splitlines()
  assert ['row 10' in dropped[0], 'row 11' in dropped[1]] == [True, True]
  with Image.open(out / 'lengths.png') as picture:
    assert picture.size[0] > 500
  assert 'unreadable image' in done.stdout


def test_a_bad_row_stops_unless_it_may_be_skipped(tmp_path):
  path = llava_files.write(tmp_path, 12)
  (tmp_path / 'coco/3.png').write_bytes(b'no image')
  options = _options(path, tmp_path / 'out')
  with pytest.raises(rows.DataError, match=r'rows.json row 6 .*3\.png.*skip'):
    conversion.run(options, llava_files.settings(tmp_path))
  skip = llava_files.settings(tmp_path, on_bad='skip')
  with pytest.raises(rows.DataError, match='on_bad was error, now skip'):
    conversion.run(options, skip)
  report = conversion.run(_options(path, tmp_path / 'other'), skip)
  assert report['dropped'] == {'unreadable image': 2}
  assert len(sources.read(str(tmp_path / 'other'), '')) == 10


def test_an_error_in_a_process_is_the_same_error(tmp_path):
  path = llava_files.write(tmp_path, 12)
  (tmp_path / 'coco/3.png').unlink()
  done = _run(*_command(path, tmp_path, tmp_path / 'out', '--workers=2'))
  assert done.returncode == 1
  assert done.stderr.startswith('error: ') and 'row 6 ' in done.stderr


def test_other_things_are_not_overwritten(tmp_path):
  path = llava_files.write(tmp_path, 4)
  with pytest.raises(rows.DataError, match='not empty'):
    conversion.run(_options(path, tmp_path), llava_files.settings(tmp_path))
  out = tmp_path / 'out'
  conversion.run(_options(path, out), llava_files.settings(tmp_path))
  llava_files.write(tmp_path, 5)
  with pytest.raises(rows.DataError, match='inputs was'):
    conversion.run(_options(path, out), llava_files.settings(tmp_path))


def _shards(out):
  return {
      p.name: (p.stat().st_ino, p.stat().st_mtime_ns)
      for p in out.glob('*.array_record')
  }


def test_a_killed_run_goes_on_and_redoes_one_shard_at_most(tmp_path):
  path = llava_files.write(tmp_path, 600)
  out = tmp_path / 'out'
  command = _command(path, tmp_path, out, '--workers=2', '--shard_rows=30')
  process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
  children = []
  try:
    deadline = time.monotonic() + 120
    while not (out / 'shard-00003.json').exists():
      assert process.poll() is None and time.monotonic() < deadline
      children = psutil.Process(process.pid).children(recursive=True)
      time.sleep(0.005)
  finally:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
  gone, alive = psutil.wait_procs(children, timeout=30)
  assert gone and not alive  # Workers do not outlive their parent.
  assert not (out / 'manifest.json').exists()
  with pytest.raises(rows.DataError, match='run its command again'):
    sources.read(str(out), '')
  complete = len(list(out.glob('shard-*.json')))
  assert 4 <= complete < 20
  # One more at most had been begun.
  begun = {p.name.split('.')[0] for p in out.glob('rows-*')}
  assert complete <= len(begun) <= complete + 1
  finished = {
      name: stat
      for name, stat in _shards(out).items()
      if (out / f'shard-{name.split(".")[0].split("-")[1]}.json').exists()
  }
  done = _run(*command)
  assert done.returncode == 0, done.stderr
  assert finished.items() <= _shards(out).items()
  # As if it had never been stopped.
  other = tmp_path / 'other'
  assert (
      _run(
          *_command(path, tmp_path, other, '--workers=0', '--shard_rows=30')
      ).returncode
      == 0
  )
  manifests = [
      json.loads((folder / 'manifest.json').read_text())
      for folder in (out, other)
  ]
  assert manifests[0] == manifests[1]
  assert len(sources.read(str(out), '')) == 600


def _peak_mb(tmp_path, count):
  """Memory of all processes of a run over `count` rows, in MiB."""
  (tmp_path / 'coco').mkdir()
  data = llava_files.picture(0, 'jpeg', (320, 240))
  words = 'what is the red dog on the left of the table '
  with open(tmp_path / 'rows.json', 'w') as file:
    file.write('[')
    for number in range(count):
      raw = llava_files.row(number, f'coco/{number}.jpg')
      raw['conversations'][-1]['value'] = words * 20
      (tmp_path / f'coco/{number}.jpg').write_bytes(data)
      file.write((',\n' if number else '') + json.dumps(raw))
    file.write(']')
  process = subprocess.Popen(
      _command(
          tmp_path / 'rows.json', tmp_path, tmp_path / 'out', '--workers=2'
      ),
      stdout=subprocess.DEVNULL,
  )
  peak = 0
  while process.poll() is None:
    try:
      main = psutil.Process(process.pid)
      peak = max(
          peak,
          sum(
              p.memory_info().rss
              for p in [main, *main.children(recursive=True)]
          ),
      )
    except psutil.NoSuchProcess:
      pass
    time.sleep(0.05)
  assert process.returncode == 0
  assert len(sources.read(str(tmp_path / 'out'), '')) == count
  return peak / 2**20


def test_memory_of_1000_rows(tmp_path):
  assert _peak_mb(tmp_path, 1000) < 600


@pytest.mark.slow
@pytest.mark.large
def test_memory_of_100_000_rows(tmp_path):
  assert _peak_mb(tmp_path, 100_000) < 1000


def test_sources_of_the_published_mixes():
  assert [
      published.source_of(path)
      for path in (
          'coco/train2017/1.jpg',
          'llava_image_tune/ocr_vqa/images/1.jpg',
          'llava_image/00453/1.jpg',
          'mimicit_tune/LA/1.jpg',
          './vg/VG_100K/1.jpg',
          '1.jpg',
          None,
      )
  ] == ['coco', 'ocr_vqa', 'llava_image', 'mimicit_tune', 'vg', '.', 'text']
  assert published.difference('gqa', 72_140) == 'as published'
  assert published.difference('gqa', 72_139) == '-1'
  assert published.difference('svit_tune', 157_400) == 'as published'
  assert published.difference('svit_tune', 100_000) == '-57000'
  assert published.difference('mine', 5) is None
  # The mix of LLaVA-1.5 has 665,298 rows.
  mix = [c for c in published.COUNTS.values() if c.group == 'LLaVA-FT']
  assert sum(count.rows for count in mix) == 665_298


def test_images_are_opened_once(tmp_path, monkeypatch):
  path = llava_files.write(tmp_path, 40)
  opened = []
  original = inspection.Inspector._file
  monkeypatch.setattr(
      inspection.Inspector,
      '_file',
      lambda self, name: opened.append(name) or original(self, name),
  )
  for report in (True, False):
    opened.clear()
    options = _options(path, tmp_path / f'out{report}', report=report)
    conversion.run(options, llava_files.settings(tmp_path))
    assert len(opened) == len(set(opened)) == 20


def test_wrong_settings_say_what_to_do(tmp_path):
  path = llava_files.write(tmp_path, 4)
  out = tmp_path / 'out'
  for more, message in (
      (['--store_size=100'], 'images of 42 pixels'),
      (['--config.init.tokenizer=nowhere'], 'is no directory'),
      (['--config.init.lm=hf:org/name'], 'cannot be fetched'),
      (['--json=none.json'], 'none.json does not exist'),
      (['--config=configs/shapes.py'], 'name one, as in'),
  ):
    done = _run(*_command(path, tmp_path, out), *more)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr
