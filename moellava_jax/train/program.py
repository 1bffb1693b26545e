# SPDX-License-Identifier: Apache-2.0
"""What a stage runs on its devices, and where each array of it lies.

The training loop executes it; `train.plan` only compiles it. Nothing here
holds or reads weights.
"""

import functools
from typing import Any

import jax
import numpy as np
import optax

from moellava_jax import checkpoint, config, sharding, trees
from moellava_jax.data import shapes
from moellava_jax.model import llava
from moellava_jax.train import init, optimizer, stacking, stages
from moellava_jax.train import state as state_lib
from moellava_jax.train import step as step_lib


def probe_sizes(stage: str) -> tuple[int, ...] | None:
  """Classes of the attributes that the warm-up's probe tells apart."""
  if stage != 'warmup':
    return None
  return tuple(size for _, size in shapes.ATTRIBUTES)


class Program:
  """The model, the optimizer and the compiled steps of one stage.

  With `model.scan_layers` the step has layers that repeat stacked; `stack` and
  `unstack` are the way in and out, and do nothing otherwise. States, and the
  parts of parameters that methods take, are in the form of the step.

  Attributes:
    model: dense or sparse, as the stage trains it.
    tx: the optimizer of the trained parameters.
    rate: its schedule.
    probe_sizes: classes of the warm-up's attributes; None in other stages.
  """

  def __init__(self, cfg: config.TrainConfig, stage: str, mesh, steps: int):
    """Args: `steps` is the length of the stage, for the schedule."""
    self._cfg, self._stage, self._mesh = cfg, stage, mesh
    self.model = llava.Llava(cfg.stage_model(stage))
    self.probe_sizes = probe_sizes(stage)
    if self.model.cfg.remat == 'offload_dots':
      sharding.require_memory('pinned_host', "model.remat='offload_dots'")
    self._layers = stacking.table(self.model.cfg)
    section = cfg.stage(stage)
    self.rate = optimizer.schedule(
        section.lr, steps, cfg.optimizer.warmup_ratio
    )
    self.tx: optax.GradientTransformation = optimizer.make(
        self.stack(self.split(self.shardings)[0]),
        cfg.optimizer,
        section,
        steps,
    )

  @functools.cached_property
  def shardings(self) -> Any:
    """The sharding of every parameter, trained or not."""
    return init.shardings(self.model, self._mesh, self.probe_sizes)

  def split(self, params: Any) -> tuple[Any, Any]:
    """(trained, frozen) parts of a tree of all parameters."""
    whole_lm = self._cfg.stage(self._stage).whole_lm
    return trees.split(params, stages.mask(params, self._stage, whole_lm))

  def freeze(self, frozen: Any) -> Any:
    """The frozen part as the step takes it, see `llava.stored_dtype`.

    Args:
      frozen: single layers, of arrays or abstract.
    """

    def cast(path, x):
      dtype = llava.stored_dtype(path, self.model.cfg)
      if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
      return x.astype(dtype)

    return trees.map_paths(cast, frozen)

  def abstract_params(self) -> Any:
    """Shape, dtype and sharding of every parameter."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        init.abstract(self.model, self.probe_sizes),
        self.shardings,
    )

  def stack(self, tree: Any) -> Any:
    """A tree of single layers in the form of the step; consumes its arrays."""
    return stacking.stack(tree, self._layers, consume=True)

  def single(self, tree: Any) -> Any:
    """The abstract form of a tree, layer by layer."""
    return stacking.unstack(_abstract(tree), consume=False)

  def unstack(self, tree: Any) -> Any:
    """The inverse of `stack`; consumes the arrays."""
    return stacking.unstack(tree, consume=True)

  def to_save(self, tree: Any) -> Any:
    """A copy of single layers in host memory, if the tree is stacked."""
    return stacking.unstack(
        tree, consume=False, to_host=sharding.has_memory('pinned_host')
    )

  def init_state(self, trained: Any) -> state_lib.TrainState:
    """The state before the first step."""
    opt_state = jax.jit(
        self.tx.init, out_shardings=self._opt_shardings(trained)
    )(trained)
    zero = checkpoint.replicate_scalar(0, sharding.replicated(self._mesh))
    # Three arrays, not one thrice: the state is donated.
    return state_lib.TrainState(zero, trained, opt_state, zero + 0, zero + 0)

  def abstract_state(self, trained: Any) -> state_lib.TrainState:
    """`init_state` of arrays or of their abstract forms, not computed."""
    trained = self.stack(_abstract(trained))
    scalar: Any = jax.ShapeDtypeStruct(
        (), np.int32, sharding=sharding.replicated(self._mesh)
    )
    opt_state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(self.tx.init, trained),
        self._opt_shardings(trained),
    )
    return state_lib.TrainState(scalar, trained, opt_state, scalar, scalar)

  def _opt_shardings(self, trained: Any) -> Any:
    """Optimizer state lies where the sum of gradients does."""
    whole = sharding.replicated(self._mesh)
    return optax.tree_utils.tree_map_params(
        self.tx,
        lambda leaf, where: leaf if _is_masked(leaf) else where,
        jax.eval_shape(self.tx.init, trained),
        self._gradient_shardings(trained),
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )

  def _gradient_shardings(self, trained: Any) -> Any:
    """The shard of each gradient that a device keeps (ZeRO-2)."""
    memory = self._cfg.mesh.optimizer_memory
    return self.stack(
        jax.tree.map(
            lambda x: sharding.zero(x.sharding, x.shape).with_memory_kind(
                memory
            ),
            self.single(trained),
        )
    )

  def train_step(self, state: Any, frozen: Any) -> Any:
    """The jitted step (state, frozen, batch) -> (state, metrics).

    Args:
      state: a TrainState, of arrays or abstract; only shardings matter.
      frozen: the parameters that the stage does not train, likewise.
    """
    step = step_lib.make_train_step(
        self.model,
        self.tx,
        self.rate,
        self._cfg,
        self._stage,
        self.probe_sizes,
        self._gradient_shardings(state.trained),
    )
    on_device = jax.tree.map(
        lambda x: x.sharding.with_memory_kind('device'), state.opt_state
    )

    def fetched(state, frozen, batch):
      opt_state = jax.device_put(state.opt_state, on_device)
      return step(state.replace(opt_state=opt_state), frozen, batch)

    offloaded = self._cfg.mesh.optimizer_memory != 'device'
    return jax.jit(
        fetched if offloaded else step,
        in_shardings=(_where(state), _where(frozen), self._rows()),
        out_shardings=(_where(state), sharding.replicated(self._mesh)),
        donate_argnums=0,
    )

  def eval_step(self, state: Any, frozen: Any) -> Any:
    """The jitted (trained, frozen, batch) -> (sum of the loss, weight)."""
    return jax.jit(
        step_lib.make_eval_step(self.model),
        in_shardings=(_where(state.trained), _where(frozen), self._rows()),
        out_shardings=sharding.replicated(self._mesh),
    )

  def _rows(self) -> jax.sharding.NamedSharding:
    return sharding.of_batch(self._mesh)


def _is_masked(leaf: Any) -> bool:
  """A parameter that another group of the optimizer updates."""
  return isinstance(leaf, optax.MaskedNode)


def _abstract(tree: Any) -> Any:
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree,
  )


def _where(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)
