# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, by arithmetic.

A product of [m, k] and [k, n] is 2 m k n operations; what is not a product is
not counted. A trained weight costs as much again backward, and so does the
gradient of an input that depends on something trained. Attention is counted
over all pairs of positions, as is usual for an MFU; what runs is 5/8 of them
(`dot_product.attend_causal`) or half (a kernel), and computes them again in the
backward pass. Padding counts as tokens.
Letters as in `model.layers`.
"""

import math
import re
from typing import Any, NamedTuple

from moellava_jax import config, trees
from moellava_jax.data import shapes
from moellava_jax.model import dispatch, flash, layers, projector, routing
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
    recompute: what rematerialisation and the loss compute again.
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
    """All products that run, with attention over all pairs."""
    return self.model + self.capacity + self.dispatch + self.recompute


def of_step(cfg: config.TrainConfig, stage: str, params: Any) -> StepFlops:
  """Operations of one optimizer step of a stage.

  Args:
    cfg: with `row_length` set for the stage.
    stage: its name.
    params: any tree with the paths of all parameters.
  """
  trained = trees.flatten(stages.mask(params, stage, cfg.stage(stage).whole_lm))

  def trains(pattern: str) -> bool:
    return any(on and re.match(pattern, p) for p, on in trained.items())

  section, model = cfg.stage(stage), cfg.stage_model(stage)
  images = section.batch_size * section.max_images
  parts = {'tower': _tower(model.vision, images, trains('vision/'))}
  if stage == 'warmup':  # Rows of text; the images go to the probe alone.
    classes = sum(size for _, size in shapes.ATTRIBUTES)
    positions = images * model.vision.num_tokens
    parts['probe'] = _product(
        2.0 * positions * model.vision.width * classes, True, True
    )
  else:
    parts['projector'] = _projector(model, images, trains('projector/'))
  trains_attention = trains('llm/.*/attn/')
  trains_ffn = trains('llm/.*/(mlp|moe)/')
  trains_head = trains('llm/embedding' if model.llm.tied_head else 'llm/head')
  llm = _Decoder(model, section)
  # In every stage something trained precedes the first layer.
  for name, forward, weight in (
      ('attention', llm.projections, trains_attention),
      ('attention scores', llm.scores, True),
      ('dense FFNs', llm.dense, trains_ffn),
      ('head', llm.head, trains_head),
      ('experts', llm.experts, trains_ffn),
      ('routers', llm.routers, trains_ffn),
  ):
    if forward:
      parts[name] = _product(forward, weight, True)
  recompute = llm.again()
  if model.llm.vocab_size > model.loss_chunk:
    recompute += llm.head  # See `model.cross_entropy`.
  return StepFlops(
      parts,
      capacity=llm.empty * (3 if trains_ffn else 2),
      # Into slots and back; backward their inputs and the weights.
      dispatch=5 * llm.carried,
      recompute=recompute,
  )


class _Decoder:
  """Forward operations of the decoder, of all tokens of a step.

  Attributes:
    projections: of queries, keys, values and outputs.
    scores: of all pairs of positions, and the sums of values.
    dense, routers: of the FFNs and routers.
    experts: of k slots a token, and of the dense FFN beside them if there is.
    empty: of slots beyond k a token.
    carried: of one of the two products of dispatch.
  """

  def __init__(self, model: config.ModelConfig, section: config.StageConfig):
    llm, moe, length = model.llm, model.moe, section.row_length
    assert length is not None
    tokens = section.batch_size * length
    heads = llm.num_heads * llm.head_dim
    self._model = model
    self._output = llm.depth * 2.0 * tokens * llm.width * heads
    keys = 2.0 * tokens * llm.width * llm.num_kv_heads * llm.head_dim
    self.projections = 2 * self._output + 2 * llm.depth * keys
    self.scores = llm.depth * 4.0 * tokens * length * heads
    self.head = 2.0 * tokens * llm.width * llm.vocab_size
    self._products = 3 if llm.mlp == 'swiglu' else 2
    ffn = 2.0 * self._products * llm.width * llm.mlp_width
    sparse = 0 if moe is None else len(moe.layer_ids(llm.depth))
    self.dense = (llm.depth - sparse) * tokens * ffn
    self.experts = self.routers = self.empty = self.carried = 0.0
    self._residual = 0.0
    self._ragged = False
    # Its kernels work on tiles: there are no scores that could be kept.
    self._kernel = (
        model.attention != 'einsum'
        and length >= flash.SHORTEST
        and layers.platform() != 'cpu'
    )
    if moe is not None:
      self._residual = sparse * tokens * moe.use_residual * ffn
      self.experts = sparse * tokens * moe.top_k * ffn + self._residual
      gate = moe.num_experts + 2 * moe.use_residual
      self.routers = sparse * 2.0 * tokens * llm.width * gate
      slots, pairs = _slots(moe, section)
      how = dispatch.resolve(moe.dispatch, layers.platform())
      self._ragged = how == 'ragged'
      if not self._ragged:  # Which leaves no slot empty.
        self.empty = sparse * (slots - tokens * moe.top_k) * ffn
      if how == 'einsum':
        self.carried = sparse * pairs * 2.0 * llm.width

  def again(self) -> float:
    """What rematerialisation computes a second time.

    Not the last product of a layer: no gradient needs its result. In a parallel
    block that is true of attention as well. Experts' results count, as the
    weights of slots have a gradient.
    """
    remat = self._model.remat
    if remat == 'none':
      return 0.0
    again = 0.0
    if remat != 'dots' or self._kernel:
      again += self.scores
    inner = (self._products - 1) / self._products
    if remat in ('full', 'expert_io'):  # All else keeps these.
      again += self.projections + self.routers + self.dense * inner
      if self._model.llm.parallel_block:
        again -= self._output
      again += self._residual
    slots = self.experts - self._residual + self.empty
    if self._ragged:  # It has no names, and products that policies do not know.
      again += slots
    elif remat == 'expert_io':
      again += slots * inner
    elif remat != 'dots':
      again += slots + self.carried
    if self._residual and remat != 'dots':  # What is mixed with it as well.
      again += self.carried
    return again


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
  plan = routing.grouping(moe, rows, section.row_length)
  slots = routing.capacity(
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
