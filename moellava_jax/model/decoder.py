# SPDX-License-Identifier: Apache-2.0
"""One decoder LM for all backbones: Phi-2, LLaMA, Mistral, Qwen, StableLM.

The families differ in a row of switches (`config.DecoderConfig`), not in
code; which layers are sparse is a property of the MoE config.

Parameters of layers that repeat may come stacked (`trees.Segment`): then one
loop runs them, with the same results and the same random numbers. Only
training does so; with a cache, and for diagnostics, layers come one by one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from flax.linen import spmd
import jax
import jax.numpy as jnp
import optax

from moellava_jax import config, trees
from moellava_jax.model import (
    attention,
    cross_entropy,
    dispatch,
    dot_product,
    layers,
)
from moellava_jax.model import moe as moe_lib


def _policy(name: str) -> Callable[..., Any] | None:
  """What `config.ModelConfig.remat` keeps; None: nothing."""
  policies = jax.checkpoint_policies
  return {
      'full': None,
      'dots': policies.dots_saveable,
      'dots_no_batch': policies.dots_with_no_batch_dims_saveable,
      'expert_io': policies.save_only_these_names(dispatch.EXPERT_IO),
      'offload_dots': policies.offload_dot_with_no_batch_dims(
          'device', 'pinned_host'
      ),
  }[name]


class LayerKeys(NamedTuple):
  """What a layer's random numbers are made from; None where it has none."""

  attn_dropout: jax.Array | None
  ffn_dropout: jax.Array | None
  router: jax.Array | None


class DecoderOutput(NamedTuple):
  hidden_BTD: jax.Array  # After the final norm.
  moe: tuple[moe_lib.MoeAux, ...]  # One per sparse layer, in order of depth.
  cache: tuple[attention.KVCache, ...] | None  # One per layer.


class Block(nn.Module):
  """A decoder layer: sequential (pre-norm) or parallel (Phi-2)."""

  cfg: config.DecoderConfig
  moe: config.MoeConfig | None  # None: dense.
  dtype: jnp.dtype
  train: bool

  @nn.compact
  def __call__(
      self,
      x_BTD,
      positions_BT,
      rotation,
      seen,
      is_token_BT,
      is_image_BT,
      cache,
      keys=None,
  ):
    """`keys` (`LayerKeys`) are used instead of the module's own streams."""
    cfg = self.cfg
    if keys is None:
      keys = LayerKeys(None, None, None)

    def norm(name):
      return layers.norm(cfg.norm, cfg.norm_eps, self.dtype, name)

    def residual(y_BTD, key):
      drop = nn.Dropout(cfg.residual_dropout, deterministic=not self.train)
      if cfg.residual_scale != 1:
        y_BTD *= cfg.residual_scale
      return spmd.with_logical_constraint(
          drop(y_BTD, rng=key), ('batch', 'length', 'features')
      )

    def feed_forward(h_BTD):
      mlp = (cfg.mlp, cfg.mlp_width, cfg.mlp_bias, self.dtype)
      if self.moe is None:
        return layers.Mlp(*mlp, name='mlp')(h_BTD), None
      return moe_lib.Moe(self.moe, *mlp, name='moe')(
          h_BTD, is_token_BT, is_image_BT, train=self.train, key=keys.router
      )

    h_BTD = norm('norm1')(x_BTD)
    attended_BTD, cache = attention.Attention(
        cfg.num_heads,
        cfg.num_kv_heads,
        cfg.head_dim,
        cfg.qkv_bias,
        cfg.out_bias,
        cfg.norm_eps if cfg.qk_norm else None,
        self.dtype,
        name='attn',
    )(h_BTD, positions_BT, rotation, seen, cache)
    x_BTD += residual(attended_BTD, keys.attn_dropout)
    if not cfg.parallel_block:
      h_BTD = norm('norm2')(x_BTD)
    y_BTD, aux = feed_forward(h_BTD)
    return x_BTD + residual(y_BTD, keys.ffn_dropout), aux, cache


class _Draw(nn.Module):
  """Has the random number that a module of the same path begins with."""

  stream: str

  @nn.compact
  def __call__(self) -> jax.Array | None:
    return self.make_rng(self.stream) if self.has_rng(self.stream) else None


class _LayerDraw(nn.Module):
  """The keys that a `Block` of this name would draw."""

  @nn.compact
  def __call__(self) -> LayerKeys:
    return LayerKeys(
        _Draw('dropout', name='Dropout_0')(),
        _Draw('dropout', name='Dropout_1')(),
        _Draw('router', name='moe')(),
    )


class Decoder(nn.Module):
  """Embedding, blocks, final norm and head."""

  cfg: config.DecoderConfig
  moe: config.MoeConfig | None
  dtype: jnp.dtype
  remat: str

  def setup(self):
    cfg = self.cfg
    self.embedding_VD = self.param(
        'embedding',
        layers.partitioned(nn.initializers.normal(0.02), ('vocab', 'embed')),
        (cfg.vocab_size, cfg.width),
    )
    if not cfg.tied_head:
      self.head = layers.Dense(
          cfg.vocab_size, ('embed', 'vocab'), cfg.head_bias, self.dtype
      )

  def embed(self, tokens_BT: jax.Array, *, with_images: bool) -> jax.Array:
    """Token embeddings, fp32 `[B, T, D]`; ids outside [0, V) are clipped."""
    # Features that are split like the table's would have to be exchanged for
    # rows, which the partitioner does by copying everything everywhere.
    table_VD = spmd.with_logical_constraint(
        self.embedding_VD, ('vocab', 'features')
    )
    x_BTD = jnp.take(table_VD, tokens_BT, axis=0, mode='clip')
    x_BTD = x_BTD.astype(jnp.float32)
    if self.cfg.embed_scale_at == 'always' or not with_images:
      x_BTD *= self.cfg.embed_scale
    return spmd.with_logical_constraint(x_BTD, ('batch', 'length', 'features'))

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """fp32 next-token logits, `[B, T, V]`."""
    if self.cfg.head_scale != 1:
      hidden_BTD *= self.cfg.head_scale
    if self.cfg.tied_head:
      return layers.product(
          'BTD,VD->BTV', hidden_BTD, self.embedding_VD, self.dtype
      )
    return self.head(hidden_BTD)

  def losses(
      self, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int
  ) -> jax.Array:
    """-log p of the targets, fp32 `[B, T]`.

    Args:
      hidden_BTD: after the final norm.
      targets_BT: int32, in `[0, V)`.
      chunk: columns of the logits that exist at once, at most.
    """
    if self.cfg.vocab_size <= chunk:
      return optax.softmax_cross_entropy_with_integer_labels(
          self.logits(hidden_BTD), targets_BT
      )
    if self.cfg.tied_head:
      kernel_DV, bias_V = self.embedding_VD.T, None
    else:
      head = self.head.variables['params']
      kernel_DV, bias_V = head['kernel'], head.get('bias')
    return cross_entropy.token_losses(
        hidden_BTD * self.cfg.head_scale,
        kernel_DV,
        bias_V,
        targets_BT,
        chunk=chunk,
        dtype=self.dtype,
    )

  @nn.compact
  def __call__(
      self,
      x_BTD: jax.Array,
      positions_BT: jax.Array,
      seen: dot_product.Causal | jax.Array,
      is_token_BT: jax.Array,
      is_image_BT: jax.Array,
      cache: tuple[attention.KVCache, ...] | None,
      *,
      train: bool,
  ) -> DecoderOutput:
    cfg = self.cfg
    sparse = () if self.moe is None else self.moe.layer_ids(cfg.depth)
    rotation = layers.rotation(
        positions_BT, cfg.head_dim, cfg.rotary_fraction, cfg.rotary_base
    )
    context = (positions_BT, rotation, seen, is_token_BT, is_image_BT)
    block = Block
    if self.remat != 'none' and train:
      block = nn.remat(Block, policy=_policy(self.remat))
    auxes, caches = [], []
    for segment in trees.segments([n in sparse for n in range(cfg.depth)]):
      if self.has_variable('params', segment.names[0]):
        if cache is not None:
          raise ValueError('A cache needs layers that are not stacked.')
        x_BTD, more = self._loop(segment, x_BTD, context, train)
        auxes += more
        continue
      for n in segment.span:
        x_BTD, aux, layer_cache = block(
            cfg,
            self.moe if n in sparse else None,
            self.dtype,
            train,
            name=f'layers_{n}',
        )(x_BTD, *context, None if cache is None else cache[n])
        caches.append(layer_cache)
        if aux is not None:
          auxes.append(aux)
    x_BTD = layers.norm(cfg.norm, cfg.norm_eps, self.dtype, 'norm')(x_BTD)
    return DecoderOutput(
        x_BTD, tuple(auxes), None if cache is None else tuple(caches)
    )

  def _loop(self, segment: trees.Segment, x_BTD, context, train: bool):
    """Runs the stacked layers of a segment: (x_BTD, their MoeAux by depth)."""
    sparse = () if self.moe is None else self.moe.layer_ids(self.cfg.depth)

    def block(position):
      module = Block(
          self.cfg,
          self.moe if segment.start + position in sparse else None,
          self.dtype,
          train,
          parent=None,
      )

      def run(params, x_BTD, keys):
        out: Any = module.apply({'params': params}, x_BTD, *context, None, keys)
        return out[:2]

      if self.remat == 'none' or not train:
        return run
      # A loop forward and one backward: there is nothing to be merged.
      return jax.checkpoint(run, policy=_policy(self.remat), prevent_cse=False)

    def inputs(position):
      drawn = [
          _LayerDraw(name=f'layers_{n}')() for n in segment.layers(position)
      ]
      keys = jax.tree.map(lambda *key: jnp.stack(key), *drawn)
      return self.get_variable('params', segment.names[position]), keys

    positions = range(segment.period)
    blocks = [block(position) for position in positions]

    def period(x_BTD, inputs):
      auxes = []
      for run, (params, keys) in zip(blocks, inputs, strict=True):
        x_BTD, aux = run(params, x_BTD, keys)
        auxes.append(aux)
      return x_BTD, [aux for aux in auxes if aux is not None]

    x_BTD, stacked = jax.lax.scan(
        period, x_BTD, [inputs(position) for position in positions]
    )
    auxes = [
        jax.tree.map(lambda x, n=n: x[n], aux)
        for n in range(segment.repeats)
        for aux in stacked
    ]
    return x_BTD, auxes
