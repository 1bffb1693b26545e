# SPDX-License-Identifier: Apache-2.0
"""A forward pass with everything that the golden arrays show of it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config
from moellava_jax.model import llava
from moellava_jax.model import routing as routing_lib


class Traced(NamedTuple):
  out: Any  # `llava.LlavaOutput`.
  seen: Any  # Outputs of all modules, by path.
  routing: tuple[Any, ...]  # `RoutingTrace` of each sparse layer.


def run(
    model_cfg: config.ModelConfig,
    params: Any,
    tokens_BT,
    segments_BT,
    positions_BT,
    images_BIHWC,
    noise: dict[str, Any],
    *,
    train: bool,
    cache: Any = None,
) -> Traced:
  out, seen = _apply(
      model_cfg,
      params,
      noise,
      jnp.asarray(tokens_BT),
      jnp.asarray(segments_BT),
      jnp.asarray(positions_BT),
      images_BIHWC,
      cache,
      train=train,
  )
  llm = seen.get('diagnostics', {}).get('llm', {})
  routing = tuple(
      llm[f'layers_{n}']['moe']['routing'][0] for n in layers_of(model_cfg)
  )
  return Traced(out, seen['intermediates'], routing)


@functools.partial(jax.jit, static_argnames=('model_cfg', 'train'))
def _apply(
    model_cfg,
    params,
    noise,
    tokens,
    segments,
    positions,
    images,
    cache,
    *,
    train,
):
  variables = {'params': params}
  if noise:
    variables['routing'] = noise
  return llava.Llava(model_cfg).apply(
      variables,
      tokens,
      segments,
      positions,
      images,
      train=train,
      cache=cache,
      capture_intermediates=True,
      mutable=['intermediates', 'diagnostics'],
      rngs={'dropout': jax.random.key(0)},
  )


def replay(model_cfg: config.ModelConfig, traced: Traced) -> dict[str, Any]:
  """The choices of a run, for another run to repeat."""
  return {
      'llm': {
          f'layers_{n}': {'moe': {'choice': trace.choice_BTk}}
          for n, trace in zip(layers_of(model_cfg), traced.routing, strict=True)
      }
  }


def layers_of(model_cfg: config.ModelConfig) -> tuple[int, ...]:
  if model_cfg.moe is None:
    return ()
  return model_cfg.moe.layer_ids(model_cfg.llm.depth)


def noise_of(
    model_cfg: config.ModelConfig, golden, prefix: str, shape, step=None
) -> dict[str, Any]:
  """The recorded noise as the collection that the model reads."""
  if model_cfg.moe is None:
    return {}
  kind = 'gumbel' if model_cfg.moe.top_k > 1 else 'uniform'
  noise = golden[f'{prefix}noise_{kind}']  # [(steps,) M, T, E].
  if step is not None:
    noise = noise[step]
  layers = layers_of(model_cfg)
  return {
      'llm': {
          f'layers_{n}': {'moe': {'noise': jnp.asarray(x.reshape(*shape, -1))}}
          for n, x in zip(layers, noise, strict=True)
      }
  }


def _routing(trace, experts: int) -> dict[str, np.ndarray]:
  """gate_logits, combine and slot, `[T, E]` with T = rows times positions."""
  logits_BTE, choice_BTk, slot_BTk, weight_BTk, kept_BTk = map(
      np.asarray, trace
  )
  k = choice_BTk.shape[-1]
  choice, slot, weight, kept = (
      x.reshape(-1, k) for x in (choice_BTk, slot_BTk, weight_BTk, kept_BTk)
  )
  combine_TE = np.zeros((len(choice), experts), np.float32)
  slot_TE = np.full((len(choice), experts), -1, np.int32)
  rows = np.arange(len(choice))
  for n in range(k):
    combine_TE[rows, choice[:, n]] += weight[:, n]
    used = kept[:, n] & (weight[:, n] != 0)
    slot_TE[rows[used], choice[used, n]] = slot[used, n]
  return {
      'gate_logits': logits_BTE.reshape(-1, experts),
      'combine': combine_TE,
      'slot': slot_TE,
      'exp_counts': np.bincount(choice[:, 0], minlength=experts),
  }


def _stacked(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {key: np.stack([part[key] for part in parts]) for key in parts[0]}


def _capacity(moe: config.MoeConfig, tokens: int, train: bool) -> int:
  factor = moe.capacity_factor if train else moe.eval_capacity_factor
  assert factor is not None
  return routing_lib.capacity(
      tokens, moe.num_experts, moe.top_k, factor, moe.min_capacity
  )


def arrays(
    model_cfg: config.ModelConfig, params, traced: Traced, inputs, train: bool
) -> dict[str, Any]:
  """All arrays of a forward pass, under the names of the golden files."""
  seen, depth = traced.seen, model_cfg.llm.depth
  place = tuple(np.array(inputs.place).T)
  projected_BIPD = np.asarray(seen['projector']['__call__'][0])
  features_NPD = np.asarray(seen['vision']['__call__'][0])
  shape = (*projected_BIPD.shape[:2], *features_NPD.shape[1:])
  layers = [
      np.asarray(seen['llm'][f'layers_{n}']['__call__'][0][0])
      for n in range(depth)
  ]
  logits = np.asarray(traced.out.logits_BTV)
  ours = {
      'logits': logits,
      'logits_sub8': logits[..., ::8],
      'hidden_states': np.stack(
          [
              _embeddings(model_cfg, params, projected_BIPD, inputs),
              *layers[:-1],
              np.asarray(seen['llm']['norm']['__call__'][0]),
          ]
      ),
      'last_layer_out_prenorm': layers[-1],
      'image_tower_features': features_NPD.reshape(shape)[place],
      'image_features_projected': projected_BIPD[place],
  }
  moe = model_cfg.moe
  if moe is None:
    return ours
  ids = layers_of(model_cfg)
  first = seen['llm'][f'layers_{ids[0]}']
  norm = 'norm1' if model_cfg.llm.parallel_block else 'norm2'
  tokens = inputs.tokens_BT.size
  return (
      ours
      | _stacked([_routing(x, moe.num_experts) for x in traced.routing])
      | {
          'moe_layers': np.array(ids),
          'l_aux': np.stack([x.balance_loss for x in traced.out.moe]),
          'capacity': np.full(len(ids), _capacity(moe, tokens, train)),
          'moe_first_in': first[norm]['__call__'][0],
          'moe_first_out': first['moe']['__call__'][0][0],
      }
  )


def _embeddings(model_cfg, params, projected_BIPD, inputs) -> np.ndarray:
  """What enters the first layer."""
  embedding_VD = params['llm']['embedding']
  text_BTD = embedding_VD[jnp.maximum(inputs.tokens_BT, 0)]
  real_BT = inputs.segments_BT > 0
  b, _, _, d = projected_BIPD.shape
  x_BTD = llava.place_images(
      text_BTD,
      jnp.asarray(projected_BIPD.reshape(b, -1, d)),
      jnp.asarray((inputs.tokens_BT == config.IMAGE_TOKEN) & real_BT),
  )
  del model_cfg
  return np.asarray(jnp.where(real_BT[..., None], x_BTD, 0))


def of_generation(
    model_cfg: config.ModelConfig, prefill: Traced, decoded: list[Traced], shape
) -> dict[str, Any]:
  moe = model_cfg.moe
  assert moe is not None
  ids = layers_of(model_cfg)
  b, t = shape
  first = _stacked([_routing(x, moe.num_experts) for x in prefill.routing])
  later = _stacked(
      [
          _stacked([_routing(x, moe.num_experts) for x in traced.routing])
          for traced in decoded
      ]
  )
  sizes = [b * t] + [b] * len(decoded)
  return {
      'moe_layers': np.array(ids),
      'capacity': np.array(
          [[_capacity(moe, size, False)] * len(ids) for size in sizes]
      ),
      **{f'prefill_{key}': value for key, value in first.items()},
      **{f'decode_{key}': value for key, value in later.items()},
  }
