# SPDX-License-Identifier: Apache-2.0
"""JPEG files decoded at their scale, beside the exact path."""

import io
import itertools

import numpy as np
from PIL import Image
import pytest
from skimage import data as photographs

from moellava_jax import backbones, config
from moellava_jax.data import encode, images, jpeg
from tests import tiny

MEAN = backbones.TOWERS['clip_l14_336'].mean
PHOTOS = ('astronaut', 'coffee', 'chelsea', 'rocket')
GEOMETRY = (
    ('pad', 'short_edge'),
    ('square', 'short_edge'),
    ('square', 'exact'),
)


def _photo(name, width, height):
  pixels_HWC = getattr(photographs, name)()
  return Image.fromarray(pixels_HWC).resize(
      (width, height), Image.Resampling.LANCZOS
  )


def _jpeg(image, **options):
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=90, **options)
  return file.getvalue()


def _exact(data, size=336, aspect='pad', resize='short_edge'):
  image = Image.open(io.BytesIO(data))
  return images.preprocess(image.convert('RGB'), size, aspect, resize, MEAN)


def _difference(data, *how):
  exact_HWC, fast_HWC = _exact(data, *how), jpeg.preprocess(data, *how, MEAN)
  assert fast_HWC is not None and fast_HWC.shape == exact_HWC.shape
  assert fast_HWC.dtype == np.uint8
  return float(np.abs(exact_HWC.astype(int) - fast_HWC).mean())


@pytest.mark.parametrize('width, height', [(640, 480), (480, 640), (1024, 768)])
def test_photographs_differ_by_less_than_a_grey_level(width, height):
  found = [
      _difference(_jpeg(_photo(name, width, height)), 336, 'pad', 'short_edge')
      for name in PHOTOS
  ]
  assert max(found) < 1


@pytest.mark.parametrize('aspect, resize', GEOMETRY)
def test_every_geometry_lies_where_the_exact_one_does(aspect, resize):
  # A smooth image shows any shift, and forgives any filter.
  for width, height in itertools.product((333, 501, 640), (337, 480, 1203)):
    y, x = np.mgrid[:height, :width]
    pixels_HWC = np.stack(
        [x * 255 / width, y * 255 / height, 128 + 0 * x], -1
    ).astype(np.uint8)
    data = _jpeg(Image.fromarray(pixels_HWC), subsampling=0)
    assert _difference(data, 336, aspect, resize) < 0.6, (width, height)


def test_a_small_image_is_not_scaled_while_decoding():
  data = _jpeg(_photo('coffee', 200, 150))
  assert _difference(data, 336, 'square', 'short_edge') == 0


def test_grey_images_have_three_channels():
  data = _jpeg(_photo('rocket', 640, 480).convert('L'))
  assert _difference(data, 336, 'pad', 'short_edge') < 1


def test_what_it_does_not_know_is_left_to_pillow():
  how = (336, 'pad', 'short_edge', MEAN)
  photo = _photo('coffee', 64, 48)
  png = io.BytesIO()
  photo.save(png, 'PNG')
  assert jpeg.preprocess(png.getvalue(), *how) is None
  assert jpeg.preprocess(_jpeg(photo.convert('CMYK')), *how) is None
  assert jpeg.preprocess(_jpeg(photo)[:300], *how) is None
  assert jpeg.preprocess(b'', *how) is None
  strip = Image.new('RGB', (4000, 10))
  assert jpeg.preprocess(_jpeg(strip), *how) is None


def test_images_beyond_the_limit_of_pillow_are_left_to_it(monkeypatch):
  data = _jpeg(_photo('coffee', 640, 480))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 640 * 480 - 1)
  assert jpeg.preprocess(data, 336, 'pad', 'short_edge', MEAN) is None


def test_the_store_takes_the_path_that_is_configured(tmp_path):
  vision = tiny.train_config().model.vision
  (tmp_path / 'a.jpg').write_bytes(_jpeg(_photo('rocket', 640, 480)))
  (tmp_path / 'bad.jpg').write_bytes(_jpeg(_photo('rocket', 640, 480))[:999])
  exact, fast = (
      encode.ImageStore(str(tmp_path), vision, 'pad', decode, 0)
      for decode in ('exact', 'fast')
  )
  one, other = exact['a.jpg'].pixels_HWC, fast['a.jpg'].pixels_HWC
  difference = np.abs(one.astype(int) - other).mean()
  assert 0 < difference < 1.5
  (tmp_path / 'a.png').write_bytes((tmp_path / 'a.jpg').read_bytes())
  for store in (exact, fast):
    assert store['a.jpg'].rules == ()
    assert store['a.png'].rules == ('a format that is not what the name says',)
    with pytest.raises(images.ImageError, match='bad.jpg.*cannot be read'):
      store['bad.jpg']
    with pytest.raises(images.ImageError, match='none.jpg.*does not exist'):
      store['none.jpg']


def test_a_missing_decoder_is_named(monkeypatch):
  monkeypatch.setattr(jpeg.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(config.UserError, match=r'moellava_jax\[jpeg\]'):
    jpeg.check()
