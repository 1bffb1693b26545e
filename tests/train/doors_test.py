# SPDX-License-Identifier: Apache-2.0
"""Runs that begin with weights of others, in files as they are released."""

import dataclasses
import json
import pathlib
import weakref

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from moellava_jax import checkpoint, config, trees
from moellava_jax.data import tokenizer
from moellava_jax.interop import files
from moellava_jax.model import llava
from moellava_jax.train import doors, init, loop, placement, program
from tests import tiny

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
TOWER = GOLDENS / 'clip_tiny'


def _release(folder, case, kind='llava'):
  """A golden as a release: with its tokenizer; of `lm`, without the rest."""
  folder.mkdir()
  tokenizer.train(['What is the shape in the picture?'], 300).save(str(folder))
  raw = json.loads((GOLDENS / case / 'config.json').read_text())
  own = files.open_weights(str(GOLDENS / case))
  arrays = {name: own.read(name) for name in own.infos}
  if kind == 'lm':
    raw['model_type'] = raw['model_type'].removeprefix('llava_')
    raw = {k: v for k, v in raw.items() if not k.startswith('mm_')}
    arrays = {
        name: x
        for name, x in arrays.items()
        if 'mm_projector' not in name and 'image_tower' not in name
    }
    arrays['lm_head.bias'] = np.ones(320, np.float16)  # As Phi-2 has it.
  (folder / 'config.json').write_text(json.dumps(raw))
  safetensors_numpy.save_file(arrays, folder / 'model.safetensors')
  return folder


def _config(run, llm='phi', **overrides):
  """A few steps of two rows, with the sizes of the goldens."""
  sizes = dict(
      vocab_size=320,
      depth=4,
      num_heads=4,
      num_kv_heads=4,
      head_dim=16,
      norm='layernorm',
      norm_eps=1e-5,
      parallel_block=True,
      rotary_fraction=0.5,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
  )
  tower = dict(
      image_size=56,
      width=32,
      num_heads=4,
      mlp_width=64,
      activation='quick_gelu',
      patch_bias=False,
      pre_norm=True,
      mean=(0.48145466, 0.4578275, 0.40821073),
      std=(0.26862954, 0.26130258, 0.27577711),
  )
  settings = {f'model__llm__{k}': v for k, v in sizes.items()}
  settings |= {f'model__vision__{k}': v for k, v in tower.items()}
  for stage in ('warmup', 'pretrain', 'finetune', 'moe'):
    settings[f'{stage}__steps'] = 1
    settings[f'{stage}__batch_size'] = 8
    settings[f'{stage}__data__eval_json'] = None
    settings[f'{stage}__data__json'] = f'{run}/data/{stage}.json'
    settings[f'{stage}__data__images'] = f'{run}/data'
  return tiny.train_config(run, **{**settings, **overrides})


def _flat(path):
  return trees.flatten(checkpoint.load(str(path)).params)


def _golden(case, name):
  return files.open_weights(str(GOLDENS / case)).read(name)


EMBEDDING = 'model.embed_tokens.weight'


def _projector_file(folder):
  """What stage I of the original writes."""
  torch = pytest.importorskip('torch')
  own = files.open_weights(str(GOLDENS / 'phi_dense'))
  folder.mkdir()
  torch.save(
      {
          name: torch.tensor(own.read(name)).bfloat16()
          for name in own.infos
          if 'mm_projector' in name
      },
      folder / 'mm_projector.bin',
  )
  return folder


def test_stage_1_from_a_language_model_and_a_tower(tmp_path, capsys):
  lm = _release(tmp_path / 'phi', 'phi_dense', 'lm')
  run = tmp_path / 'run'
  cfg = _config(
      run, stages=('pretrain',), init__lm=str(lm), init__tower=str(TOWER)
  )
  loop.run(cfg)
  flat = _flat(run / 'pretrain')
  assert {str(x.dtype) for x in flat.values()} == {'float32'}
  np.testing.assert_array_equal(
      flat['llm/embedding'], _golden('phi_dense', EMBEDDING)
  )
  np.testing.assert_array_equal(
      flat['vision/pre_norm/scale'],
      _golden('clip_tiny', 'vision_model.pre_layrnorm.weight'),
  )
  assert 'projector starts at random' in capsys.readouterr().out
  # The tokenizer is the language model's.
  kept = json.loads((run / 'tokenizer' / 'tokenizer.json').read_text())
  given = json.loads((lm / 'tokenizer.json').read_text())
  assert kept['model']['vocab'] == given['model']['vocab']
  # The next stage goes on from here, with the same settings.
  later = _config(
      run, stages=('finetune',), init__lm=str(lm), init__tower=str(TOWER)
  )
  assert init.source(later, 'finetune') == str(run / 'pretrain' / 'final')


@pytest.mark.parity
def test_stage_2_from_a_language_model_a_tower_and_a_projector(tmp_path):
  lm = _release(tmp_path / 'phi', 'phi_dense', 'lm')
  projector = _projector_file(tmp_path / 'stage1')
  cfg = _config(
      tmp_path / 'run',
      stages=('finetune',),
      finetune__lr=1e-9,
      init__lm=str(lm),
      init__tower=str(TOWER),
      init__projector=str(projector),
  )
  loop.run(cfg)
  flat = _flat(tmp_path / 'run')
  expected = _golden(
      'phi_dense', 'model.mm_projector.image_spatial_proj.2.weight'
  )
  np.testing.assert_allclose(
      flat['projector/linear_1/kernel'], expected.T, rtol=2**-8
  )


def test_stage_2_without_a_projector_says_what_is_missing(tmp_path):
  lm = _release(tmp_path / 'phi', 'phi_dense', 'lm')
  cfg = _config(
      tmp_path / 'run',
      stages=('finetune',),
      init__lm=str(lm),
      init__tower=str(TOWER),
  )
  with pytest.raises(checkpoint.CheckpointError, match='and .projector'):
    loop.run(cfg)


def test_stage_3_from_a_release_of_stage_2(tmp_path):
  release = _release(tmp_path / 'stage2', 'phi_dense')
  cfg = _config(
      tmp_path / 'run', stages=('moe',), init__checkpoint=str(release)
  )
  loop.run(cfg)
  flat = _flat(tmp_path / 'run')
  experts = flat['llm/layers_0/moe/experts/fc1/kernel']
  dense = _golden('phi_dense', 'model.layers.0.mlp.fc1.weight').T
  assert experts.shape == (4, *dense.shape)
  np.testing.assert_allclose(experts[2], dense, atol=3e-3)  # One step.
  np.testing.assert_array_equal(  # Frozen in this stage.
      flat['llm/embedding'], _golden('phi_dense', EMBEDDING)
  )


def test_a_sparse_release_is_trained_on(tmp_path):
  release = _release(tmp_path / 'stage3', 'phi_moe_first_half')
  settings = dict(
      stages=('moe',),
      init__checkpoint=str(release),
      init__tower=str(TOWER),
      model__moe__layers='first_half',
  )
  loop.run(_config(tmp_path / 'run', **settings))
  flat = _flat(tmp_path / 'run')
  name = 'model.layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.3.fc2.bias'
  np.testing.assert_allclose(
      flat['llm/layers_1/moe/experts/fc2/bias'][3],
      _golden('phi_moe_first_half', name),
      atol=3e-3,
  )
  with pytest.raises(config.UserError, match=r"moe.layers is '0,2'.*'0,1'"):
    loop.run(
        _config(
            tmp_path / 'other', **{**settings, 'model__moe__layers': 'interval'}
        )
    )


def test_weights_are_read_into_their_shards(tmp_path):
  release = _release(tmp_path / 'stage2', 'phi_dense')
  cfg = _config(
      tmp_path / 'run', stages=('finetune',), init__checkpoint=str(release)
  )
  mesh = jax.make_mesh((2, 4), ('fsdp', 'tensor'))
  spec = jax.sharding.PartitionSpec('fsdp', 'tensor')
  split = jax.sharding.NamedSharding(mesh, spec)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  source = doors.open_weights(cfg, 'finetune')
  paths = [path for path, _ in source.read()]
  where = dict.fromkeys(paths, whole)
  where['llm/layers_0/mlp/fc1/kernel'] = split
  kernel = doors.read(source, where)['llm']['layers_0']['mlp']['fc1']['kernel']
  assert kernel.sharding == split and kernel.dtype == np.float32
  assert {s.data.shape for s in kernel.addressable_shards} == {(32, 32)}
  np.testing.assert_array_equal(
      kernel, _golden('phi_dense', 'model.layers.0.mlp.fc1.weight').T
  )


def test_a_device_reads_its_shards_and_the_host_one_parameter(
    tmp_path, monkeypatch
):
  release = _release(tmp_path / 'stage2', 'phi_dense')
  cfg = _config(
      tmp_path / 'run',
      stages=('finetune',),
      init__checkpoint=str(release),
      mesh__data=2,
      mesh__fsdp=4,
  )
  mesh = placement.mesh_for(cfg, 'finetune')
  where = trees.flatten(program.Program(cfg, 'finetune', mesh, 1).shardings)
  source = doors.open_weights(cfg, 'finetune')
  paths, alive, asked = [], [], []

  class Watched:

    def read(self):
      for path, array in source.read():
        # What came before is gone, but for what devices hold of it.
        assert all(ref() is None for ref in alive)
        array = array.copy()
        alive[:] = [weakref.ref(array)]
        paths.append(path)
        yield path, array
        del array

  real = jax.make_array_from_callback

  def callback(shape, sharding, read):
    pieces = {}

    def counted(index):
      piece = read(index)
      pieces[id(piece)] = piece.shape
      return piece

    array = real(shape, sharding, counted)
    asked.append((paths[-1], sharding, shape, list(pieces.values())))
    return array

  monkeypatch.setattr(jax, 'make_array_from_callback', callback)
  params = trees.flatten(doors.read(Watched(), where))
  assert len(asked) == len(params) > 20
  for path, sharding, shape, pieces in asked:
    assert set(pieces) == {sharding.shard_shape(shape)}
    # Twice on the devices (data), once on the host.
    assert np.sum([np.prod(p) for p in pieces]) == np.prod(shape), path
  kernel = params['llm/layers_0/mlp/fc1/kernel']
  assert {s.data.shape for s in kernel.addressable_shards} == {
      (kernel.shape[0] // 4, kernel.shape[1])
  }


@pytest.mark.parametrize(
    'overrides, message',
    [
        (
            dict(model__llm__vocab_size=300),
            r'model.llm.vocab_size is 300, there it is 320.*set'
            r' --config.model.llm.vocab_size=320',
        ),
        (
            dict(model__llm__rotary_fraction=1.0, model__llm__depth=3),
            'model.llm.depth is 3.*model.llm.rotary_fraction is 1.0',
        ),
        (dict(model__vision__select_layer=-1), 'vision.select_layer is -1'),
        (dict(model__projector='linear'), "projector is 'linear'"),
        (dict(init__lm='x'), 'drop --config.init.lm'),
        (dict(init__tower=str(TOWER), model__vision__num_heads=2), 'num_heads'),
    ],
)
def test_a_config_that_contradicts_the_weights(tmp_path, overrides, message):
  release = _release(tmp_path / 'stage2', 'phi_dense')
  cfg = _config(
      tmp_path / 'run',
      **{
          'stages': ('moe',),
          'init__checkpoint': str(release),
          'model__moe__layers': 'all',
          **overrides,
      },
  )
  with pytest.raises(config.UserError, match=message):
    loop.run(cfg)


def test_a_start_from_nothing_is_announced(tmp_path, capsys):
  cfg = tiny.train_config(tmp_path, stages=('pretrain',), warmup=None)
  dense = dataclasses.replace(cfg.model, moe=None)
  mesh = placement.mesh_for(cfg, 'pretrain')
  init.first_params(cfg, 'pretrain', llava.Llava(dense), mesh, None)
  printed = capsys.readouterr().out
  assert printed.startswith('pretrain: WARNING: everything starts at random')
  assert '--config.init.lm=DIR' in printed
  cfg = tiny.train_config(tmp_path)  # Whose warm-up is to start so.
  init.first_params(cfg, 'warmup', llava.Llava(dense), mesh, None)
  assert not capsys.readouterr().out


def test_doors_that_do_not_go_together(tmp_path):
  lm = _release(tmp_path / 'phi', 'phi_dense', 'lm')
  moe = _release(tmp_path / 'moe', 'phi_moe_sparse')

  def refused(message, **overrides):
    with pytest.raises(config.UserError, match=message):
      loop.run(_config(tmp_path / 'run', **overrides))

  refused('without init.tower', stages=('pretrain',), init__lm=str(lm))
  refused('without init.lm', stages=('pretrain',), init__tower=str(TOWER))
  refused(
      'no LLaVA; name it with --config.init.lm',
      stages=('finetune',),
      init__checkpoint=str(lm),
  )
  refused(
      'expected a language model: name it with --config.init.checkpoint',
      stages=('pretrain',),
      init__lm=str(moe),
      init__tower=str(TOWER),
  )
  refused(
      'is sparse, but stage',
      stages=('finetune',),
      init__checkpoint=str(moe),
  )
  refused(
      'does not exist. For a repository .* write hf:org/name',
      stages=('finetune',),
      init__checkpoint='./org/name',
  )


def test_the_tokenizer_of_another_model(tmp_path):
  release = _release(tmp_path / 'stage2', 'phi_dense')
  words = str(GOLDENS / 'text' / 'tokenizer_byte')
  cfg = _config(
      tmp_path / 'run',
      stages=('finetune',),
      init__checkpoint=str(release),
      init__tokenizer=words,
  )
  with pytest.raises(
      config.UserError, match='420 ids, .* 320; take the tokenizer .*stage2'
  ):
    loop.run(cfg)
  (release / 'tokenizer.json').unlink()
  cfg = dataclasses.replace(
      cfg, init=dataclasses.replace(cfg.init, tokenizer=None)
  )
  with pytest.raises(config.UserError, match='--config.init.tokenizer=DIR'):
    loop.run(cfg)


def test_an_imported_model_becomes_fp32(tmp_path):
  """`interop.main` keeps fp16; a run that starts from it does not."""
  from moellava_jax.interop import convert

  release = _release(tmp_path / 'stage2', 'phi_dense')
  convert.import_model(
      str(release),
      str(tmp_path / 'ours'),
      tiny.train_config(),
      tower=str(TOWER),
  )
  run = tmp_path / 'run'
  cfg = _config(
      run, stages=('finetune',), init__checkpoint=str(tmp_path / 'ours')
  )
  loop.run(cfg)
  assert {str(x.dtype) for x in _flat(run).values()} == {'float32'}
