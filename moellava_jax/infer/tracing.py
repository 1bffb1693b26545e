# SPDX-License-Identifier: Apache-2.0
"""Which experts the tokens of a conversation go to."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config, sharding
from moellava_jax.infer import decode, generate
from moellava_jax.model import llava


class Routing(NamedTuple):
  """The tokens of a prompt and its answer, in order. M counts sparse layers."""

  layers: tuple[int, ...]  # Which of the decoder's layers are sparse.
  tokens_T: np.ndarray  # int32, `config.IMAGE_TOKEN` for a patch.
  is_answer_T: np.ndarray  # bool.
  choice_MTk: np.ndarray  # int32, the experts, the likeliest first.
  weight_MTk: np.ndarray  # float32, how much each of them counts.
  kept_MTk: np.ndarray  # bool, False: the expert was full.

  @property
  def is_image_T(self) -> np.ndarray:
    return self.tokens_T == config.IMAGE_TOKEN


def routing(
    cfg: config.ModelConfig,
    tokens_T: np.ndarray,
    prompt_length: int,
    routed: decode.Routed,
) -> Routing:
  """`Routing` of one conversation; `routed` has no B and the T of `tokens_T`."""
  assert cfg.moe is not None
  return Routing(
      cfg.moe.layer_ids(cfg.llm.depth),
      tokens_T,
      np.arange(len(tokens_T)) >= prompt_length,
      *map(np.asarray, routed),
  )


def require_experts(cfg: config.ModelConfig, name: str) -> None:
  """Raises UserError for a dense model."""
  if cfg.moe is None:
    raise config.UserError(
        f'{name} is a dense model: it routes nothing, so there are no expert'
        ' choices. Give a checkpoint of stage moe.'
    )


@functools.partial(jax.jit, static_argnames='model')
def _run(
    model: llava.Llava,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    images_BIHWC: jax.Array | None,
) -> decode.Routed:
  positions_BT = jnp.arange(tokens_BT.shape[1])[None]
  _, sown = model.apply(
      {'params': params},
      tokens_BT,
      (positions_BT < lengths_B[:, None]).astype(jnp.int32),
      positions_BT,
      images_BIHWC,
      train=False,
      rngs={'router': jax.random.key(0)},
      mutable=['diagnostics'],
  )
  return decode.routed_of(sown, model.cfg)


def trace(
    model: llava.Llava,
    params: Any,
    prompt: generate.Prompt,
    prompt_length: int,
    mesh: jax.sharding.Mesh,
) -> Routing:
  """Runs a whole conversation through a sparse model.

  Args:
    model: sparse.
    params: its parameters.
    prompt: the conversation with its answer.
    prompt_length: where the answer begins.
    mesh: where `params` are.
  """
  padded = jax.device_put(
      generate.pad([prompt], 1), decode.rows_sharding(mesh, 1)
  )
  with sharding.use(mesh):
    routed = jax.device_get(_run(model, params, *padded))
  length = len(prompt.tokens_L)
  row = jax.tree.map(lambda x: x[:, 0, :length], routed)
  return routing(model.cfg, prompt.tokens_L, prompt_length, row)
