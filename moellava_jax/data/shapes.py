# SPDX-License-Identifier: Apache-2.0
"""The embedded task: writes Shapes as PNG files and LLaVA JSON, from a seed.

  python -m moellava_jax.data.shapes --out=DIR --seed=0 \
      --train_scenes=6000 --heldout_scenes=600

Image paths in all files are relative to DIR, so DIR is the image root.

  images/                 train_000012.png, heldout_000003.png
  warmup.json             text about another scene, attributes of the image
  pretrain.json           captions
  finetune.json, moe.json questions about each scene; a few rows of text alone
  heldout*.json           texts, captions and questions about held-out scenes,
                          for the held-out loss of the stages
  questions_pope.jsonl    yes or no, in the three categories of POPE
  questions_exact.jsonl   count, colour, position; one answer is right
  spec.json               what the folder was made from; written last
"""

import collections
from collections.abc import Iterator
import contextlib
import fcntl
import glob
import itertools
import json
import os
import pathlib
import shutil
import time
from typing import Any
import uuid

from absl import app, flags

import moellava_jax
from moellava_jax import config
from moellava_jax.data import scene_text, scenes

ATTRIBUTES = scenes.ATTRIBUTES
FORMAT = 3

_TURNS = 3  # Questions of a training row.
_TEXT_ROWS = 0.04  # Rows without an image, for each row with one.
_TOP = 3  # Absent kinds that a popular or adversarial negative is drawn from.
_MIN_TRAIN_SCENES = 16  # Fewer may all show the same but for sizes.

Row = dict[str, Any]


def write(cfg: config.ShapesConfig) -> None:
  """Writes the task to `cfg.dir`, unless it is there already.

  The folder appears all at once: it is made beside its place and renamed, so
  a killed run leaves nothing that looks complete. The same seed and counts
  give the same bytes.

  Raises:
    ValueError: for too few scenes, or if `cfg.dir` holds something else.
  """
  if cfg.train_scenes < _MIN_TRAIN_SCENES or cfg.heldout_scenes < 1:
    raise ValueError(
        f'Shapes of train_scenes={cfg.train_scenes} and heldout_scenes='
        f'{cfg.heldout_scenes}: expected at least {_MIN_TRAIN_SCENES} and 1.'
    )
  target = pathlib.Path(cfg.dir).absolute()
  if _is_written(target, cfg):
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  with _locked(target.parent) as locked:
    if _is_written(target, cfg):  # By the process that held the lock.
      return
    if locked:
      for stale in target.parent.glob(f'.{glob.escape(target.name)}.tmp-*'):
        shutil.rmtree(stale)
    temporary = target.parent / f'.{target.name}.tmp-{uuid.uuid4().hex}'
    try:
      _write_files(temporary, cfg)
      os.replace(temporary, target)
    except OSError:
      if not _is_written(target, cfg):  # Else another process was faster.
        raise
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


def _spec(cfg: config.ShapesConfig) -> dict[str, int]:
  return {
      'format': FORMAT,
      'seed': cfg.seed,
      'train_scenes': cfg.train_scenes,
      'heldout_scenes': cfg.heldout_scenes,
  }


def _is_written(target: pathlib.Path, cfg: config.ShapesConfig) -> bool:
  """Whether `target` is complete; UserError if it is something else."""
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return False
  spec = target / 'spec.json'
  found = json.loads(spec.read_text()) if spec.exists() else None
  # The version is for the reader: only the format decides.
  if found is not None and {**found, **_spec(cfg)} == found:
    return True
  raise config.UserError(
      f'{target} holds {f"Shapes of {found}" if found else "other files"}, but'
      f' Shapes of {_spec(cfg)} are wanted. Remove that folder, or choose'
      ' another one (data.shapes.dir, or --out).'
  )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
  """Holds a lock that dies with the process; False where there are none.

  Under the lock every temporary folder is a dead run's. Some network file
  systems cannot lock a folder: there, leftovers stay.
  """
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX)
      locked = True
    except OSError:
      locked = False
    yield locked
  finally:
    os.close(descriptor)


def _write_files(folder: pathlib.Path, cfg: config.ShapesConfig) -> None:
  train = scenes.collect(cfg.seed, 'train', cfg.train_scenes)
  heldout = scenes.collect(cfg.seed, 'heldout', cfg.heldout_scenes)
  (folder / 'images').mkdir(parents=True)
  _write_images(folder, cfg.seed, train, heldout)
  for name, rows in (
      ('warmup.json', warmup_rows(cfg.seed, train)),
      ('pretrain.json', caption_rows(cfg.seed, 'pretrain', train)),
      ('finetune.json', chat_rows(cfg.seed, 'finetune', train)),
      ('moe.json', chat_rows(cfg.seed, 'moe', train)),
      ('heldout.json', chat_rows(cfg.seed, 'heldout', heldout)),
      ('heldout_captions.json', caption_rows(cfg.seed, 'heldout', heldout)),
      ('heldout_texts.json', text_rows(cfg.seed, heldout)),
  ):
    lines = ',\n'.join(json.dumps(row) for row in rows)
    (folder / name).write_text(f'[\n{lines}\n]\n')
  for name, rows in (
      ('questions_pope.jsonl', pope_questions(cfg.seed, train, heldout)),
      ('questions_exact.jsonl', exact_questions(cfg.seed, heldout)),
  ):
    lines = (
        json.dumps({'question_id': i, **row}) for i, row in enumerate(rows)
    )
    (folder / name).write_text(''.join(f'{line}\n' for line in lines))
  spec = {**_spec(cfg), 'version': moellava_jax.__version__}
  (folder / 'spec.json').write_text(json.dumps(spec, indent=2) + '\n')


def _write_images(
    folder: pathlib.Path,
    seed: int,
    train: list[scenes.Scene],
    heldout: list[scenes.Scene],
) -> None:
  shown = time.monotonic()
  total = len(train) + len(heldout)
  done = 0
  for split, some in (('train', train), ('heldout', heldout)):
    for i, scene in enumerate(some):
      image = scenes.render(scene, scenes.rng(seed, f'image/{split}', i))
      image.save(folder / image_path(split, i), 'PNG')
      done += 1
      if time.monotonic() - shown > 5:
        shown = time.monotonic()
        print(f'Shapes: {done} of {total} images', flush=True)


def image_path(split: str, index: int) -> str:
  return f'images/{split}_{index:06d}.png'


def _turns(*texts: str) -> list[dict[str, str]]:
  speakers = itertools.cycle(('human', 'gpt'))
  return [
      {'from': s, 'value': text}
      for s, text in zip(speakers, texts, strict=False)
  ]


def warmup_rows(seed: int, train: list[scenes.Scene]) -> list[Row]:
  """An image with its attributes, and a text about another scene.

  The tower learns from the attributes and the LM from the text, and neither
  learns from the row how an image and its words belong together.
  """
  rows = []
  for i, scene in enumerate(train):
    generator = scenes.rng(seed, 'warmup', i)
    other = scene
    while scenes.key(other) == scenes.key(scene):
      other = train[generator.integers(len(train))]
    rows.append(
        {
            'id': f'warmup_{i:06d}',
            'image': image_path('train', i),
            'attributes': scenes.attributes(scene),
            'conversations': _turns(
                '', scene_text.text_about(generator, other)
            ),
        }
    )
  return rows


def caption_rows(seed: int, name: str, some: list[scenes.Scene]) -> list[Row]:
  """An image and its caption."""
  rows = []
  for i, scene in enumerate(some):
    request = scene_text.instruction(scenes.rng(seed, f'{name}/caption', i))
    rows.append(
        {
            'id': f'{name}_caption_{i:06d}',
            'image': image_path(_split(name), i),
            'conversations': _turns(
                f'<image>\n{request}', scene_text.caption(scene)
            ),
        }
    )
  return rows


def text_rows(seed: int, some: list[scenes.Scene]) -> list[Row]:
  """The texts of the warm-up, about other scenes.

  Their template leaves the question out, but a conversation needs one.
  """
  rows = []
  for i, scene in enumerate(some):
    generator = scenes.rng(seed, 'heldout/text_about', i)
    rows.append(
        {
            'id': f'heldout_text_{i:06d}',
            'conversations': _turns(
                'Say something.', scene_text.text_about(generator, scene)
            ),
        }
    )
  return rows


def _split(name: str) -> str:
  return 'heldout' if name == 'heldout' else 'train'


def chat_rows(seed: int, name: str, some: list[scenes.Scene]) -> list[Row]:
  """Questions and answers for each image; then the rows of text alone."""
  rows = []
  for i, scene in enumerate(some):
    facts = scene_text.draw(scenes.rng(seed, name, i), scene, _TURNS)
    texts = [text for fact in facts for text in (fact.question, fact.answer)]
    rows.append(
        {
            'id': f'{name}_{i:06d}',
            'image': image_path(_split(name), i),
            'conversations': _turns(f'<image>\n{texts[0]}', *texts[1:]),
        }
    )
  for i in range(round(len(some) * _TEXT_ROWS)):
    generator = scenes.rng(seed, f'{name}/text', i)
    scene = some[generator.integers(len(some))]
    (fact,) = scene_text.draw(generator, scene, 1)
    rows.append(
        {
            'id': f'{name}_text_{i:06d}',
            'conversations': _turns(
                scene_text.text_question(scene, fact), fact.answer
            ),
        }
    )
  return rows


def pope_questions(
    seed: int, train: list[scenes.Scene], heldout: list[scenes.Scene]
) -> Iterator[Row]:
  """Yields one 'yes' and one 'no' a category for three in four held-out scenes.

  The 'yes' is the same in all categories. As in POPE (arXiv 2305.10355) the
  'no' asks for an absent kind: any one, one of the most frequent, or one of
  those that are seen most often with what is there. Frequencies are those of
  the training scenes.
  """
  frequency = collections.Counter(
      kind for scene in train for kind in scenes.present(scene)
  )
  together = collections.Counter(
      pair
      for scene in train
      for pair in itertools.permutations(scenes.present(scene), 2)
  )
  for i, scene in enumerate(heldout):
    if i % 4 == 3:
      continue
    generator = scenes.rng(seed, 'pope', i)
    here, others = scenes.present(scene), scenes.absent(scene)
    met = {o: sum(together[o, h] for h in here) for o in others}
    negatives = {
        'random': others,
        'popular': sorted(others, key=lambda o: -frequency[o])[:_TOP],
        'adversarial': sorted(others, key=lambda o: -met[o])[:_TOP],
    }
    positive = here[generator.integers(len(here))]
    for category, kinds in negatives.items():
      for kind in (positive, kinds[generator.integers(len(kinds))]):
        fact = scene_text.exist(scene, kind)
        yield {
            'image': image_path('heldout', i),
            'text': fact.question,
            'category': category,
            'label': fact.answer.lower(),
        }


def exact_questions(seed: int, heldout: list[scenes.Scene]) -> Iterator[Row]:
  """Yields one question for each held-out scene and category.

  Of what may be asked about a scene, the question whose kind and answer were
  asked most rarely so far: answers are then as balanced as the scenes allow
  (four objects of one shape are rare, and so is a single object). A scene in
  which no colour can be asked for without ambiguity has no such question.
  """
  asked: collections.Counter[tuple[str, str]] = collections.Counter()
  for i, scene in enumerate(heldout):
    generator = scenes.rng(seed, 'exact', i)
    for category, facts_of in scene_text.EXACT.items():
      facts = facts_of(scene)
      if not facts:
        continue
      shuffled = [facts[j] for j in generator.permutation(len(facts))]
      fact = min(shuffled, key=lambda f: asked[f.kind, f.answer])
      asked[fact.kind, fact.answer] += 1
      yield {
          'image': image_path('heldout', i),
          'text': fact.question,
          'category': category,
          'kind': fact.kind,
          'answer': fact.answer,
      }


def define_flags() -> None:
  """Only for the command: others import this module and have an --out too."""
  flags.DEFINE_string('out', None, 'Folder to write.', required=True)
  flags.DEFINE_integer('seed', None, 'Seed of all files.', required=True)
  flags.DEFINE_integer(
      'train_scenes', None, 'Scenes to train on; 6000 is usual.', required=True
  )
  flags.DEFINE_integer(
      'heldout_scenes', None, 'Scenes to ask about; 600.', required=True
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}; see --help.')
  args = flags.FLAGS
  write(
      config.ShapesConfig(
          dir=args.out,
          seed=args.seed,
          train_scenes=args.train_scenes,
          heldout_scenes=args.heldout_scenes,
      )
  )
  folder = pathlib.Path(args.out)
  print(f'{folder}: Shapes of seed {args.seed}')
  print(f'  images/ {sum(1 for _ in (folder / "images").iterdir())} files')
  for path in sorted(folder.glob('*.json*')):
    if path.name != 'spec.json':
      text = path.read_text()
      rows = json.loads(text) if path.suffix == '.json' else text.splitlines()
      print(f'  {path.name} {len(rows)} rows')


if __name__ == '__main__':
  define_flags()
  app.run(main)
