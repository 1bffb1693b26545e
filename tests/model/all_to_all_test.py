# SPDX-License-Identifier: Apache-2.0
"""With an expert axis, tokens travel to the experts and weights stay."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, sharding, trees
from moellava_jax.data import batch as batch_lib
from moellava_jax.model import moe as moe_lib
from moellava_jax.train import placement, program
from tests import tiny

# Compiles in half the time; the partitioner's part is the same.
FAST = {'xla_backend_optimization_level': 0}


def _mesh():
  return sharding.make_mesh(
      config.MeshConfig(
          data=2,
          fsdp=1,
          expert=4,
          tensor=1,
          cpu_devices=1,
          print_table=False,
          optimizer_memory='device',
      )
  )


def _count(text, op):
  return len(re.findall(rf'\s{op}(?:-start)?\(', text))


def _shapes(text):
  """The dimensions of the arrays that an HLO type names."""
  return [
      [int(n) for n in sizes.split(',') if n]
      for sizes in re.findall(r'\w+\[([\d,]*)\]', text)
  ]


def _gathered(text):
  """(dimensions, ascending, of what an all-gather makes; from how many)."""
  made = dict(re.findall(r'(%[\w.-]+) = (\(.*?\)|\S+) ', text))
  found = []
  for result, names in re.findall(
      r'= (\(.*?\)|\S+) all-gather(?:-start)?\(([^)]*)\)', text
  ):
    parts = [s for name in names.split(', ') for s in _shapes(made[name])]
    whole = _shapes(result)[-len(parts) :]
    for part, shape in zip(parts, whole, strict=True):
      found.append((sorted(shape), math.prod(shape) // math.prod(part)))
  return found


def _layer(dispatch):
  """A sparse layer, inputs whose sizes are all different, and parameters."""
  cfg = tiny.moe_config(second_choice='sampled', dispatch=dispatch)
  layer = moe_lib.Moe(cfg, 'gelu_tanh', 48, False, jnp.dtype('float32'))
  x_BTD = jnp.ones((16, 40, 24))
  mask_BT = jnp.ones((16, 40), bool)

  def apply(params, x_BTD):
    y_BTD, aux = layer.apply(
        {'params': params},
        x_BTD,
        mask_BT,
        mask_BT,
        train=True,
        rngs={'router': jax.random.key(0)},
    )
    return jnp.sum(y_BTD**2) + aux.balance_loss

  boxed = jax.eval_shape(
      lambda: layer.init(
          {'params': jax.random.key(0), 'router': jax.random.key(0)},
          x_BTD,
          mask_BT,
          mask_BT,
          train=True,
      )
  )['params']
  return apply, boxed, x_BTD


def _abstract(x, where):
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


@pytest.mark.parametrize('dispatch', ['einsum', 'index'])
@pytest.mark.parametrize('which, expected', [('forward', 2), ('gradient', 4)])
def test_all_to_all_of_a_sparse_layer(which, expected, dispatch):
  apply, boxed, x_BTD = _layer(dispatch)
  mesh = _mesh()
  program = apply if which == 'forward' else jax.grad(apply, argnums=(0, 1))
  with sharding.use(mesh):
    where = sharding.of_parameters(boxed, mesh)
    params = jax.tree.map(lambda w, box: _abstract(box.value, w), where, boxed)
    text = (
        jax.jit(program)
        .lower(params, _abstract(x_BTD, sharding.of_batch(mesh)))
        .compile(compiler_options=FAST)
        .as_text()
    )
  assert params['experts']['fc1']['kernel'].sharding.spec[0] == 'expert'
  assert _count(text, 'all-to-all') == expected
  assert _count(text, 'collective-permute') == 0
  kernel = sorted((4, 24, 48))
  assert all(shape != kernel for shape, _ in _gathered(text))


@pytest.mark.parametrize(
    'remat, layer, dispatch',
    [('none', 4, 'einsum'), ('full', 6, 'einsum'), ('full', 6, 'index')],
)
def test_all_to_all_of_stage_3_of_shapes(remat, layer, dispatch):
  """2 forward and 2 backward per sparse layer; remat runs forward twice."""
  cfg = tiny.train_config(
      model__remat=remat,
      model__moe__dispatch=dispatch,
      mesh__data=2,
      mesh__fsdp=1,
      mesh__expert=4,
  )
  mesh = placement.mesh_for(cfg, 'moe')
  vision, rows = cfg.model.vision, 16
  with sharding.use(mesh):
    what = program.Program(cfg, 'moe', mesh, 10)
    trained, frozen = what.split(what.abstract_params())
    state = what.abstract_state(trained)
    where = sharding.of_batch(mesh)
    batch = jax.tree.map(
        lambda x: _abstract(x, where),
        batch_lib.Batch(
            *(np.zeros((rows, 80), np.int32) for _ in range(2)),
            np.zeros((rows, 80), np.float32),
            *(np.zeros((rows, 80), np.int32) for _ in range(2)),
            np.zeros(
                (rows, 1, vision.image_size, vision.image_size, 3), np.uint8
            ),
            np.zeros((rows, 1, 0, 0), np.int32),
            np.zeros(rows, np.uint32),
        ),
    )
    text = (
        what.train_step(state, frozen)
        .lower(state, frozen, batch)
        .compile(compiler_options=FAST)
        .as_text()
    )
  assert cfg.model.moe is not None
  sparse = len(cfg.model.moe.layer_ids(cfg.model.llm.depth))
  assert sparse == 2
  assert _count(text, 'all-to-all') == layer * sparse
  kernel = trees.flatten(trained)['llm/layers_0/moe/experts/fc1/kernel']
  experts, *rest = kernel.shape
  gathered = _gathered(text)
  assert all(shape != sorted(kernel.shape) for shape, _ in gathered)
  # After the update each device collects its own expert from the 2 that share
  # it (ZeRO-2), and no other.
  own = {near for shape, near in gathered if shape == sorted((1, *rest))}
  assert experts == 4 and own == {2}
