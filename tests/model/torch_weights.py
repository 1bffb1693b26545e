# SPDX-License-Identifier: Apache-2.0
"""torch weights as our parameters, written out by hand, and how to run them.

Gradients pass through the same functions: every one of them is linear.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config, trees
from moellava_jax.model import decoder, dot_product, llava, vision

Arrays = dict[str, np.ndarray]


class Names(NamedTuple):
  """Where a family keeps the parts of its decoder."""

  embedding: str
  layer: str  # With `{}` for the number.
  norm1: str
  norm2: str
  o: str
  mlp: dict[str, str]  # Ours -> theirs.
  norm: str


_GATED = {'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj'}
LLAMA = Names(
    'model.embed_tokens',
    'model.layers.{}.',
    'input_layernorm',
    'post_attention_layernorm',
    'self_attn.o_proj',
    _GATED,
    'model.norm',
)
PHI = LLAMA._replace(
    o='self_attn.dense',
    mlp={'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'},
    norm='model.final_layernorm',
)


def arrays(module, *, gradients: bool = False) -> Arrays:
  """Parameters of a torch module, or their gradients, by name."""
  return {
      name: (p.grad if gradients else p).detach().numpy().copy()
      for name, p in module.named_parameters()
  }


def randomise(module, seed: int = 0) -> None:
  """Weights of a size that lets every part of a tiny model count."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  for name, p in module.named_parameters():
    noise = torch.randn(p.shape, generator=generator)
    if p.ndim > 1:
      noise *= 2 * p.shape[-1] ** -0.5
    else:
      noise = 0.2 * noise + (name.endswith('weight') and 'embed' not in name)
    p.data.copy_(noise)


def norm(w: Arrays, name: str) -> dict[str, Any]:
  out = {'scale': w[f'{name}.weight']}
  if f'{name}.bias' in w:
    out['bias'] = w[f'{name}.bias']
  return out


def linear(w: Arrays, name: str) -> dict[str, Any]:
  out = {'kernel': w[f'{name}.weight'].T}
  if f'{name}.bias' in w:
    out['bias'] = w[f'{name}.bias']
  return out


def attention_of(w: Arrays, layer: str, o: str, d: int) -> dict[str, Any]:
  """`d` is the head size."""
  out: dict[str, Any] = {}
  for letter in 'qkv':
    name = f'{layer}self_attn.{letter}_proj'
    weight_OI = w[f'{name}.weight']
    out[f'{letter}_kernel'] = weight_OI.T.reshape(weight_OI.shape[1], -1, d)
    if f'{name}.bias' in w:
      out[f'{letter}_bias'] = w[f'{name}.bias'].reshape(-1, d)
    if f'{layer}self_attn.{letter}_norm.weight' in w:
      out[f'{letter}_norm'] = norm(w, f'{layer}self_attn.{letter}_norm')
  weight_OI = w[f'{layer}{o}.weight']
  out['o_kernel'] = weight_OI.T.reshape(-1, d, weight_OI.shape[0])
  if f'{layer}{o}.bias' in w:
    out['o_bias'] = w[f'{layer}{o}.bias']
  return out


def decoder_of(w: Arrays, names: Names, cfg: config.DecoderConfig) -> Any:
  """Parameters of `decoder.Decoder`."""
  out: dict[str, Any] = {
      'embedding': w[f'{names.embedding}.weight'],
      'norm': norm(w, names.norm),
  }
  if not cfg.tied_head:
    out['head'] = linear(w, 'lm_head')
    if not cfg.head_bias:
      out['head'].pop('bias', None)
  for n in range(cfg.depth):
    layer = names.layer.format(n)
    block = {
        'norm1': norm(w, layer + names.norm1),
        'attn': attention_of(w, layer, names.o, cfg.head_dim),
        'mlp': {k: linear(w, layer + v) for k, v in names.mlp.items()},
    }
    if not cfg.parallel_block:
      block['norm2'] = norm(w, layer + names.norm2)
    out[f'layers_{n}'] = block
  return jax.tree.map(jnp.asarray, out)


def vision_of(w: Arrays, cfg: config.VisionConfig) -> Any:
  """Parameters of `vision.Vision`: the layers up to `select_layer`."""
  prefix = 'embeddings.patch_embedding'
  kernel_OIhw = w[f'{prefix}.weight']
  patch = {'kernel': kernel_OIhw.transpose(2, 3, 1, 0).reshape(-1, cfg.width)}
  if cfg.patch_bias:
    patch['bias'] = w[f'{prefix}.bias']
  out: dict[str, Any] = {
      'patch_embed': patch,
      'position_embed': w['embeddings.position_embedding.weight'],
  }
  if cfg.class_token:
    out['class_embed'] = w['embeddings.class_embedding']
  if cfg.pre_norm:
    out['pre_norm'] = norm(w, 'pre_layrnorm')
  for n in range(cfg.num_layers):
    layer = f'encoder.layers.{n}.'
    d = cfg.width // cfg.num_heads
    out[f'layers_{n}'] = {
        'norm1': norm(w, f'{layer}layer_norm1'),
        'norm2': norm(w, f'{layer}layer_norm2'),
        'attn': attention_of(w, layer, 'self_attn.out_proj', d),
        'mlp': {k: linear(w, f'{layer}mlp.{k}') for k in ('fc1', 'fc2')},
    }
  return jax.tree.map(jnp.asarray, out)


@functools.partial(jax.jit, static_argnames='cfg')
def run_vision(cfg: config.VisionConfig, params, images_NHWC):
  tower = vision.Vision(cfg, jnp.dtype('float32'))
  return tower.apply({'params': params}, images_NHWC)


def _module(cfg: config.DecoderConfig) -> decoder.Decoder:
  return decoder.Decoder(cfg, None, jnp.dtype('float32'), 'none')


@functools.partial(jax.jit, static_argnames='cfg')
def run_decoder(cfg: config.DecoderConfig, params, tokens_BT, segments_BT):
  """Returns (logits, [output of each layer], gradients of the mean loss).

  The loss is that of the next token, over the tokens of segment 1.
  """

  def loss(params):
    def run(m):
      x_BTD = m.embed(tokens_BT, with_images=False)
      positions_BT = jnp.broadcast_to(
          jnp.arange(tokens_BT.shape[1]), tokens_BT.shape
      )
      real_BT = segments_BT > 0
      out = m(
          x_BTD,
          positions_BT,
          dot_product.causal_mask(segments_BT),
          real_BT,
          ~real_BT,
          None,
          train=False,
      )
      return m.logits(out.hidden_BTD)

    logits_BTV, state = _module(cfg).apply(
        {'params': params},
        method=run,
        capture_intermediates=lambda m, _: isinstance(m, decoder.Block),
        mutable=['intermediates'],
    )
    log_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    chosen_BT = jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], axis=-1)[
        ..., 0
    ]
    weight_BT = segments_BT[:, 1:] > 0
    layers = [
        state['intermediates'][f'layers_{n}']['__call__'][0][0]
        for n in range(cfg.depth)
    ]
    mean = -jnp.sum(chosen_BT * weight_BT) / jnp.sum(weight_BT)
    return mean, (logits_BTV, layers)

  grads, (logits_BTV, layers) = jax.grad(loss, has_aux=True)(params)
  return logits_BTV, layers, grads


@functools.partial(jax.jit, static_argnames='cfg')
def _step(cfg, params, tokens_BT, position, cache):
  def run(m):
    positions_BT = jnp.full(tokens_BT.shape, position)
    real_BT = jnp.ones_like(tokens_BT, bool)
    out = m(
        m.embed(tokens_BT, with_images=False),
        positions_BT,
        dot_product.cache_mask(positions_BT, cache[0].k_BKSd.shape[2]),
        real_BT,
        ~real_BT,
        cache,
        train=False,
    )
    return m.logits(out.hidden_BTD), out.cache

  return _module(cfg).apply({'params': params}, method=run)


def greedy(cfg: config.DecoderConfig, params, prompt_T, count: int):
  """`count` tokens after a prompt, one position at a time through the cache.

  Returns the tokens, and the logits `[count, V]` they were chosen from.
  """
  ids, chosen_from = list(prompt_T), []
  cache = llava.init_cache(cfg, 1, len(ids) + count, jnp.float32)
  for position in range(len(ids) + count - 1):
    token_BT = jnp.array([[ids[position]]], jnp.int32)
    logits_BTV, cache = _step(cfg, params, token_BT, position, cache)
    if position + 1 == len(ids):
      chosen_from.append(logits_BTV[0, 0])
      ids.append(int(jnp.argmax(logits_BTV[0, 0])))
  return ids[-count:], np.stack(chosen_from)


def assert_gradients_equal(ours: Any, theirs: Any) -> None:
  """Every leaf within 1e-3 of its largest element."""
  flat = trees.flatten(theirs)
  for path, got in trees.flatten(ours).items():
    scale = float(np.abs(flat[path]).max())
    assert scale > 0, path
    np.testing.assert_allclose(
        got, flat[path], rtol=1e-3, atol=1e-4 * scale, err_msg=path
    )
