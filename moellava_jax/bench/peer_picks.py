# SPDX-License-Identifier: Apache-2.0
"""Finds the setting in which a peer is fastest.

All are tried without compilation, then with torch.compile, the most promising
first. A layer is compiled in all of them; a model, which takes long, not where it
is far behind without (one thread, mostly), nor, on a GPU, after that has gained
nothing. At last what is fastest is tried again with huge pages, compiled and not.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from moellava_jax.bench import peer_cases, torch_process

# Times the best without compilation: a model that is slower is not compiled.
_HOPELESS = 1.5
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
      found[trial][part] = _timed(trial.call(case, torch, part))
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
    why = _why_not(case, found, plain, trial, parts)
    if why is None:
      measure(trial)
    else:
      found[trial] = {part: {'skipped': why} for part in parts}
  fastest = [*_best(plain, parts).values(), *_best(found, parts).values()]
  for trial in dict.fromkeys(fastest):
    if trial.setting.huge_pages is False:
      trials.append(_with_huge_pages(trial))
      measure(trials[-1])
  return {t.name: found[t] for t in trials}, _best(found, parts)


def _twin(trial: Trial) -> Trial:
  """The same, not compiled."""
  return trial._replace(setting=trial.setting._replace(compiled=False))


def _with_huge_pages(trial: Trial) -> Trial:
  return trial._replace(setting=trial.setting._replace(huge_pages=True))


def _seconds(
    found: Mapping[Trial, Any], trial: Trial, parts: tuple[str, ...]
) -> float:
  """Of the part that decides, the last one; infinite where it does not run."""
  return found[trial][parts[-1]].get('seconds', float('inf'))


def _why_not(
    case: peer_cases.Case,
    found: Mapping[Trial, Any],
    plain: Mapping[Trial, Any],
    trial: Trial,
    parts: tuple[str, ...],
) -> str | None:
  """Why it is not compiled; None: it is."""
  done = [t for t in found if t not in plain]
  for other in done:
    error = found[other][parts[-1]].get('error')
    if error and other.implementation == trial.implementation:
      return f'not compiled: {error}'
  if case.kind == 'layer':
    return None
  best_s = min(_seconds(plain, other, parts) for other in plain)
  its_s = _seconds(plain, _twin(trial), parts)
  if its_s > _HOPELESS * best_s:
    return f'not compiled: {its_s / best_s:.1f} x the best time without'
  gains = [_seconds(found, other, parts) < best_s for other in done]
  if case.device == 'cuda' and gains and not any(gains):
    return 'not compiled: compiling the best one gained nothing'
  return None


def _timed(call: Callable[[], float]) -> dict[str, Any]:
  try:
    first = call()
    # Two at least: a first one is slow, and where shapes vary, the second
    # compiles again.
    values = [call(), call()]
    if sum(values) < _LONG_S:
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
