# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Datasets builders of MoE-LLaVA's three data groups.

They read the files that the paper's own code reads, which are of LLaVA's form
for SViT, LVIS-Instruct4V, LRV and MIMIC-IT LA too: MoE-LLaVA publishes them at
https://huggingface.co/datasets/LanguageBind/MoE-LLaVA (`train_json/*.json`;
the images as zip files), sends its users there (docs/TRAIN.md) and names them
in its scripts (scripts/v1/*/*.sh). The names that LLaVA and LVIS-Instruct4V
gave to files of this form will do as well. Nothing is downloaded.
`manual_dir`:

  pt_json/ ft_json/ (or train_json/, or none)   the JSON files
  llava_image/ llava_image_tune/ lvis_tune/     the images, at the paths that
  lrv_tune/ svit_tune/ mimicit_tune/LA/         the JSON files name

An example is a conversation with the files of its images, which is self-
contained and readable without this package:

  {'id', 'paths': [...], 'images': [...], 'conversations': [{'from', 'value'}]}

Works without TensorFlow, if `file_format='array_record'`.
"""

import io
import itertools
import os
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from moellava_jax.data import census as census_lib
from moellava_jax.data import check, images, inspection, rows

_FOLDERS = ('', 'pt_json', 'ft_json', 'train_json')


class Part(NamedTuple):
  """A JSON file of a group, and the other names it is known by."""

  name: str
  files: tuple[str, ...]


class Options(NamedTuple):
  """How rows are checked; see `data.check`."""

  on_bad: str
  workers: int


class Conversations(tfds.core.GeneratorBasedBuilder):
  """What the groups share.

  Attributes:
    parts: the files, in order.
    whole: the name of one file that may stand for all parts.
    options: may be set before `download_and_prepare`.
    census: what was found, once it is prepared.
  """

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = __doc__ or ''
  parts: tuple[Part, ...] = ()
  whole: str | None = None
  options = Options(on_bad='error', workers=0)
  census: census_lib.Census | None = None

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features
    return tfds.core.DatasetInfo(
        builder=self,
        description=(self.__doc__ or '').strip(),
        homepage='https://github.com/PKU-YuanGroup/MoE-LLaVA',
        features=features.FeaturesDict(
            {
                'id': features.Text(),
                'paths': features.Sequence(features.Text()),
                'images': features.Sequence(
                    features.Image(shape=(None, None, 3))
                ),
                'conversations': features.Sequence(
                    {'from': features.Text(), 'value': features.Text()}
                ),
            }
        ),
        # Training shuffles by index; the order of the files is kept.
        disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    root = str(dl_manager.manual_dir)
    whole = self.whole and _first(root, (self.whole,))
    paths = [whole] if whole else [_find(root, part) for part in self.parts]
    return {'train': self._generate_examples(root, paths)}

  def _generate_examples(self, root: str, paths: list[str]):
    settings = inspection.Settings(
        images=root,
        on_bad=self.options.on_bad,
        attributes=False,
        stored_as=None,
        tokenizer=None,
        family=None,
        template='plain',
        image_tokens=1,
    )
    self.census = census_lib.Census()
    raws = itertools.chain.from_iterable(map(check.read, paths))
    with inspection.Pool(settings, self.options.workers) as pool:
      for number, found in enumerate(pool.inspect(raws, lambda path: False)):
        self.census.add(found)
        if found.row is not None:
          yield number, _example(found)


class LlavaPt(Conversations):
  """LLaVA-PT, stage I: 558k captions of LAION, CC and SBU."""

  parts = (
      Part('LLaVA-PT', ('llava_image_.json', 'blip_laion_cc_sbu_558k.json')),
  )


_TEXT = Part('text', ('nlp_tune.json',))


class HybridFt(Conversations):
  """Hybrid-FT, stage II: SViT, LVIS-Instruct4V, LRV, MIMIC-IT LA, and text."""

  parts = (
      Part('MIMIC-IT LA', ('la_tune_256k.json',)),
      Part('LRV', ('lrv_tune_331k.json',)),
      Part('LVIS', ('lvis_tune_220k_.json', 'lvis_instruct4v_220k.json')),
      Part('SViT', ('svit_tune_157k.json',)),
      _TEXT,
  )


class LlavaFt(Conversations):
  """LLaVA-FT, stage III: the mix of LLaVA-1.5, 665k with its text part."""

  parts = (Part('LLaVA-FT', ('llava_image_tune_.json',)), _TEXT)
  whole = 'llava_v1_5_mix665k.json'


GROUPS = {'llava_pt': LlavaPt, 'hybrid_ft': HybridFt, 'llava_ft': LlavaFt}


def _first(root: str, names: tuple[str, ...]) -> str | None:
  for name in names:
    for folder in _FOLDERS:
      if os.path.isfile(path := os.path.join(root, folder, name)):
        return path
  return None


def _find(root: str, part: Part) -> str:
  if (path := _first(root, part.files)) is None:
    raise rows.DataError(
        f'{part.name}: there is no {" or ".join(part.files)} in {root!r}, nor'
        f' in its folders {_FOLDERS[1:]}; fetch it from'
        ' https://huggingface.co/datasets/LanguageBind/MoE-LLaVA.'
    )
  return path


def _example(found: inspection.Inspected) -> dict[str, Any]:
  assert found.row is not None
  names = [str(path) for path in found.row.images]
  return {
      'id': found.row.id,
      'paths': names,
      'images': [_encoded(found.files[name]) for name in names],
      'conversations': [
          {'from': role, 'value': value} for role, value in found.row.turns
      ],
  }


def _encoded(data: bytes) -> bytes:
  """JPEG and PNG as they are; others, which TFDS does not know, as PNG."""
  if data.startswith((b'\xff\xd8\xff', b'\x89PNG')):
    return data
  file = io.BytesIO()
  images.examine(data, 'image').image.save(file, 'png')
  return file.getvalue()
