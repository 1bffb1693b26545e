# SPDX-License-Identifier: Apache-2.0
"""Scenes of the embedded task: coloured shapes on a 3 x 3 grid, and images.

A scene is drawn from a seed, belongs to training or to the held-out part by
the hash of what it shows, and is rendered at 42 x 42 pixels, so that a cell is
one 14-pixel patch of a ViT.
"""

import bisect
import functools
import hashlib
import itertools
from typing import Literal, NamedTuple, TYPE_CHECKING
import zlib

import numpy as np

if TYPE_CHECKING:
  from PIL import Image

COLORS = ('red', 'green', 'blue', 'yellow')
SHAPES = ('circle', 'square', 'triangle')
SIZES = ('small', 'large')
ROWS = ('top', 'middle', 'bottom')
COLUMNS = ('left', 'center', 'right')
GRID = len(ROWS)  # Cells a side.
CELL = 14  # Pixels a side.
MAX_THINGS = 4

# What an image shows in each cell, and how many values that takes. Of colour,
# shape and size, value 0 is an empty cell.
ATTRIBUTES = (
    ('color', 5),
    ('shape', 4),
    ('size', 3),
    ('row', GRID),
    ('column', GRID),
)

Kind = tuple[int, int]  # Indices into COLORS and SHAPES.
KINDS: tuple[Kind, ...] = tuple(
    itertools.product(range(len(COLORS)), range(len(SHAPES)))
)

# Relative frequencies of the kinds, a row for each colour. Every row and every
# column has the same sum: some kinds are popular but no colour or shape is, so
# an answer cannot be guessed from its frequency.
_POPULARITY = ((3, 2, 1), (1, 3, 2), (2, 1, 3), (2, 2, 2))
_SHARE = 0.4  # Chance that an object is drawn to resemble an earlier one.
_HELDOUT_EVERY = 5  # One key in so many is held out.

_RGB = ((220, 40, 40), (40, 165, 65), (45, 85, 220), (240, 200, 20))
_BACKGROUND = (240, 240, 240)
_RADII = (3, 6)  # Pixels, by size.
_JITTER = 1  # Pixels; 6 + 1 still fits into half a cell.
_SUPERSAMPLING = 8


class Thing(NamedTuple):
  """One object. All numbers count from 0."""

  cell: int  # Row-major.
  color: int
  shape: int
  size: int

  @property
  def kind(self) -> Kind:
    return self.color, self.shape

  @property
  def row(self) -> int:
    return self.cell // GRID

  @property
  def column(self) -> int:
    return self.cell % GRID


Scene = tuple[Thing, ...]  # In the order of the cells.


def rng(seed: int, purpose: str, index: int) -> np.random.Generator:
  """The random numbers of one scene for one purpose.

  Whatever draws from its own generator leaves all other files as they were.
  """
  return np.random.default_rng([seed, zlib.crc32(purpose.encode()), index])


def collect(
    seed: int, split: Literal['train', 'heldout'], count: int
) -> list[Scene]:
  """Returns the first `count` scenes of a split, all different.

  No scene of one split has the key of a scene of the other, whatever the
  seeds. The number of objects is uniform over 1 to 4 except that scenes of one
  object run out: there are 216 of them in all, sizes included.
  """
  scenes: dict[Scene, None] = {}
  for i in range(count):
    generator = rng(seed, f'scene/{split}', i)
    while len(scenes) == i:
      scene = sample(generator)
      if is_heldout(scene) == (split == 'heldout'):
        scenes[scene] = None
  return list(scenes)


def sample(generator: np.random.Generator) -> Scene:
  """Draws 1 to 4 objects in distinct cells, no two of a kind."""
  count = int(generator.integers(1, MAX_THINGS + 1))
  cells = generator.permutation(GRID * GRID)[:count].tolist()
  kinds: list[Kind] = []
  for _ in range(count):
    kinds.append(_next_kind(generator, kinds))
  sizes = generator.integers(len(SIZES), size=count).tolist()
  return tuple(
      sorted(
          Thing(cell, *kind, size)
          for cell, kind, size in zip(cells, kinds, sizes, strict=True)
      )
  )


def _next_kind(generator: np.random.Generator, kinds: list[Kind]) -> Kind:
  free = [kind for kind in KINDS if kind not in kinds]
  if kinds and generator.random() < _SHARE:
    earlier = kinds[generator.integers(len(kinds))]
    axis = generator.integers(2)
    # All three shapes of a colour may be taken.
    free = [kind for kind in free if kind[axis] == earlier[axis]] or free
  weights = [_POPULARITY[color][shape] for color, shape in free]
  upto = list(itertools.accumulate(weights))
  return free[bisect.bisect(upto, generator.random() * upto[-1])]


def key(scene: Scene) -> frozenset[tuple[int, str, str]]:
  """What a scene shows, sizes ignored: {(cell, colour, shape)}."""
  return frozenset((t.cell, COLORS[t.color], SHAPES[t.shape]) for t in scene)


def is_heldout(scene: Scene) -> bool:
  """Whether a scene belongs to the held-out fifth, by the hash of its key."""
  text = ';'.join(','.join(map(str, item)) for item in sorted(key(scene)))
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest, 'big') % _HELDOUT_EVERY == 0


def present(scene: Scene) -> list[Kind]:
  return [thing.kind for thing in scene]


def absent(scene: Scene) -> list[Kind]:
  return [kind for kind in KINDS if kind not in present(scene)]


def attributes(scene: Scene) -> list[list[int]]:
  """Returns the values of `ATTRIBUTES` for each of the 9 cells, row-major."""
  cells = [[0, 0, 0, *divmod(cell, GRID)] for cell in range(GRID * GRID)]
  for thing in scene:
    cells[thing.cell][:3] = (thing.color + 1, thing.shape + 1, thing.size + 1)
  return cells


def render(scene: Scene, generator: np.random.Generator) -> 'Image.Image':
  """Returns an RGB image of 42 x 42; objects are a pixel off centre at most."""
  # Imported here because who counts attributes, as training does, draws none.
  from PIL import Image

  image = Image.new('RGB', (GRID * CELL, GRID * CELL), _BACKGROUND)
  for thing in scene:
    x, y = generator.integers(-_JITTER, _JITTER, size=2, endpoint=True).tolist()
    corner = (thing.column * CELL + x, thing.row * CELL + y)
    mask = _mask(thing.shape, thing.size)
    # The coloured pixels reach at most `_JITTER` pixels beyond what the mask
    # leaves empty, so a clipped border is blank.
    image.paste(_RGB[thing.color], corner, mask)
  return image


@functools.cache
def _mask(shape: int, size: int) -> 'Image.Image':
  """Returns the coverage (0 to 255) of a cell's pixels by a centred shape."""
  from PIL import Image, ImageDraw

  scale = _SUPERSAMPLING
  image = Image.new('L', (CELL * scale, CELL * scale))
  draw = ImageDraw.Draw(image)
  low = (CELL // 2 - _RADII[size]) * scale
  high = (CELL // 2 + _RADII[size]) * scale - 1  # PIL's boxes are inclusive.
  if SHAPES[shape] == 'circle':
    draw.ellipse((low, low, high, high), fill=255)
  elif SHAPES[shape] == 'square':
    draw.rectangle((low, low, high, high), fill=255)
  else:
    top = ((low + high) / 2, low)
    draw.polygon((top, (low, high), (high, high)), fill=255)
  return image.resize((CELL, CELL), Image.Resampling.BOX)
