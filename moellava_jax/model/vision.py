# SPDX-License-Identifier: Apache-2.0
"""The ViT tower (CLIP, SigLIP, Shapes) and the probe that warms it up."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax import config, trees
from moellava_jax.model import attention, layers


class VisionBlock(nn.Module):
  """A pre-norm encoder layer with biases everywhere."""

  cfg: config.VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTD):
    cfg = self.cfg

    def norm(name):
      return layers.norm('layernorm', cfg.norm_eps, self.dtype, name)

    positions_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    attended_BTD, _ = attention.Attention(
        cfg.num_heads,
        cfg.num_heads,
        cfg.width // cfg.num_heads,
        qkv_bias=True,
        out_bias=True,
        qk_norm_eps=None,
        dtype=self.dtype,
        name='attn',
    )(norm('norm1')(x_BTD), positions_BT, None, None)
    x_BTD += attended_BTD
    mlp = layers.Mlp(
        cfg.activation, cfg.mlp_width, True, self.dtype, name='mlp'
    )
    return x_BTD + mlp(norm('norm2')(x_BTD))


class Vision(nn.Module):
  """Images `[N, H, W, 3]` -> features of `select_layer`, `[N, P, D]`.

  uint8 pixels are normalised here, on the device, so that images travel as
  bytes; floating-point ones are taken as normalised.
  Only the layers up to `select_layer` exist; no norm follows them. They may
  come stacked, as the decoder's.
  """

  cfg: config.VisionConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images_NHWC: jax.Array) -> jax.Array:
    cfg = self.cfg
    n, p = images_NHWC.shape[0], cfg.patch_size
    grid = cfg.image_size // p
    x_NHWC = images_NHWC.astype(jnp.float32)
    if jnp.issubdtype(images_NHWC.dtype, jnp.integer):
      x_NHWC = (x_NHWC / 255.0 - jnp.array(cfg.mean)) / jnp.array(cfg.std)
    # A SigLIP image has a margin at the right and bottom that fills no patch.
    x_NHWC = x_NHWC[:, : grid * p, : grid * p]
    x_NTD = (
        x_NHWC.reshape(n, grid, p, grid, p, 3)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(n, grid * grid, p * p * 3)
    )
    x_NTD = layers.Dense(
        cfg.width,
        ('patch', 'embed'),
        cfg.patch_bias,
        self.dtype,
        name='patch_embed',
    )(x_NTD)
    embed_init = nn.initializers.normal(0.02)
    if cfg.class_token:
      token_D = self.param(
          'class_embed',
          layers.partitioned(embed_init, ('norm',)),
          (cfg.width,),
      )
      token_N1D = jnp.broadcast_to(token_D, (n, 1, cfg.width))
      x_NTD = jnp.concatenate([token_N1D.astype(jnp.float32), x_NTD], axis=1)
    x_NTD += self.param(
        'position_embed',
        layers.partitioned(embed_init, ('position', 'embed')),
        (x_NTD.shape[1], cfg.width),
    ).astype(jnp.float32)
    if cfg.pre_norm:
      x_NTD = layers.norm('layernorm', cfg.norm_eps, jnp.float32, 'pre_norm')(
          x_NTD
      )
    for segment in trees.segments((False,) * cfg.num_layers):
      (name,) = segment.names
      if self.has_variable('params', name):
        x_NTD = self._loop(self.get_variable('params', name), x_NTD)
        continue
      for layer in segment.span:
        x_NTD = VisionBlock(cfg, self.dtype, name=f'layers_{layer}')(x_NTD)
    return x_NTD[:, 1:] if cfg.select_feature == 'patch' else x_NTD

  def _loop(self, params: Any, x_NTD: jax.Array) -> jax.Array:
    """Runs stacked layers."""
    block = VisionBlock(self.cfg, self.dtype, parent=None)

    def layer(x_NTD, params) -> Any:
      return block.apply({'params': params}, x_NTD), None

    x_NTD, _ = jax.lax.scan(layer, x_NTD, params)
    return x_NTD


class AttributeProbe(nn.Module):
  """Linear classifiers on every patch feature: `[N, P, D] -> [N, P, sum]`.

  The warm-up of the embedded task trains the tower through it; afterwards it
  is thrown away. `sizes` are the numbers of classes of the attributes.
  """

  sizes: tuple[int, ...]

  @nn.compact
  def __call__(self, features_NPD: jax.Array) -> list[jax.Array]:
    logits = layers.Dense(
        sum(self.sizes), ('embed', 'norm'), True, jnp.float32, name='linear'
    )(features_NPD)
    ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
    return jnp.split(logits, ends, axis=-1)
