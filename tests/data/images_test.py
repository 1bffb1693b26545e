# SPDX-License-Identifier: Apache-2.0
"""Pixels against recordings of the original; bad files and bad paths."""

import hashlib
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from moellava_jax.data import images

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/image'
META = json.loads((GOLDENS / 'meta.json').read_text())
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
ASPECT = {'pad': 'pad', 'default': 'square'}


@pytest.mark.parametrize('mode', ['pad', 'default'])
@pytest.mark.parametrize('name', ['wide', 'square'])
def test_pixels_equal_the_original(name, mode):
  pixels_HWC = images.preprocess(
      images.load(GOLDENS / f'{name}.png'),
      336,
      ASPECT[mode],
      'short_edge',
      MEAN,
  )
  assert pixels_HWC.shape == (336, 336, 3) and pixels_HWC.dtype == np.uint8
  pixels_CHW = np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))
  recorded = np.load(GOLDENS / 'pixels.npz')
  key = f'{name}.{mode}'
  if f'{key}.uint8' in recorded:
    np.testing.assert_array_equal(pixels_CHW, recorded[f'{key}.uint8'])
  digest = hashlib.sha256(pixels_CHW.tobytes()).hexdigest()
  assert digest == META[key]['sha256_uint8_pixels_before_normalise_CHW']
  mean, std = (np.float32(x).reshape(3, 1, 1) for x in (MEAN, STD))
  normal_CHW = (pixels_CHW.astype(np.float32) / 255 - mean) / std
  for part, value in [
      ('sub7', normal_CHW[:, ::7, ::7]),
      ('crop', normal_CHW[:, 150:182, 150:182]),
  ]:
    np.testing.assert_allclose(value, recorded[f'{key}.{part}'], atol=1e-6)
  np.testing.assert_allclose(
      normal_CHW.sum(2), recorded[f'{key}.row_sums'], atol=1e-3
  )


@pytest.mark.parametrize('name', ['wide', 'square'])
def test_padded_square_equals_the_original(name):
  image = images.load(GOLDENS / f'{name}.png')
  padded_HWC = np.asarray(images.pad_to_square(image, MEAN))
  expected = META[f'{name}.expand2square']
  assert list(padded_HWC.shape[:2]) == expected['size']
  digest = hashlib.sha256(padded_HWC.tobytes()).hexdigest()
  assert digest == expected['sha256_uint8_HWC']


def test_padding_of_an_odd_difference_rounds_down():
  white = Image.new('RGB', (2, 5), (255, 255, 255))
  padded_HWC = np.asarray(images.pad_to_square(white, (0.0, 0.0, 0.0)))
  assert padded_HWC[0, :, 0].tolist() == [0, 255, 255, 0, 0]
  turned_HWC = np.asarray(
      images.pad_to_square(white.transpose(Image.Transpose.ROTATE_90), MEAN)
  )
  assert turned_HWC[:, 0, 0].tolist() == [122, 255, 255, 122, 122]


@pytest.mark.parametrize('resize', ['short_edge', 'exact'])
def test_any_shape_equals_hugging_face(resize):
  transformers = pytest.importorskip('transformers')
  if resize == 'short_edge':
    processor = transformers.CLIPImageProcessorPil(
        size={'shortest_edge': 24}, crop_size={'height': 24, 'width': 24}
    )
  else:
    processor = transformers.SiglipImageProcessorPil(
        size={'height': 24, 'width': 24}, resample=Image.Resampling.BICUBIC
    )
  rng = np.random.default_rng(0)
  for shape in [(1, 1), (17, 29), (29, 17), (23, 24), (61, 50), (7, 90)]:
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    theirs_CHW = processor(
        image, do_rescale=False, do_normalize=False, return_tensors='np'
    )['pixel_values'][0]
    ours_HWC = images.preprocess(image, 24, 'square', resize, MEAN)
    np.testing.assert_array_equal(ours_HWC.transpose(2, 0, 1), theirs_CHW)


def _stripes(width, height):
  """Left third red, middle green, right blue (thirds of the height if tall)."""
  pixels_HWC = np.zeros((height, width, 3), np.uint8)
  long_axis = 1 if width >= height else 0
  for c, part in enumerate(np.array_split(np.arange(max(width, height)), 3)):
    index = [slice(None)] * 2
    index[long_axis] = part
    pixels_HWC[(*index, c)] = 255
  return Image.fromarray(pixels_HWC)


@pytest.mark.parametrize('shape', [(90, 30), (30, 90)])
def test_aspect_and_resize_decide_what_is_seen(shape):
  image = _stripes(*shape)
  tall = shape[0] < shape[1]

  def middle_line(aspect, resize):
    pixels_HWC = images.preprocess(image, 30, aspect, resize, MEAN)
    return pixels_HWC[:, 15] if tall else pixels_HWC[15]

  cropped = middle_line('square', 'short_edge')
  np.testing.assert_array_equal(cropped, np.tile([0, 255, 0], (30, 1)))
  for aspect, resize in [('square', 'exact'), ('pad', 'short_edge')]:
    squeezed = middle_line(aspect, resize)
    assert squeezed[2].tolist() == [255, 0, 0]
    assert squeezed[15].tolist() == [0, 255, 0]
    assert squeezed[27].tolist() == [0, 0, 255]
  padded_HWC = images.preprocess(image, 30, 'pad', 'exact', MEAN)
  for y, x in [(0, 0), (29, 29)]:
    assert padded_HWC[y, x].tolist() == [122, 116, 104]


def test_siglip_padding_is_mid_grey():
  padded = images.pad_to_square(_stripes(9, 3), (0.5, 0.5, 0.5))
  assert padded.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize('shape', [(500, 1), (1, 500), (1000, 3), (3, 1000)])
def test_thin_strips_are_resized_as_a_whole(shape, monkeypatch):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
  size = 40
  short = min(shape)
  height, width = (size if n == short else int(size * n / short) for n in shape)
  top, left = (height - size) // 2, (width - size) // 2
  whole_HWC = np.asarray(
      image.resize((width, height), Image.Resampling.BICUBIC)
  )[top : top + size, left : left + size]
  for block in (1 << 24, 1000, 1):  # Whole, some rows at a time, one.
    monkeypatch.setattr(images, '_BLOCK', block)
    pixels_HWC = images.preprocess(image, size, 'square', 'short_edge', MEAN)
    np.testing.assert_array_equal(pixels_HWC, whole_HWC)


def test_threads_can_be_padded_but_not_cropped():
  thread = Image.new('RGB', (1, 3000))
  pixels_HWC = images.preprocess(thread, 8, 'pad', 'short_edge', MEAN)
  assert pixels_HWC.shape == (8, 8, 3)
  with pytest.raises(images.ImageError, match=r"1 x 3000.*aspect='pad'"):
    images.preprocess(thread, 8, 'square', 'short_edge', MEAN)


def test_a_strip_that_padding_makes_a_bomb_is_refused():
  strip = Image.new('RGB', (14_000, 2))  # As a square, 588 MB.
  with pytest.raises(images.ImageError, match='14000 x 2 .*too long to pad'):
    images.preprocess(strip, 8, 'pad', 'short_edge', MEAN)
  pixels_HWC = images.preprocess(strip, 8, 'square', 'exact', MEAN)
  assert pixels_HWC.shape == (8, 8, 3)


def test_a_photograph_with_a_preview_is_no_animation(tmp_path):
  photo = Image.new('RGB', (9, 9), 'red')
  photo.save(tmp_path / 'x.jpg', 'MPO', save_all=True, append_images=[photo])
  data = images.content(tmp_path / 'x.jpg')
  assert images.examine(data, 'x.jpg').rules == ()


@pytest.mark.parametrize('mode', ['L', 'P', '1', 'RGBA', 'CMYK', 'LA'])
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
  path = tmp_path / ('x.tif' if mode == 'CMYK' else 'x.png')
  Image.new('RGB', (4, 2), (255, 255, 255)).convert(mode).save(path)
  image = images.load(path)
  assert (image.mode, image.size) == ('RGB', (4, 2))
  assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize('transparency', [0, bytes([0, 128])])
def test_transparent_colours_of_a_palette_are_shown(transparency, tmp_path):
  image = Image.new('P', (2, 1))
  image.putpalette([10, 20, 30, 40, 50, 60])
  image.putpixel((1, 0), 1)
  image.save(tmp_path / 'x.png', transparency=transparency)
  pixels_HWC = np.asarray(images.load(tmp_path / 'x.png'))
  assert pixels_HWC.tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_exif_orientation_is_not_applied(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # Turned by a quarter.
  Image.new('RGB', (4, 2)).save(tmp_path / 'x.jpg', exif=exif)
  assert images.load(tmp_path / 'x.jpg').size == (4, 2)


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'does not exist'),
        (b'', 'empty file'),
        (b'no image at all', 'cannot be read'),
        ((GOLDENS / 'wide.png').read_bytes()[:9000], 'cannot be read'),
        ((GOLDENS / 'wide.png').read_bytes()[:20], 'cannot be read'),
    ],
)
def test_bad_files_are_named(content, message, tmp_path):
  path = tmp_path / 'cat.png'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(images.ImageError, match=message) as error:
    images.load(path)
  assert str(path) in str(error.value)


def test_broken_bytes_raise_nothing_else(tmp_path):
  rng = np.random.default_rng(0)
  source = np.frombuffer((GOLDENS / 'square.png').read_bytes(), np.uint8)
  bad = 0
  for i in range(50):
    broken = source.copy()
    broken[rng.integers(8, len(source), 20)] = rng.integers(0, 256, 20)
    path = tmp_path / f'{i}.png'
    path.write_bytes(broken.tobytes())
    try:
      images.load(path)
    except images.ImageError:
      bad += 1
  assert bad > 25


def test_directories_and_bombs_are_refused(tmp_path, monkeypatch):
  with pytest.raises(images.ImageError, match='cannot be read'):
    images.load(tmp_path)
  Image.new('RGB', (40, 40)).save(tmp_path / 'x.png')
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
  with pytest.raises(images.ImageError, match=r'x.png.*DecompressionBomb'):
    images.load(tmp_path / 'x.png')


def test_paths_stay_below_the_root(tmp_path):
  root = tmp_path / 'root'
  (root / 'sub').mkdir(parents=True)
  (tmp_path / 'root2').mkdir()
  (tmp_path / 'secret.png').touch()
  (root / 'out.png').symlink_to(tmp_path / 'secret.png')
  (root / 'in.png').symlink_to(root / 'sub/a.png')
  (tmp_path / 'alias').symlink_to(root)
  expected = (root / 'sub/a.png').resolve()
  for top in (root, tmp_path / 'alias'):
    for path in ('sub/a.png', './sub/../sub/a.png', 'in.png'):
      assert images.resolve(str(top), path) == expected
  for path in (
      '../secret.png',
      'sub/../../secret.png',
      'out.png',
      '../root2/a',
      str(tmp_path / 'secret.png'),
      str(expected),
      'a\0b',
  ):
    with pytest.raises(images.ImageError) as error:
      images.resolve(str(root), path)
    assert repr(path) in str(error.value)
    if '\0' not in path:
      assert str(root) in str(error.value)


def test_training_follows_links_but_no_path_leads_out(tmp_path):
  root = tmp_path / 'root'
  (root / 'sub').mkdir(parents=True)
  (tmp_path / 'disk').mkdir()
  Image.new('RGB', (3, 2)).save(tmp_path / 'disk/a.png')
  (root / 'coco').symlink_to(tmp_path / 'disk')
  (root / 'b.png').symlink_to(tmp_path / 'disk/a.png')
  for path in ('coco/a.png', './sub/../coco/a.png', 'b.png'):
    assert images.load(images.locate(str(root), path)).size == (3, 2)
    with pytest.raises(images.ImageError, match='out of the image root'):
      images.resolve(str(root), path)
  for path in (
      '..',
      '../disk/a.png',
      'sub/../../disk/a.png',
      'coco/../../disk/a.png',
      str(tmp_path / 'disk/a.png'),
      'a\0b',
  ):
    with pytest.raises(images.ImageError) as error:
      images.locate(str(root), path)
    assert repr(path) in str(error.value)
  assert images.locate(str(root), '..a.png') == root / '..a.png'


@pytest.mark.parametrize('option', [('crop', 'exact'), ('pad', 'long_edge')])
def test_unknown_options_are_named(option):
  with pytest.raises(ValueError, match='expected'):
    images.preprocess(Image.new('RGB', (2, 2)), 2, *option, MEAN)
