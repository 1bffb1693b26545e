# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest

from moellava_jax import config, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import init, placement, program, table
from tests import tiny


def _config(**overrides):
  cfg = tiny.train_config(**{'mesh__expert': None, **overrides})
  return dataclasses.replace(
      cfg,
      model=tiny.model_config(moe=cfg.model.moe, width=256, vocab_size=4096),
  )


def _sizes(cfg, stage, **given):
  return tuple(placement.mesh_for(cfg, stage, **given).shape.values())


def test_the_expert_axis_is_chosen_by_experts_and_devices():
  cfg, eight = _config(), jax.devices()
  assert _sizes(cfg, 'moe') == (2, 1, 4, 1)
  assert _sizes(cfg, 'moe', given=eight[:2]) == (1, 1, 2, 1)
  assert _sizes(cfg, 'moe', given=eight[:1]) == (1, 1, 1, 1)
  assert _sizes(cfg, 'finetune') == (8, 1, 1, 1)
  assert _sizes(_config(mesh__tensor=2), 'moe') == (1, 1, 4, 2)
  assert _sizes(_config(mesh__expert=1), 'moe') == (8, 1, 1, 1)
  assert _sizes(_config(mesh__data=4), 'moe') == (4, 1, 2, 1)
  three = _config(model__moe__num_experts=6)
  assert _sizes(three, 'moe') == (4, 1, 2, 1)
  ragged = _config(model__moe__dispatch='ragged')
  assert _sizes(ragged, 'moe') == (8, 1, 1, 1)


def test_parameters_are_divided_as_far_as_memory_asks_for():
  cfg = _config()
  whole = sum(
      4 * x.size
      for x in jax.tree.leaves(tiny.params_of(cfg.stage_model('finetune')))
  )
  # Divided by 8, gradient and moments take 3/8 of the parameters.
  assert _sizes(cfg, 'finetune', memory=int(2.9 * whole)) == (8, 1, 1, 1)
  assert _sizes(cfg, 'finetune', memory=int(2.2 * whole)) == (4, 2, 1, 1)
  assert _sizes(cfg, 'finetune', memory=1) == (1, 8, 1, 1)
  # The projector alone needs neither gradients nor moments of the rest.
  assert _sizes(cfg, 'pretrain', memory=int(2.2 * whole)) == (8, 1, 1, 1)
  fixed = _config(mesh__fsdp=1)
  assert _sizes(fixed, 'finetune', memory=1) == (8, 1, 1, 1)


@pytest.mark.parametrize(
    'overrides, message',
    [
        (dict(mesh__data=3), 'needs 3 devices, but there are 8'),
        (dict(mesh__data=-1, mesh__expert=-1), 'one may be -1'),
        (
            dict(mesh__expert=8),
            r"num_experts=4 is not a multiple of the mesh axis 'expert'.*8.*"
            r'--config.mesh.expert',
        ),
        (dict(mesh__tensor=4, mesh__expert=1), "num_heads=2 .*'tensor'"),
        (dict(mesh__fsdp=8, model__llm__width=36), "width=36 .*'fsdp'"),
        (
            dict(moe__batch_size=20),
            r"Stage 'moe': batch_size=20 is not a multiple of 8 .*accumulate",
        ),
        (dict(moe__accumulate=3), 'not a multiple of 24'),
    ],
)
def test_what_does_not_divide_is_an_error_before_compiling(overrides, message):
  width = overrides.pop('model__llm__width', 16)
  cfg = tiny.train_config(**{'mesh__expert': None, **overrides})
  cfg = dataclasses.replace(
      cfg, model=tiny.model_config(moe=cfg.model.moe, width=width)
  )
  with pytest.raises(config.UserError, match=message):
    placement.mesh_for(cfg, 'moe')


def test_creating_parameters_takes_a_device_its_own_part():
  cfg = _config(mesh__data=1, mesh__fsdp=8, mesh__expert=1)
  mesh = placement.mesh_for(cfg, 'finetune')
  model = llava.Llava(cfg.stage_model('finetune'))
  with sharding.use(mesh):
    used = (
        init.creator(model, mesh)
        .lower(jax.random.key(0))
        .compile(compiler_options={'xla_backend_optimization_level': 0})
        .memory_analysis()
    )
  sizes = [4 * x.size for x in jax.tree.leaves(init.abstract(model))]
  assert used is not None
  assert used.output_size_in_bytes < 0.2 * sum(sizes)
  # Not even the largest parameter is ever whole on a device.
  assert used.temp_size_in_bytes < 0.8 * max(sizes)


def test_the_table_adds_up_to_what_a_device_holds():
  cfg = _config(mesh__data=2, mesh__expert=4)
  mesh = placement.mesh_for(cfg, 'moe')
  with sharding.use(mesh):
    what = program.Program(cfg, 'moe', mesh, 10)
    trained, frozen = what.split(what.abstract_params())
    state = what.abstract_state(trained)
  rows = table.table(trained, frozen, state.opt_state)
  leaves = trees.flatten(what.abstract_params())
  assert sum(row.count for row in rows) == len(leaves)
  first = jax.devices()[0]

  def held(tree):
    return sum(
        np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if first in x.sharding.device_set and x.shape
    )

  parameters, gradients, optimizer = table.totals(rows)
  assert parameters == held(leaves)
  assert optimizer == held(state.opt_state) == 2 * gradients
  text = table.text(rows)
  (experts,) = [
      line.split() for line in text.splitlines() if 'experts/fc1/' in line
  ]
  path, shape, dtype, parameter, moments, *_ = experts
  assert path == 'llm/layers_*/moe/experts/fc1/kernel'
  assert (shape, dtype) == ('4x256x32', 'float32')
  assert (parameter, moments) == ('expert', 'expert,data')
  summary = table.summary(rows, mesh)
  assert summary.startswith('mesh data 2 x expert 4: each device holds ')
