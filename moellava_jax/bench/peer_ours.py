# SPDX-License-Identifier: Apache-2.0
"""The training step of stages II and III, as the training loop runs it.

Random weights and rows: one image behind a first token, then text, the second
half of which is answers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moellava_jax import config, sharding
from moellava_jax.bench import sizes
from moellava_jax.data import batch as batch_lib
from moellava_jax.train import init, program

_STEPS = 1000  # Of the schedule.


def programs(
    models: Mapping[str, config.ModelConfig], rows: int, length: int, mesh
) -> dict[str, Callable[[], Any]]:
  """The step of each model; a call does one and returns its metrics.

  Args:
    models: they differ in how tokens get to experts, at most: they share one
      state, of which there may be room for no more.
    rows: of the batch.
    length: positions of a row.
    mesh: its devices share the rows.
  """
  made, stage = {}, 'finetune'
  for name, model in models.items():
    stage = 'finetune' if model.moe is None else 'moe'
    cfg = sizes.training(model, rows, length)
    made[name] = program.Program(cfg, stage, mesh, _STEPS)
  first = next(iter(made.values()))
  with sharding.use(mesh):
    params = init.fresh(first.model, 0, mesh)
    trained, frozen = first.split(params)
    trained, frozen = first.stack((trained, first.freeze(frozen)))
    held = [first.init_state(trained)]
    steps = {
        name: each.train_step(held[0], frozen) for name, each in made.items()
    }
    data = sharding.put_batch(batch(first.model.cfg, rows, length), mesh)

  def run(step):
    with sharding.use(mesh):
      held[0], metrics = step(held[0], frozen, data)
    return metrics

  return {name: lambda step=step: run(step) for name, step in steps.items()}


def mesh_of(count: int) -> jax.sharding.Mesh:
  """A mesh of the first `count` devices, which share the rows of a batch."""
  one = config.MeshConfig(-1, 1, 1, 1, count, False, 'device')
  return sharding.make_mesh(one, jax.devices()[:count])


def tokens(model: config.ModelConfig, rows: int, length: int) -> np.ndarray:
  """int32 `[B, T]`: a token, an image, and text."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(1, model.llm.vocab_size, (rows, length))
  tokens_BT[:, 1 : 1 + model.vision.num_tokens] = config.IMAGE_TOKEN
  return tokens_BT.astype(np.int32)


def images(model: config.ModelConfig, rows: int) -> np.ndarray:
  """uint8 `[B, 1, H, W, 3]`."""
  size = model.vision.image_size
  rng = np.random.default_rng(1)
  return rng.integers(0, 256, (rows, 1, size, size, 3), np.uint8)


def batch(model: config.ModelConfig, rows: int, length: int) -> batch_lib.Batch:
  tokens_BT = tokens(model, rows, length)
  weight_BT = np.zeros(tokens_BT.shape, np.float32)
  weight_BT[:, (1 + model.vision.num_tokens + length) // 2 : -1] = 1
  targets_BT = np.roll(tokens_BT, -1, axis=1) * weight_BT.astype(np.int32)
  positions_BT = np.broadcast_to(np.arange(length), tokens_BT.shape)
  return batch_lib.Batch(
      tokens_BT,
      targets_BT.astype(np.int32),
      weight_BT,
      np.ones_like(tokens_BT),
      positions_BT.astype(np.int32),
      images(model, rows),
      np.zeros((rows, 1, 0, 0), np.int32),
      np.arange(rows, dtype=np.uint32),
  )
