# SPDX-License-Identifier: Apache-2.0
"""Bytes that a stage takes on each device, without compiling anything.

What lies there from step to step is exact: it is read from the shardings. What
a step adds is estimated from the program as traced: the values that its
forward pass keeps for its backward pass, and the largest that it works on.
"""

import collections
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config, sharding, trees
from moellava_jax.data import batch as batch_lib
from moellava_jax.model import llava
from moellava_jax.train import init, program, stages
from moellava_jax.train import step as step_lib

# Compilers merge all else into the products before or after it.
_PRODUCTS = 'products'

_HOST_MEMORY = ('pinned_host', 'unpinned_host')


class Memory(NamedTuple):
  """Bytes per device; all but `host` are of the device's own memory."""

  trained: int  # fp32 master weights.
  frozen: int
  optimizer: int
  gradients: int
  accumulator: int  # The sum over micro-batches, if there are several.
  saved: int  # Activations from the forward pass for the backward pass.
  working: int  # The largest layer (or the loss) while it is differentiated.
  gathered: int  # Whole weights of the layers at work, where fsdp splits them.
  host: int  # Of the state, what waits in the host's memory.

  @property
  def state(self) -> int:
    """What lies on the device between two steps."""
    return self.trained + self.frozen + self.optimizer

  @property
  def total(self) -> int:
    return sum(self) - self.host


def abstract_mesh(sizes: tuple[int, ...]) -> Any:
  """A mesh of sizes `sharding.AXES` without devices."""
  auto = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
  return jax.sharding.AbstractMesh(sizes, sharding.AXES, axis_types=auto)


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


def of_stage(
    cfg: config.TrainConfig, stage: str, sizes: tuple[int, ...]
) -> Memory:
  """Estimates what a step of the stage takes on a mesh of `sizes`.

  Args:
    cfg: with `row_length` of the stage and `model.compute_dtype` given.
    stage: its name.
    sizes: of `sharding.AXES`.
  """
  section = cfg.stage(stage)
  shards = sharding.batch_divisor(abstract_mesh(sizes))
  rows = section.batch_size // (shards * section.accumulate)
  alike = _one_row(cfg, stage)
  state = _state(alike, stage, sizes)
  tensor = sizes[sharding.AXES.index('tensor')]
  saved, working = _activations(alike, stage, rows, tensor)
  several = section.accumulate > 1
  away = state.host > 0  # Then the sum over micro-batches waits there too.
  return state._replace(
      accumulator=state.gradients if several and not away else 0,
      saved=saved,
      working=working,
      host=state.host + (state.gradients if several and away else 0),
  )


def _one_row(cfg: config.TrainConfig, stage: str) -> config.TrainConfig:
  """`cfg` without what changes neither the state nor what a row keeps."""
  section: Any = dataclasses.replace(
      cfg.stage(stage), batch_size=1, accumulate=1
  )
  changed: dict[str, Any] = {stage: section}
  return dataclasses.replace(cfg, **changed)


@functools.lru_cache(maxsize=64)
def _state(
    cfg: config.TrainConfig, stage: str, sizes: tuple[int, ...]
) -> Memory:
  """The part that no batch decides."""
  mesh = abstract_mesh(sizes)
  runner = program.Program(cfg, stage, mesh, 1)
  trained, frozen = runner.split(runner.abstract_params())
  here, away = _bytes_of(runner.abstract_state(trained).opt_state)
  gathered = 0
  if mesh.shape['fsdp'] > 1:
    gathered = _gathered(cfg, trees.merge(trained, frozen), mesh.shape)
  return Memory(
      trained=_bytes_of(trained)[0],
      frozen=_bytes_of(frozen)[0],
      optimizer=here,
      # Adam keeps two numbers where each gradient lies (and is summed up).
      gradients=(here + away) // 2,
      accumulator=0,
      saved=0,
      working=0,
      gathered=gathered,
      host=away,
  )


def _bytes_of(tree: Any) -> tuple[int, int]:
  """Bytes of a device's shards: (in its own memory, in the host's)."""
  here = away = 0
  for leaf in jax.tree.leaves(tree):
    shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
    if leaf.sharding.memory_kind in _HOST_MEMORY:
      away += shard * leaf.dtype.itemsize
    else:
      here += shard * leaf.dtype.itemsize
  return here, away


def _gathered(cfg: config.TrainConfig, params: Any, mesh: Any) -> int:
  """Two layers' weights, since one is fetched while another is at work.

  And of one the gradient: whole, in fp32, until it is cut into its shards.
  """
  width = np.dtype(llava.compute_dtype(cfg.model.compute_dtype)).itemsize
  layers: collections.Counter[str] = collections.Counter()
  for path, leaf in trees.flatten(params).items():
    if path.startswith(('llm/layers_', 'vision/layers_')):
      share = mesh['expert'] if '/moe/experts/' in path else 1
      layers['/'.join(path.split('/')[:2])] += math.prod(leaf.shape) // share
  head = cfg.model.llm.vocab_size * cfg.model.llm.width
  most = max(layers.values())
  return (most * (2 * width + 4) + head * width) // mesh['tensor']


class _Saved(NamedTuple):
  """Arrays that a forward pass keeps: (shape, bytes) -> how many."""

  arrays: collections.Counter[tuple[tuple[int, ...], int]]

  def __sub__(self, other: '_Saved') -> '_Saved':
    return _Saved(self.arrays - other.arrays)

  def bytes(self, cfg: config.DecoderConfig, tensor: int) -> int:
    split = {cfg.num_heads, cfg.num_kv_heads, cfg.mlp_width, cfg.vocab_size}
    return sum(
        count * size // (tensor if split & set(shape) else 1)
        for (shape, size), count in self.arrays.items()
    )

  def having(self, size: int) -> '_Saved':
    """The arrays with an axis of that size."""
    return _Saved(
        collections.Counter(
            {key: n for key, n in self.arrays.items() if size in key[0]}
        )
    )

  def largest(self) -> int:
    return max((size for _, size in self.arrays), default=0)


def _activations(
    cfg: config.TrainConfig, stage: str, rows: int, tensor: int
) -> tuple[int, int]:
  """(saved, working) bytes of a micro-batch of `rows` rows on one device."""
  model, section = cfg.stage_model(stage), cfg.stage(stage)
  assert section.row_length is not None
  vocab = model.llm.vocab_size
  sparse = () if model.moe is None else model.moe.layer_ids(model.llm.depth)
  counts = {True: len(sparse), False: model.llm.depth - len(sparse)}
  # Rows are alike, unless all of them together are one group of tokens.
  together = model.moe is not None and model.moe.group == 'batch'
  traced = rows if together else 2
  saved = shared = working = loss = 0
  for kind in [kind for kind, count in counts.items() if count]:
    one, layer = _layer(cfg, stage, traced, kind, model.remat)
    rest = one - layer
    logits = rest.having(vocab)
    loss = logits.bytes(model.llm, tensor)
    shared = (rest - logits).bytes(model.llm, tensor)
    _, whole = _layer(cfg, stage, traced, kind, _PRODUCTS)
    # While a layer is differentiated: the results of its products, unless they
    # were kept anyway, and two cotangents of the largest of them.
    work = 2 * whole.largest() // tensor
    kept = layer.bytes(model.llm, tensor)
    if model.remat == 'none':
      # XLA makes some of what could be kept again, where that is cheap. On the
      # CPU it ends half-way between all and the results of products alone.
      kept = (kept + whole.bytes(model.llm, tensor)) // 2
    else:
      work += whole.bytes(model.llm, tensor)
    saved += counts[kind] * kept
    working = max(working, work)
  # Two cotangents of the logits, beside what the loss keeps of them.
  loss += 2 * 4 * traced * section.row_length * vocab // tensor
  working = max(working, loss)
  return (saved + shared) * rows // traced, working * rows // traced


def _layer(cfg, stage, rows, kind, remat) -> tuple[_Saved, _Saved]:
  """What a model of one layer keeps, and what each further layer adds."""
  one = _traced(cfg, stage, rows, kind, 1, remat)
  return one, _traced(cfg, stage, rows, kind, 2, remat) - one


@functools.lru_cache(maxsize=256)
def _traced(
    cfg: config.TrainConfig,
    stage: str,
    rows: int,
    sparse: bool,
    depth: int,
    remat: Any,
) -> _Saved:
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
      remat='none' if remat == _PRODUCTS else remat,
  )
  module = llava.Llava(model)
  probe = program.probe_sizes(stage)
  params = init.abstract(module, probe)
  trained, frozen = trees.split(params, stages.mask(params, stage))

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

    if remat == _PRODUCTS:
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
  return _Saved(
      collections.Counter(
          (aval.shape, aval.size * aval.dtype.itemsize)
          for aval in kept.values()
      )
  )
