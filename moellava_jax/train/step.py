# SPDX-License-Identifier: Apache-2.0
"""The training step: pure (state, frozen, batch) -> (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moellava_jax import config, trees
from moellava_jax.data import batch as batch_lib
from moellava_jax.model import llava, vision
from moellava_jax.model import moe as moe_lib
from moellava_jax.train import state as state_lib

Batch = batch_lib.Batch


class LossSums(NamedTuple):
  """Sums over a micro-batch, so that micro-batches can be added up."""

  ce_loss: jax.Array  # Sum of -log p over supervised targets.
  weight: jax.Array  # Number of supervised targets.
  balance_loss: jax.Array  # Sum over sparse layers.
  z_loss: jax.Array
  stats: tuple[moe_lib.MoeStats, ...]  # One per sparse layer.
  layer_balance: tuple[jax.Array, ...]
  probe_loss: jax.Array  # Warm-up only.
  tokens: jax.Array  # Real positions.


def probe_loss(
    model: llava.Llava, params: Any, batch: Batch, sizes: tuple[int, ...]
) -> jax.Array:
  """Mean cross entropy of the patches' attributes, over attributes added."""
  features = model.apply(
      {'params': {'vision': params['vision']}},
      batch.images_BIHWC,
      method='features',
  )
  logits: Any = vision.AttributeProbe(sizes).apply(
      {'params': params['probe']}, features
  )
  losses = [
      jnp.mean(
          optax.softmax_cross_entropy_with_integer_labels(
              x, batch.attributes_BIPA[..., n]
          )
      )
      for n, x in enumerate(logits)
  ]
  return jnp.sum(jnp.stack(losses))


def loss_sums(
    model: llava.Llava,
    params: Any,
    batch: Batch,
    rng: jax.Array | None,
    *,
    train: bool,
    probe_sizes: tuple[int, ...] | None,
) -> LossSums:
  """Runs the model on one micro-batch.

  Args:
    model: dense or sparse.
    params: all parameters.
    batch: rows of this micro-batch.
    rng: for dropout and sampled routing; None when `train` is False.
    train: training or evaluation behaviour.
    probe_sizes: classes of the attributes in the warm-up, whose rows are text
      alone and whose images only the probe looks at; else None.
  """
  # Evaluation draws only if its second choice is 'sampled', as in the original.
  rngs: dict[str, jax.Array] = {'router': jax.random.key(0)}
  if rng is not None:
    router, dropout = jax.random.split(rng)
    rngs = {'router': router, 'dropout': dropout}
  out = llava.forward(
      model,
      {k: v for k, v in params.items() if k != 'probe'},
      batch.tokens_BT,
      batch.segment_ids_BT,
      batch.positions_BT,
      batch.images_BIHWC if probe_sizes is None else None,
      train=train,
      targets_BT=batch.targets_BT,
      rngs=rngs,
  )
  zero = jnp.zeros((), jnp.float32)
  probe = zero
  if probe_sizes is not None:
    probe = probe_loss(model, params, batch, probe_sizes)
  return LossSums(
      ce_loss=jnp.sum(out.losses_BT * batch.loss_weight_BT),
      weight=jnp.sum(batch.loss_weight_BT),
      balance_loss=sum((aux.balance_loss for aux in out.moe), zero),
      z_loss=sum((aux.z_loss for aux in out.moe), zero),
      stats=tuple(aux.stats for aux in out.moe),
      layer_balance=tuple(aux.balance_loss for aux in out.moe),
      probe_loss=probe,
      tokens=jnp.sum(batch.segment_ids_BT > 0).astype(jnp.float32),
  )


def micro_batches(batch: Batch, count: int) -> Batch:
  """`[B, ...] -> [A, B/A, ...]`; every device keeps its own rows.

  Micro-batch a has the rows a, a + A, a + 2A, ..., on which `data.grouping`
  relies.
  """

  def cut(x):
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  return jax.tree.map(cut, batch)


def _objective(
    sums: LossSums,
    total_weight: jax.Array,
    count: int,
    moe: config.MoeConfig | None,
    normalization: str,
) -> jax.Array:
  """This micro-batch's part of the loss; the parts of a step add up."""
  if normalization == 'token':
    loss = sums.ce_loss / total_weight
  else:  # Mean of means, as the original's gradient accumulation.
    loss = sums.ce_loss / jnp.maximum(sums.weight, 1.0) / count
  loss += sums.probe_loss / count
  if moe is not None:
    loss += moe.aux_loss_weight * sums.balance_loss / count
    loss += moe.z_loss_weight * sums.z_loss / count
  return loss


def _keep(tree: Any, shards: Any | None) -> Any:
  """Moves what is kept in host memory there; the rest is left to XLA."""

  def move(x, where):
    host = where.memory_kind != 'device'
    return jax.device_put(x, where) if host else x

  return tree if shards is None else jax.tree.map(move, tree, shards)


def _fetch(tree: Any, shards: Any | None) -> Any:
  """The inverse of `_keep`."""

  def move(x, where):
    host = where.memory_kind != 'device'
    return jax.device_put(x, where.with_memory_kind('device')) if host else x

  return tree if shards is None else jax.tree.map(move, tree, shards)


def _scatter(tree: Any, shards: Any | None) -> Any:
  """Divides a tree over the devices as `shards` says, in their own memory."""
  if shards is None:
    return tree
  return jax.lax.with_sharding_constraint(
      tree, jax.tree.map(lambda x: x.with_memory_kind('device'), shards)
  )


def _accumulated(
    gradient: Callable[[Batch, jax.Array], Any],
    batch: Batch,
    rng: jax.Array,
    count: int,
    shards: Any | None,
) -> Any:
  """The sum of `gradient(micro_batch, rng)`, a (value, gradients), over all.

  Between micro-batches the gradients wait where `shards` says.
  """
  if count == 1:
    return gradient(batch, rng)

  def add(carry, inputs):
    micro, index = inputs
    value, grads = gradient(micro, jax.random.fold_in(rng, index))
    summed = jax.tree.map(
        jnp.add, (carry[0], _fetch(carry[1], shards)), (value, grads)
    )
    return (summed[0], _keep(summed[1], shards)), None

  parts = micro_batches(batch, count)
  shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts), rng)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  zeros = (zeros[0], _keep(_scatter(zeros[1], shards), shards))
  (value, grads), _ = jax.lax.scan(add, zeros, (parts, jnp.arange(count)))
  return value, _fetch(grads, shards)


def _updated(
    tx: optax.GradientTransformation,
    state: state_lib.TrainState,
    grads: Any,
    finite: jax.Array,
    shards: Any | None,
) -> state_lib.TrainState:
  """The state after a step, which changes only counters if not `finite`."""
  old = (_scatter(state.trained, shards), state.opt_state)
  updates, opt_state = tx.update(grads, state.opt_state, old[0])
  trained, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (optax.apply_updates(old[0], updates), opt_state),
      old,
  )
  bad = (~finite).astype(jnp.int32)
  return state_lib.TrainState(
      step=state.step + 1,
      trained=_scatter(trained, shards),
      opt_state=opt_state,
      skipped=state.skipped + bad,
      streak=(state.streak + 1) * bad,
  )


def make_train_step(
    model: llava.Llava,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    cfg: config.TrainConfig,
    stage: str,
    probe_sizes: tuple[int, ...] | None,
    shards: Any | None = None,
) -> Callable[
    [state_lib.TrainState, Any, Batch],
    tuple[state_lib.TrainState, dict[str, Any]],
]:
  """Returns the step of a stage; jit it with `state` donated.

  `rate` is only reported: `tx` has its own.

  Gradients are taken of the trained parameters only. They are applied in
  `shards`, the sharding of each (`sharding.zero`; None: as they come), where
  their sum waits for the next micro-batch, maybe in host memory; the new
  parameters are gathered at the end. A step whose loss or gradient is not
  finite changes nothing but the counters.
  """
  count = cfg.stage(stage).accumulate
  base = jax.random.fold_in(
      jax.random.key(cfg.seed), config.STAGES.index(stage)
  )

  def micro_loss(trained, frozen, batch, rng, total_weight):
    sums = loss_sums(
        model,
        trees.merge(trained, frozen),
        batch,
        rng,
        train=True,
        probe_sizes=probe_sizes,
    )
    normalization = cfg.optimizer.loss_normalization
    loss = _objective(sums, total_weight, count, model.cfg.moe, normalization)
    return loss, sums

  def step(state, frozen, batch):
    rng = jax.random.fold_in(base, state.step)
    total = jnp.maximum(jnp.sum(batch.loss_weight_BT), 1.0)

    def gradient(micro, rng):
      value, grads = jax.value_and_grad(micro_loss, has_aux=True)(
          state.trained, frozen, micro, rng, total
      )
      return value, _scatter(grads, shards)

    (loss, sums), grads = _accumulated(gradient, batch, rng, count, shards)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new_state = _updated(tx, state, grads, finite, shards)
    metrics = {
        'loss': loss,
        'grad_norm': norm,
        'lr': rate(state.step - state.skipped),
        'skipped': new_state.skipped,
        'streak': new_state.streak,
        'sums': sums,
        'ids_B': batch.ids_B,
    }
    return new_state, metrics

  return step


def make_eval_step(
    model: llava.Llava,
) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
  """Returns (trained, frozen, batch) -> (sum of the loss, weight)."""

  def step(trained, frozen, batch):
    sums = loss_sums(
        model,
        trees.merge(trained, frozen),
        batch,
        None,
        train=False,
        probe_sizes=None,
    )
    return sums.ce_loss, sums.weight

  return step
