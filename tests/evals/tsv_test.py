# SPDX-License-Identifier: Apache-2.0
"""Tables with images: cells as pandas reads them, images out of base64."""

import base64
import io

from PIL import Image
import pytest

from moellava_jax.evals import base, tsv, xlsx
from tests.evals import tables


def _png(colour):
  buffer = io.BytesIO()
  Image.new('RGB', (30, 20), colour).save(buffer, 'PNG')
  return base64.b64encode(buffer.getvalue()).decode()


def test_cells_are_those_of_pandas(tmp_path):
  path = tables.write(
      tmp_path / 'q.tsv',
      [
          {
              'index': '1',
              'question': 'Which "one"?\nHere',
              'A': 'x\ty',
              'B': 'None',
              'C': 'NA',
              'D': 'none',
              'image': 'x' * 200_000,  # More than csv takes by default.
          }
      ],
  )
  (row,) = tsv.rows(path, ('question',))
  assert row['question'] == 'Which "one"?\nHere'
  assert tsv.options(row) == {'A': 'x\ty', 'D': 'none'}
  assert 'image' not in row


def test_images_are_unpacked_once_and_shared(tmp_path):
  red, blue = _png('red'), _png('blue')
  path = tables.write(
      tmp_path / 'q.tsv',
      [
          {'index': '1', 'image': red},
          {'index': '1000001', 'image': '1'},
          {'index': '2', 'image': str([red, blue])},
          {'index': '3', 'image': ''},
      ],
  )
  assert tsv.image_names(path) == {
      '1': ('1.jpg',),
      '1000001': ('1.jpg',),
      '2': ('2_1.jpg', '2_2.jpg'),
      '3': (),
  }
  tsv.unpack(path, tmp_path / 'images')
  assert sorted(p.name for p in (tmp_path / 'images').iterdir()) == [
      '1.jpg',
      '2_1.jpg',
      '2_2.jpg',
  ]
  with Image.open(tmp_path / 'images' / '2_2.jpg') as image:
    assert image.getpixel((0, 0)) == (0, 0, 255)
  (tmp_path / 'images' / '1.jpg').write_bytes(b'mine')
  tsv.unpack(path, tmp_path / 'images')
  assert (tmp_path / 'images' / '1.jpg').read_bytes() == b'mine'


def test_a_bad_table_is_named(tmp_path):
  with pytest.raises(base.EvalError, match='gone.tsv: no such file'):
    tsv.rows(tmp_path / 'gone.tsv', ())
  path = tables.write(tmp_path / 'q.tsv', [{'index': '1'}, {'index': '1'}])
  with pytest.raises(base.EvalError, match='row 3: index 1 occurs already in'):
    tsv.rows(path, ())
  with pytest.raises(base.EvalError, match=r"no column \['question'\]; there"):
    tsv.rows(path, ('question',))
  (tmp_path / 'q.tsv').write_text('index\tA\n1\n')
  with pytest.raises(base.EvalError, match="row '1' has more or fewer cells"):
    tsv.rows(path, ())
  (tmp_path / 'q.tsv').write_text('index\tA\n')
  with pytest.raises(base.EvalError, match='no rows'):
    tsv.rows(path, ())
  (tmp_path / 'q.tsv').write_text('index\timage\n5\t' + '?' * 80 + '\n')
  with pytest.raises(base.EvalError, match='index 5: the image is no base64'):
    tsv.unpack(path, tmp_path / 'images')


def test_a_workbook_holds_what_was_written(tmp_path):
  path = tmp_path / 'a.xlsx'
  rows = [[1, 'x < y & "z"\n\x07', None], [2, ' 你好 ', 'w' * 40_000]]
  xlsx.write(path, ['index', 'a', 'b'], rows)
  assert tables.read_xlsx(path) == [
      ['index', 'a', 'b'],
      [1, 'x < y & "z"\n', None],
      [2, ' 你好 ', 'w' * 32_767],
  ]
