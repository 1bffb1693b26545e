# SPDX-License-Identifier: Apache-2.0
"""The first parameters of a stage: fresh, of others, or of the stage before.

Dense ones are upcycled where the stage trains a sparse model.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moellava_jax import checkpoint, config, sharding, trees
from moellava_jax.interop import hf, hub, upcycle
from moellava_jax.model import llava, vision
from moellava_jax.train import cluster, doors


def _initialiser(model: llava.Llava, probe_sizes: tuple[int, ...] | None):
  """Returns rng -> boxed parameters of the model (and the probe)."""

  def fresh(rng):
    inputs = llava.dummy_inputs(model.cfg)
    model_rng, probe_rng = jax.random.split(rng)
    params = model.init(
        {'params': model_rng, 'router': rng}, **inputs, train=False
    )['params']
    if probe_sizes is None:
      return params
    features = jax.numpy.zeros((1, 1, model.cfg.vision.width))
    probe = vision.AttributeProbe(probe_sizes).init(probe_rng, features)
    return {**params, 'probe': probe['params']}

  return fresh


def abstract(
    model: llava.Llava, probe_sizes: tuple[int, ...] | None = None
) -> Any:
  """Shape and dtype of every parameter of the model."""
  return jax.eval_shape(nn.unbox, boxed(model, probe_sizes))


def boxed(
    model: llava.Llava, probe_sizes: tuple[int, ...] | None = None
) -> Any:
  """Abstract parameters with the logical names of their axes."""
  return _boxed(model.cfg, probe_sizes)


@functools.lru_cache(maxsize=8)
def _boxed(cfg: config.ModelConfig, probe_sizes: tuple[int, ...] | None) -> Any:
  # Kept, because tracing a large model layer by layer takes half a minute.
  initialise = _initialiser(llava.Llava(cfg), probe_sizes)
  return jax.eval_shape(initialise, jax.random.key(0))


def shardings(
    model: llava.Llava, mesh, probe_sizes: tuple[int, ...] | None = None
) -> Any:
  """Sharding of every parameter of the model."""
  return sharding.of_parameters(boxed(model, probe_sizes), mesh)


def fresh(
    model: llava.Llava,
    seed: int,
    mesh,
    probe_sizes: tuple[int, ...] | None = None,
) -> Any:
  """Random parameters, created on the devices that hold them."""
  return creator(model, mesh, probe_sizes)(jax.random.key(seed))


def creator(
    model: llava.Llava, mesh, probe_sizes: tuple[int, ...] | None = None
) -> Any:
  """The jitted rng -> random parameters, each device making its own part."""
  initialise = _initialiser(model, probe_sizes)
  return jax.jit(
      lambda rng: nn.unbox(initialise(rng)),
      out_shardings=shardings(model, mesh, probe_sizes),
  )


def sections(cfg: config.TrainConfig) -> list[str]:
  """The stages that the config describes, whether or not they are to run."""
  return [name for name in config.STAGES if getattr(cfg, name) is not None]


def predecessor(cfg: config.TrainConfig, stage: str) -> str | None:
  """The stage whose parameters `stage` starts from; None for the first."""
  if stage in cfg.stages and cfg.stages.index(stage) > 0:
    return cfg.stages[cfg.stages.index(stage) - 1]
  known = sections(cfg)
  before = [
      s for s in known if config.STAGES.index(s) < config.STAGES.index(stage)
  ]
  return before[-1] if before else None


def source(cfg: config.TrainConfig, stage: str) -> str | None:
  """The checkpoint that `stage` starts from; None: random parameters.

  The first stage of a run starts from `init.checkpoint` if that is given,
  every other one from the stage before it. Where no stage has been trained
  before, a run starts from `init.lm` and `init.tower`.

  Raises:
    UserError: it is missing, or weights of others do not fit the config.
  """
  first = stage == cfg.stages[0]
  if first and cfg.init.checkpoint is not None:
    path = hub.local(cfg.init.checkpoint)
    if not hf.is_theirs(path):
      return str(checkpoint.find(path))
    doors.open_weights(cfg, stage)
    return path
  previous = predecessor(cfg, stage)
  done = previous and checkpoint.final_of(cfg.workdir, previous)
  if done:
    return str(done)
  # A later stage needs a projector; without one, stage I has been forgotten.
  begins = previous in (None, 'warmup') or cfg.init.projector is not None
  if first and begins and doors.named(cfg.init):
    doors.open_weights(cfg, stage)
    assert cfg.init.lm is not None
    return hub.local(cfg.init.lm)
  if previous is None:
    return None
  raise checkpoint.CheckpointError(
      f'Stage {stage!r} starts from stage {previous!r}, but'
      f' {cfg.workdir}/{previous}/final does not exist. Run that stage first'
      f' (--config=...:{previous}), run all stages (--config=... without a'
      ' stage), or name a checkpoint with --config.init.checkpoint=DIR (or'
      ' --config.init.lm, .tower and .projector).'
  )


def first_params(
    cfg: config.TrainConfig,
    stage: str,
    model: llava.Llava,
    mesh,
    probe_sizes: tuple[int, ...] | None,
) -> Any:
  """All parameters with which `stage` starts."""
  origin = source(cfg, stage)
  seed = cfg.seed + config.STAGES.index(stage)
  if origin is None:
    if stage != 'warmup':
      cluster.say(
          f'{stage}: WARNING: everything starts at random, also the language'
          ' model and the tower. To start from trained ones give'
          ' --config.init.lm=DIR and --config.init.tower=DIR, or'
          ' --config.init.checkpoint=DIR (or hf:org/name).'
      )
    return fresh(model, seed, mesh, probe_sizes)
  target = shardings(model, mesh)
  theirs = hf.is_theirs(origin)
  # A dense checkpoint has paths that a sparse target lacks, and vice versa.
  layout = trees.flatten(target)
  if model.cfg.moe is not None:
    dense = llava.Llava(dataclasses.replace(model.cfg, moe=None))
    layout = {**trees.flatten(shardings(dense, mesh)), **layout}
  if theirs:
    params = _imported(cfg, stage, model, layout, seed)
  else:
    params = _as_float32(checkpoint.load(origin, layout).params)
  expected = abstract(model)
  if model.cfg.moe is not None and not _is_sparse(params):
    initialise = _initialiser(model, None)
    copy_experts = model.cfg.moe.upcycle == 'copy'
    # In one program, so that what upcycling discards is never computed.
    params = jax.jit(
        lambda dense, rng: upcycle.upcycle(
            dense, nn.unbox(initialise(rng)), copy_experts=copy_experts
        ),
        out_shardings=target,
    )(params, jax.random.key(seed))
  _check_shapes(params, expected, origin)
  if probe_sizes is not None:
    params['probe'] = fresh(model, seed, mesh, probe_sizes)['probe']
  return params


def _imported(cfg, stage: str, model, layout, seed: int) -> Any:
  """Weights of others, and a random projector if none was named."""
  params = doors.read(doors.open_weights(cfg, stage), layout)
  if 'projector' not in params:
    cluster.say(f'{stage}: the projector starts at random')
    initialise = _initialiser(model, None)
    params['projector'] = jax.jit(
        lambda rng: nn.unbox(initialise(rng))['projector'],
        out_shardings=trees.unflatten(layout)['projector'],
    )(jax.random.key(seed))
  return params


def _as_float32(params: Any) -> Any:
  """What an import has kept in fewer bits, as the master weights it becomes."""
  if all(x.dtype == jnp.float32 for x in jax.tree.leaves(params)):
    return params
  return jax.jit(
      lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree),
      out_shardings=jax.tree.map(lambda x: x.sharding, params),
  )(params)


def _is_sparse(params: Any) -> bool:
  return any('/moe/router/' in path for path in trees.flatten(params))


def _check_shapes(params: Any, expected: Any, origin: str) -> None:
  ours = {p: x.shape for p, x in trees.flatten(expected).items()}
  theirs = {p: x.shape for p, x in trees.flatten(params).items()}
  wrong = [
      f'{path}: {theirs.get(path)} there, {ours.get(path)} in this config'
      for path in sorted(ours.keys() | theirs.keys())
      if ours.get(path) != theirs.get(path)
  ]
  if wrong:
    raise checkpoint.CheckpointError(
        f'{origin} is a checkpoint of another model: {"; ".join(wrong[:5])}'
        f'{" ..." if len(wrong) > 5 else ""}. Use the model section it was'
        ' trained with.'
    )
