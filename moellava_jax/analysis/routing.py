# SPDX-License-Identifier: Apache-2.0
"""Where tokens go: experts, modalities and drops of a trained sparse model.

Questions with known answers are run through the model as whole conversations,
in evaluation mode; the counts are sums over all their tokens.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moellava_jax import config, sharding, trees
from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import tally
from moellava_jax.data import batch as batch_lib
from moellava_jax.data import pipeline, sources, templates
from moellava_jax.evals import base
from moellava_jax.infer import chat as chat_lib

# Positions of a batch: their logits over the vocabulary are held at once.
_POSITIONS, _ROWS = 16384, 64


class DenseModelError(config.UserError):
  """The model has no experts."""


class Forward(NamedTuple):
  """What a batch says. L counts sparse layers, k choices.

  The arrays are of jax, or of numpy once they are on the host.
  """

  loss: Any  # float32, sum over the answers' tokens, nats.
  targets: Any  # float32, their number.
  is_token_BT: Any  # bool, False: padding.
  is_image_BT: Any  # bool.
  choice_LBTk: Any  # int32.
  kept_LBTk: Any  # bool.
  entropy_LBT: Any  # float32, of the router, nats.


def conversations(questions: Sequence[base.Question]) -> list[sources.Row]:
  """Questions with their answers as rows; those without answers are left out.

  A yes/no label is written as the answers of training are: with a capital.
  """
  rows = []
  for question in questions:
    if question.answer is None:
      continue
    answer = question.answer
    if answer in ('yes', 'no'):
      answer = answer.capitalize()
    mark = '' if question.image is None else f'{templates.IMAGE}\n'
    rows.append(
        sources.Row(
            f'question {question.question_id}',
            str(question.question_id),
            () if question.image is None else (question.image,),
            (('human', mark + question.text), ('gpt', answer)),
            None,
        )
    )
  return rows


def batches(
    chat: chat_lib.Chat, rows: list[sources.Row], images_root: str
) -> Iterator[batch_lib.Batch]:
  """Static batches of all rows, in order."""
  stage = chat.config.stage(chat.stage)
  fmt = pipeline.Format(
      stage.template,
      stage.row_length,
      stage.max_images,
      chat.model.cfg.vision,
      dataclasses.replace(
          chat.config.data,
          arrangement='shuffled',
          decode='exact',
          image_aspect=chat.image_aspect,
      ),
  )
  examples = pipeline.Examples(rows, images_root, fmt, chat.tokenizer)
  size = min(_ROWS, max(_POSITIONS // examples.format.length, 1))
  each = sharding.batch_divisor(chat.mesh)
  size = -(-size // each) * each
  yield from pipeline.eval_batches(
      examples, size, len(rows), share=np.arange(size)
  )


def make_program(model: Any):
  """Jitted (params, batch) -> `Forward`, for a sparse `Llava`."""
  cfg = model.cfg
  assert cfg.moe is not None
  sparse = cfg.moe.layer_ids(cfg.llm.depth)

  def one(params, batch):
    applied: Any = model.apply(
        {'params': params},
        batch.tokens_BT,
        batch.segment_ids_BT,
        batch.positions_BT,
        batch.images_BIHWC,
        train=False,
        rngs={'router': jax.random.key(0)},
        mutable=['diagnostics'],
    )
    out, sown = applied
    log_BTV = jax.nn.log_softmax(out.logits_BTV)
    chosen_BT1 = jnp.take_along_axis(
        log_BTV, batch.targets_BT[..., None], axis=-1
    )
    of_layers = sown['diagnostics']['llm']
    seen = [of_layers[f'layers_{n}']['moe']['routing'][0] for n in sparse]
    log_LBTE = jax.nn.log_softmax(jnp.stack([s.logits_BTE for s in seen]))
    return Forward(
        -jnp.sum(chosen_BT1[..., 0] * batch.loss_weight_BT),
        jnp.sum(batch.loss_weight_BT),
        batch.segment_ids_BT > 0,
        batch.tokens_BT == config.IMAGE_TOKEN,
        jnp.stack([s.choice_BTk for s in seen]),
        jnp.stack([s.kept_BTk for s in seen]),
        -jnp.sum(jnp.exp(log_LBTE) * log_LBTE, axis=-1),
    )

  return jax.jit(one)


def tokens(forward: Forward) -> tally.Tokens:
  """The real tokens of a batch that is on the host."""
  real_BT = forward.is_token_BT
  return tally.Tokens(
      int(real_BT.any(1).sum()),
      forward.is_image_BT[real_BT],
      forward.choice_LBTk[:, real_BT],
      forward.kept_LBTk[:, real_BT],
      forward.entropy_LBT[:, real_BT],
  )


def shuffle_experts(params: Any) -> Any:
  """Gives every expert's place to its neighbour; the routers stay."""

  def move(path, leaf):
    return jnp.roll(leaf, 1, axis=0) if '/moe/experts/' in path else leaf

  return trees.map_paths(move, params)


def expert_distance(params: Any) -> dict[int, float]:
  """Per sparse layer: mean |W_e - W_f| over pairs, over the mean |W_e|.

  0 right after upcycling, when experts are copies.
  """
  vectors: dict[int, list[np.ndarray]] = {}
  for path, leaf in trees.flatten(params).items():
    if '/moe/experts/' in path:
      layer = int(path.split('/')[1].removeprefix('layers_'))
      flat_EN = np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1)
      vectors.setdefault(layer, []).append(flat_EN)
  distances = {}
  for layer, parts in sorted(vectors.items()):
    weights_EN = np.concatenate(parts, axis=1)
    pairs = itertools.combinations(weights_EN, 2)
    apart = [float(np.linalg.norm(a - b)) for a, b in pairs]
    size = float(np.mean(np.linalg.norm(weights_EN, axis=1)))
    distances[layer] = float(np.mean(apart)) / size if apart else 0.0
  return distances


def require_experts(cfg: config.ModelConfig, name: str, stage: str) -> None:
  """Raises DenseModelError for a model that routes nothing."""
  if cfg.moe is None:
    raise DenseModelError(
        f'{name} is the dense model of stage {stage!r}: it routes nothing, so'
        ' there is nothing to show. Give a checkpoint of stage moe.'
    )


def measure(
    chat: chat_lib.Chat, rows: list[sources.Row], images_root: str
) -> tuple[counts_lib.Counts, dict[str, Any]]:
  """Runs the conversations: their counts, and what else `routing.json` says.

  Losses are means over the tokens of the answers, in nats.

  Raises:
    DenseModelError: the model has no experts.
  """
  require_experts(chat.model.cfg, chat.name, chat.stage)
  moe = chat.model.cfg.moe
  assert moe is not None
  program = make_program(chat.model)
  shuffled = shuffle_experts(chat.params)
  sums = np.zeros(3)  # Loss, loss with shuffled experts, targets.

  def parts():
    with sharding.use(chat.mesh):
      for batch in batches(chat, rows, images_root):
        placed = sharding.put_batch(batch, chat.mesh)
        found = jax.device_get(program(chat.params, placed))
        wrong = program(shuffled, placed).loss
        sums[:] += (found.loss, float(wrong), found.targets)
        yield tokens(found)

  layers = moe.layer_ids(chat.model.cfg.llm.depth)
  counts = tally.tally(layers, moe.num_experts, parts())
  targets = max(sums[2], 1.0)
  return counts, {
      'stage': chat.stage,
      'digest': chat.digest,
      'expert_distance': list(expert_distance(chat.params).values()),
      'loss': sums[0] / targets,
      'loss_shuffled_experts': sums[1] / targets,
  }


def summary(counts: counts_lib.Counts) -> dict[str, Any]:
  """The part of `routing.json` that is about counts.

  Loads are shares of all k choices of a layer; entropy is in nats.
  """
  entropy_L = counts_lib.entropy_L(counts)
  return {
      'layers': list(counts.layers),
      'num_experts': counts.num_experts,
      'top_k': counts.top_k,
      'conversations': counts.conversations,
      'expert_load': counts_lib.load_LE(counts).tolist(),
      'expert_load_text': counts_lib.load_LE(counts, 0).tolist(),
      'expert_load_image': counts_lib.load_LE(counts, 1).tolist(),
      'drop_rate': counts_lib.drop_rate_L(counts).tolist(),
      'entropy': None if entropy_L is None else entropy_L.tolist(),
      'counts': counts_lib.to_json(counts),
  }
