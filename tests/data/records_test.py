# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import shutil

import numpy as np
import pytest

from moellava_jax.data import conversion, lengths, records, rows, sources
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.train import inputs
from tests import tiny
from tests.data import llava_files


def _prepare(folder, path, out, shard_rows=5, **settings):
  options = conversion.Options((path,), str(out), False, 0, shard_rows, None)
  conversion.run(options, llava_files.settings(folder, **settings))
  return str(out)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """13 rows in three shards, and the JSON they come from."""
  folder = tmp_path_factory.mktemp('records')
  path = llava_files.write(folder, 13)
  return folder, path, _prepare(folder, path, folder / 'out')


@pytest.fixture
def copy(corpus, tmp_path):
  return shutil.copytree(corpus[2], tmp_path / 'copy')


def test_rows_come_back_as_they_were(corpus):
  folder, path, out = corpus
  before, after = sources.read(path, str(folder)), sources.read(out, 'nowhere')
  assert len(after) == len(before) == 13
  for one, other in zip(before, after, strict=True):
    assert other._replace(images=()) == one._replace(images=())
    assert [image.fetch() for image in other.images] == [
        (folder / name).read_bytes() for name in one.images
    ]
  assert after[-1] == after[12]
  with pytest.raises(IndexError, match='row 13 of 13'):
    after[13]


def test_an_image_is_stored_once(corpus):
  _, _, out = corpus
  found = sources.read(out, '')
  assert found.manifest['images'] == 6  # Of 13 rows; the last has none.
  assert sum(len(row.images) for row in found) == 12
  assert found[2].images[0].key == found[3].images[1].key


@pytest.mark.parametrize('cache_mb', [64, 0])
def test_batches_are_those_of_the_json_file(corpus, cache_mb):
  folder, path, out = corpus
  direct = llava_files.examples(
      sources.read(path, str(folder)), folder, cache_mb
  )
  stored = llava_files.examples(sources.read(out, ''), 'nowhere', cache_mb)
  assert stored.eager == bool(cache_mb)
  for n in range(13):
    for a, b in zip(direct[n], stored[n], strict=True):
      np.testing.assert_array_equal(a, b)


def test_images_of_model_size_need_no_work(corpus, tmp_path):
  folder, path, _ = corpus
  direct = llava_files.examples(sources.read(path, str(folder)), folder)
  found = {}
  for encoding in ('raw', 'jpeg'):
    made = llava_files.stored_as(encoding)
    out = _prepare(folder, path, tmp_path / encoding, stored_as=made)
    found[encoding] = sources.read(out, '')
    assert found[encoding].stored_as == made
    stored = llava_files.examples(found[encoding], 'nowhere')
    difference = direct[3].images_BIHWC.astype(int) - stored[3].images_BIHWC
    assert np.abs(difference).mean() < (1e-9 if encoding == 'raw' else 6)
  assert found['raw'][3].images[0].fetch().startswith(b'P6')
  vision = tiny.train_config().model.vision
  sources.check_stored(found['raw'], vision, 'pad')
  joined = sources.Joined([sources.read(path, str(folder)), found['raw']])
  with pytest.raises(rows.DataError, match="aspect 'pad', now 'square'"):
    sources.check_stored(joined, vision, 'square')


def test_several_sources_are_joined_in_order(corpus):
  folder, path, out = corpus
  found = sources.read(f'{path}, {out},{path}', str(folder))
  assert len(found) == 39
  assert [found[n].id for n in (0, 12, 13, 25, 26, -1)] == [
      'row0',
      'row12',
      'row0',
      'row12',
      'row0',
      'row12',
  ]
  assert isinstance(found[14].images[0], rows.Stored)
  assert isinstance(found[27].images[0], str)
  with pytest.raises(IndexError):
    found[39]


def test_rows_travel_to_other_processes(corpus):
  folder, path, out = corpus
  found = sources.read(f'{out},{path}', str(folder))
  found[3].images[0].fetch()
  again = pickle.loads(pickle.dumps(found))
  assert again[3].images[0].fetch() == found[3].images[0].fetch()
  image = pickle.loads(pickle.dumps(found[3].images[0]))
  assert image.fetch() == found[3].images[0].fetch()


def _change(path, **changes):
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps({**manifest, **changes}))


def test_a_manifest_of_another_kind_is_refused(copy):
  path = copy / 'manifest.json'
  original = path.read_text()
  for changes, message in (
      ({'rows': 12}, 'was changed'),
      ({'version': 99}, 'version 99; this program reads'),
      ({'format': 'other'}, "of format 'other'"),
  ):
    _change(path, **changes)
    with pytest.raises(rows.DataError, match=message):
      sources.read(str(copy), '')
    path.write_text(original)
  path.write_text('{')
  with pytest.raises(rows.DataError, match='manifest.json cannot be read'):
    sources.read(str(copy), '')
  path.unlink()
  with pytest.raises(rows.DataError, match='run its command again'):
    sources.read(str(copy), '')


def test_missing_and_cut_files_are_named(copy):
  shard = copy / 'rows-00001.array_record'
  data = shard.read_bytes()
  shard.write_bytes(data[:-1])
  with pytest.raises(rows.DataError, match=r'rows-00001.* bytes; .*says'):
    sources.read(str(copy), '')
  shard.unlink()
  with pytest.raises(rows.DataError, match='rows-00001.* is missing'):
    sources.read(str(copy), '')


def test_a_flipped_bit_is_noticed(copy):
  assert records.verify(str(copy)) > 1000
  shard = copy / 'images-00000.array_record'
  data = bytearray(shard.read_bytes())
  data[data.index(b'\x89PNG') + 100] ^= 1
  shard.write_bytes(data)
  found = sources.read(str(copy), '')
  with pytest.raises(rows.DataError, match='copy.*cannot be read.*hash'):
    for row in found:
      for image in row.images:
        image.fetch()
  with pytest.raises(rows.DataError, match='images-00000.*SHA-256'):
    records.verify(str(copy))


def _other_tokenizer():
  return tokenizer_lib.train(['a b c'], 258)


def test_lengths_are_those_of_the_examples(corpus):
  folder, path, _ = corpus
  found = sources.read(path, str(folder))
  examples = llava_files.examples(found, folder)
  lengths_N = lengths.count(
      found, llava_files.TOKENIZER, 'bare', llava_files.IMAGE_TOKENS, workers=0
  )
  assert lengths_N.dtype == np.int32
  assert lengths_N.tolist() == [
      int((examples[n].segment_ids_BT > 0).sum()) for n in range(13)
  ]


def test_lengths_are_kept_and_counted_again_where_the_key_differs(
    copy, monkeypatch
):
  found = sources.read(str(copy), '')
  counted = []
  of_row = lengths.of_row
  monkeypatch.setattr(
      lengths, 'of_row', lambda *args: counted.append(1) or of_row(*args)
  )

  def count(expected, tok=llava_files.TOKENIZER, template='bare', image=9):
    counted.clear()
    lengths_N = lengths.count(found, tok, template, image, workers=0)
    assert len(counted) == expected
    return lengths_N

  first_N = count(13)
  np.testing.assert_array_equal(count(0), first_N)
  images_N = np.array([len(row.images) for row in found])
  np.testing.assert_array_equal(count(13, image=19), first_N + 10 * images_N)
  assert (count(13, template='phi') > first_N).all()
  assert (count(13, tok=_other_tokenizer()) != first_N).any()
  count(0)  # All of them are kept.
  # From a time when this template did not wrap its images.
  tok = llava_files.TOKENIZER
  old = lengths.Key(lengths.fingerprint(tok), 'v1_mmtag', 9)
  lengths.write(found.directory, found.digest, old, first_N)
  count(13, template='v1_mmtag')
  joined = sources.Joined([found, found])
  assert (
      len(lengths.count(joined, llava_files.TOKENIZER, 'bare', 9, workers=0))
      == 26
  )
  # Of other rows, or damaged: not believed.
  for path in copy.glob('lengths-*.npz'):
    path.write_bytes(path.read_bytes()[:50])
  count(13)
  manifest = json.loads((copy / 'manifest.json').read_text())
  manifest['plan']['images'] = 'elsewhere'
  manifest['digest'] = records.digest(manifest)
  (copy / 'manifest.json').write_text(json.dumps(manifest))
  found = sources.read(str(copy), '')
  count(13)


def test_processes_count_the_same_lengths(copy, monkeypatch):
  monkeypatch.setattr(lengths, '_RANGE', 4)
  tok = llava_files.TOKENIZER
  found = sources.read(str(copy), '')
  there_N = lengths.count(found, tok, 'bare', 9, workers=2)
  here_N = lengths.count(list(found), tok, 'bare', 9, workers=0)
  np.testing.assert_array_equal(there_N, here_N)


def test_training_takes_a_prepared_directory(corpus, tmp_path, capsys):
  folder, path, out = corpus
  found = {}
  for name, given in (('json', path), ('prepared', out)):
    cfg = tiny.train_config(
        tmp_path / name,
        data__json=given,
        data__images=str(folder),
        data__eval_json=given,
        moe__max_images=2,
        moe__row_length=128,
    )
    (tmp_path / name).mkdir()
    found[name] = inputs.read(cfg, ['moe'])
  for kind in ('examples', 'held_out'):
    direct, stored = (getattr(found[name], kind)['moe'] for name in found)
    assert len(direct) == len(stored) == 13
    for one, other in zip(direct[3], stored[3], strict=True):
      np.testing.assert_array_equal(one, other)


def test_training_counts_what_was_dropped_and_repaired(tmp_path, capsys):
  path = llava_files.write(tmp_path, 12)
  raws = json.loads((tmp_path / 'rows.json').read_text())
  raws[1]['image'] = '../out.png'
  raws[2]['image'] = 'coco/1.jpg'  # It is a PNG.
  raws[4]['conversations'] = []
  (tmp_path / 'rows.json').write_text(json.dumps(raws))
  cfg = tiny.train_config(
      tmp_path / 'run',
      data__json=path,
      data__images=str(tmp_path),
      data__on_bad='skip',
      moe__max_images=1,  # Rows 3, 7 and 11 have two.
      moe__row_length=128,
  )
  (tmp_path / 'run').mkdir()
  assert len(inputs.read(cfg, ['moe']).examples['moe']) == 7
  text = capsys.readouterr().out
  assert 'dropped 1 rows: image outside the image root' in text
  assert 'dropped 1 rows: no conversation' in text
  assert 'dropped 3 rows: more images than max_images; the first' in text
  assert 'has 2 images, but a row has max_images=1 slots; raise' in text
  assert 'repaired 1 rows: the file of another extension' in text
