# SPDX-License-Identifier: Apache-2.0
"""Finds the setting in which a peer is fastest.

All are tried without compilation. Then torch.compile is, first with the threads
and the way of waiting that were best without it; with others only if that has
gained something, and if they are not far behind.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from moellava_jax.bench import peer_cases, torch_process

# Times the best without compilation: what is slower is not compiled.
_HOPELESS = 1.4
_LONG_S = 1.0
# What is picked by the time of another part, because the two are subtracted.
_PICKED_BY = {'prefill': 'answer'}


class Trial(NamedTuple):
  """An implementation of a peer and how it runs."""

  implementation: str  # See `torch_models`.
  setting: torch_process.Setting

  @property
  def name(self) -> str:
    return f'{self.implementation}, {self.setting.name}'

  def call(
      self, case: peer_cases.Case, torch: torch_process.Torch, part: str
  ) -> Callable[[], float]:
    """What runs a part of a case once and returns its seconds."""
    work = case.work(self.implementation)
    return functools.partial(torch.seconds, self.setting, work, part)

  def drop(self, case: peer_cases.Case, torch: torch_process.Torch) -> None:
    torch.drop(self.setting, case.work(self.implementation))


def pick(
    case: peer_cases.Case, peer: str, torch: torch_process.Torch
) -> tuple[dict[str, Any], dict[str, Trial]]:
  """Tries all settings of a peer; only what is fastest stays in memory.

  Returns:
    By trial and part: the least `seconds` of a few calls and those of the
    `first` one, with compilation; or the `error`; or why it was `skipped`. And
    the best trial of each part of which there is one.
  """
  trials = [
      Trial(implementation, setting)
      for implementation in peer_cases.IMPLEMENTATIONS[peer]
      for setting in case.settings
  ]
  parts = peer_cases.PARTS[case.kind]
  found: dict[Trial, dict[str, Any]] = {}
  kept: set[Trial] = set()

  def measure(trial):
    found[trial] = {}
    for part in parts:
      found[trial][part] = _timed(
          trial.call(case, torch, part), trial.setting.compiled
      )
    kept.add(trial)
    for other in kept - set(_best(found, parts).values()):
      other.drop(case, torch)
      kept.remove(other)

  for trial in trials:
    if not trial.setting.compiled:
      measure(trial)
  plain = dict(found)
  compiled = [trial for trial in trials if trial.setting.compiled]
  for trial in sorted(compiled, key=lambda t: _seconds(plain, _twin(t), parts)):
    why = _why_not(found, plain, trial, parts)
    if why is None:
      measure(trial)
    else:
      found[trial] = {part: {'skipped': why} for part in parts}
  return {t.name: found[t] for t in trials}, _best(found, parts)


def _twin(trial: Trial) -> Trial:
  """The same, not compiled."""
  return trial._replace(setting=trial.setting._replace(compiled=False))


def _seconds(
    found: Mapping[Trial, Any], trial: Trial, parts: tuple[str, ...]
) -> float:
  """Of the part that decides, the last one; infinite where it does not run."""
  return found[trial][parts[-1]].get('seconds', float('inf'))


def _why_not(
    found: Mapping[Trial, Any],
    plain: Mapping[Trial, Any],
    trial: Trial,
    parts: tuple[str, ...],
) -> str | None:
  """Why it is not worth compiling; None: it is."""
  best_s = min(_seconds(plain, other, parts) for other in plain)
  its_s = _seconds(plain, _twin(trial), parts)
  if its_s > _HOPELESS * best_s:
    return f'not compiled: {its_s / best_s:.1f} x the best time without'
  done = [t for t in found if t not in plain]
  for other in done:
    error = found[other][parts[-1]].get('error')
    if error and other.implementation == trial.implementation:
      return f'not compiled: {error}'
  gains = [_seconds(found, other, parts) < best_s for other in done]
  if gains and not any(gains):
    return 'not compiled: compiling the best one gained nothing'
  return None


def _timed(call: Callable[[], float], compiled: bool) -> dict[str, Any]:
  try:
    first = call()
    # What takes so long has warmed up meanwhile.
    if not compiled and first > _LONG_S:
      return {'seconds': first, 'first': first}
    values = [call()]
    # Where shapes vary, the second call compiles again.
    while len(values) < (2 if compiled else 1) or (
        len(values) < 3 and sum(values) < _LONG_S
    ):
      values.append(call())
  except torch_process.TorchError as error:  # Which is a result, too.
    return {'error': str(error)}
  return {'seconds': min(values), 'first': first}


def _best(
    found: Mapping[Trial, Any], parts: tuple[str, ...]
) -> dict[str, Trial]:
  """By part the fastest trial that runs."""
  best = {}
  for part in parts:
    decides = _PICKED_BY.get(part, part)
    times = {
        trial: tried[decides]['seconds']
        for trial, tried in found.items()
        if 'seconds' in tried.get(decides, {})
    }
    if times:
      best[part] = min(times, key=lambda t: times[t])
  return best
