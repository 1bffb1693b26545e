# SPDX-License-Identifier: Apache-2.0
"""Traces of a few training steps, for Perfetto and TensorBoard."""

from collections.abc import Iterator
import contextlib
import os
import re
from typing import NamedTuple

import jax

from moellava_jax import config, run_folder
from moellava_jax.train import cluster


class Steps(NamedTuple):
  """Numbers of the first and the last step that is recorded, of any stage."""

  first: int
  last: int


def parse(text: str) -> Steps:
  """`10-14` -> Steps(10, 14), `10` -> Steps(10, 10).

  Raises:
    UserError: anything else.
  """
  found = re.fullmatch(r'(\d+)(?:-(\d+))?', text)
  steps = Steps(0, 0)
  if found is not None:
    steps = Steps(int(found[1]), int(found[2] or found[1]))
  if not 1 <= steps.first <= steps.last:
    raise config.UserError(
        f'--profile_steps={text}: expected the numbers of the first and the'
        ' last step, from 1, such as 10-14.'
    )
  return steps


class Profile:
  """Records `steps` of one stage into RUN/profile/STAGE.

  Of several processes each has a folder PROCESS of its own in there: those of
  one host would overwrite each other's files. JAX writes for Perfetto only on a
  disk, not to gs://.

  A trace that fails is reported, and training goes on.
  """

  def __init__(self, workdir: str, stage: str, steps: Steps | None):
    self._steps = steps
    self._folder = os.path.join(workdir, 'profile', stage)
    if not cluster.alone():
      self._folder = os.path.join(self._folder, f'process-{cluster.process()}')
    self._stage = stage
    self._runs = False

  @contextlib.contextmanager
  def around(self) -> Iterator[None]:
    """Ends the trace however the steps end."""
    try:
      yield
    finally:
      self._stop()

  def before(self, step: int) -> None:
    """Call before a step is dispatched; the first one records compiling too."""
    if self._steps is not None and step == self._steps.first:
      with self._reported():
        jax.profiler.start_trace(
            self._folder, create_perfetto_trace='://' not in self._folder
        )
        self._runs = True

  def after(self, step: int, results: object) -> None:
    """Call with what a step returns; waits for it if it is the last one."""
    if self._runs and self._steps is not None and step == self._steps.last:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if not self._runs:
      return
    self._runs = False
    with self._reported():
      jax.profiler.stop_trace()
      cluster.say(f'{self._stage}: the trace is in {self._folder}')

  @contextlib.contextmanager
  def _reported(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      print(
          f'{self._stage}: no complete trace in {self._folder}:'
          f' {run_folder.reason(error)}. Training goes on.',
          flush=True,
      )
