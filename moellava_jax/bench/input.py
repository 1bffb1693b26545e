# SPDX-License-Identifier: Apache-2.0
"""How full rows are, how fast images are read, what the rest of input costs.

  python -m moellava_jax.bench.input --out=moellava_jax/bench/results

`results/input.json` is what it wrote, at the revision that it names. All figures
are ratios of medians of interleaved runs, in CPU seconds of one core, so that
they mean something on a busy machine too. The photographs are
those of scikit-image (extra `test`). `bench.main --suite=cpu` measures the same.
"""

from collections.abc import Callable, Sequence
from importlib import metadata, util
import io
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any, NamedTuple

from absl import app, flags
import numpy as np
from PIL import Image

from moellava_jax import backbones, config
from moellava_jax.bench import measure, sizes
from moellava_jax.data import (
    images,
    jpeg,
    order,
    packing,
    pipeline,
    sources,
    templates,
)
from moellava_jax.data import tokenizer as tokenizer_lib

TEMPLATE = 'phi'
TOWER = 'clip_l14_336'
ROW_LENGTHS = (2048, 4096, 8192)
ROWS, REPEATS = 665_298, 15
PACKAGES = ('pillow', 'simplejpeg', 'grain')
HEADER = ('input pipeline', 'of', 'figure')


class Source(NamedTuple):
  """A source of LLaVA-FT, and what is assumed of its texts."""

  name: str
  rows: int  # https://github.com/haotian-liu/LLaVA/issues/657
  images: int  # Of a row.
  exchanges: int  # Questions with their answers, of a row.
  words: int  # Of an exchange, median.
  spread: float  # Of the logarithm of the words of a row.


# The counts are published, the texts are assumptions: short questions about
# one image, asked several at a time where the source is known to, and long
# conversations in the rows without an image (ShareGPT).
SOURCES = (
    Source('coco', 364_100, 1, 4, 28, 0.6),
    Source('vg', 86_417, 1, 8, 14, 0.4),
    Source('gqa', 72_140, 1, 10, 12, 0.4),
    Source('ocr_vqa', 80_000, 1, 5, 14, 0.3),
    Source('textvqa', 21_953, 1, 2, 45, 0.5),
    Source('text', 40_688, 0, 3, 200, 0.9),
)
TOKENS_A_WORD = 1.35  # English under a byte-level BPE of 50k ids.


def histogram(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """lengths_N and images_N of so many rows in the published proportions."""
  rng = np.random.default_rng(seed)
  patches = backbones.TOWERS[TOWER].num_tokens
  lengths, counts = [], []
  total = sum(source.rows for source in SOURCES)
  for source in SOURCES:
    n = round(rows * source.rows / total)
    words_N = source.exchanges * source.words
    words_N = words_N * np.exp(rng.normal(0, source.spread, n))
    words_N = words_N + _template_words(source.exchanges)
    lengths.append(
        np.ceil(words_N * TOKENS_A_WORD).astype(np.int32)
        + source.images * patches
    )
    counts.append(np.full(n, source.images, np.int32))
  order_N = rng.permutation(sum(map(len, lengths)))
  return np.concatenate(lengths)[order_N], np.concatenate(counts)[order_N]


def _template_words(exchanges: int) -> int:
  """Words that the real template puts around the turns.

  The letters a turn stands for here count as its colon or its stop.
  """
  turns = (('human', 'a'), ('gpt', 'b')) * exchanges
  text = templates.text(templates.render(templates.get(TEMPLATE), turns))
  return len(text.split())


def packing_fill(rows: int) -> list[dict[str, Any]]:
  """Fill of rows: a conversation each, planned, and packed all at once."""
  lengths_N, images_N = histogram(rows)
  found = []
  for row_length in ROW_LENGTHS:
    cut_N = np.minimum(lengths_N, row_length)
    slots = row_length // 800  # An image and the text that is usual with it.
    source_N = np.zeros(len(cut_N), int)
    known = order.Known(('all',), source_N, cut_N, images_N, None)
    plan = order.Plan('packed', None, 1, 1, row_length, slots)
    began = time.process_time()
    packed = order.Layout(plan, known, 0).rows(1)
    seconds = time.process_time() - began
    offline = packing.pack(
        np.arange(len(cut_N), dtype=np.int32),
        cut_N,
        images_N,
        row_length=row_length,
        max_images=slots,
        window=len(cut_N),
    )
    positions = float(cut_N.sum())
    found.append(
        {
            'row_length': row_length,
            'max_images': slots,
            'padded': positions / (len(cut_N) * row_length),
            'packed': positions / (packed * row_length),
            'offline': positions / (len(offline.ends_R) * row_length),
            'packed_over_offline': len(offline.ends_R) / packed,
            'slots_filled': float(images_N.sum()) / (packed * slots),
            'plan_seconds': seconds,
        }
    )
  return found


def check_installed() -> None:
  """Raises UserError where a package is missing that only this needs."""
  jpeg.check()
  if util.find_spec('skimage') is None:
    raise config.UserError(
        "The photographs are those of scikit-image: pip install 'moellava_jax"
        "[test]'."
    )


def _photographs(width: int, height: int) -> list[bytes]:
  """JPEG files of quality 90."""
  from skimage import data

  files = []
  for name in ('astronaut', 'coffee', 'chelsea', 'rocket', 'retina'):
    image = Image.fromarray(getattr(data, name)())
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=90)
    files.append(file.getvalue())
  return files


def medians(
    runs: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
  """CPU seconds of each, run in turns."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      began = time.process_time()
      run()
      times[name].append(time.process_time() - began)
  return {name: statistics.median(found) for name, found in times.items()}


def jpeg_rates(repeats: int) -> list[dict[str, Any]]:
  """Both ways from JPEG files to 336 x 336 pixels."""
  vision = backbones.TOWERS[TOWER]
  how = (vision.image_size, 'pad', vision.resize, vision.mean)

  def exact(data: bytes) -> np.ndarray:
    image = images.Image.open(io.BytesIO(data)).convert('RGB')
    return images.preprocess(image, *how)

  def fast(data: bytes) -> np.ndarray:
    pixels_HWC = jpeg.preprocess(data, *how)
    assert pixels_HWC is not None
    return pixels_HWC

  def differ(data: bytes) -> float:
    return float(np.abs(exact(data).astype(int) - fast(data)).mean())

  jpeg.check()
  found = []
  for width, height in ((640, 480), (1024, 768)):
    files = _photographs(width, height)
    seconds = medians(
        {
            'exact': lambda files=files: [exact(data) for data in files],
            'fast': lambda files=files: [fast(data) for data in files],
        },
        repeats,
    )
    found.append(
        {
            'size': f'{width}x{height}',
            'exact_a_second': len(files) / seconds['exact'],
            'fast_over_exact': seconds['exact'] / seconds['fast'],
            'difference': statistics.mean(map(differ, files)),
            'largest_difference': max(map(differ, files)),
        }
    )
  return found


def overhead(repeats: int) -> dict[str, float]:
  """CPU time of all but decoding, as a share of the time of decoding."""
  vision = backbones.TOWERS[TOWER]
  files = _photographs(640, 480)
  with tempfile.TemporaryDirectory() as folder:
    for n, data in enumerate(files):
      pathlib.Path(folder, f'{n}.jpg').write_bytes(data)
    rows = _rows(96, len(files))
    text = [value for row in rows for _, value in row.turns]
    tok = tokenizer_lib.train(text, 4000)
    found: dict[str, float] = {}
    for arrangement, length, slots in (
        ('shuffled', 2048, 1),
        ('packed', 2048, 3),
    ):
      fmt = pipeline.Format(
          TEMPLATE, length, slots, vision, sizes.data(arrangement)
      )
      # Lazy: too many rows for the cache, but few enough images.
      data = pipeline.Examples(rows, folder, fmt, tok)
      assert not data.eager
      total = data.layout(0, 8).rows(1) // 8
      share = np.arange(8)

      def read(data=data, total=total, share=share):
        batches = pipeline.train_batches(data, 8, 0, 0, share=share)
        for _ in range(total):
          next(batches)

      read()  # Fills the cache.
      how = (vision.image_size, 'pad', vision.resize, vision.mean)

      def decode(folder=folder, how=how):
        for n in range(len(files)):
          images.preprocess(images.load(f'{folder}/{n}.jpg'), *how)

      seconds = medians({'read': read, 'decode': decode}, repeats)
      decoding = seconds['decode'] / len(files) * len(rows)
      found[arrangement] = seconds['read'] / decoding
  return found


def _rows(count: int, files: int) -> Sequence[sources.Row]:
  """Conversations about an image each, as long as those of `coco`."""
  rng = np.random.default_rng(0)
  letters = list('abcdefghijklmnopqrstuvwxyz')
  words = [''.join(rng.choice(letters, rng.integers(2, 9))) for _ in range(999)]
  source = SOURCES[0]
  rows = []
  for n in range(count):
    turns = []
    for exchange in range(source.exchanges):
      mark = '' if exchange else f'{templates.IMAGE}\n'
      text = rng.choice(words, source.words)
      turns += [
          ('human', mark + ' '.join(text[:10])),
          ('gpt', ' '.join(text[10:])),
      ]
    where = f'row {n}'
    rows.append(
        sources.Row(where, where, (f'{n % files}.jpg',), tuple(turns), None)
    )
  return rows


def run(rows: int, repeats: int) -> dict[str, Any]:
  """All of it.

  Args:
    rows: of the histogram.
    repeats: runs of which a median is.
  """
  return {
      'versions': {name: metadata.version(name) for name in PACKAGES},
      'rows': rows,
      'assumptions': {
          'sources': [source._asdict() for source in SOURCES],
          'tokens_a_word': TOKENS_A_WORD,
          'template': TEMPLATE,
          'tower': TOWER,
      },
      'packing': packing_fill(rows),
      'jpeg': jpeg_rates(repeats),
      'overhead': overhead(max(repeats // 2, 1)),
  }


def table(case: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
  """Rows of HEADER."""
  rows = [
      (
          case,
          '{row_length} positions, {max_images} image slots'.format(**packed),
          'fill {padded:.3f} padded, {packed:.4f} packed, {offline:.4f} best fit'
          ' decreasing of all at once (ratio {packed_over_offline:.4f});'
          ' {slots_filled:.2f} of the slots used; planned in'
          ' {plan_seconds:.1f} s'.format(**packed),
      )
      for packed in found['packing']
  ]
  rows += [
      (
          case,
          'JPEG {size}'.format(**rate),
          '{exact_a_second:.0f} a second exact, {fast_over_exact:.2f} times that'
          ' fast; mean difference {difference:.2f} grey levels, at most'
          ' {largest_difference:.2f}'.format(**rate),
      )
      for rate in found['jpeg']
  ]
  rows += [
      (
          case,
          f'all but decoding, {name}',
          f'{share:.1%} of the time of decoding',
      )
      for name, share in found['overhead'].items()
  ]
  return rows


def define_flags() -> None:
  flags.DEFINE_string('out', None, 'Folder for input.json.')
  flags.DEFINE_integer('rows', ROWS, 'Rows of the histogram.')
  flags.DEFINE_integer('repeats', REPEATS, 'Runs of which a median is.')


def main(argv) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}.')
  values = flags.FLAGS
  check_installed()
  found = run(values.rows, values.repeats)
  about = measure.environment()
  versions = about['versions'] | found['versions']
  for _, what, figure in table('', found):
    print(f'{what}: {figure}')
  if values.out:
    folder = pathlib.Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, **found, 'versions': versions}, indent=1)
    (folder / 'input.json').write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
  define_flags()
  app.run(main)
