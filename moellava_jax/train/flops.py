# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, by arithmetic.

A product of [m, k] and [k, n] is 2 m k n operations; what is not a product is
not counted. A trained weight costs as much again backward, and so does the
gradient of an input that depends on something trained. Attention is counted
over all pairs of positions, as it is computed, and padding counts as tokens.
Letters as in `model.layers`.
"""

import math
import re
from typing import Any, NamedTuple

from moellava_jax import config, trees
from moellava_jax.data import shapes
from moellava_jax.model import moe as moe_lib
from moellava_jax.model import projector
from moellava_jax.train import stages


class Part(NamedTuple):
  """Operations of a part of the model in a whole step, on all devices."""

  forward: float
  backward: float


class StepFlops(NamedTuple):
  """Operations of an optimizer step on all devices.

  Attributes:
    parts: what the model needs, k experts a token: the numerator of an MFU.
    capacity: slots of experts beyond k a token (negative if there are fewer).
    dispatch: the products that carry tokens to slots and back.
    recompute: what rematerialisation computes again.
  """

  parts: dict[str, Part]
  capacity: float
  dispatch: float
  recompute: float

  @property
  def model(self) -> float:
    return sum(part.forward + part.backward for part in self.parts.values())

  @property
  def total(self) -> float:
    """All products that the devices run."""
    return self.model + self.capacity + self.dispatch + self.recompute


def of_step(cfg: config.TrainConfig, stage: str, params: Any) -> StepFlops:
  """Operations of one optimizer step of a stage.

  Args:
    cfg: with `row_length` set for the stage.
    stage: its name.
    params: any tree with the paths of all parameters.
  """
  trained = trees.flatten(stages.mask(params, stage))

  def trains(pattern: str) -> bool:
    return any(on and re.match(pattern, p) for p, on in trained.items())

  section, model = cfg.stage(stage), cfg.stage_model(stage)
  assert section.row_length is not None
  images = section.batch_size * section.max_images
  tokens = section.batch_size * section.row_length
  parts = {'tower': _tower(model.vision, images, trains('vision/'))}
  if stage == 'warmup':  # Rows of text; the images go to the probe alone.
    classes = sum(size for _, size in shapes.ATTRIBUTES)
    positions = images * model.vision.num_tokens
    parts['probe'] = _product(
        2.0 * positions * model.vision.width * classes, True, True
    )
  else:
    parts['projector'] = _projector(model, images, trains('projector/'))
  llm = model.llm
  sparse = () if model.moe is None else model.moe.layer_ids(llm.depth)
  dense = llm.depth - len(sparse)
  heads = llm.num_heads * llm.head_dim
  linear = 2.0 * llm.width * (2 * heads + 2 * llm.num_kv_heads * llm.head_dim)
  scores = 4.0 * tokens * section.row_length * heads
  # In every stage something trained precedes the first layer.
  parts['attention'] = _product(
      llm.depth * tokens * linear, trains('llm/.*/attn/'), True
  )
  parts['attention scores'] = _product(llm.depth * scores, True, True)
  ffn = 2.0 * (3 if llm.mlp == 'swiglu' else 2) * llm.width * llm.mlp_width
  trains_ffn = trains('llm/.*/(mlp|moe)/')
  parts['dense FFNs'] = _product(dense * tokens * ffn, trains_ffn, True)
  parts['head'] = _product(
      2.0 * tokens * llm.width * llm.vocab_size,
      trains('llm/embedding' if llm.tied_head else 'llm/head'),
      True,
  )
  capacity = dispatch = 0.0
  again = parts['attention'].forward + parts['attention scores'].forward
  again += parts['dense FFNs'].forward
  if model.moe is not None:
    moe, count = model.moe, len(sparse)
    wanted = float(tokens * moe.top_k)
    if moe.use_residual:
      wanted += tokens
    parts['experts'] = _product(count * wanted * ffn, trains_ffn, True)
    gate = moe.num_experts + (2 if moe.use_residual else 0)
    parts['routers'] = _product(
        count * 2.0 * tokens * llm.width * gate, trains_ffn, True
    )
    slots, carried = _slots(moe, section)
    extra = count * (slots - tokens * moe.top_k) * ffn
    capacity = extra * (3 if trains_ffn else 2)
    # Forward into slots and back; backward their inputs and the weights.
    carried *= 2.0 * llm.width * count
    dispatch = 5 * carried
    again += parts['experts'].forward + parts['routers'].forward
    again += extra + 2 * carried
  return StepFlops(
      parts, capacity, dispatch, again if model.remat == 'full' else 0.0
  )


def _product(forward: float, weight: bool, inputs: bool) -> Part:
  return Part(forward, forward * (weight + inputs))


def _tower(cfg: config.VisionConfig, images: int, trained: bool) -> Part:
  positions = cfg.num_patches + cfg.class_token
  patches = 2.0 * cfg.num_patches * cfg.patch_size**2 * 3 * cfg.width
  layer = positions * (
      8.0 * cfg.width**2
      + 4.0 * positions * cfg.width
      + 4.0 * cfg.width * cfg.mlp_width
  )
  inside = _product(images * cfg.num_layers * layer, trained, trained)
  first = _product(images * patches, trained, False)
  return Part(inside.forward + first.forward, inside.backward + first.backward)


def _projector(model: config.ModelConfig, images: int, trained: bool) -> Part:
  positions = images * model.vision.num_tokens
  first = 2.0 * positions * model.vision.width * model.llm.width
  rest = 2.0 * positions * model.llm.width**2
  rest *= projector.depth(model.projector) - 1
  begin, end = _product(first, trained, False), _product(rest, trained, trained)
  return Part(begin.forward + end.forward, begin.backward + end.backward)


def _slots(
    moe: config.MoeConfig, section: config.StageConfig
) -> tuple[float, float]:
  """(slots of a sparse layer in a step, sum over groups of S E C)."""
  assert section.row_length is not None
  rows = section.batch_size // section.accumulate
  plan = moe_lib.grouping(moe, rows, section.row_length)
  slots = moe_lib.capacity(
      plan.size,
      moe.num_experts,
      moe.top_k,
      moe.capacity_factor,
      moe.min_capacity,
  )
  slots = moe.num_experts * min(slots, plan.size)
  groups = float(plan.groups * section.accumulate)
  return groups * slots, groups * slots * plan.size


def seconds(flops: StepFlops, devices: int, peak: float, mfu: float) -> float:
  """Seconds of a step: `mfu` is the share of the peak that the model uses."""
  if not 0 < mfu <= 1 or not math.isfinite(mfu):
    raise config.UserError(f'--mfu={mfu}; expected more than 0, at most 1.')
  return flops.model / (devices * peak * mfu)
