# SPDX-License-Identifier: Apache-2.0
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from moellava_jax import backbones, config
from moellava_jax.model import decoder, dot_product, projector
from moellava_jax.train import about

# What the model cards and the metadata of the published files say. Files of a
# tied model may hold the head twice; it counts once here.
PUBLISHED = {
    'phi2': 2_779_683_840 - 51_200,  # Without the bias of the head.
    'stablelm_1_6b': 1_644_515_328,
    'qwen_1_8b': 1_836_828_672,
    'openchat_7b': 7_241_748_480,
    'mistral_7b': 7_241_732_096,
    'llama2_7b': 6_738_415_616,
    'llama2_13b': 13_015_864_320,
    'vicuna_7b': 6_738_415_616,
    'vicuna_13b': 13_015_864_320,
    'qwen1_5_1_8b': 1_836_828_672,
    'qwen2_0_5b': 494_032_768,
    'qwen2_1_5b': 1_543_714_304,
    'qwen2_7b': 7_615_616_512,
    'qwen2_5_0_5b': 494_032_768,
    'qwen2_5_1_5b': 1_543_714_304,
    'qwen2_5_3b': 3_085_938_688,
    'qwen2_5_7b': 7_615_616_512,
    'qwen3_0_6b': 596_049_920,
    'qwen3_1_7b': 1_720_574_976,
    'qwen3_4b': 4_022_468_096,
    'qwen3_8b': 8_190_735_360,
    'minicpm_2b': 2_724_880_896,
}


def _count(cfg: config.DecoderConfig) -> int:
  """Parameters of a decoder, from the shapes of one and of two layers."""

  def parameters(depth):
    module = decoder.Decoder(
        dataclasses.replace(cfg, depth=depth),
        None,
        jnp.dtype('float32'),
        'none',
    )
    tokens_BT = jnp.zeros((1, 1), jnp.int32)

    def run(m):
      x_BTD = m.embed(tokens_BT, with_images=False)
      mask_BTS = dot_product.causal_mask(tokens_BT + 1)
      real_BT = tokens_BT == 0
      out = m(x_BTD, tokens_BT, mask_BTS, real_BT, ~real_BT, None, train=False)
      return m.logits(out.hidden_BTD)

    def initialise():
      return module.init(jax.random.key(0), method=run)

    return about.count(nn.unbox(jax.eval_shape(initialise)))

  one, two = parameters(1), parameters(2)
  return one + (cfg.depth - 1) * (two - one)


@pytest.mark.parametrize('name', sorted(PUBLISHED))
def test_decoder_has_the_published_number_of_parameters(name):
  assert _count(backbones.LMS[name]) == PUBLISHED[name]


def test_every_published_decoder_is_counted():
  assert set(backbones.LMS) == {*PUBLISHED, 'shapes'}


@pytest.mark.parametrize('table', [backbones.LMS, backbones.TOWERS])
def test_the_name_is_the_key(table):
  assert all(name == cfg.name for name, cfg in table.items())


@pytest.mark.parametrize(
    'name, tokens, layers',
    [
        ('clip_l14', 256, 23),
        ('clip_l14_336', 576, 23),
        ('siglip_base_224', 195, 11),
        ('siglip_base_384', 575, 11),
        ('siglip_so400m_384', 728, 26),  # Not 729: the first patch is dropped.
    ],
)
def test_positions_and_layers_of_a_tower(name, tokens, layers):
  tower = backbones.TOWERS[name]
  assert (tower.num_tokens, tower.num_layers) == (tokens, layers)


@pytest.mark.parametrize(
    'vision, width, expected',
    [
        (1024, 2048, 6_295_552),
        (1024, 2560, 9_180_160),
        (1024, 4096, 20_979_712),
        (1152, 2048, 6_557_696),
        (1152, 2560, 9_507_840),
    ],
)
def test_projector_has_the_published_number_of_parameters(
    vision, width, expected
):
  module = projector.Projector('mlp2x_gelu', width, jnp.dtype('float32'))
  shapes = jax.eval_shape(
      lambda: module.init(jax.random.key(0), jnp.zeros((1, vision)))
  )
  assert about.count(nn.unbox(shapes)) == expected


def test_scales_of_minicpm():
  cfg = backbones.LMS['minicpm_2b']
  assert cfg.embed_scale == 12
  assert cfg.residual_scale == pytest.approx(1.4 / 40**0.5)
  assert cfg.head_scale == pytest.approx(1 / 9)
