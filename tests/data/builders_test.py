# SPDX-License-Identifier: Apache-2.0
"""The three groups, from small files of the form that is published."""

import json
import subprocess
import sys

import numpy as np
import pytest

from moellava_jax.data import rows, sources
from moellava_jax.data.builders import groups, main
from tests.data import llava_files

# JSON file -> the image of a row, by its number; as in MoE-LLaVA's files.
FILES = {
    'pt_json/llava_image_.json': 'llava_image/00453/{}.jpg',
    'ft_json/la_tune_256k.json': 'mimicit_tune/LA/LA_{}.jpg',
    'ft_json/lrv_tune_331k.json': 'lrv_tune/{}.jpg',
    'ft_json/lvis_tune_220k_.json': 'lvis_tune/coco/train2017/{}.jpg',
    'ft_json/svit_tune_157k.json': 'svit_tune/{}.png',
    'ft_json/llava_image_tune_.json': 'llava_image_tune/ocr_vqa/images/{}.jpg',
    'ft_json/nlp_tune.json': None,
}
HYBRID = [name for name in FILES if 'tune' in name and 'image_tune' not in name]
GROUPS = {
    'llava_pt': ['pt_json/llava_image_.json'],
    'hybrid_ft': HYBRID,
    'llava_ft': ['ft_json/llava_image_tune_.json', 'ft_json/nlp_tune.json'],
}


@pytest.fixture
def published(tmp_path):
  """All files, three rows each; every third image is really a GIF."""
  for name, pattern in FILES.items():
    raws = []
    for number in range(3):
      if pattern is None:
        raws.append(llava_files.row(number))
        continue
      image = pattern.format(number)
      raws.append(llava_files.row(number, image))
      kind = 'gif' if number == 2 else 'jpeg'
      (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / image).write_bytes(llava_files.picture(number, kind))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(json.dumps(raws))
  return tmp_path


def _prepare(folder, group, on_bad='skip'):
  return main.prepare(group, str(folder), str(folder / 'tfds'), on_bad, 0)


@pytest.mark.parametrize('group', groups.GROUPS)
def test_a_group_trains_as_its_json_files_do(group, published):
  directory = _prepare(published, group)
  found = sources.read(directory, 'nowhere')
  paths = ','.join(str(published / name) for name in GROUPS[group])
  direct = sources.read(paths, str(published))
  assert len(found) == len(direct) == 3 * len(GROUPS[group])
  stored = llava_files.examples(found, 'nowhere')
  wanted = llava_files.examples(direct, published, on_bad='skip')
  for n in range(len(found)):
    for one, other in zip(stored[n], wanted[n], strict=True):
      np.testing.assert_array_equal(one, other)
  report = json.loads((published / directory / 'report.json').read_text())
  assert report['kept'] == len(found)


def test_anyone_can_read_what_is_written(published):
  import tensorflow_datasets as tfds

  directory = _prepare(published, 'llava_pt')
  stored = [row.images[0].fetch()[:4] for row in sources.read(directory, '')]
  # TFDS itself decodes no GIF.
  assert stored == [b'\xff\xd8\xff\xe0', b'\xff\xd8\xff\xe0', b'\x89PNG']
  source = tfds.data_source(
      'llava_pt', split='train', data_dir=str(published / 'tfds')
  )
  example = source[2]
  assert example['id'] == b'row2'
  assert example['images'][0].shape == (40, 60, 3)  # Of what was a GIF.
  assert list(example['conversations']['from']) == [b'human', b'gpt']


def test_bad_rows_are_counted_or_stop(published):
  (published / 'llava_image/00453/1.jpg').write_bytes(b'')
  with pytest.raises(rows.DataError, match='row 1 .*empty file'):
    _prepare(published, 'llava_pt', 'error')
  directory = _prepare(published, 'llava_pt')
  assert [row.id for row in sources.read(directory, '')] == ['row0', 'row2']
  report = json.loads((published / directory / 'report.json').read_text())
  assert report['dropped'] == {'unreadable image': 1}
  assert report['repaired'] == {'a format that is not what the name says': 1}


def test_missing_files_are_named(published):
  (published / 'ft_json/svit_tune_157k.json').unlink()
  with pytest.raises(rows.DataError, match='SViT: .*svit_tune_157k.json'):
    _prepare(published, 'hybrid_ft')


@pytest.mark.parametrize(
    'group, old, new',
    [
        (
            'llava_pt',
            'pt_json/llava_image_.json',
            'blip_laion_cc_sbu_558k.json',
        ),
        ('llava_ft', 'ft_json/nlp_tune.json', 'llava_v1_5_mix665k.json'),
        ('llava_ft', 'ft_json/nlp_tune.json', 'train_json/nlp_tune.json'),
    ],
)
def test_other_names_of_the_files(group, old, new, published):
  (published / 'train_json').mkdir()
  (published / old).rename(published / new)
  assert len(sources.read(_prepare(published, group), '')) in (3, 6)


def test_other_datasets_are_refused(tmp_path):
  (tmp_path / 'dataset_info.json').write_text('{}')
  with pytest.raises(rows.DataError, match='cannot be opened'):
    sources.read(str(tmp_path), '')


def test_the_command_does_without_tensorflow(published):
  code = """
import sys
from absl import app
from moellava_jax.data.builders import main
def run(argv):
  main.main(argv)
  from moellava_jax.data import sources
  found = sources.read(sys.argv[-1].split('=')[1] + '/llava_pt/1.0.0', '')
  assert found[1].images[0].fetch().startswith(b'\\xff\\xd8')
  print(len(found), 'tensorflow' in sys.modules)
app.run(run)
"""
  done = subprocess.run(
      [
          sys.executable,
          '-c',
          code,
          '--group=llava_pt',
          '--workers=0',
          f'--manual_dir={published}',
          f'--data_dir={published}/tfds',
      ],
      capture_output=True,
      text=True,
      timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == '3 False'
  assert 'LLaVA' not in done.stderr
