# SPDX-License-Identifier: Apache-2.0
"""The vision-language model: tower -> projector -> decoder.

Images were expanded to placeholder ids on the host (`config.IMAGE_TOKEN`), so
every shape is static and the model only gathers patch features.
"""

from typing import Any, cast, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax import config, trees
from moellava_jax.model import (
    attention,
    decoder,
    dot_product,
    flash,
    layers,
    projector,
    vision,
)
from moellava_jax.model import moe as moe_lib


class LlavaOutput(NamedTuple):
  logits_BTV: Any  # fp32; None where there are losses instead.
  moe: tuple[moe_lib.MoeAux, ...]  # One per sparse layer.
  cache: tuple[attention.KVCache, ...] | None
  losses_BT: Any = None  # fp32, -log p of targets, where these were given.


class Features(NamedTuple):
  """What the tower says about images, in the place of the images."""

  features_BIPD: Any  # Of jax or numpy, `[B, I, P, D_vision]`.


def compute_dtype(name: str) -> jnp.dtype:
  """'auto' is bfloat16 where the device multiplies it natively."""
  if name != 'auto':
    return jnp.dtype(name)
  return jnp.dtype(jnp.float32 if layers.platform() == 'cpu' else jnp.bfloat16)


def stored_dtype(
    path: str, cfg: config.ModelConfig, given: Any = jnp.float32
) -> jnp.dtype:
  """In which a parameter of dtype `given` may lie where it is not trained.

  Kernels are rounded by the product that they enter (`layers.product`), so
  that they may as well lie rounded: half the bytes to hold and to read, the
  same products. The router's are multiplied in fp32; embeddings, norms and
  biases are read in fp32, and a tied head is rounded only there.
  """
  given = jnp.dtype(given)
  if not path.endswith('kernel') or '/router/' in path:
    return given
  rounded = compute_dtype(cfg.compute_dtype)
  return rounded if rounded.itemsize < given.itemsize else given


def rounded(params: Any, cfg: config.ModelConfig) -> Any:
  """Parameters as `stored_dtype` has them."""
  return trees.map_paths(
      lambda path, x: x.astype(stored_dtype(path, cfg, x.dtype)), params
  )


def place_images(
    text_BTD: jax.Array, patches_BND: jax.Array, is_image_BT: jax.Array
) -> jax.Array:
  """Puts the n-th patch of a row at the n-th image position of that row."""
  index_BT = jnp.cumsum(is_image_BT.astype(jnp.int32), axis=1) - 1
  index_BT = jnp.clip(index_BT, 0, patches_BND.shape[1] - 1)
  gathered_BTD = jnp.take_along_axis(patches_BND, index_BT[:, :, None], axis=1)
  return jnp.where(is_image_BT[:, :, None], gathered_BTD, text_BTD)


class Llava(nn.Module):
  """Parameters live under `vision`, `projector` and `llm`."""

  cfg: config.ModelConfig

  def setup(self):
    cfg, dtype = self.cfg, compute_dtype(self.cfg.compute_dtype)
    self.vision = vision.Vision(cfg.vision, dtype)
    self.projector = projector.Projector(cfg.projector, cfg.llm.width, dtype)
    self.llm = decoder.Decoder(cfg.llm, cfg.moe, dtype, cfg.remat)

  def features(self, images_BIHWC: jax.Array | Features) -> jax.Array:
    """Tower features of all images, `[B, I, P, D_vision]`."""
    if isinstance(images_BIHWC, Features):
      return images_BIHWC.features_BIPD
    b, i = images_BIHWC.shape[:2]
    images_NHWC = images_BIHWC.reshape(b * i, *images_BIHWC.shape[2:])
    features_NPD = self.vision(images_NHWC)
    return features_NPD.reshape(b, i, *features_NPD.shape[1:])

  def __call__(
      self,
      tokens_BT: jax.Array,
      segment_ids_BT: jax.Array,
      positions_BT: jax.Array,
      images_BIHWC: jax.Array | Features | None,
      *,
      train: bool,
      cache: tuple[attention.KVCache, ...] | None = None,
      cache_is_empty: bool = False,
      logits_at_B: jax.Array | None = None,
      targets_BT: jax.Array | None = None,
  ) -> LlavaOutput:
    """Next-token logits for every position, or the losses of `targets_BT`.

    Args:
      tokens_BT: int32, `IMAGE_TOKEN` where a patch of an image belongs.
      segment_ids_BT: int32, 0 for padding.
      positions_BT: int32, position within the segment.
      images_BIHWC: uint8, or normalised floats, or their features; None where
        no row has an image (decoding).
      train: dropout, sampled routing and training capacity.
      cache: written at `positions_BT`; attention then sees the cache only, up
        to the position of a query, whatever the segments are.
      cache_is_empty: these rows are all that it will hold, from position 0 on:
        never rows that go on from others. Attention then sees them as it does
        without a cache, segments included, and padding gets other values.
      logits_at_B: int32, the only column of each row that needs logits, which
        are then `[B, 1, V]`. Those of a long prompt are larger than the model.
      targets_BT: int32, the next tokens: what comes out are their losses, and
        at most `loss_chunk` columns of logits exist at once.
    """
    is_token_BT = segment_ids_BT > 0
    is_image_BT = (tokens_BT == config.IMAGE_TOKEN) & is_token_BT
    x_BTD = self.llm.embed(
        jnp.maximum(tokens_BT, 0),
        with_images=images_BIHWC is not None,
    )
    if images_BIHWC is not None:
      patches_BIPD = self.projector(self.features(images_BIHWC))
      b, _, _, d = patches_BIPD.shape
      x_BTD = place_images(x_BTD, patches_BIPD.reshape(b, -1, d), is_image_BT)
    # The original pads with zero vectors after splicing.
    x_BTD = jnp.where(is_token_BT[:, :, None], x_BTD, 0)
    if cache is None or cache_is_empty:
      seen = self._seen(segment_ids_BT)
    else:
      slots = cache[0].k_BKSd.shape[-2]
      seen = dot_product.cache_mask(positions_BT, slots)
    out = self.llm(
        x_BTD,
        positions_BT,
        seen,
        is_token_BT,
        is_image_BT,
        cache,
        train=train,
    )
    hidden_BTD = out.hidden_BTD
    if targets_BT is not None:
      losses_BT = self.llm.losses(hidden_BTD, targets_BT, self.cfg.loss_chunk)
      return LlavaOutput(None, out.moe, out.cache, losses_BT)
    if logits_at_B is not None:
      hidden_BTD = jnp.take_along_axis(
          hidden_BTD, logits_at_B[:, None, None], axis=1
      )
    return LlavaOutput(self.llm.logits(hidden_BTD), out.moe, out.cache)

  def _seen(self, segment_ids_BT: jax.Array) -> dot_product.Causal:
    """What `attention.Attention` takes for rows that see themselves only."""
    cfg = self.cfg
    how = 'einsum'  # Kernels give padding other results, which would be routed.
    if cfg.moe is None or not cfg.moe.route_padding:
      how = flash.choose(
          cfg.attention,
          layers.platform(),
          compute_dtype(cfg.compute_dtype),
          cfg.llm.head_dim,
          segment_ids_BT.shape[1],
      )
    return dot_product.Causal(segment_ids_BT, how)


def forward(
    model: Llava,
    params: Any,
    tokens_BT: Any,
    segment_ids_BT: Any,
    positions_BT: Any,
    images_BIHWC: Any,
    *,
    train: bool,
    cache: tuple[attention.KVCache, ...] | None = None,
    targets_BT: Any = None,
    rngs: dict[str, jax.Array] | None = None,
) -> LlavaOutput:
  """`model` with plain parameters; see `Llava.__call__`.

  `rngs` are 'router' (sampled second choices, random token selection) and
  'dropout'. To repeat the routing of another run, apply the model with the
  collection `{'routing': {'llm': {'layers_0': {'moe': {...}}}}}`, which gives a
  layer its `noise`, float32 `[B, T, E]`, or its `choice`, int32 `[B, T, k]`.
  """
  out = model.apply(
      {'params': params},
      tokens_BT,
      segment_ids_BT,
      positions_BT,
      images_BIHWC,
      train=train,
      cache=cache,
      targets_BT=targets_BT,
      rngs=rngs,
  )
  return cast(LlavaOutput, out)


def init_cache(
    cfg: config.DecoderConfig, batch: int, slots: int, dtype
) -> tuple[attention.KVCache, ...]:
  """An empty cache of `slots` positions for each layer."""
  shape = (batch, cfg.num_kv_heads, slots, cfg.head_dim)
  return tuple(
      attention.KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
      for _ in range(cfg.depth)
  )


def dummy_inputs(cfg: config.ModelConfig) -> dict[str, Any]:
  """The smallest inputs that touch every parameter, for `Llava.init`."""
  length = cfg.vision.num_tokens + 1
  size = cfg.vision.image_size
  tokens_BT = jnp.full((1, length), config.IMAGE_TOKEN, jnp.int32)
  return dict(
      tokens_BT=tokens_BT,
      segment_ids_BT=jnp.ones_like(tokens_BT),
      positions_BT=jnp.arange(length)[None],
      images_BIHWC=jnp.zeros((1, 1, size, size, 3), jnp.uint8),
  )
