# SPDX-License-Identifier: Apache-2.0
"""What a run writes about itself, for reports and for people."""

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from moellava_jax import checkpoint, config, run_folder, trees
from moellava_jax.train import cluster

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain')


def write_run(cfg: config.TrainConfig) -> None:
  """RUN/config.json and RUN/environment.json, by process 0."""
  if not cluster.is_first():
    return
  run_folder.write_json(
      os.path.join(cfg.workdir, 'config.json'), dataclasses.asdict(cfg)
  )
  run_folder.write_json(
      os.path.join(cfg.workdir, 'environment.json'),
      {
          'revision': revision(),
          'versions': versions(),
          'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
          'python': platform.python_version(),
          'seed': cfg.seed,
      },
  )


def write_stages(cfg: config.TrainConfig) -> None:
  """RUN/stages.json from the finished stages: nothing to lose by a kill."""
  if not cluster.is_first():
    return
  stages = {}
  for stage in config.STAGES:
    if (final := checkpoint.final_of(cfg.workdir, stage)) is not None:
      about = json.loads((final / 'stage.json').read_text())
      stages[stage] = {k: v for k, v in about.items() if k != 'params'}
  run_folder.write_json(os.path.join(cfg.workdir, 'stages.json'), stages)


def versions() -> dict[str, str]:
  """Of the packages that decide what a run computes."""
  return {p: importlib.metadata.version(p) for p in _PACKAGES}


def revision() -> str:
  """The git commit of the code, '+' if changed; 'unknown' outside git."""
  here = os.path.dirname(os.path.abspath(__file__))

  def git(*args):
    return subprocess.run(
        ('git', '-C', here, *args), capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return 'unknown'


def could_have_huge_pages(
    setting: str = '/sys/kernel/mm/transparent_hugepage/enabled',
) -> bool:
  """Whether the system gives them to who asks, and glibc was not told."""
  path = pathlib.Path(setting)
  told = 'GLIBC_TUNABLES' in os.environ
  return not told and path.exists() and '[madvise]' in path.read_text()


def count(tree: Any) -> int:
  """Number of parameters in a tree."""
  return sum(math.prod(x.shape) for x in trees.flatten(tree).values())


def parameter_counts(params: Any, cfg: config.ModelConfig) -> dict[str, int]:
  """Total parameters, and those that one token uses (k of E experts).

  The paper's figures ("5.3B / 3.6B") are those of the decoder alone, `llm_*`.
  """
  total = count(params)
  llm = count(params['llm'])
  idle = 0
  if cfg.moe is not None:
    experts = sum(
        math.prod(x.shape)
        for path, x in trees.flatten(params).items()
        if '/moe/experts/' in path
    )
    unused = cfg.moe.num_experts - cfg.moe.top_k
    idle = experts * unused // cfg.moe.num_experts
  return {
      'total_parameters': total,
      'activated_parameters': total - idle,
      'llm_total_parameters': llm,
      'llm_activated_parameters': llm - idle,
  }
