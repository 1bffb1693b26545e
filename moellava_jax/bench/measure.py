# SPDX-License-Identifier: Apache-2.0
"""Times of programs that are run in turns, and where they are kept."""

from collections.abc import Callable, Mapping
import functools
from importlib import metadata
import json
import os
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moellava_jax import config
from moellava_jax.train import about

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')


class Time(NamedTuple):
  """Seconds of a call: the median, and the quartiles around it."""

  median: float
  low: float
  high: float


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, Time]:
  """Wall time of each call, all of them in turns.

  In turns, so that what else happens on the machine hits all alike. Every call
  is made once before, to compile it.

  Args:
    runs: what to call; waited for until its arrays are there.
    repeats: how often each is measured, at least twice.
  """
  return in_turns(
      {name: functools.partial(seconds, run) for name, run in runs.items()},
      repeats,
  )


def seconds(run: Callable[[], Any]) -> float:
  """Wall time of a call, until its arrays are there."""
  began = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - began


def in_turns(
    timed: Mapping[Any, Callable[[], float]], repeats: int
) -> dict[Any, Time]:
  """`interleaved`, of calls that say themselves how many seconds they took."""
  found: dict[Any, list[float]] = {name: [] for name in timed}
  for run in timed.values():
    run()
  for _ in range(repeats):
    for name, run in timed.items():
      found[name].append(run())
  return {name: _time(values) for name, values in found.items()}


def matmul_peak(dtype: str, repeats: int) -> float:
  """FLOP/s of a product of two large square matrices on the first device."""
  side = 1536 if jax.default_backend() == 'cpu' else 8192
  x = jax.random.normal(jax.random.key(0), (side, side), jnp.dtype(dtype))
  product = jax.jit(jnp.matmul)
  times = interleaved({'product': lambda: product(x, x)}, repeats)
  return 2.0 * side**3 / times['product'].median


def _time(values: list[float]) -> Time:
  low, median, high = statistics.quantiles(values, n=4, method='inclusive')
  return Time(median, low, high)


def beside_goal(
    value: float, goal: float | None, *, at_least: bool = False
) -> str:
  """A figure for people, and whether it reaches its goal where it has one."""
  shown = f'{value:.2f}'
  if goal is None:
    return shown
  met = value >= goal if at_least else value <= goal
  sign = '>=' if at_least else '<='
  return f'{shown} {sign} {goal:g} {"met" if met else "missed"}'


def environment() -> dict[str, Any]:
  """What a result depends on beside the code."""
  device = jax.devices()[0]
  return {
      'revision': about.revision(),
      'versions': {name: metadata.version(name) for name in PACKAGES},
      'device': f'{jax.device_count()} x {device.device_kind}',
      'cores': os.cpu_count(),
      'glibc_tunables': os.environ.get('GLIBC_TUNABLES'),
      'matmul_precision': jax.config.values['jax_default_matmul_precision'],
  }


class Results:
  """The finished cases of a suite, in one JSON file.

  Attributes:
    path: of the file.
    cases: result by case, in the order in which they were measured.
  """

  def __init__(self, folder: str, suite: str, settings: Mapping[str, Any]):
    """Reads what is there.

    Args:
      folder: made if need be.
      suite: names the file.
      settings: of the measurement; results of others are not gone on with.

    Raises:
      UserError: the file was written by other code, on another machine, or
        with other settings.
    """
    self.path = pathlib.Path(folder) / f'{suite}.json'
    self._about = {**environment(), 'settings': dict(settings)}
    self.cases: dict[str, Any] = {}
    if not self.path.exists():
      return
    found = json.loads(self.path.read_text(encoding='utf-8'))
    other = [
        name
        for name, value in self._about.items()
        if found['about'].get(name) != value
    ]
    if other:
      raise config.UserError(
          f'{self.path} was measured with another {", ".join(other)}. Name'
          ' another --out, or delete the file to measure again.'
      )
    self.cases = found['cases']

  def add(self, name: str, result: Any) -> None:
    """Keeps the result of a case; the file is whole at any moment."""
    self.cases[name] = result
    self.path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({'about': self._about, 'cases': self.cases}, indent=1)
    part = self.path.with_suffix('.part')
    part.write_text(text + '\n', encoding='utf-8')
    part.replace(self.path)
