# SPDX-License-Identifier: Apache-2.0
"""What the README names exists, and its tables say what the code does."""

import dataclasses
import importlib
import pathlib
import re

import numpy as np
import pytest

from configs import common
from moellava_jax import backbones, config
from moellava_jax.interop import config_json, lms, native
from tests import documented

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
COMMANDS = documented.commands(README)
CONFIGS = {
    path.stem: importlib.import_module(f'configs.{path.stem}').get_config()
    for path in (ROOT / 'configs').glob('*.py')
    if path.stem != 'common'
}


def _section(title: str) -> str:
  return README.split(f'\n## {title}\n')[1].split('\n## ')[0]


def _rows(title: str, head: str) -> list[list[str]]:
  """The cells of the table whose headings begin with `head`."""
  table = _section(title).split(f'\n{head} |')[1].split('\n\n')[0]
  lines = table.splitlines()[2:]
  return [[cell.strip() for cell in x.strip('|').split('|')] for x in lines]


def _names(cell: str) -> list[str]:
  return re.findall(r'`([^`]+)`', cell)


def test_every_config_is_there_and_named():
  named = set(re.findall(r'configs/(\w+)\.py', README))
  assert named - {'common'} <= CONFIGS.keys()
  assert CONFIGS.keys() - named == set()


def test_every_stage_of_a_config_builds():
  stages = set(re.findall(r'configs/(\w+)\.py:(\w+)', README))
  assert stages
  for name, stage in stages:
    importlib.import_module(f'configs.{name}').get_config(stage)


def test_every_override_exists():
  for command in COMMANDS:
    if '--config.' in command:
      name = re.findall(r'configs/(\w+)\.py', command + ' configs/shapes.py')[0]
      unknown = documented.unknown_overrides(command, CONFIGS[name])
      assert not unknown, command
  assert not documented.unknown_overrides(README, CONFIGS['phi2'])


def test_every_switch_of_the_fidelity_table_exists():
  rows = _rows('Fidelity', '| | default')
  keys = dict(config._flatten(CONFIGS['phi2'].to_dict())).keys()
  switches = [
      name for row in rows for name in re.findall(r'`([\w.]+)=', row[2])
  ]
  assert len(switches) >= len(rows) - 1
  for name in switches:
    assert any(f'.{key}'.endswith(f'.{name}') for key in keys), name


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_and_flag_exists(command):
  words = command.split()
  flags = {w[2:].split('=')[0] for w in words if re.match(r'--\w', w)}
  flags = {flag for flag in flags if not flag.startswith('config.')}
  if match := re.search(r'-m (moellava_jax[\w.]+)', command):
    path = ROOT / (match[1].replace('.', '/') + '.py')
    assert flags <= documented.flags_of(path.read_text()), command
  elif match := re.search(r'(tests/\w+\.py)\b', command):
    assert flags <= documented.flags_of((ROOT / match[1]).read_text()), command
  elif match := re.search(r'(launch/\w+\.sh)', command):
    text = (ROOT / match[1]).read_text()
    assert all(f'--{flag}' in text for flag in flags), command
  else:
    assert not flags, command


def test_every_extra_exists():
  extras = re.findall(r'pip install -e \.\[(\w+)\]', README)
  assert extras
  text = (ROOT / 'setup.py').read_text()
  assert all(f"'{extra}': " in text for extra in extras)


def test_every_file_of_the_tree_exists():
  tree = _section('Where things are').split('```')[1]
  folders = {-2: ROOT}
  for line in tree.strip('\n').splitlines():
    indent = len(line) - len(line.lstrip())
    first = line.split()[0]
    if first.endswith('/') and indent < 20:
      folders[indent] = folders[indent - 2] / first
      here = folders[indent]
    elif indent < 20:
      here = folders[indent - 2]
    for name in re.findall(r'\b\w+\.(?:py|sh)\b', line):
      assert (here / name).is_file(), line
    assert here.is_dir(), line


def _kind(llm: config.DecoderConfig, layers: str | None) -> str:
  """The `model_type` of the text half of `--to=hf`, or `no`."""
  base = config.from_dict(common.run('clip_l14_336', 'phi2')).model
  assert base.moe is not None
  moe = layers and dataclasses.replace(base.moe, layers=layers)
  model = dataclasses.replace(base, llm=llm, moe=moe or None)

  def no_weights(path: str) -> np.ndarray:
    raise AssertionError(path)

  try:
    made = native.make(
        model,
        no_weights,
        image_token=0,
        tower=None,
        dtype=np.dtype(np.float16),
        extra={},
    )
  except config.UserError:
    return 'no'
  return f'`{made.config["text_config"]["model_type"]}`'


def test_the_table_of_backbones():
  rows = _rows('Pretrained weights', '| family')
  listed = []
  for family, sizes, template, dense, interval, every in rows:
    (family,) = _names(family)
    assert _names(template) == [lms.FAMILIES[family].template]
    for name in _names(sizes):
      listed.append(name)
      llm = backbones.LMS[name]
      raw = config_json.decoder(family, llm) | {'model_type': family}
      back = lms.decoder(raw, 'x')[1]
      assert back.num_heads == llm.num_heads and back.norm == llm.norm
      assert [_kind(llm, x) for x in (None, 'interval', 'all')] == [
          dense,
          interval,
          every,
      ], name
  assert sorted(listed) == sorted(backbones.LMS.keys() - {'shapes'})
  assert [_names(row[0])[0] for row in rows] == list(lms.FAMILIES)


def test_the_table_of_published_models():
  rows = _rows("The paper's models", '| config')
  for name, lm, tower, positions in rows:
    c = CONFIGS[_names(name)[0].removesuffix('.py').removeprefix('configs/')]
    assert [c.model.llm.name] == _names(lm)
    assert [c.model.vision.name] == _names(tower)
    assert int(positions) == config.from_dict(c).model.vision.num_tokens
  assert len(rows) == len(CONFIGS) - 2  # Without `shapes` and `imported`.


def test_towers_are_listed():
  text = _section('Pretrained weights')
  for name in backbones.TOWERS.keys() - {'shapes'}:
    assert f'`{name}`' in text, name
