# SPDX-License-Identifier: Apache-2.0
"""Configs that runs have saved, by this version or an earlier one.

A field that has come since gets the value that repeats what was done before it
was there, so that old checkpoints load, and old runs go on.
"""

from collections.abc import Mapping
import copy
import json
from typing import Any

from moellava_jax import config

# Dotted path -> value. A section that a config does not have is left out.
ADDED: dict[str, Any] = {
    'model.loss_chunk': 16384,
    'model.attention': 'auto',
    **{f'{stage}.whole_lm': False for stage in config.STAGES},
    **{f'{stage}.arrangement': None for stage in config.STAGES},
    **{f'{stage}.grouped_world': None for stage in config.STAGES},
}


def read(text: str) -> config.TrainConfig:
  """A config from its JSON; see `build`."""
  return build(json.loads(text))


def build(raw: Mapping[str, Any]) -> config.TrainConfig:
  """A config from what a checkpoint holds.

  Raises:
    UserError: see `config.from_dict`; a field that no version has had, or one
      that is missing and was always there.
  """
  raw = copy.deepcopy(dict(raw))
  for path, value in ADDED.items():
    *parents, name = path.split('.')
    section: Any = raw
    for parent in parents:
      section = section.get(parent) if isinstance(section, dict) else None
    if isinstance(section, dict):
      section.setdefault(name, value)
  return config.from_dict(raw)
