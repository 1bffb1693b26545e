# SPDX-License-Identifier: Apache-2.0
"""A run: its stages one after the other, each resumable at any moment."""

import contextlib
import dataclasses
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np

from moellava_jax import checkpoint, config, saved_config, sharding, trees
from moellava_jax.data import pipeline, sources
from moellava_jax.train import (
    about,
    agree,
    cluster,
    data_report,
    diagnose,
    features,
    feed,
    guard,
    init,
    inputs,
    preflight,
    profiling,
    program,
    table,
)
from moellava_jax.train import metrics as metrics_lib
from moellava_jax.train import state as state_lib

MAX_STREAK = 10  # Non-finite steps in a row that end a run.


class Pending(NamedTuple):
  """A step that has been dispatched and not logged."""

  step: int
  metrics: dict[str, Any]  # On the device.
  batch: Any  # On the device; never donated.
  eval_loss: float | None


def run(
    cfg: config.TrainConfig,
    watchman: guard.Guard | None = None,
    profiled: profiling.Steps | None = None,
) -> None:
  """Trains all stages of `cfg`, going on where an earlier call stopped.

  Everything that can be wrong with settings, checkpoints and data is found
  before anything is compiled.

  Args:
    cfg: of the run.
    watchman: entered by the caller; None: signals do what they usually do, and
      nothing watches over the time that a step takes.
    profiled: steps of each stage that are recorded; None: none.

  Raises:
    guard.Stopped: `watchman` was told to stop, and a checkpoint is written.
    config.UserError: settings, data (`sources.DataError`) or checkpoints
      (`checkpoint.CheckpointError`) that cannot be used.
    FloatingPointError: ten steps in a row were not finite.
  """
  watchman = watchman or guard.Guard()
  watchman.workdir = cfg.workdir
  watchman.watch('reading the data', None, disposable=True)
  sharding.simulate_devices(cfg.mesh.cpu_devices)  # Before Orbax starts JAX.
  meshes = preflight.check(cfg)
  begins = cluster.together('the checkpoints', lambda: _unfinished(cfg))
  cluster.agree('the checkpoints', begins)
  todo = list(begins)
  if not todo:
    about.write_stages(cfg)
    cluster.say(
        f'All of {", ".join(cfg.stages)} are finished in {cfg.workdir}.'
    )
    return
  data = inputs.read(cfg, todo)
  about.write_run(cfg)
  if jax.default_backend() == 'cpu' and about.could_have_huge_pages():
    cluster.say(
        'Training on a CPU is faster with GLIBC_TUNABLES='
        'glibc.malloc.hugetlb=1 in the environment; the launchers set it.'
    )
  watchman.process = jax.process_index()
  for stage in todo:
    with sharding.use(meshes[stage]):
      profile = profiling.Profile(cfg.workdir, stage, profiled)
      _StageRun(cfg, stage, meshes[stage], data, watchman, profile).train()
    about.write_stages(cfg)


def _unfinished(cfg: config.TrainConfig) -> dict[str, str]:
  """The stages that are left to do, after comparing what is there.

  Returns:
    By stage the path of its newest step, '' before the first.

  Raises:
    CheckpointError: a checkpoint of another config, or no checkpoint to start
      the first of these stages from.
  """
  todo = {}
  for stage in cfg.stages:
    if (final := checkpoint.final_of(cfg.workdir, stage)) is not None:
      saved = saved_config.read((final / 'config.json').read_text())
      _check_same(saved, cfg, stage, str(final))
      continue
    todo[stage] = ''
    if (latest := checkpoint.latest_meta(cfg.workdir, stage)) is not None:
      path, meta = latest
      todo[stage] = path
      _check_same(saved_config.build(meta['config']), cfg, stage, path)
    elif len(todo) == 1:
      origin = init.source(cfg, stage) or ''
      previous = init.predecessor(cfg, stage)
      if previous and origin == str(checkpoint.final_of(cfg.workdir, previous)):
        saved = saved_config.read(
            (epath.Path(origin) / 'config.json').read_text()
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


class _StageRun:
  """One stage: its data, its compiled steps and its state."""

  def __init__(
      self,
      cfg: config.TrainConfig,
      stage: str,
      mesh,
      data: inputs.Inputs,
      watchman: guard.Guard,
      profile: profiling.Profile,
  ):
    self._cfg, self._stage, self._mesh = cfg, stage, mesh
    self._guard, self._profile = watchman, profile
    self._poll = agree.Poll(mesh)
    self._section = cfg.stage(stage)
    self._began = self._saved_at = time.monotonic()
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
    self._data_seed = cfg.seed * len(config.STAGES) + config.STAGES.index(stage)
    self._steps: int = self._section.steps or pipeline.steps(
        self._examples,
        self._section.batch_size,
        self._data_seed,
        self._section.epochs,
    )
    self._program = program.Program(cfg, stage, mesh, self._steps)
    # Of the save before the next record. The record of the step that is saved
    # is in the file by then, lest a kill leave the step without it.
    self._save_seconds: float | None = None
    self._saves = 0
    self._blocked = 0.0  # Seconds, of all of them.
    self._checkpoints = checkpoint.Stage(cfg.workdir, stage, cfg.checkpoint)

  def train(self) -> None:
    """Runs the stage to its end and writes `final/`.

    Raises:
      guard.Stopped: after a checkpoint, or before the stage has begun.
    """
    if self._poll.now(self._wish()) == agree.STOP:
      raise guard.Stopped(f'Stopped before stage {self._stage!r}.')
    self._watch_other('the start of the stage', disposable=True)
    state, frozen, first = self._restore_or_start()
    self._print_table(state, frozen)
    self._writer = metrics_lib.Writer(self._cfg.workdir, self._stage, first)
    display = metrics_lib.Display(
        self._stage, first, self._steps, self._cfg.log_every
    )
    with contextlib.ExitStack() as stack:
      # Also after an error: a checkpoint that was begun is worth completing.
      stack.callback(self._checkpoints.wait)
      stack.callback(self._writer.close)
      stack.callback(display.close)
      stack.enter_context(self._profile.around())
      state = self._steps_from(first, state, frozen, display)
    if state is None:
      self._checkpoints.close()
      self._print_end()
      raise guard.Stopped(f'Stopped in stage {self._stage!r}.')
    self._finish(state, frozen)

  def _steps_from(self, first: int, state, frozen, display):
    """Does the steps after `first`; returns the state, None if stopped."""
    train_step = self._program.train_step(state, frozen)
    eval_step = self._program.eval_step(state, frozen)
    batches = self._feed(first, frozen)
    pending = None
    self._last = self._saved_at = time.monotonic()
    for step in range(first + 1, self._steps + 1):
      rows = next(batches)
      self._profile.before(step)
      with (
          jax.profiler.StepTraceAnnotation(self._stage, step_num=step),
          # Whatever it needs is there: a copy from the host would hold it up.
          jax.transfer_guard('disallow'),
      ):
        state, metrics = train_step(state, frozen, rows)
      self._profile.after(step, metrics)
      # The record of a step is made while the next one runs.
      if pending is not None:
        self._log(display, pending, state, frozen)
      pending = Pending(step, metrics, rows, None)
      last = step == self._steps
      asked = self._poll.after_step(self._wish())
      if self._eval_batches and (last or step % self._section.eval_every == 0):
        pending = pending._replace(
            eval_loss=self._evaluate(eval_step, state, frozen, metrics)
        )
      due = step % self._cfg.checkpoint.every == 0 or asked != agree.CONTINUE
      if due or last:  # The history must not lag behind the checkpoint.
        self._log(display, pending, state, frozen)
        pending = None
      if due and not last:
        self._save(step, state)
      if asked == agree.STOP and not last:
        return None
      # After the records: data that hang must not take finished steps along.
      if not last:
        batches.ahead()
    return state

  def _feed(self, first: int, frozen) -> feed.Feed:
    """The batches after step `first`, as the step takes them."""
    batches = pipeline.train_batches(
        self._examples,
        self._section.batch_size,
        self._data_seed,
        first,
        share=self._share(),
    )
    batches = data_report.aloud(self._stage, self._examples, batches)
    if self._stage == 'pretrain' and self._cfg.data.feature_cache is not None:
      batches = features.Cache(
          self._cfg.data.feature_cache,
          self._program.model,
          frozen['vision'],
          self._examples.images,
      ).through(batches)
    return feed.Feed(batches, self._mesh)

  def _wish(self) -> int:
    """What this process would like to do after this step."""
    if self._guard.stopping:
      return agree.STOP
    minutes = self._cfg.checkpoint.minutes
    age = time.monotonic() - self._saved_at
    if minutes is not None and age >= 60 * minutes:
      return agree.SAVE
    return agree.CONTINUE

  def _watch_other(self, what: str, *, disposable: bool = False) -> None:
    self._guard.watch(
        f'{self._stage}: {what}',
        self._cfg.watchdog.other_minutes,
        disposable=disposable,
    )

  def _watch_step(self, step: int) -> None:
    self._guard.watch(
        f'{self._stage}: step {step}', self._cfg.watchdog.step_minutes
    )

  def _print_table(self, state, frozen) -> None:
    rows = table.table(
        *self._program.single((state.trained, frozen, state.opt_state))
    )
    cluster.say(f'{self._stage}: {table.summary(rows, self._mesh)}')
    if self._cfg.mesh.print_table:
      cluster.say(table.text(rows))

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
      frozen = self._program.freeze(frozen)
      trained, frozen = self._program.stack((trained, frozen))
      return self._program.init_state(trained), frozen, 0
    meta = self._checkpoints.read_meta(latest)
    cluster.say(f'{self._stage}: going on after step {latest}')
    self._frozen_hash = meta['frozen']
    frozen = self._program.freeze(self._load_frozen())
    abstract, _ = self._program.split(self._program.abstract_params())
    like = self._program.unstack(
        self._program.abstract_state(self._program.stack(abstract))
    )
    trained, rest = self._checkpoints.restore(latest, abstract, _beside(like))
    self._before = meta['seconds']
    state = state_lib.TrainState(trained=trained, **rest)
    state, frozen = self._program.stack((state, frozen))
    return state, frozen, meta['data']['next_index']

  def _load_frozen(self) -> Any:
    """What the stage does not train, in fp32."""
    return checkpoint.load_frozen(
        self._cfg.workdir,
        self._frozen_hash,
        trees.flatten(self._program.shardings),
    )

  def _share(self) -> np.ndarray:
    """The rows of a global batch that this process reads."""
    return sharding.rows_of_process(self._mesh, self._section.batch_size)

  def _evaluate(self, eval_step, state, frozen, metrics) -> float:
    """Mean held-out loss over targets, routing as in evaluation.

    `metrics` are of the step before it, whose time ends when they are there.
    """
    jax.block_until_ready(metrics)
    self._watch_other('evaluation')
    began = time.monotonic()
    sums = [
        eval_step(state.trained, frozen, sharding.put_batch(b, self._mesh))
        for b in self._eval_batches
    ]
    loss, weight = (
        sum(float(x) for x in column) for column in zip(*sums, strict=True)
    )
    self._last += time.monotonic() - began
    return loss / max(weight, 1.0)

  def _log(self, display, pending: Pending, state, frozen) -> None:
    """Writes the record of a step; `state` is the newest one."""
    host = jax.device_get(pending.metrics)
    self._checkpoints.check()
    self._watch_step(pending.step + 1)
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
    if self._save_seconds is not None:
      record['save_seconds'] = self._save_seconds
      self._save_seconds = None
    if pending.eval_loss is not None:
      record['eval_loss'] = pending.eval_loss
    self._writer.write(record)
    display.update(record)
    if not record['targets']:
      # Of the rows of all processes; the id of an empty one is 0.
      empty = int(np.sum(host['ids_B'] == 0))
      raise sources.DataError(
          f'Stage {self._stage!r}: the batch of step {pending.step} has no'
          ' target token: '
          + data_report.no_targets(
              self._examples, empty, self._section.batch_size
          )
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
    began = time.monotonic()
    self._watch_other(f'the checkpoint of step {step}')
    self._writer.publish()  # The history must not lag behind the checkpoint.
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
    self._poll.saved()
    self._last = self._saved_at = time.monotonic()
    self._save_seconds = self._last - began
    self._saves += 1
    self._blocked += self._save_seconds
    self._watch_step(step + 1)

  def _finish(self, state, frozen) -> None:
    self._watch_other('writing the model')
    jax.tree.map(lambda x: x.delete(), frozen)  # They may be rounded.
    state = self._program.unstack(state)
    params = trees.merge(state.trained, self._load_frozen())
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
    self._print_end()

  def _print_end(self) -> None:
    """Says what saving has cost since the stage was begun or resumed, and what
    was dropped."""
    data_report.print_read(self._stage, self._examples)
    total = time.monotonic() - self._began
    if self._saves:
      cluster.say(
          f'{self._stage}: {self._saves} checkpoints held training up for'
          f' {self._blocked:.2f} s, {self._blocked / total:.2%} of its time'
      )


def _beside(state: state_lib.TrainState) -> dict[str, Any]:
  """What a checkpoint keeps beside the trained parameters."""
  return {
      'opt_state': state.opt_state,
      'step': state.step,
      'skipped': state.skipped,
      'streak': state.streak,
  }
