# SPDX-License-Identifier: Apache-2.0
"""Every family of decoders and towers against its class in transformers."""

import dataclasses
import json
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, trees
from moellava_jax.interop import files, hf, load, towers
from moellava_jax.model import dot_product, llava, vision
from tests import tiny

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.parity

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
ROPE = {'rope_type': 'default', 'rope_theta': 5000.0}
# (class prefix, settings beside SIZES)
LMS = {
    'phi': (
        'Phi',
        dict(rope_parameters={**ROPE, 'partial_rotary_factor': 0.5}),
    ),
    'stablelm': (
        'StableLm',
        dict(
            num_key_value_heads=2,
            use_qkv_bias=True,
            rope_parameters={**ROPE, 'partial_rotary_factor': 0.25},
        ),
    ),
    'qwen2': ('Qwen2', dict(num_key_value_heads=2, rope_parameters=ROPE)),
    'qwen2_tied': (
        'Qwen2',
        dict(
            num_key_value_heads=2,
            rope_parameters={**ROPE, 'rope_theta': 1e6},
            tie_word_embeddings=True,
        ),
    ),
    'qwen3': (
        'Qwen3',
        dict(num_key_value_heads=2, head_dim=16, rope_parameters=ROPE),
    ),
    'mistral': (
        'Mistral',
        dict(num_key_value_heads=2, rope_parameters=ROPE, sliding_window=None),
    ),
    'llama': ('Llama', dict(rope_parameters=ROPE, attention_bias=True)),
}


def _random(model):
  """Every parameter random, biases and norms too, so that none can be lost."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      p.copy_(noise * 0.2 + ('norm' in name and name.endswith('weight')))
  return model.eval()


def _logits(llm: config.DecoderConfig, params, ids_BT):
  model = llava.Llava(
      dataclasses.replace(
          tiny.train_config().model, llm=llm, moe=None, compute_dtype='float32'
      )
  )
  tree = trees.unflatten({p: jnp.asarray(x) for p, x in params.items()})
  one_BT = jnp.ones_like(ids_BT)

  def run(module):
    hidden = module.llm(
        module.llm.embed(ids_BT, with_images=False),
        jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape),
        dot_product.causal_mask(one_BT),
        one_BT > 0,
        one_BT < 0,
        None,
        train=False,
    ).hidden_BTD
    return module.llm.logits(hidden)

  return np.asarray(nn.apply(run, model)({'params': tree}))


def _open_lm(path, described):
  return load.open_lm(str(path), described.family, described.llm)


def _ids():
  return np.random.default_rng(1).integers(0, 61, (2, 9)).astype(np.int32)


def _expected(model, ids_BT):
  with torch.no_grad():
    return model(torch.tensor(ids_BT).long()).logits.numpy()


@pytest.mark.parametrize('case', LMS)
def test_logits_equal_transformers(case, tmp_path):
  import transformers

  prefix, settings = LMS[case]
  cls = getattr(transformers, f'{prefix}ForCausalLM')
  cfg = getattr(transformers, f'{prefix}Config')(**SIZES, **settings)
  model = _random(cls(cfg))
  if case == 'phi':  # As MoE-LLaVA: it discards this bias.
    model.lm_head.bias.data.zero_()
  model.save_pretrained(tmp_path)
  described = hf.describe(str(tmp_path))
  assert described.kind == 'lm' and described.family == case.split('_')[0]
  source = _open_lm(tmp_path, described)
  ids_BT = _ids()
  np.testing.assert_allclose(
      _logits(described.llm, dict(source.read()), ids_BT),
      _expected(model, ids_BT),
      atol=2e-5,
  )


def _old_spelling(path, renamed, **changes):
  raw = json.loads((path / 'config.json').read_text())
  rope = raw.pop('rope_parameters')
  raw['rope_theta'] = rope['rope_theta']
  if 'partial_rotary_factor' in rope:
    raw['partial_rotary_factor'] = rope['partial_rotary_factor']
  for new, old in renamed.items():
    raw[old] = raw.pop(new)
  (path / 'config.json').write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize('case', ['phi', 'stablelm', 'qwen2'])
def test_configs_before_transformers_5(case, tmp_path):
  import transformers

  prefix, settings = LMS[case]
  cfg = getattr(transformers, f'{prefix}Config')(**SIZES, **settings)
  cfg.save_pretrained(tmp_path)
  new = hf.describe(str(tmp_path)).llm
  renamed, changes = {}, {}
  if case == 'stablelm':
    renamed = {
        'partial_rotary_factor': 'rope_pct',
        'layer_norm_eps': 'norm_eps',
    }
    changes = {'model_type': 'stablelm_epoch'}
  _old_spelling(tmp_path, renamed, **changes)
  assert hf.describe(str(tmp_path)).llm == new


def test_qwen_1_is_qwen_2_with_fused_projections(tmp_path):
  """transformers has no Qwen 1; its mathematics is that of Qwen 2."""
  import transformers

  cfg = transformers.Qwen2Config(
      **SIZES, num_key_value_heads=4, rope_parameters=ROPE
  )
  model = _random(transformers.Qwen2ForCausalLM(cfg))
  state = {k: v.clone() for k, v in model.state_dict().items()}
  theirs = {
      'transformer.wte.weight': state['model.embed_tokens.weight'],
      'transformer.ln_f.weight': state['model.norm.weight'],
      'lm_head.weight': state['lm_head.weight'],
  }
  for n in range(2):
    old, new = f'model.layers.{n}', f'transformer.h.{n}'
    for kind in ('weight', 'bias'):
      theirs[f'{new}.attn.c_attn.{kind}'] = torch.cat(
          [state[f'{old}.self_attn.{x}_proj.{kind}'] for x in 'qkv']
      )
    for a, b in (
        ('attn.c_proj', 'self_attn.o_proj'),
        ('ln_1', 'input_layernorm'),
        ('ln_2', 'post_attention_layernorm'),
        ('mlp.w2', 'mlp.gate_proj'),
        ('mlp.w1', 'mlp.up_proj'),
        ('mlp.c_proj', 'mlp.down_proj'),
    ):
      theirs[f'{new}.{a}.weight'] = state[f'{old}.{b}.weight']
  torch.save(theirs, tmp_path / 'pytorch_model.bin')
  raw = dict(
      model_type='qwen',
      vocab_size=61,
      hidden_size=32,
      num_hidden_layers=2,
      num_attention_heads=4,
      kv_channels=8,
      intermediate_size=96,
      layer_norm_epsilon=1e-6,
      rotary_pct=1.0,
      rotary_emb_base=5000,
      no_bias=True,
      seq_length=64,
  )
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  described = hf.describe(str(tmp_path))
  source = _open_lm(tmp_path, described)
  ids_BT = _ids()
  np.testing.assert_allclose(
      _logits(described.llm, dict(source.read()), ids_BT),
      _expected(model, ids_BT),
      atol=2e-5,
  )


def test_minicpm_is_llama_with_three_constants(tmp_path):
  """transformers has no MiniCPM; LLaMA with scaled weights computes it."""
  import transformers

  cfg = transformers.LlamaConfig(**SIZES, rope_parameters=ROPE)
  model = _random(transformers.LlamaForCausalLM(cfg))
  with torch.no_grad():
    model.lm_head.weight.copy_(model.model.embed_tokens.weight)
  model.save_pretrained(tmp_path)
  raw = json.loads((tmp_path / 'config.json').read_text())
  raw |= dict(
      model_type='minicpm',
      tie_word_embeddings=True,
      scale_emb=12,
      scale_depth=1.4,
      dim_model_base=8,
  )
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  with torch.no_grad():
    model.model.embed_tokens.weight *= 12
    for layer in model.model.layers:
      layer.self_attn.o_proj.weight *= 1.4 / math.sqrt(2)
      layer.mlp.down_proj.weight *= 1.4 / math.sqrt(2)
    model.lm_head.weight *= 8 / 32
  described = hf.describe(str(tmp_path))
  source = _open_lm(tmp_path, described)
  dropped = {r['name'] for r in source.tensors() if r['discarded']}
  assert dropped == {'lm_head.weight'}
  ids_BT = _ids()
  np.testing.assert_allclose(
      _logits(described.llm, dict(source.read()), ids_BT),
      _expected(model, ids_BT),
      atol=2e-5,
  )


def test_a_tied_head_that_differs_is_an_error(tmp_path):
  import transformers

  cfg = transformers.LlamaConfig(**SIZES, rope_parameters=ROPE)
  _random(transformers.LlamaForCausalLM(cfg)).save_pretrained(tmp_path)
  raw = json.loads((tmp_path / 'config.json').read_text())
  raw['tie_word_embeddings'] = True
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  with pytest.raises(files.WeightsError, match='ties the head'):
    _open_lm(tmp_path, hf.describe(str(tmp_path)))


TOWER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=30,
    patch_size=14,
)


@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('layer', [-2, -1, 1])
@pytest.mark.parametrize('kind', ['CLIP', 'Siglip'])
def test_features_equal_transformers(kind, layer, whole, tmp_path):
  import transformers

  text = dict(
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=1,
      num_attention_heads=4,
      vocab_size=50,
      bos_token_id=1,
      eos_token_id=2,
      pad_token_id=1,
  )
  if whole:
    cfg = getattr(transformers, f'{kind}Config')(
        vision_config=TOWER, text_config=text
    )
    model = _random(getattr(transformers, f'{kind}Model')(cfg))
    tower = model.vision_model
  else:
    cfg = getattr(transformers, f'{kind}VisionConfig')(**TOWER)
    model = tower = _random(getattr(transformers, f'{kind}VisionModel')(cfg))
  model.save_pretrained(tmp_path)
  select = towers.Select(layer, 'cls_patch')
  ours = towers.read(str(tmp_path), select)
  params = dict(load.open_tower(str(tmp_path), ours).read())
  images_NHWC = np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3))
  pixels = (images_NHWC / 255 - ours.mean) / ours.std
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  with torch.no_grad():
    states = tower(pixels, output_hidden_states=True).hidden_states
  tree = trees.unflatten({p: jnp.asarray(x) for p, x in params.items()})
  found = vision.Vision(ours, jnp.dtype('float32')).apply(
      {'params': tree['vision']}, jnp.asarray(images_NHWC, jnp.uint8)
  )
  np.testing.assert_allclose(found, states[layer].numpy(), atol=3e-5)


@pytest.mark.parametrize('prefix, settings', LMS.values(), ids=LMS)
def test_llava_of_transformers(prefix, settings, tmp_path):
  import transformers

  text = getattr(transformers, f'{prefix}Config')(**SIZES, **settings)
  cfg = transformers.LlavaConfig(
      vision_config=transformers.CLIPVisionConfig(**TOWER),
      text_config=text,
      image_token_index=60,
      image_seq_length=4,
      tie_word_embeddings=text.tie_word_embeddings,
  )
  model = _random(transformers.LlavaForConditionalGeneration(cfg))
  model.save_pretrained(tmp_path)
  described = hf.describe(str(tmp_path))
  ours = load.model_of(described, None, tiny.train_config().model)
  ours = dataclasses.replace(ours, compute_dtype='float32')
  source = load.open_llava(described, ours, None)
  params = {p: jnp.asarray(x) for p, x in source.read()}
  ids_BT = np.full((2, 10), 3, np.int32)
  ids_BT[:, 6:] = np.arange(8).reshape(2, 4)
  ids_BT[:, 1:5] = 60
  images_NHWC = np.random.default_rng(0).integers(0, 256, (2, 30, 30, 3))
  pixels = (images_NHWC / 255 - ours.vision.mean) / ours.vision.std
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  with torch.no_grad():
    expected = model(
        input_ids=torch.tensor(ids_BT).long(), pixel_values=pixels
    ).logits.numpy()
  found = llava.forward(
      llava.Llava(ours),
      trees.unflatten(params),
      jnp.where(ids_BT == 60, config.IMAGE_TOKEN, ids_BT),
      jnp.ones_like(ids_BT),
      jnp.broadcast_to(jnp.arange(10), (2, 10)),
      jnp.asarray(images_NHWC[:, None], jnp.uint8),
      train=False,
  ).logits_BTV
  np.testing.assert_allclose(found, expected, atol=5e-5)
