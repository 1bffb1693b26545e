# SPDX-License-Identifier: Apache-2.0
"""The same sizes in torch and transformers, in turns with ours.

What is compared: one sparse layer; the whole training step of stage II (dense)
and of stage III (sparse); greedy answers about an image. `torch_models` says
what the peers are and where they are not quite the same.

A peer runs at its best: each of its settings is tried first (`peer_picks`), and
the fastest one takes turns with our programs. All settings are kept and shown,
those that were skipped with the reason. Only one program runs at a time, ours on
two devices of the CPU, as in training, or on one for layers and answers.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np

from moellava_jax import config, sharding
from moellava_jax.bench import (
    decode,
    measure,
    moe_layer,
    peer_cases,
    peer_ours,
    peer_picks,
    torch_process,
)
from moellava_jax.infer import generate
from moellava_jax.model import llava

DISPATCHES = ('einsum_256', 'index', 'ragged')

# At least so many times the speed of the peer, by kind, peer and part: on the
# CPU, and on a GPU.
GOALS = {
    ('layer', 'deepspeed', 'forward_backward'): (3.0, None),
    ('layer', 'loop', 'forward_backward'): (0.9, None),
    ('train', 'dense', 'step'): (0.85, 1.2),
    ('train', 'mixtral', 'step'): (1.0, 1.2),
    ('train', 'deepspeed', 'step'): (2.0, 2.0),
    ('decode', 'dense', 'steps'): (2.0, 2.0),
    ('decode', 'mixtral', 'steps'): (2.0, 2.0),
}
HEADER = (
    *('case', 'part', 'ours', 'time', 'peer', 'its best setting', 'time'),
    *('speed ratio', 'goal'),
)
SETTINGS_HEADER = ('case', 'peer', 'part', 'setting', 'time', 'first call')


def start(device: str) -> torch_process.Torch:
  """torch, not yet started, after JAX was told to leave room for it.

  Raises:
    UserError: torch or transformers is missing, or JAX has no GPU.
  """
  torch = torch_process.Torch(device)
  if device == 'cpu':
    sharding.simulate_devices(2)
    return torch
  # Both live on one GPU, of which JAX would take three quarters at once.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  if jax.default_backend() != 'gpu':
    raise config.UserError(
        f'JAX runs on {jax.default_backend()!r}, and --suite=gpu_peers needs a'
        ' GPU: install jax[cuda12] or jax[cuda13], or measure with'
        ' --suite=peers.'
    )
  return torch


def run(
    case: peer_cases.Case, repeats: int, torch: torch_process.Torch
) -> dict[str, Any]:
  """Times of ours and of each peer, in turns, and of all of its settings.

  Returns:
    `ours` (by program and part: a Time) and `peers` (by peer: `tried`, see
    `peer_picks.pick`, and by part `best`: the setting and its Time).
  """
  found: dict[str, Any] = {'ours': {}, 'peers': {}}
  chosen = {}
  for peer in case.peers:
    print(f'  {peer}', flush=True)
    tried, best = peer_picks.pick(case, peer, torch)
    found['peers'][peer] = {'tried': tried, 'best': {}}
    chosen |= {(peer, part): trial for part, trial in best.items()}
  print('  in turns', flush=True)
  programs = _ours(case)
  for part in peer_cases.PARTS[case.kind]:
    timed: dict[Any, Callable[[], float]] = {
        name: functools.partial(measure.seconds, parts[part])
        for name, parts in programs.items()
    }
    for (peer, its_part), trial in chosen.items():
      if its_part == part:
        timed[peer, trial.name] = trial.call(case, torch, part)
    for key, time in measure.in_turns(timed, repeats).items():
      if isinstance(key, tuple):
        entry = {'setting': key[1], 'seconds': time._asdict()}
        found['peers'][key[0]]['best'][part] = entry
      else:
        found['ours'].setdefault(key, {})[part] = time._asdict()
  for trial in set(chosen.values()):
    trial.drop(case, torch)
  return found


def _ours(case: peer_cases.Case) -> dict[str, dict[str, Callable[[], Any]]]:
  """Our programs, by name and part."""
  if case.kind == 'layer':
    llm = case.model.llm
    layer = moe_layer.Case(
        llm.width,
        llm.mlp_width,
        llm.mlp,
        _moe(case).num_experts,
        case.rows * case.length,
        case.model.compute_dtype,
    )
    return {
        way: moe_layer.programs(layer, way) for way in ('dense', *DISPATCHES)
    }
  if case.kind == 'train':
    count = min(2, jax.device_count())
    mesh = peer_ours.mesh_of(count)
    steps = peer_ours.programs(_models(case), case.rows, case.length, mesh)
    return {name: {'step': step} for name, step in steps.items()}
  return {'ours': _answers(case)}


def _moe(case: peer_cases.Case) -> config.MoeConfig:
  assert case.model.moe is not None, case.name
  return case.model.moe


def _models(case: peer_cases.Case) -> dict[str, config.ModelConfig]:
  """Our model by dispatch."""
  if case.model.moe is None:
    return {'dense': case.model}
  found = {}
  for name in DISPATCHES:
    way = moe_layer.WAYS[name]
    moe = dataclasses.replace(
        case.model.moe,
        dispatch=way.dispatch,  # pyright: ignore[reportArgumentType]
        max_group_size=way.size or case.length,
    )
    found[name] = dataclasses.replace(case.model, moe=moe)
  return found


def _answers(case: peer_cases.Case) -> dict[str, Callable[[], Any]]:
  mesh = peer_ours.mesh_of(1)
  model = llava.Llava(case.model)
  with sharding.use(mesh):
    params = decode.as_answered(model, mesh)
  tokens_BT = peer_ours.tokens(case.model, case.rows, case.length)
  images_BIHWC = peer_ours.images(case.model, case.rows)
  prompts = [
      generate.Prompt(*row) for row in zip(tokens_BT, images_BIHWC, strict=True)
  ]

  def answer(new: int) -> np.ndarray:
    return decode.answer(model, params, prompts, new, case.new, mesh)

  return {'prefill': lambda: answer(1), 'answer': lambda: answer(case.new)}


def _medians(
    case: peer_cases.Case, by_part: Mapping[str, Any]
) -> dict[str, float]:
  """Seconds by part; of decoding also those of the steps alone."""
  found = {part: time['median'] for part, time in by_part.items()}
  if case.kind == 'decode' and len(found) == 2:
    found['steps'] = found['answer'] - found['prefill']
  return found


def _shown(case: peer_cases.Case, part: str, seconds: float, time: Any) -> str:
  spread = ''
  if time is not None:
    spread = f' ± {(time["high"] - time["low"]) / 2 / time["median"]:.0%}'
  rate = ''
  if part in ('answer', 'steps') and seconds > 0:
    count = case.rows * (case.new - (part == 'steps'))
    rate = f' ({count / seconds:.0f} tokens/s)'
  return f'{1e3 * seconds:.1f} ms{spread}{rate}'


def table(
    case: peer_cases.Case, found: dict[str, Any]
) -> list[tuple[str, ...]]:
  """Rows of HEADER: each of ours against each peer at its best."""
  rows = []
  parts = (
      *peer_cases.PARTS[case.kind],
      *(['steps'] if case.kind == 'decode' else []),
  )
  for part in parts:
    for ours, our_times in found['ours'].items():
      our_s = _medians(case, our_times)[part]
      for peer, entry in found['peers'].items():
        # The dense FFNs are controls of each other, and of nothing else.
        if case.kind == 'layer' and (ours == 'dense') != (peer == 'dense'):
          continue
        mine = _shown(case, part, our_s, our_times.get(part))
        theirs = _peer_cells(case, part, peer, entry['best'], our_s)
        rows.append((case.name, part, ours, mine, peer, *theirs))
  return rows


def _peer_cells(
    case: peer_cases.Case,
    part: str,
    peer: str,
    best: dict[str, Any],
    our_s: float,
) -> tuple[str, ...]:
  times = {p: b['seconds'] for p, b in best.items()}
  its_s = _medians(case, times).get(part)
  if its_s is None:
    return ('none runs', '', '', '')
  setting = best['answer' if part == 'steps' else part]['setting']
  on_gpu = case.device == 'cuda'
  goal = GOALS.get((case.kind, peer, part), (None, None))[on_gpu]
  if on_gpu and case.kind == 'decode' and case.rows > 1:
    goal = None  # There it is of one answer at a time.
  return (
      setting,
      _shown(case, part, its_s, times.get(part)),
      f'{its_s / our_s:.2f}',
      '' if goal is None else f'>= {goal:g}',
  )


def settings_table(
    case: peer_cases.Case, found: dict[str, Any]
) -> list[tuple[str, ...]]:
  """Rows of SETTINGS_HEADER: all that was tried."""
  rows = []
  for peer, entry in found['peers'].items():
    for setting, parts in entry['tried'].items():
      for part, tried in parts.items():
        cells = (tried.get('error') or tried.get('skipped', ''), '')
        if 'seconds' in tried:
          cells = (
              f'{1e3 * tried["seconds"]:.1f} ms',
              f'{tried["first"]:.1f} s',
          )
        rows.append((case.name, peer, part, setting, *cells))
  return rows
