# SPDX-License-Identifier: Apache-2.0
"""The published configs at full size, by shapes alone."""

import functools
import importlib
import json

import flax.linen as nn
import jax
import numpy as np
from PIL import Image
import pytest

from moellava_jax import config, trees
from moellava_jax.data import images, sources, templates
from moellava_jax.model import llava
from moellava_jax.train import about, inputs, stages
from tests import documented, tiny

# Config -> positions of an image, dense decoder, projector, and the sparse
# decoder: total and activated with every other layer sparse, and with all.
PUBLISHED = {
    'stablelm_1_6b': (
        576,
        1_644_515_328,
        6_295_552,
        (2_890_321_920, 2_059_849_728),
        (4_136_128_512, 2_475_184_128),
    ),
    'qwen_1_8b': (
        576,
        1_836_828_672,
        6_295_552,
        (3_054_323_712, 2_242_725_888),
        (4_271_818_752, 2_648_623_104),
    ),
    'phi2': (
        576,
        2_779_632_640,
        9_180_160,
        (5_296_993_280, 3_618_862_080),
        (7_814_353_920, 4_458_091_520),
    ),
    'openchat_7b': (
        576,
        7_241_748_480,
        20_979_712,
        (15_697_727_488, 10_060_582_912),
        (24_153_706_496, 12_879_417_344),
    ),
    'stablelm_384': (
        728,
        1_644_515_328,
        6_557_696,
        (2_890_321_920, 2_059_849_728),
        (4_136_128_512, 2_475_184_128),
    ),
    'phi2_384': (
        728,
        2_779_632_640,
        9_507_840,
        (5_296_993_280, 3_618_862_080),
        (7_814_353_920, 4_458_091_520),
    ),
}
BACKBONES = ('stablelm_1_6b', 'qwen_1_8b', 'phi2', 'openchat_7b')
STAGES = ('pretrain', 'finetune', 'moe')


def _get(name, stage='all'):
  return importlib.import_module(f'configs.{name}').get_config(stage)


@functools.cache
def _parameters(cfg: config.ModelConfig):
  model, rng = llava.Llava(cfg), jax.random.key(0)

  def initialise():
    rngs = {'params': rng, 'router': rng}
    return model.init(rngs, **llava.dummy_inputs(cfg), train=False)['params']

  return nn.unbox(jax.eval_shape(initialise))


def _llm_counts(cfg: config.ModelConfig):
  counts = about.parameter_counts(_parameters(cfg), cfg)
  return counts['llm_total_parameters'], counts['llm_activated_parameters']


@pytest.mark.parametrize('name', BACKBONES)
def test_dense_stages_have_the_published_number_of_parameters(name):
  _, dense, projector, _, _ = PUBLISHED[name]
  cfg = config.from_dict(_get(name))
  for stage in ('pretrain', 'finetune'):
    model = cfg.stage_model(stage)
    assert _llm_counts(model) == (dense, dense)
    trained, _ = trees.split(
        _parameters(model), stages.mask(_parameters(model), stage)
    )
    expected = projector if stage == 'pretrain' else projector + dense
    assert about.count(trained) == expected


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_sparse_stage_has_the_published_number_of_parameters(name):
  patches, _, projector, sparse, _ = PUBLISHED[name]
  cfg = config.from_dict(_get(name)).stage_model('moe')
  assert cfg.vision.num_tokens == patches
  assert _llm_counts(cfg) == sparse
  assert about.count(_parameters(cfg)['projector']) == projector


@pytest.mark.parametrize('name', BACKBONES)
def test_all_layers_sparse_have_the_published_number_of_parameters(name):
  c = _get(name, 'moe')
  c.model.moe.layers = 'all'
  c.model.vision.depth = 2  # It does not touch the decoder.
  assert _llm_counts(config.from_dict(c).stage_model('moe')) == (
      PUBLISHED[name][4]
  )


@pytest.mark.parametrize(
    'name, billions',
    [
        ('phi2', 4.205),
        ('stablelm_1_6b', 2.083),
        ('qwen_1_8b', 2.035),
        ('openchat_7b', 14.114),
    ],
)
def test_stage_three_trains_the_published_number_of_parameters(name, billions):
  params = _parameters(config.from_dict(_get(name)).stage_model('moe'))
  trained, _ = trees.split(params, stages.mask(params, 'moe'))
  assert round(about.count(trained) / 1e9, 3) == billions


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_every_stage_builds_alone(name, stage):
  cfg = config.from_dict(_get(name, stage))
  assert cfg.stages == (stage,)
  assert hash(cfg)


@pytest.mark.parametrize('name', PUBLISHED)
def test_templates_are_those_of_the_paper(name):
  cfg = config.from_dict(_get(name))
  assert templates.get(cfg.stage('pretrain').template).caption_only
  ends = {
      templates.get(cfg.stage(stage).template).stop
      for stage in ('finetune', 'moe')
  }
  openchat = name.startswith('openchat')
  assert ends == {'<|end_of_turn|>' if openchat else '<|endoftext|>'}


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_recipe_of_the_paper(name):
  cfg = config.from_dict(_get(name))
  assert cfg.stages == STAGES
  rows = [cfg.stage(s) for s in STAGES]
  assert [s.batch_size for s in rows] == [256, 128, 128]
  per_gpu = 4 if name == 'openchat_7b' else 8
  micro = [s.batch_size // s.accumulate for s in rows]
  assert micro == [256, 64, 8 * per_gpu]
  assert [s.lr for s in rows] == [1e-3, 2e-5, 2e-5]
  assert [s.epochs for s in rows] == [1, 1, 1]
  assert rows[0].template == 'plain'
  family = name.split('_')[0].removesuffix('2')
  assert {s.template for s in rows[1:]} == {family}
  aspects = [s.image_aspect or cfg.data.image_aspect for s in rows]
  assert aspects == ['square', 'pad', 'pad']
  assert cfg.optimizer.warmup_ratio == 0.03
  assert cfg.optimizer.weight_decay == 0
  assert cfg.optimizer.clip_norm is None
  moe = cfg.model.moe
  assert moe is not None
  assert (moe.layers, moe.num_experts, moe.top_k) == ('interval', 4, 2)
  assert (moe.capacity_factor, moe.aux_loss_weight) == (1.5, 0.01)
  dropout = 0.1 if name.startswith('phi2') else 0.0
  assert cfg.model.llm.residual_dropout == dropout


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_2048_tokens_with_an_image_fit_into_a_row(name):
  cfg = config.from_dict(_get(name))
  image = cfg.model.vision.num_tokens
  for stage in ('finetune', 'moe'):
    length = cfg.stage(stage).row_length
    assert length is not None
    assert 2047 + image <= length < 2047 + image + 128
    assert length % 128 == 0


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_overrides_of_the_docstring_exist(name):
  text = importlib.import_module(f'configs.{name}').__doc__
  # Written with a star, it stands for all of a section.
  text = text.replace('--config.init.*', '--config.init')
  assert documented.unknown_overrides(text, _get(name)) == []


def test_data_that_are_not_there_are_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  c = _get('phi2')
  c.workdir = str(tmp_path / 'run')
  with pytest.raises(
      sources.DataError, match='pt_json/llava_image_.json.*json'
  ):
    inputs.read(config.from_dict(c), ['pretrain'])


def test_a_stage_may_have_its_own_image_aspect_and_arrangement(tmp_path):
  pixels = np.zeros((20, 60, 3), np.uint8)
  pixels[:, 30:] = 255
  Image.fromarray(pixels).save(tmp_path / 'wide.png')
  row = {
      'id': '0',
      'image': 'wide.png',
      'conversations': [
          {'from': 'human', 'value': '<image>\nWhat?'},
          {'from': 'gpt', 'value': 'Black and white.'},
      ],
  }
  (tmp_path / 'rows.json').write_text(json.dumps([row]))
  cfg = tiny.train_config(
      tmp_path / 'run',
      data__json=str(tmp_path / 'rows.json'),
      data__images=str(tmp_path),
      data__shapes=None,
      warmup=None,
      stages=('pretrain', 'finetune'),
      pretrain__image_aspect='square',
      finetune__arrangement='grouped',
  )
  data = inputs.read(cfg, ['pretrain', 'finetune'])
  vision = cfg.model.vision
  for stage, aspect in (('pretrain', 'square'), ('finetune', 'pad')):
    expected = images.preprocess(
        images.load(str(tmp_path / 'wide.png')),
        vision.image_size,
        aspect,
        vision.resize,
        vision.mean,
    )
    got = data.examples[stage][0].images_BIHWC[0]
    np.testing.assert_array_equal(got, expected)
  # Which fills up its last batch.
  rows = [data.examples[s].layout(0, 16).rows(1) for s in cfg.stages]
  assert rows == [1, 16]
