# SPDX-License-Identifier: Apache-2.0
"""A run: its stages one after the other, each resumable at any moment."""

import dataclasses
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import checkpoint, config, sharding, trees
from moellava_jax.data import pipeline, sources
from moellava_jax.train import about, diagnose, init, inputs, program
from moellava_jax.train import metrics as metrics_lib
from moellava_jax.train import state as state_lib

MAX_STREAK = 10  # Non-finite steps in a row that end a run.


class Pending(NamedTuple):
  """A step that has been dispatched and not logged."""

  step: int
  metrics: dict[str, Any]  # On the device.
  batch: Any  # On the device; never donated.
  eval_loss: float | None


def run(cfg: config.TrainConfig) -> None:
  """Trains all stages of `cfg`, going on where an earlier call stopped.

  Everything that can be wrong with settings, checkpoints and data is found
  before anything is compiled.

  Raises:
    config.UserError: settings, data (`sources.DataError`) or checkpoints
      (`checkpoint.CheckpointError`) that cannot be used.
    FloatingPointError: ten steps in a row were not finite.
  """
  os.makedirs(cfg.workdir, exist_ok=True)
  sharding.simulate_devices(cfg.mesh.cpu_devices)  # Before Orbax starts JAX.
  todo = _unfinished(cfg)
  if not todo:
    about.write_stages(cfg)
    print(f'All of {", ".join(cfg.stages)} are finished in {cfg.workdir}.')
    return
  data = inputs.read(cfg, todo)
  mesh = sharding.make_mesh(cfg.mesh)
  for stage in todo:
    _check_batch(cfg, stage, mesh)
  about.write_run(cfg)
  with sharding.use(mesh):
    for stage in todo:
      _StageRun(cfg, stage, mesh, data).train()
      about.write_stages(cfg)


def _unfinished(cfg: config.TrainConfig) -> list[str]:
  """The stages that are left to do, after comparing what is there.

  Raises:
    CheckpointError: a checkpoint of another config, or no checkpoint to start
      the first of these stages from.
  """
  todo = []
  for stage in cfg.stages:
    if (final := checkpoint.final_of(cfg.workdir, stage)) is not None:
      saved = config.from_json((final / 'config.json').read_text())
      _check_same(saved, cfg, stage, str(final))
      continue
    todo.append(stage)
    if (latest := checkpoint.latest_meta(cfg.workdir, stage)) is not None:
      path, meta = latest
      _check_same(config.from_dict(meta['config']), cfg, stage, path)
    elif len(todo) == 1:
      origin = init.source(cfg, stage) or ''
      previous = init.predecessor(cfg, stage)
      if previous and origin == str(checkpoint.final_of(cfg.workdir, previous)):
        saved = config.from_json(
            pathlib.Path(origin, 'config.json').read_text()
        )
        _check_same(saved, cfg, previous, origin)
  return todo


def _check_same(saved, cfg, stage: str, where: str) -> None:
  if differences := config.differences(saved, cfg, stage):
    raise checkpoint.CheckpointError(
        f'{where} was written by another config: {"; ".join(differences[:5])}.'
        ' Use another --config.workdir, or delete that folder to train the'
        ' stage again.'
    )


def _check_batch(cfg: config.TrainConfig, stage: str, mesh) -> None:
  section = cfg.stage(stage)
  need = sharding.batch_divisor(mesh) * section.accumulate
  if section.batch_size % need:
    raise config.UserError(
        f'Stage {stage!r}: batch_size={section.batch_size} is not a multiple of'
        f' {need} (accumulate={section.accumulate} micro-batches times'
        f' {sharding.batch_divisor(mesh)} data-parallel devices).'
    )


class _StageRun:
  """One stage: its data, its compiled steps and its state."""

  def __init__(
      self, cfg: config.TrainConfig, stage: str, mesh, data: inputs.Inputs
  ):
    self._cfg, self._stage, self._mesh = cfg, stage, mesh
    self._section = cfg.stage(stage)
    self._began = time.monotonic()
    self._tokenizer = data.tokenizer
    self._layers = ()
    model_cfg = cfg.stage_model(stage)
    if model_cfg.moe is not None:
      self._layers = model_cfg.moe.layer_ids(model_cfg.llm.depth)
    self._examples = data.examples[stage]
    self._eval_batches = []
    if stage in data.held_out:
      self._eval_batches = pipeline.eval_batches(
          data.held_out[stage],
          self._section.batch_size,
          self._section.eval_batches,
          share=self._share(),
      )
    rows = self._section.epochs * len(self._examples)
    self._steps: int = self._section.steps or math.ceil(
        rows / self._section.batch_size
    )
    self._program = program.Program(cfg, stage, mesh, self._steps)
    self._checkpoints = checkpoint.Stage(cfg.workdir, stage, cfg.checkpoint)

  def train(self) -> None:
    """Runs the stage to its end and writes `final/`."""
    state, frozen, first = self._restore_or_start()
    self._writer = metrics_lib.Writer(self._cfg.workdir, self._stage, first)
    train_step = self._program.train_step(state, frozen)
    eval_step = self._program.eval_step(state, frozen)
    batches = pipeline.train_batches(
        self._examples,
        self._section.batch_size,
        self._cfg.seed * len(config.STAGES) + config.STAGES.index(self._stage),
        first,
        share=self._share(),
    )
    display = metrics_lib.Display(
        self._stage, first, self._steps, self._cfg.log_every
    )
    pending = None
    self._last = time.monotonic()
    try:
      for step in range(first + 1, self._steps + 1):
        batch = next(batches)
        rows = sharding.put_batch(batch, self._mesh)
        state, metrics = train_step(state, frozen, rows)
        # The record of a step is made while the next one runs.
        if pending is not None:
          self._log(display, pending, state, frozen)
        pending = Pending(step, metrics, rows, None)
        last = step == self._steps
        saves = last or step % self._cfg.checkpoint.every == 0
        if self._eval_batches and (
            last or step % self._section.eval_every == 0
        ):
          jax.block_until_ready(metrics)
          began = time.monotonic()
          loss = self._evaluate(eval_step, state, frozen)
          self._last += time.monotonic() - began
          pending = pending._replace(eval_loss=loss)
        if saves:  # The history must not lag behind the checkpoint.
          self._log(display, pending, state, frozen)
          pending = None
          if not last:
            self._save(step, state)
            self._last = time.monotonic()
    finally:
      display.close()
      self._writer.close()
      # Also after an error: a checkpoint that was begun is worth completing.
      self._checkpoints.wait()
    self._finish(state, frozen)

  def _restore_or_start(self):
    """Returns (state, frozen parameters, batches done before)."""
    latest = self._checkpoints.latest_step()
    if latest is None:
      params = init.first_params(
          self._cfg,
          self._stage,
          self._program.model,
          self._mesh,
          self._program.probe_sizes,
      )
      trained, frozen = self._program.split(params)
      self._frozen_hash = self._checkpoints.save_frozen(frozen)
      self._before = 0.0
      trained, frozen = self._program.stack((trained, frozen))
      return self._program.init_state(trained), frozen, 0
    meta = self._checkpoints.read_meta(latest)
    print(f'{self._stage}: going on after step {latest}', flush=True)
    self._frozen_hash = meta['frozen']
    frozen = checkpoint.load_frozen(
        self._cfg.workdir,
        meta['frozen'],
        trees.flatten(self._program.shardings),
    )
    abstract, _ = self._program.split(self._program.abstract_params())
    like = self._program.unstack(
        self._program.abstract_state(self._program.stack(abstract))
    )
    trained, rest = self._checkpoints.restore(latest, abstract, _beside(like))
    self._before = meta['seconds']
    state = state_lib.TrainState(trained=trained, **rest)
    state, frozen = self._program.stack((state, frozen))
    return state, frozen, meta['data']['next_index']

  def _share(self) -> np.ndarray:
    """The rows of a global batch that this process reads."""
    return sharding.rows_of_process(self._mesh, self._section.batch_size)

  def _evaluate(self, eval_step, state, frozen) -> float:
    """Mean held-out loss over targets, routing as in evaluation."""
    sums = [
        eval_step(state.trained, frozen, sharding.put_batch(b, self._mesh))
        for b in self._eval_batches
    ]
    loss, weight = (
        sum(float(x) for x in column) for column in zip(*sums, strict=True)
    )
    return loss / max(weight, 1.0)

  def _log(self, display, pending: Pending, state, frozen) -> None:
    """Writes the record of a step; `state` is the newest one."""
    host = jax.device_get(pending.metrics)
    now = time.monotonic()
    record = metrics_lib.step_record(
        self._stage,
        pending.step,
        host,
        seconds=now - self._last,
        count=self._section.accumulate,
        layers=self._layers,
    )
    self._last = now
    if pending.eval_loss is not None:
      record['eval_loss'] = pending.eval_loss
    self._writer.write(record)
    display.update(record)
    if not record['targets']:
      raise sources.DataError(
          f'Stage {self._stage!r}: the batch of step {pending.step} has no'
          f' target token: no answer of its {self._section.batch_size} rows'
          f' lies within row_length={self._section.row_length}. Check the'
          ' template and the row length.'
      )
    if host['streak'] >= MAX_STREAK:
      # Steps that are not finite leave the parameters as they were, so the
      # newest ones will do. Nothing else needs them any more.
      state, frozen = self._program.unstack((state, frozen))
      blame = diagnose.first_bad(
          self._program.model,
          trees.merge(state.trained, frozen),
          pending.batch,
      )
      raise FloatingPointError(
          f'Stage {self._stage!r}: {MAX_STREAK} steps in a row were not'
          f' finite, the last was {pending.step}; first bad: {blame}. Try a lower'
          ' learning rate in another --config.workdir.'
      )

  def _seconds(self) -> float:
    return self._before + time.monotonic() - self._began

  def _save(self, step: int, state) -> None:
    state = self._program.to_save(state)
    self._checkpoints.save(
        step,
        state.trained,
        _beside(state),
        {
            'stage': self._stage,
            'config': dataclasses.asdict(self._cfg),
            'frozen': self._frozen_hash,
            'data': {'next_index': step},
            'seconds': self._seconds(),
        },
    )

  def _finish(self, state, frozen) -> None:
    state, frozen = self._program.unstack((state, frozen))
    params = trees.merge(state.trained, frozen)
    params.pop('probe', None)
    summary = {
        'steps': self._steps,
        'skipped': int(state.skipped),
        'trained_parameters': about.count(state.trained),
        **about.parameter_counts(params, self._program.model.cfg),
        'seconds': self._seconds(),
    }
    self._checkpoints.save_final(
        params, self._cfg, summary, self._tokenizer.save
    )
    self._checkpoints.close()


def _beside(state: state_lib.TrainState) -> dict[str, Any]:
  """What a checkpoint keeps beside the trained parameters."""
  return {
      'opt_state': state.opt_state,
      'step': state.step,
      'skipped': state.skipped,
      'streak': state.streak,
  }
