# SPDX-License-Identifier: Apache-2.0
"""A step compiled ahead of time: what XLA says of it, and what it takes.

Nothing is materialised to compile; `measure` runs it once, to compare.
"""

import collections
import ctypes
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from moellava_jax import config, sharding
from moellava_jax.data import batch as batch_lib
from moellava_jax.train import init, placement, program, residuals, topology

# "-done" belongs to a "-start"; the CPU's have tuple types.
_COLLECTIVE = re.compile(
    r'\s(all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute)'
    r'(?:-start)?\('
)


class Compiled(NamedTuple):
  """What XLA reports of a step, in bytes per device.

  Attributes:
    target: the devices it was compiled for.
    arguments: state, frozen parameters and batch.
    temporary: all else at its peak: gradients, activations, whole weights.
    outputs: results that do not overwrite an argument.
    flops: of one device; a loop counts once (micro-batches, repeated layers).
    collectives: instructions by kind; a loop counts once.
    seconds: to trace and compile.
  """

  target: str
  arguments: int
  temporary: int
  outputs: int
  flops: float
  collectives: dict[str, int]
  seconds: float

  @property
  def total(self) -> int:
    return self.arguments + self.temporary + self.outputs


class DoesNotFit(config.UserError):
  """The compiler found that the step does not fit the device's memory."""


class Step:
  """The training step of a stage on the devices of a target."""

  def __init__(
      self,
      cfg: config.TrainConfig,
      stage: str,
      target: topology.Target,
  ):
    """Traces and compiles it.

    Raises:
      DoesNotFit: the compiler says so; its message names the bytes.
    """
    began = time.monotonic()
    self._cfg, self._stage, self._target = cfg, stage, target
    self._mesh = placement.mesh_for(cfg, stage, target.devices, target.memory)
    rows = cfg.stage(stage).batch_size
    with topology.use(self._mesh, target):
      self._program = program.Program(cfg, stage, self._mesh, 1)
      trained, frozen = self._in_form(self._program.abstract_params())
      state = self._program.abstract_state(trained)
      batch = residuals.abstract_batch(
          cfg, stage, rows, sharding.of_batch(self._mesh)
      )
      lowered = self._program.train_step(state, frozen).lower(
          state, frozen, batch
      )
      try:
        self._step = lowered.compile()
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        raise DoesNotFit(_first_lines(str(error))) from error
    self._seconds = time.monotonic() - began

  def report(self) -> Compiled:
    """What XLA says of it."""
    stats = self._step.memory_analysis()
    cost = self._step.cost_analysis()
    assert stats is not None and cost is not None
    text = self._step.as_text() or ''
    return Compiled(
        self._target.name,
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        cost['flops'],
        dict(collections.Counter(_COLLECTIVE.findall(text))),
        self._seconds,
    )

  def measure(self) -> int:
    """Runs it once on random parameters and data; returns bytes of a device.

    On accelerators their own peak; on the CPU, whose devices share it, the
    growth of the resident memory divided by their number (Linux only). That
    counts what the first step loads once: about 0.2 GiB.
    """
    first = self._target.devices[0]
    with topology.use(self._mesh, self._target):
      if first.platform != 'cpu':
        jax.block_until_ready(self._step(*self.arguments()))
        return first.memory_stats()['peak_bytes_in_use']
      before = _resident('VmRSS')
      arguments = self.arguments()
      _forget_peak()
      jax.block_until_ready(self._step(*arguments))
      return (_resident('VmHWM') - before) // len(self._target.devices)

  def __call__(self, state: Any, frozen: Any, batch: Any) -> Any:
    """Runs it: (state, metrics); the given state is donated."""
    return self._step(state, frozen, batch)

  def arguments(self) -> tuple[Any, Any, batch_lib.Batch]:
    """Random (state, frozen, batch), on devices that exist."""
    with topology.use(self._mesh, self._target):
      params = init.fresh(
          self._program.model, 0, self._mesh, self._program.probe_sizes
      )
      trained, frozen = self._in_form(params)
      state = self._program.init_state(trained)
      rows = self._cfg.stage(self._stage).batch_size
      share = sharding.rows_of_process(self._mesh, rows)
      batch = jax.tree.map(lambda x: x[share], self._random_batch())
      batch = sharding.put_batch(batch, self._mesh)
      return jax.block_until_ready((state, frozen, batch))

  def _in_form(self, params: Any) -> tuple[Any, Any]:
    """(trained, frozen) as the step takes them."""
    trained, frozen = self._program.split(params)
    return self._program.stack((trained, self._program.freeze(frozen)))

  def _random_batch(self) -> batch_lib.Batch:
    """Rows that begin with their images; the rest is text, all supervised."""
    cfg, rng = self._cfg, np.random.default_rng(0)
    rows = cfg.stage(self._stage).batch_size
    empty = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype),
        residuals.abstract_batch(cfg, self._stage, rows),
    )
    shape = empty.tokens_BT.shape
    tokens_BT = rng.integers(1, cfg.model.llm.vocab_size, shape, np.int32)
    if self._stage != 'warmup':
      images = empty.images_BIHWC.shape[1] * cfg.model.vision.num_tokens
      tokens_BT[:, : min(images, shape[1] - 1)] = config.IMAGE_TOKEN
    return empty._replace(
        tokens_BT=tokens_BT,
        targets_BT=np.maximum(np.roll(tokens_BT, -1, axis=1), 0),
        loss_weight_BT=np.ones(shape, np.float32),
        segment_ids_BT=np.ones(shape, np.int32),
        positions_BT=np.broadcast_to(
            np.arange(shape[1], dtype=np.int32), shape
        ).copy(),
        images_BIHWC=rng.integers(0, 256, empty.images_BIHWC.shape, np.uint8),
        ids_B=np.arange(rows, dtype=np.uint32),
    )


def _first_lines(text: str) -> str:
  return ' '.join(line.strip() for line in text.splitlines()[:2])


def _resident(field: str) -> int:
  """Bytes of resident memory of this process: now (VmRSS) or peak (VmHWM).

  What was freed is given back first (Linux; malloc_trim(3)).
  """
  ctypes.CDLL(None).malloc_trim(0)
  with open('/proc/self/status', encoding='ascii') as file:
    for line in file:
      if line.startswith(field + ':'):
        return int(line.split()[1]) * 1024
  raise ValueError(f'/proc/self/status has no {field}.')


def _forget_peak() -> None:
  """Sets VmHWM to the present VmRSS (proc(5), clear_refs)."""
  with open('/proc/self/clear_refs', 'w', encoding='ascii') as file:
    file.write('5')
