# SPDX-License-Identifier: Apache-2.0
"""Published model sizes as data, each with its source.

A config copies a literal from here into its `model` section, where every
field can be overridden from the command line.
"""

import dataclasses
from typing import NamedTuple

from moellava_jax import config

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


def _clip_l14(name: str, image_size: int) -> config.VisionConfig:
  return config.VisionConfig(
      name=name,
      image_size=image_size,
      patch_size=14,
      width=1024,
      depth=24,
      num_heads=16,
      mlp_width=4096,
      activation='quick_gelu',
      norm_eps=1e-5,
      class_token=True,
      patch_bias=False,
      pre_norm=True,
      select_layer=-2,
      select_feature='patch',
      resize='short_edge',
      mean=_CLIP_MEAN,
      std=_CLIP_STD,
  )


def _siglip(
    name: str,
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    num_heads: int,
    mlp_width: int,
) -> config.VisionConfig:
  """A SigLIP tower has no class token, so that `patch` drops a real patch.

  The original does that, and its weights are trained so; `cls_patch` keeps all.
  """
  return config.VisionConfig(
      name=name,
      image_size=image_size,
      patch_size=patch_size,
      width=width,
      depth=depth,
      num_heads=num_heads,
      mlp_width=mlp_width,
      activation='gelu_tanh',
      norm_eps=1e-6,
      class_token=False,
      patch_bias=True,
      pre_norm=False,
      select_layer=-2,
      select_feature='patch',
      resize='exact',
      mean=_HALF,
      std=_HALF,
  )


_TOWERS = (
    # The embedded task: 42 px, one patch per cell of the 3 x 3 grid.
    config.VisionConfig(
        name='shapes',
        image_size=42,
        patch_size=14,
        width=64,
        depth=3,
        num_heads=2,
        mlp_width=128,
        activation='gelu_tanh',
        norm_eps=1e-5,
        class_token=True,
        patch_bias=True,
        pre_norm=False,
        select_layer=-2,
        select_feature='patch',
        resize='short_edge',
        mean=_HALF,
        std=_HALF,
    ),
    # https://huggingface.co/openai/clip-vit-large-patch14
    _clip_l14('clip_l14', 224),
    # https://huggingface.co/openai/clip-vit-large-patch14-336
    _clip_l14('clip_l14_336', 336),
    # https://huggingface.co/google/siglip-base-patch16-224
    _siglip('siglip_base_224', 224, 16, 768, 12, 12, 3072),
    # https://huggingface.co/google/siglip-base-patch16-384
    _siglip('siglip_base_384', 384, 16, 768, 12, 12, 3072),
    # https://huggingface.co/google/siglip-so400m-patch14-384
    _siglip('siglip_so400m_384', 384, 14, 1152, 27, 16, 4304),
)


class _Sizes(NamedTuple):
  """The numbers of a published decoder, in the order of `DecoderConfig`."""

  vocab_size: int
  width: int
  depth: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int


def _llama_like(
    name: str,
    sizes: _Sizes,
    *,
    norm_eps: float,
    rotary_base: float,
    qkv_bias: bool,
    qk_norm: bool,
    tied_head: bool,
) -> config.DecoderConfig:
  """Sequential blocks, RMSNorm, SwiGLU, full rotary embedding.

  The rotary layout is half-split in every family here (in the files of Hugging
  Face, that is, to which the conversion of LLaMA permuted Meta's pairs), so
  that it needs no switch.
  """
  return config.DecoderConfig(
      name=name,
      **sizes._asdict(),
      mlp='swiglu',
      norm='rmsnorm',
      norm_eps=norm_eps,
      parallel_block=False,
      rotary_fraction=1.0,
      rotary_base=rotary_base,
      qk_norm=qk_norm,
      qkv_bias=qkv_bias,
      out_bias=False,
      mlp_bias=False,
      head_bias=False,
      tied_head=tied_head,
      residual_dropout=0.0,
      embed_scale=1.0,
      embed_scale_at='always',
      residual_scale=1.0,
      head_scale=1.0,
  )


def _llama(name: str, sizes: _Sizes) -> config.DecoderConfig:
  """LLaMA 2, Vicuna 1.5, Mistral 7B v0.1 and its children.

  Mistral's window of 4096 positions is not modelled: rows are shorter.
  """
  return _llama_like(
      name,
      sizes,
      norm_eps=1e-5,
      rotary_base=1e4,
      qkv_bias=False,
      qk_norm=False,
      tied_head=False,
  )


def _qwen2(name: str, sizes: _Sizes, tied_head: bool) -> config.DecoderConfig:
  """Qwen 1.5, 2 and 2.5."""
  return _llama_like(
      name,
      sizes,
      norm_eps=1e-6,
      rotary_base=1e6,
      qkv_bias=True,
      qk_norm=False,
      tied_head=tied_head,
  )


def _qwen3(name: str, sizes: _Sizes, tied_head: bool) -> config.DecoderConfig:
  return _llama_like(
      name,
      sizes,
      norm_eps=1e-6,
      rotary_base=1e6,
      qkv_bias=False,
      qk_norm=True,
      tied_head=tied_head,
  )


_LLAMA_7B = _Sizes(32000, 4096, 32, 32, 32, 128, 11008)
_LLAMA_13B = _Sizes(32000, 5120, 40, 40, 40, 128, 13824)
_MISTRAL_7B = _Sizes(32000, 4096, 32, 32, 8, 128, 14336)
_QWEN2_0_5B = _Sizes(151936, 896, 24, 14, 2, 64, 4864)
_QWEN2_1_5B = _Sizes(151936, 1536, 28, 12, 2, 128, 8960)
_QWEN2_7B = _Sizes(152064, 3584, 28, 28, 4, 128, 18944)

_LMS = (
    # The embedded task; a LLaMA-like block small enough for two CPU cores.
    config.DecoderConfig(
        name='shapes',
        vocab_size=512,
        width=64,
        depth=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_width=128,
        mlp='gelu_tanh',
        norm='rmsnorm',
        norm_eps=1e-5,
        parallel_block=False,
        rotary_fraction=1.0,
        rotary_base=10000.0,
        qk_norm=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        head_bias=False,
        tied_head=False,
        residual_dropout=0.0,
        embed_scale=1.0,
        embed_scale_at='always',
        residual_scale=1.0,
        head_scale=1.0,
    ),
    # https://huggingface.co/microsoft/phi-2; its head bias is dropped, as in
    # the original.
    config.DecoderConfig(
        name='phi2',
        vocab_size=51200,
        width=2560,
        depth=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=80,
        mlp_width=10240,
        mlp='gelu_tanh',
        norm='layernorm',
        norm_eps=1e-5,
        parallel_block=True,
        rotary_fraction=0.4,
        rotary_base=10000.0,
        qk_norm=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=False,
        tied_head=False,
        residual_dropout=0.1,
        embed_scale=1.0,
        embed_scale_at='always',
        residual_scale=1.0,
        head_scale=1.0,
    ),
    # https://huggingface.co/stabilityai/stablelm-2-1_6b
    dataclasses.replace(
        _qwen2(
            'stablelm_1_6b',
            _Sizes(100352, 2048, 24, 32, 32, 64, 5632),
            tied_head=False,
        ),
        norm='layernorm',
        norm_eps=1e-5,
        rotary_fraction=0.25,
        rotary_base=1e4,
    ),
    # https://huggingface.co/Qwen/Qwen-1_8B (its own code, not Qwen 1.5's). The
    # file says intermediate_size 11008, of which w1 and w2 have half each; w2
    # is the gate. Its NTK and logn scalings begin beyond 8192 positions.
    dataclasses.replace(
        _qwen2(
            'qwen_1_8b',
            _Sizes(151936, 2048, 24, 16, 16, 128, 5504),
            tied_head=False,
        ),
        rotary_base=1e4,
    ),
    # https://huggingface.co/openchat/openchat-3.5-1210: Mistral 7B with two
    # more tokens.
    _llama('openchat_7b', _MISTRAL_7B._replace(vocab_size=32002)),
    # https://huggingface.co/mistralai/Mistral-7B-v0.1
    _llama('mistral_7b', _MISTRAL_7B),
    # https://huggingface.co/meta-llama/Llama-2-7b-hf
    _llama('llama2_7b', _LLAMA_7B),
    # https://huggingface.co/meta-llama/Llama-2-13b-hf
    _llama('llama2_13b', _LLAMA_13B),
    # https://huggingface.co/lmsys/vicuna-7b-v1.5
    _llama('vicuna_7b', _LLAMA_7B),
    # https://huggingface.co/lmsys/vicuna-13b-v1.5
    _llama('vicuna_13b', _LLAMA_13B),
    # https://huggingface.co/Qwen/Qwen1.5-1.8B
    _qwen2(
        'qwen1_5_1_8b',
        _Sizes(151936, 2048, 24, 16, 16, 128, 5504),
        tied_head=False,
    ),
    # https://huggingface.co/Qwen/Qwen2-0.5B, -1.5B and -7B
    _qwen2('qwen2_0_5b', _QWEN2_0_5B, tied_head=True),
    _qwen2('qwen2_1_5b', _QWEN2_1_5B, tied_head=True),
    _qwen2('qwen2_7b', _QWEN2_7B, tied_head=False),
    # https://huggingface.co/Qwen/Qwen2.5-0.5B, -1.5B, -3B and -7B
    _qwen2('qwen2_5_0_5b', _QWEN2_0_5B, tied_head=True),
    _qwen2('qwen2_5_1_5b', _QWEN2_1_5B, tied_head=True),
    _qwen2(
        'qwen2_5_3b',
        _Sizes(151936, 2048, 36, 16, 2, 128, 11008),
        tied_head=True,
    ),
    _qwen2('qwen2_5_7b', _QWEN2_7B, tied_head=False),
    # https://huggingface.co/Qwen/Qwen3-0.6B, -1.7B, -4B and -8B
    _qwen3(
        'qwen3_0_6b',
        _Sizes(151936, 1024, 28, 16, 8, 128, 3072),
        tied_head=True,
    ),
    _qwen3(
        'qwen3_1_7b',
        _Sizes(151936, 2048, 28, 16, 8, 128, 6144),
        tied_head=True,
    ),
    _qwen3(
        'qwen3_4b',
        _Sizes(151936, 2560, 36, 32, 8, 128, 9728),
        tied_head=True,
    ),
    _qwen3(
        'qwen3_8b',
        _Sizes(151936, 4096, 36, 32, 8, 128, 12288),
        tied_head=False,
    ),
    # https://huggingface.co/openbmb/MiniCPM-2B-sft-bf16: scale_emb 12,
    # scale_depth 1.4 over the root of the depth, dim_model_base 256 over the
    # width. MoE-LLaVA forgets the first where images come along
    # (`embed_scale_at`), and has published no weights that learned so.
    dataclasses.replace(
        _llama('minicpm_2b', _Sizes(122753, 2304, 40, 36, 36, 64, 5760)),
        tied_head=True,
        embed_scale=12.0,
        residual_scale=1.4 / 40**0.5,
        head_scale=256 / 2304,
    ),
)

# By name. Sources: the `config.json` beside the published weights.
TOWERS = {tower.name: tower for tower in _TOWERS}
LMS = {lm.name: lm for lm in _LMS}

# Positions that decoders were made for, by name: `max_position_embeddings` of
# the same files (`seq_length` of Qwen 1). Names that are missing know no limit.
POSITIONS = {
    'phi2': 2048,
    'stablelm_1_6b': 4096,
    'qwen_1_8b': 8192,
    'openchat_7b': 8192,
    # Its window, which is not modelled.
    'mistral_7b': 4096,
    'llama2_7b': 4096,
    'llama2_13b': 4096,
    'vicuna_7b': 4096,
    'vicuna_13b': 4096,
    'qwen1_5_1_8b': 32768,
    'qwen2_0_5b': 131072,
    'qwen2_1_5b': 131072,
    'qwen2_7b': 131072,
    'qwen2_5_0_5b': 32768,
    'qwen2_5_1_5b': 131072,
    'qwen2_5_3b': 32768,
    'qwen2_5_7b': 131072,
    'qwen3_0_6b': 40960,
    'qwen3_1_7b': 40960,
    'qwen3_4b': 40960,
    'qwen3_8b': 40960,
    'minicpm_2b': 4096,
}
