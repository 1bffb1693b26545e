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

from moellava_jax import sharding, trees
from moellava_jax.data import batch as batch_lib
from moellava_jax.data import pipeline, sources, templates
from moellava_jax.evals import base
from moellava_jax.infer import chat as chat_lib


class DenseModelError(ValueError):
  """The model has no experts."""


class Measured(NamedTuple):
  """Sums over conversations."""

  loss: jax.Array  # Of the answers' tokens.
  targets: jax.Array
  layers: tuple[Any, ...]  # `MoeStats` of each sparse layer.


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
    chat: chat_lib.Chat,
    rows: list[sources.Row],
    images_root: str,
    batch_size: int,
) -> Iterator[batch_lib.Batch]:
  """Static batches of all rows, in order."""
  stage = chat.config.stage(chat.stage)
  fmt = pipeline.Format(
      stage.template,
      stage.row_length,
      stage.max_images,
      chat.model.cfg.vision,
      dataclasses.replace(
          chat.config.data, arrangement='shuffled', decode='exact'
      ),
  )
  examples = pipeline.Examples(rows, images_root, fmt, chat.tokenizer)
  yield from pipeline.eval_batches(
      examples, batch_size, len(rows), share=np.arange(batch_size)
  )


def measure(
    chat: chat_lib.Chat, params: Any, data: Sequence[batch_lib.Batch], program
) -> Measured:
  """Runs `program` on all batches and adds up loss and routing."""
  with sharding.use(chat.mesh):
    parts = [
        jax.device_get(program(params, sharding.put_batch(batch, chat.mesh)))
        for batch in data
    ]
  return jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *parts)


def make_program(chat: chat_lib.Chat):
  """Jitted (params, batch) -> `Measured`."""

  def one(params, batch):
    out: Any = chat.model.apply(
        {'params': params},
        batch.tokens_BT,
        batch.segment_ids_BT,
        batch.positions_BT,
        batch.images_BIHWC,
        train=False,
        rngs={'router': jax.random.key(0)},
    )
    log_BTV = jax.nn.log_softmax(out.logits_BTV)
    chosen_BT1 = jnp.take_along_axis(
        log_BTV, batch.targets_BT[..., None], axis=-1
    )
    return Measured(
        -jnp.sum(chosen_BT1[..., 0] * batch.loss_weight_BT),
        jnp.sum(batch.loss_weight_BT),
        tuple(aux.stats for aux in out.moe),
    )

  return jax.jit(one)


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


def summarise(
    chat: chat_lib.Chat, rows: list[sources.Row], images_root: str
) -> dict[str, Any]:
  """The content of `routing.json`.

  Loads are shares of all k assignments of a layer; entropy is in nats; losses
  are means over the tokens of the answers.

  Raises:
    DenseModelError: the model has no experts.
  """
  moe = chat.model.cfg.moe
  if moe is None:
    raise DenseModelError(
        f'{chat.name} is the dense model of stage {chat.stage!r}: it routes'
        ' nothing. Give a checkpoint of stage moe.'
    )
  data = list(batches(chat, rows, images_root, batch_size=64))
  program = make_program(chat)
  found = measure(chat, chat.params, data, program)
  shuffled = measure(chat, shuffle_experts(chat.params), data, program)

  def load(modality):
    counts = [np.sum(s.assigned_ME[modality], axis=0) for s in found.layers]
    return [(c / max(np.sum(c), 1.0)).tolist() for c in counts]

  def per_layer(fn):
    return [float(fn(stats)) for stats in found.layers]

  return {
      'stage': chat.stage,
      'digest': chat.digest,
      'layers': list(moe.layer_ids(chat.model.cfg.llm.depth)),
      'num_experts': moe.num_experts,
      'top_k': moe.top_k,
      'conversations': len(rows),
      'expert_load': load(slice(None)),
      'expert_load_text': load(slice(0, 1)),
      'expert_load_image': load(slice(1, 2)),
      'drop_rate': per_layer(
          lambda s: 1 - np.sum(s.kept_ME) / max(np.sum(s.assigned_ME), 1.0)
      ),
      'entropy': per_layer(
          lambda s: np.sum(s.entropy_M) / max(np.sum(s.tokens_M), 1.0)
      ),
      'expert_distance': list(expert_distance(chat.params).values()),
      'loss': float(found.loss / max(found.targets, 1.0)),
      'loss_shuffled_experts': float(
          shuffled.loss / max(shuffled.targets, 1.0)
      ),
  }
