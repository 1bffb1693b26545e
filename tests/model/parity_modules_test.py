# SPDX-License-Identifier: Apache-2.0
"""Attention, norms, rotary embedding, FFNs and projector against torch."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax.model import dot_product, layers, projector
from tests.model import torch_weights

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.parity

F32 = jnp.dtype('float32')


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize('heads, kv_heads', [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize('causal', [False, True])
def test_attention(heads, kv_heads, causal):
  q_BTHd = _draw(2, 7, heads, 8, seed=1)
  k_BSKd = _draw(2, 7, kv_heads, 8, seed=2)
  v_BSKd = _draw(2, 7, kv_heads, 8, seed=3)
  mask_BTS = None
  if causal:
    segments_BT = np.ones((2, 7), np.int32)
    segments_BT[1, 5:] = 0
    mask_BTS = dot_product.causal_mask(jnp.asarray(segments_BT))
  ours_BTHd = dot_product.attend(
      jnp.asarray(q_BTHd), jnp.asarray(k_BSKd), jnp.asarray(v_BSKd), mask_BTS
  )
  q, k, v = (torch.tensor(x).transpose(1, 2) for x in (q_BTHd, k_BSKd, v_BSKd))
  theirs = torch.nn.functional.scaled_dot_product_attention(
      q,
      k,
      v,
      attn_mask=None
      if mask_BTS is None
      else torch.tensor(np.asarray(mask_BTS))[:, None],
      enable_gqa=True,
  )
  _assert_close(ours_BTHd, theirs.transpose(1, 2))


# Inputs so small that the epsilon decides.
@pytest.mark.parametrize('scale', [1.0, 1e-3])
@pytest.mark.parametrize('eps', [1e-5, 1e-6])
def test_layernorm(eps, scale):
  theirs = torch.nn.LayerNorm(16, eps=eps)
  torch_weights.randomise(theirs)
  x_BTD = _draw(2, 3, 16) * scale
  params = torch_weights.norm(
      {f'n.{k}': v for k, v in torch_weights.arrays(theirs).items()}, 'n'
  )
  ours = layers.norm('layernorm', eps, F32, 'norm')
  _assert_close(
      ours.apply({'params': params}, x_BTD), theirs(torch.tensor(x_BTD))
  )


@pytest.mark.parametrize('scale', [1.0, 1e-3])
@pytest.mark.parametrize('eps', [1e-5, 1e-6])
def test_rmsnorm(eps, scale):
  from transformers.models.llama import modeling_llama

  theirs = modeling_llama.LlamaRMSNorm(16, eps=eps)
  torch_weights.randomise(theirs)
  x_BTD = _draw(2, 3, 16) * scale
  params = {'scale': torch_weights.arrays(theirs)['weight']}
  ours = layers.norm('rmsnorm', eps, F32, 'norm')
  _assert_close(
      ours.apply({'params': params}, x_BTD), theirs(torch.tensor(x_BTD))
  )


@pytest.mark.parametrize('base', [1e4, 1e6])
def test_full_rotary_embedding(base):
  from transformers.models.llama import configuration_llama, modeling_llama

  cfg = configuration_llama.LlamaConfig(
      hidden_size=32,
      num_attention_heads=2,
      rope_parameters={'rope_type': 'default', 'rope_theta': base},
  )
  q_BTHd, k_BTHd = _draw(2, 5, 2, 16, seed=1), _draw(2, 5, 1, 16, seed=2)
  positions_BT = np.array([[0, 1, 2, 3, 4], [7, 8, 900, 2047, 4000]])
  cos, sin = modeling_llama.LlamaRotaryEmbedding(cfg)(
      torch.tensor(q_BTHd), torch.tensor(positions_BT)
  )
  theirs = modeling_llama.apply_rotary_pos_emb(
      torch.tensor(q_BTHd), torch.tensor(k_BTHd), cos, sin, unsqueeze_dim=2
  )
  for x_BTHd, expected in zip((q_BTHd, k_BTHd), theirs, strict=True):
    by = layers.rotation(jnp.asarray(positions_BT), 16, 1.0, base)
    ours = layers.rotate(jnp.asarray(x_BTHd), by)
    # An angle of 4000 radians is known to 2e-4 in fp32.
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(
    'fraction, d, turned', [(0.4, 80, 32), (0.25, 64, 16), (0.5, 12, 6)]
)
def test_partial_rotary_embedding(fraction, d, turned):
  from transformers.models.llama import modeling_llama

  x_BTHd = _draw(1, 6, 2, d)
  positions_BT = jnp.arange(6)[None]
  by = layers.rotation(positions_BT, d, fraction, 1e4)
  ours = layers.rotate(jnp.asarray(x_BTHd), by)
  angle_Td = torch.arange(6.0)[:, None] * 1e4 ** (
      -torch.arange(0, turned, 2) / turned
  )
  angle_1Td = torch.cat([angle_Td, angle_Td], dim=-1)[None]
  x = torch.tensor(x_BTHd[..., :turned])
  theirs, _ = modeling_llama.apply_rotary_pos_emb(
      x, x, angle_1Td.cos(), angle_1Td.sin(), unsqueeze_dim=2
  )
  _assert_close(ours[..., :turned], theirs)
  np.testing.assert_array_equal(ours[..., turned:], x_BTHd[..., turned:])


def _mlp(kind, bias):
  """`transformers`' FFN of a family, and our names of its parts."""
  sizes = dict(hidden_size=16, intermediate_size=40)
  if kind == 'swiglu':
    from transformers.models.llama import modeling_llama

    cfg = types.SimpleNamespace(**sizes, mlp_bias=bias, hidden_act='silu')
    names = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
    return modeling_llama.LlamaMLP(cfg), names
  from transformers.models.clip import modeling_clip

  acts = {
      'gelu_tanh': 'gelu_new',  # The name of Phi-2; SigLIP's is another.
      'gelu': 'gelu',
      'quick_gelu': 'quick_gelu',
  }
  cfg = types.SimpleNamespace(**sizes, hidden_act=acts[kind])
  return modeling_clip.CLIPMLP(cfg), {'fc1': 'fc1', 'fc2': 'fc2'}


@pytest.mark.parametrize(
    'kind, bias',
    [
        ('swiglu', False),
        ('swiglu', True),
        ('gelu_tanh', True),
        ('gelu', True),
        ('quick_gelu', True),
    ],
)
def test_feed_forward(kind, bias):
  theirs, names = _mlp(kind, bias)
  torch_weights.randomise(theirs)
  w = torch_weights.arrays(theirs)
  params = {k: torch_weights.linear(w, v) for k, v in names.items()}
  x_BTD = 2 * _draw(2, 3, 16)
  ours = layers.Mlp(kind, 40, bias, F32).apply({'params': params}, x_BTD)
  _assert_close(ours, theirs(torch.tensor(x_BTD)))


def test_tanh_gelu_is_also_that_of_siglip():
  x = np.linspace(-6, 6, 101, dtype=np.float32)
  theirs = torch.nn.functional.gelu(torch.tensor(x), approximate='tanh')
  _assert_close(layers.ACTIVATIONS['gelu_tanh'](x), theirs)


@pytest.mark.parametrize('kind', ['linear', 'mlp2x_gelu', 'mlp3x_gelu'])
def test_projector(kind):
  depth = projector.depth(kind)
  modules = [torch.nn.Linear(12, 20)]
  for _ in range(depth - 1):
    modules += [torch.nn.GELU(), torch.nn.Linear(20, 20)]
  theirs = torch.nn.Sequential(*modules)
  torch_weights.randomise(theirs)
  w = torch_weights.arrays(theirs)
  params = {
      f'linear_{n}': torch_weights.linear(w, str(2 * n)) for n in range(depth)
  }
  x_NPD = _draw(2, 3, 12)
  ours = projector.Projector(kind, 20, F32).apply({'params': params}, x_NPD)
  _assert_close(ours, theirs(torch.tensor(x_NPD)))
