# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import flax.linen as nn
from flax.linen import spmd
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moellava_jax import config, devices, sharding, trees
from moellava_jax.model import llava
from moellava_jax.train import init
from tests import tiny


def _mesh(**sizes):
  base = dict(
      data=1,
      fsdp=1,
      expert=1,
      tensor=1,
      cpu_devices=1,
      print_table=False,
      optimizer_memory='device',
  )
  return sharding.make_mesh(config.MeshConfig(**{**base, **sizes}))


def test_mesh_sizes_are_checked_against_the_devices():
  assert dict(_mesh(data=-1, expert=4).shape) == {
      'data': 2,
      'fsdp': 1,
      'expert': 4,
      'tensor': 1,
  }
  with pytest.raises(ValueError, match='needs 3 devices, but there are 8'):
    _mesh(data=3)
  with pytest.raises(ValueError, match='one may be -1'):
    _mesh(data=-1, expert=-1)


def test_a_flag_names_a_mesh():
  assert dict(sharding.parse_mesh('fsdp=2, expert=2').shape) == {
      'data': 2,
      'fsdp': 2,
      'expert': 2,
      'tensor': 1,
  }
  with pytest.raises(config.UserError, match='needs 6 devices, .* there are 8'):
    sharding.parse_mesh('fsdp=3')
  for text in (
      '',
      'fsdp',
      'experts=2',
      'fsdp=2,fsdp=2',
      'tensor=two',
      'fsdp=-1',
  ):
    with pytest.raises(config.UserError, match='as in --mesh=fsdp=2,expert=2'):
      sharding.parse_mesh(text)


def test_parameters_are_created_where_they_belong():
  cfg = tiny.model_config(moe=tiny.moe_config())
  mesh = _mesh(data=2, expert=4)
  with sharding.use(mesh):
    params = init.fresh(llava.Llava(cfg), 0, mesh)
  kernel_EDF = trees.flatten(params)['llm/layers_0/moe/experts/fc1/kernel']
  assert {s.data.shape[0] for s in kernel_EDF.addressable_shards} == {1}
  norm = trees.flatten(params)['llm/norm/scale']
  assert norm.sharding.is_fully_replicated


def test_too_late_to_simulate_devices_is_an_error(monkeypatch):
  assert jax.device_count() == 8
  sharding.simulate_devices(2)  # XLA_FLAGS decides.
  monkeypatch.delenv('XLA_FLAGS')
  sharding.simulate_devices(8)
  with pytest.raises(config.UserError, match='has started with 8 devices'):
    sharding.simulate_devices(2)


def test_batches_are_split_over_the_data_axes():
  mesh = _mesh(data=2, expert=4)
  assert sharding.batch_divisor(mesh) == 8
  x = sharding.put_batch(np.arange(16.0), mesh)
  assert {s.data.shape for s in x.addressable_shards} == {(2,)}
  np.testing.assert_array_equal(jnp.asarray(x), np.arange(16.0))


def _spec(mesh, *axes):
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


@pytest.mark.parametrize(
    'axes, shape, expected',
    [
        # The largest dimension takes all the data axes.
        ((), (16, 64), (None, ('data', 'fsdp', 'expert'))),
        # An axis that the parameter uses is not used again.
        (('expert',), (2, 16, 64), ('expert', None, ('data', 'fsdp'))),
        (
            (None, 'fsdp'),
            (16, 64),
            (None, ('fsdp', 'data', 'expert')),
        ),
        # What no dimension can be divided by stays out.
        ((), (4, 3), (('fsdp', 'expert'),)),
        ((), (6,), ('expert',)),
        ((), (3,), ()),
        ((), (), ()),
    ],
)
def test_optimizer_state_takes_the_data_axes_that_are_left(
    axes, shape, expected
):
  mesh = _mesh(data=2, fsdp=2, expert=2)
  where = sharding.zero(_spec(mesh, *axes), shape)
  assert where == _spec(mesh, *expected)
  where.shard_shape(shape)  # Raises where it does not divide.


def test_optimizer_state_stays_out_of_axes_of_one_and_of_tensor():
  mesh = _mesh(data=4, tensor=2)
  where = sharding.zero(_spec(mesh, 'fsdp', 'tensor'), (16, 64))
  assert where == _spec(mesh, 'fsdp', ('tensor', 'data'))


@functools.cache
def _names():
  """The logical names of parameters and activations of a model with it all."""
  moe = tiny.moe_config(use_residual=True)
  cfg = tiny.model_config(
      moe=moe, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True
  )
  used = set()
  real = spmd.with_logical_constraint

  def record(x, names, *rest, **options):
    used.update(names)
    return real(x, names, *rest, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(spmd, 'with_logical_constraint', record)
    # Two rows: one alone is not split.
    inputs = {
        name: jnp.concatenate([x, x])
        for name, x in llava.dummy_inputs(cfg).items()
    }
    rng = jax.random.key(0)
    boxed = jax.eval_shape(
        lambda: llava.Llava(cfg).init(
            {'params': rng, 'router': rng}, **inputs, train=False
        )
    )['params']
  for box in trees.flatten(boxed).values():
    assert isinstance(box, nn.LogicallyPartitioned)
    assert len(box.names) == len(box.value.shape)
    used.update(box.names)
  return used - {None}


def test_every_name_in_the_model_has_a_rule_and_every_rule_is_used():
  assert _names() == {name for name, _ in sharding.RULES}


def test_a_name_without_a_rule_is_an_error():
  box = nn.LogicallyPartitioned(
      jax.ShapeDtypeStruct((4,), np.float32), ('embeded',)
  )
  with pytest.raises(ValueError, match='embeded'):
    sharding.of_parameters({'kernel': box}, _mesh(data=8))


def test_what_does_not_divide_stays_whole():
  def box(*shape):
    value = jax.ShapeDtypeStruct(shape, np.float32)
    return nn.LogicallyPartitioned(value, ('vocab', 'embed'))

  mesh = _mesh(data=2, fsdp=2, tensor=2)
  where = sharding.of_parameters(
      {'odd': box(51, 16), 'even': box(52, 16)}, mesh
  )
  assert where['odd'] == _spec(mesh, None, 'fsdp')
  assert where['even'] == _spec(mesh, 'tensor', 'fsdp')


@dataclasses.dataclass(frozen=True)
class _Device:
  """What JAX tells of a device, as far as the arrangement asks."""

  id: int
  process_index: int
  platform: str = 'gpu'
  device_kind: str = 'fake'


@dataclasses.dataclass(frozen=True)
class _SliceDevice(_Device):
  slice_index: int = 0


def _groups(arranged, attribute):
  """The one slice or process of each place along the data axis."""
  places = [{getattr(d, attribute) for d in part.flat} for part in arranged]
  assert all(len(place) == 1 for place in places)
  return [place.pop() for place in places]


def test_the_data_axis_is_the_one_that_spans_slices():
  # JAX does not list the devices of a slice together.
  found = [_SliceDevice(n, n, slice_index=n % 2) for n in range(8)]
  arranged = devices.arrange((4, 1, 2, 1), found)
  assert arranged.shape == (4, 1, 2, 1)
  assert _groups(arranged, 'slice_index') == [0, 0, 1, 1]
  assert len(set(arranged.flat)) == 8
  # One slice, one process a device: any arrangement is near.
  near = [_SliceDevice(n, n) for n in range(8)]
  assert devices.arrange((1, 1, 4, 2), near).shape == (1, 1, 4, 2)


def test_nodes_are_told_by_process_where_slices_are_not_numbered():
  found = [_Device(n, n // 4, platform='cpu') for n in range(8)]
  arranged = devices.arrange((2, 2, 2, 1), found)
  assert _groups(arranged, 'process_index') == [0, 1]
  # A slice of TPUs has many hosts, and all of them are near.
  pod = [_Device(n, n // 4, platform='tpu') for n in range(8)]
  assert len(devices.slices(pod)) == 1


def test_parameters_span_slices_only_as_far_as_data_does_not():
  found = [_SliceDevice(n, n, slice_index=n // 2) for n in range(8)]
  arranged = devices.arrange((2, 2, 2, 1), found)
  for data in range(2):
    for fsdp in range(2):
      assert len({d.slice_index for d in arranged[data, fsdp].flat}) == 1
  with pytest.raises(
      config.UserError, match='expert x tensor = 4.* within one'
  ):
    devices.arrange((2, 1, 4, 1), found)
