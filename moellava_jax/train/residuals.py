# SPDX-License-Identifier: Apache-2.0
"""What the forward pass of a stage keeps for its backward pass, as traced.

Nothing is compiled. What one more layer keeps is the difference between a model
of two layers and a model of one.
"""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config, trees
from moellava_jax.data import batch as batch_lib
from moellava_jax.model import llava
from moellava_jax.train import init, program, stages
from moellava_jax.train import step as step_lib

# As if only results of products were kept: compilers merge all else into the
# products before or after it.
PRODUCTS = 'products'


def abstract_batch(
    cfg: config.TrainConfig, stage: str, rows: int, where: Any = None
) -> batch_lib.Batch:
  """Shapes of a batch of the stage, `row_length` given; see `Batch`."""
  section, image = cfg.stage(stage), cfg.model.vision
  length, slots = section.row_length, section.max_images
  assert length is not None
  probe = program.probe_sizes(stage)

  def array(dtype, *shape) -> Any:
    return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

  attributes = (image.num_tokens, len(probe)) if probe else (0, 0)
  return batch_lib.Batch(
      array(np.int32, length),
      array(np.int32, length),
      array(np.float32, length),
      array(np.int32, length),
      array(np.int32, length),
      array(np.uint8, slots, image.image_size, image.image_size, 3),
      array(np.int32, slots, *attributes),
      array(np.uint32),
  )


class Saved(NamedTuple):
  """Arrays that a forward pass keeps: (shape, bytes) -> how many."""

  arrays: collections.Counter[tuple[tuple[int, ...], int]]

  def __sub__(self, other: 'Saved') -> 'Saved':
    return Saved(self.arrays - other.arrays)

  def bytes(self, cfg: config.DecoderConfig, tensor: int) -> int:
    split = {cfg.num_heads, cfg.num_kv_heads, cfg.mlp_width, cfg.vocab_size}
    return sum(
        count * size // (tensor if split & set(shape) else 1)
        for (shape, size), count in self.arrays.items()
    )

  def having(self, size: int) -> 'Saved':
    """The arrays with an axis of that size."""
    return Saved(
        collections.Counter(
            {key: n for key, n in self.arrays.items() if size in key[0]}
        )
    )

  def largest(self) -> int:
    return max((size for _, size in self.arrays), default=0)


def of_layer(
    cfg: config.TrainConfig, stage: str, rows: int, sparse: bool, remat: str
) -> tuple[Saved, Saved]:
  """What a model of one layer keeps, and what each further layer adds."""
  one = _traced(cfg, stage, rows, sparse, 1, remat)
  return one, _traced(cfg, stage, rows, sparse, 2, remat) - one


@functools.lru_cache(maxsize=256)
def _traced(
    cfg: config.TrainConfig,
    stage: str,
    rows: int,
    sparse: bool,
    depth: int,
    remat: Any,
) -> Saved:
  """What the forward pass of `depth` equal layers keeps.

  Weights are not counted, nor copies of them in another precision: where they
  are split, they are made again for the backward pass.
  """
  model = cfg.stage_model(stage)
  moe = model.moe if sparse else None
  if moe is not None:
    moe = dataclasses.replace(moe, layers='all')
  vision = model.vision
  if stage != 'warmup':  # The tower is not differentiated.
    vision = dataclasses.replace(vision, select_layer=0)
  model = dataclasses.replace(
      model,
      vision=vision,
      llm=dataclasses.replace(model.llm, depth=depth),
      moe=moe,
      remat='none' if remat == PRODUCTS else remat,
  )
  module = llava.Llava(model)
  probe = program.probe_sizes(stage)
  params = init.abstract(module, probe)
  trained, frozen = trees.split(
      params, stages.mask(params, stage, cfg.stage(stage).whole_lm)
  )

  def backward(trained, frozen, batch):
    def loss(trained):
      sums = step_lib.loss_sums(
          module,
          trees.merge(trained, frozen),
          batch,
          jax.random.key(0),
          train=True,
          probe_sizes=probe,
      )
      return sums.ce_loss + sums.probe_loss + sums.balance_loss

    if remat == PRODUCTS:
      policy = jax.checkpoint_policies.dots_saveable
      return jax.vjp(jax.checkpoint(loss, policy=policy), trained)[1]
    return jax.vjp(loss, trained)[1]

  batch = abstract_batch(
      dataclasses.replace(cfg, model=dataclasses.replace(model, moe=None)),
      stage,
      rows,
  )
  jaxpr = jax.make_jaxpr(backward)(trained, frozen, batch).jaxpr
  weights = {x.shape for x in jax.tree.leaves(params)}
  given = set(map(id, (*jaxpr.invars, *jaxpr.constvars)))
  kept = {
      id(v): v.aval
      for v in jaxpr.outvars
      if id(v) not in given and v.aval.shape not in weights
  }
  return Saved(
      collections.Counter(
          (aval.shape, aval.size * aval.dtype.itemsize)
          for aval in kept.values()
      )
  )
