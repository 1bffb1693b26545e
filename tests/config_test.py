# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import subprocess
import sys

import ml_collections
import pytest

from configs import shapes
from moellava_jax import config, saved_config
from tests import tiny


@pytest.mark.parametrize(
    'stage', ['all', 'smoke', 'warmup', 'pretrain', 'finetune', 'moe']
)
def test_every_stage_of_the_config_builds(stage):
  cfg = config.from_dict(shapes.get_config(stage))
  assert hash(cfg)
  expected = config.STAGES if stage in ('all', 'smoke') else (stage,)
  assert cfg.stages == expected


def test_unknown_stage_names_the_known_ones():
  with pytest.raises(ValueError, match="'tune'.*finetune"):
    shapes.get_config('tune')


@pytest.mark.parametrize(
    'path, value, message',
    [
        ('model.moe.num_expertz', 4, r'config.model.moe has no .*num_expertz'),
        ('finetune.learning_rate', 1.0, 'config.finetune has no'),
        ('extra', 1, r"config has no fields \['extra'\]"),
        ('model.moe.group', 'device', "config.model.moe.group is 'device'"),
        ('model.moe.top_k', 2.5, 'config.model.moe.top_k is 2.5; expected int'),
        ('model.vision.mean', (0.5,), 'expected 3 values'),
        ('data', 3, 'config.data is 3; expected a section'),
        ('seed', True, 'config.seed is True; expected int'),
        (
            'moe.accumulate',
            0,
            'config.moe.accumulate is 0; expected at least 1',
        ),
        ('model.moe.top_k', 5, 'top_k is 5; expected 1 to num_experts=4'),
        ('model.moe.layers', 'intervall', "'intervall': expected one of"),
        ('stages', ('tune',), "config.stages has .'tune'."),
        ('data.images', 'photos', 'go with config.data.json'),
        ('data.json', 'gs://b/d.json', 'read from a disk.*config.data.json=D'),
        ('data.shapes.dir', 'gs://b/d', 'config.data.shapes.dir is gs://b/d'),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
  raw = shapes.get_config().to_dict()
  *parents, name = path.split('.')
  section = raw
  for parent in parents:
    section = section[parent]
  section[name] = value
  with pytest.raises(ValueError, match=message):
    config.from_dict(raw)


def test_sorted_rows_do_not_go_with_an_expert_axis():
  raw = shapes.get_config().to_dict()
  raw['model']['moe']['dispatch'] = 'ragged'
  raw['mesh']['expert'] = 2
  with pytest.raises(config.UserError, match="'ragged' and mesh.expert is 2"):
    config.from_dict(raw)
  raw['mesh']['expert'] = 1
  config.from_dict(raw)


def test_a_run_may_go_on_with_another_way_of_the_same_results():
  def saved(dispatch):
    raw = shapes.get_config().to_dict()
    raw['model']['moe']['dispatch'] = dispatch
    return config.from_dict(raw)

  assert not config.differences(saved('einsum'), saved('auto'), 'moe')
  assert not config.differences(saved('index'), saved('einsum'), 'moe')
  (line,) = config.differences(saved('einsum'), saved('ragged'), 'moe')
  assert line.startswith('model.moe.dispatch')


def test_a_stage_may_have_its_own_arrangement():
  # As the scripts of the original: stage I is shuffled, the others are not.
  cfg = tiny.train_config(
      data__arrangement='grouped',
      pretrain__arrangement='shuffled',
      moe__grouped_world=8,
  )
  used = [cfg.stage_pipeline(stage) for stage in config.STAGES]
  assert [x.arrangement for x in used] == ['shuffled'] * 2 + ['grouped'] * 2
  assert [x.grouped_world for x in used] == [16, 16, 16, 8]
  with pytest.raises(config.UserError, match='moe.batch_size is 16.*world=5'):
    tiny.train_config(moe__arrangement='grouped', moe__grouped_world=5)
  with pytest.raises(config.UserError, match="does not pack, as stage 'moe'"):
    tiny.train_config(moe__arrangement='packed', data__parity_truncation=True)


def test_a_stage_that_is_done_does_not_mind_how_a_later_one_is_arranged():
  before = tiny.train_config()
  later = tiny.train_config(moe__arrangement='grouped', moe__grouped_world=4)
  assert config.differences(before, later, 'finetune') == []
  assert config.differences(before, later, 'moe') == [
      "moe.arrangement: None in the checkpoint, 'grouped' now",
      'moe.grouped_world: None in the checkpoint, 4 now',
  ]


def test_a_missing_field_is_an_error():
  raw = shapes.get_config().to_dict()
  del raw['model']['moe']['dispatch']
  with pytest.raises(ValueError, match=r"config.model.moe lacks .*'dispatch'"):
    config.from_dict(raw)


def test_a_saved_config_reads_back():
  cfg = config.from_dict(shapes.get_config())
  assert saved_config.read(config.to_json(cfg)) == cfg


def test_a_config_of_an_earlier_version_reads_back():
  cfg = config.from_dict(shapes.get_config())
  raw = json.loads(config.to_json(cfg))
  for path in saved_config.ADDED:
    *parents, name = path.split('.')
    section = raw
    for parent in parents:
      section = section[parent]
    del section[name]
  assert saved_config.build(raw) == cfg
  raw['model']['moe'] = None  # A dense model has no such section to fill.
  assert saved_config.build(raw).model.moe is None
  del raw['model']['remat']
  with pytest.raises(config.UserError, match="config.model lacks .*'remat'"):
    saved_config.build(raw)


def test_derived_paths_follow_the_run_directory_and_the_seed():
  c = shapes.get_config()
  c.workdir, c.seed = 'elsewhere', 3
  cfg = config.from_dict(c)
  assert cfg.finetune.data.json == 'elsewhere/data/finetune.json'
  assert cfg.data.shapes is not None
  assert cfg.data.shapes == dataclasses.replace(
      cfg.data.shapes, dir='elsewhere/data', seed=3
  )


def test_one_override_replaces_the_data_of_every_stage_but_the_warmup():
  cfg = tiny.train_config('RUN', data__json='mine.json', data__images='photos')
  for stage in ('pretrain', 'finetune', 'moe'):
    data = cfg.stage_data(stage)
    assert (data.json, data.images, data.eval_json) == (
        'mine.json',
        'photos',
        None,
    )
  assert cfg.stage_data('warmup').json == 'RUN/data/warmup.json'


def test_types_from_the_command_line():
  script = (
      'from absl import app\n'
      'from moellava_jax.train import main\n'
      'from moellava_jax import config\n'
      'app.run(lambda _: print(config.from_dict(main._CONFIG.value)))\n'
  )

  def call(*overrides):
    return subprocess.run(
        [
            sys.executable,
            '-c',
            script,
            '--config=configs/shapes.py:moe',
            *overrides,
        ],
        capture_output=True,
        text=True,
        cwd=shapes.__file__.rsplit('/', 2)[0],
    )

  done = call(
      '--config.moe.lr=1',
      '--config.model.moe.layers=(1,3)',
      '--config.model.moe.eval_capacity_factor=2.0',
      '--config.data.json=x.json',
  )
  for text in (
      'lr=1.0',
      "layers='(1,3)'",
      'eval_capacity_factor=2.0',
      "json='x.json'",
  ):
    assert text in done.stdout, done.stderr
  failed = call('--config.model.moe.num_expert=8')
  assert failed.returncode and 'num_expert' in failed.stderr


def test_layers_may_be_a_list():
  raw = shapes.get_config().to_dict()
  raw['model']['moe']['layers'] = [1, 3]
  assert config.from_dict(raw).model.moe.layer_ids(4) == (1, 3)


def test_config_dict_stays_editable_by_scripts():
  c = shapes.get_config()
  assert isinstance(c, ml_collections.ConfigDict)
  c.model.moe.num_experts = 8
  assert config.from_dict(c).model.moe.num_experts == 8


def test_shapes_may_lie_outside_a_run_folder_in_a_store():
  raw = shapes.get_config()
  raw.workdir = 'gs://bucket/run'
  with pytest.raises(config.UserError, match='--config.data.shapes.dir=DIR'):
    config.from_dict(raw)
  raw.data.shapes.dir = '/disk/shapes'
  cfg = config.from_dict(raw)
  for stage in config.STAGES:
    assert cfg.stage_data(stage).json.startswith('/disk/shapes/')
    assert cfg.stage_data(stage).images == '/disk/shapes'
