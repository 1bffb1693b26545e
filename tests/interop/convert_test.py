# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from moellava_jax import checkpoint, config, trees
from moellava_jax.data import tiktoken
from moellava_jax.infer import chat
from moellava_jax.interop import convert, export, files, hf, load
from tests import tiny

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens'
TOWER = str(GOLDENS / 'clip_tiny')
TOKENIZER = str(GOLDENS / 'text' / 'tokenizer_byte')


def _import(case, target, **options):
  return convert.import_model(
      str(GOLDENS / case),
      str(target),
      tiny.train_config(),
      **{'tower': TOWER, **options},
  )


@pytest.mark.parametrize('case', ['phi_moe_sparse', 'phi_moe_first_half'])
def test_an_import_goes_back_as_it_came(case, tmp_path):
  _import(case, tmp_path / 'ours')
  convert.export_original(
      str(tmp_path / 'ours'), str(tmp_path / 'back'), shard_bytes=10**9
  )
  own = files.open_weights(str(GOLDENS / case))
  back = files.open_weights(str(tmp_path / 'back'))
  assert back.infos.keys() <= own.infos.keys()
  assert set(own.infos) - set(back.infos) == {
      name
      for name in own.infos
      if 'encoder.layers.2.' in name or 'post_layernorm' in name
  }
  for name in back.infos:
    assert back.infos[name][:2] == own.infos[name][:2]
    assert back.read(name).tobytes() == own.read(name).tobytes(), name
  assert json.loads((tmp_path / 'back' / 'config.json').read_text()) == (
      json.loads((GOLDENS / case / 'config.json').read_text())
  )


def test_an_import_is_a_checkpoint_of_ours(tmp_path):
  report = _import('phi_dense', tmp_path / 'ours', tokenizer=TOKENIZER)
  found = checkpoint.load(str(tmp_path / 'ours'))
  assert found.stage == 'finetune' and found.config.finetune.template == 'phi'
  head = trees.flatten(found.params)['llm/head/kernel']
  assert head.dtype == np.float16 and head.shape == (64, 320)
  assert found.config.stage_model('finetune').llm.parallel_block
  moved = {row.theirs: row for row in report.moved}
  row = moved['model.layers.{n}.self_attn.dense.weight']
  assert row.ours == 'llm/layers_{n}/attn/o_kernel' and row.count == 4
  assert chat.load(str(tmp_path / 'ours')).digest


def test_a_model_trained_here_is_described_as_the_original_does(tmp_path):
  """Without an origin: names and config.json come from our config."""
  _import('phi_moe_sparse', tmp_path / 'ours', tokenizer=TOKENIZER)
  shutil.rmtree(tmp_path / 'ours' / 'origin')
  # The stage has an aspect of its own.
  about = tmp_path / 'ours' / 'config.json'
  settings = json.loads(about.read_text())
  settings['data']['image_aspect'] = 'square'
  settings['moe']['image_aspect'] = 'pad'
  about.write_text(json.dumps(settings))
  convert.export_original(
      str(tmp_path / 'ours'),
      str(tmp_path / 'back'),
      dtype='bfloat16',
      shard_bytes=10**5,
  )
  raw = json.loads((tmp_path / 'back' / 'config.json').read_text())
  theirs = json.loads((GOLDENS / 'phi_moe_sparse/config.json').read_text())
  for key, value in theirs['moe'].items():
    if key != 'moe_mode':  # A list of layers is 'custom'.
      assert raw['moe'][key] == value, key
  left = {'torch_dtype', 'moe', 'mm_image_tower', 'transformers_version'}
  for key in sorted(raw.keys() & theirs.keys() - left):
    if not key.endswith('token_id'):
      assert raw[key] == theirs[key], key
  assert raw['model_type'] == 'moe_llava_phi' and raw['eos_token_id'] == 0
  assert (tmp_path / 'back' / 'tokenizer.json').is_file()
  own = files.open_weights(str(GOLDENS / 'phi_moe_sparse'))
  back = files.open_weights(str(tmp_path / 'back'))
  assert back.infos.keys() <= own.infos.keys()
  # And it can be imported again, tower and all.
  described = hf.describe(str(tmp_path / 'back'))
  model = load.model_of(described, None, tiny.train_config().model)
  ours = checkpoint.load(str(tmp_path / 'ours')).config.model
  assert model.llm == ours.llm and model.moe == ours.moe
  load.open_llava(described, model, None)


def test_every_row_of_an_export_names_our_side(tmp_path):
  _import('phi_dense', tmp_path / 'ours')
  report = convert.export_native(
      str(tmp_path / 'ours'), str(tmp_path / 'theirs'), shard_bytes=10**9
  )
  moved = {row.theirs: row.ours for row in report.moved}
  tower, llm = 'vision_tower.vision_model', 'language_model.model'
  assert moved[f'{llm}.layers.{{n}}.mlp.fc1.bias'] == (
      'llm/layers_{n}/mlp/fc1/bias'
  )
  assert moved['multi_modal_projector.linear_2.bias'] == (
      'projector/linear_1/bias'
  )
  assert moved[f'{tower}.post_layernorm.bias'] == ''  # Zeros.


def test_layers_and_experts_are_one_row_and_the_projector_is_not(tmp_path):
  report = _import('phi_moe_sparse', tmp_path / 'ours')
  moved = {row.theirs: row.count for row in report.moved}
  mlp = 'model.layers.{n}.mlp.deepspeed_moe'
  assert moved[f'{mlp}.experts.deepspeed_experts.{{e}}.fc1.bias'] == 8
  assert moved[f'{mlp}.gate.wg.weight'] == 2
  assert moved['model.mm_projector.image_spatial_proj.2.bias'] == 1


@pytest.mark.parametrize('name', tiktoken.VOCABULARIES)
def test_a_vocabulary_of_ranks_is_a_tokenizer(name, tmp_path):
  (tmp_path / 'words').mkdir()
  (tmp_path / 'words' / name).write_text('IQ== 0\n')
  report = _import(
      'phi_dense', tmp_path / 'ours', tokenizer=str(tmp_path / 'words')
  )
  assert (tmp_path / 'ours' / 'tokenizer' / name).is_file()
  assert not any('tokenizer' in note for note in report.notes)
  report = _import('phi_dense', tmp_path / 'other')
  assert any('--tokenizer' in note for note in report.notes)


def test_a_tokenizer_with_too_many_ids_is_noted(tmp_path):
  report = _import('phi_dense', tmp_path / 'ours', tokenizer=TOKENIZER)
  assert any('420 ids, but the model 320 rows' in n for n in report.notes)


def test_nothing_half_written_stays(tmp_path, monkeypatch):
  def fails(*_):
    raise OSError('No space left on device')

  monkeypatch.setattr(checkpoint, '_save', fails)
  with pytest.raises(OSError, match='No space'):
    _import('phi_dense', tmp_path / 'ours')
  assert not list(tmp_path.iterdir())


def test_a_target_that_exists_is_left_alone(tmp_path):
  (tmp_path / 'ours').mkdir()
  (tmp_path / 'ours' / 'thesis.tex').write_text('precious')
  with pytest.raises(config.UserError, match='exists and is not empty'):
    _import('phi_dense', tmp_path / 'ours')
  assert (tmp_path / 'ours' / 'thesis.tex').read_text() == 'precious'


def _edited(case, tmp_path, change):
  """A copy of a golden whose tensors `change` has edited, by name."""
  arrays = {}
  own = files.open_weights(str(GOLDENS / case))
  for name in own.infos:
    arrays[name] = own.read(name).copy()
  change(arrays)
  folder = tmp_path / 'edited'
  folder.mkdir()
  shutil.copy(GOLDENS / case / 'config.json', folder)
  from safetensors import numpy as safetensors_numpy

  safetensors_numpy.save_file(arrays, folder / 'model.safetensors')
  return folder


FC1 = 'model.layers.1.mlp.fc1.weight'


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda a: a.pop(FC1), f'lacks 1 of .*{FC1}'),
        (
            lambda a: a.update({'model.layers.9.x': np.ones(1, np.float16)}),
            'model.layers.9.x.*another model',
        ),
        (
            lambda a: a.update({FC1: a[FC1][:-1].copy()}),
            f"model.safetensors: tensor '{FC1}' has shape .127, 64.",
        ),
        (lambda a: a[FC1].fill(np.inf), f"model.safetensors: .*'{FC1}'.*NaN"),
        (
            lambda a: a.update({FC1 + '.lora_A': np.ones(1, np.float16)}),
            'LoRA',
        ),
        (
            lambda a: a.update(
                {
                    'vision_tower.vision_model.pre_layrnorm.bias': np.ones(
                        32, np.float16
                    )
                }
            ),
            'two spellings',
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
  folder = _edited('phi_dense', tmp_path, change)
  with pytest.raises(files.WeightsError, match=message):
    convert.import_model(
        str(folder), str(tmp_path / 'ours'), tiny.train_config(), tower=TOWER
    )
  assert not (tmp_path / 'ours').exists()


def test_values_that_do_not_fit_a_dtype(tmp_path):
  def grow(arrays):
    for name in arrays:
      arrays[name] = arrays[name].astype(np.float32)
    arrays[FC1][0, 0] = 1e6

  folder = _edited('phi_dense', tmp_path, grow)
  convert.import_model(
      str(folder), str(tmp_path / 'ours'), tiny.train_config(), tower=TOWER
  )
  with pytest.raises(files.WeightsError, match=f"'{FC1}' does not fit"):
    convert.export_original(
        str(tmp_path / 'ours'),
        str(tmp_path / 'back'),
        dtype='float16',
        shard_bytes=10**9,
    )


def test_what_no_family_can_express_is_said():
  from moellava_jax.interop import config_json

  with pytest.raises(config.UserError, match="decoder 'shapes'"):
    config_json.deduce(tiny.train_config().model.llm)


@pytest.mark.slow
def test_the_command(tmp_path):
  def run(*flags):
    return subprocess.run(
        [sys.executable, '-m', 'moellava_jax.interop.main', *flags],
        capture_output=True,
        text=True,
        check=False,
    )

  ours, back = str(tmp_path / 'ours'), str(tmp_path / 'back')
  source = str(GOLDENS / 'stablelm_dense')
  done = run(f'--source={source}', f'--target={ours}', f'--tower={TOWER}')
  assert done.returncode == 0, done.stderr
  assert 'llm/layers_{n}/mlp/gate/kernel' in done.stdout
  assert 'left out: behind select_layer -2' in done.stdout
  assert export.read_origin(ours).family == 'stablelm'
  done = run(f'--source={ours}', f'--target={back}', '--shard_gb=1e-4')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'back' / 'model.safetensors.index.json').exists()
  # What would do nothing is refused.
  done = run(f'--source={source}', f'--target={tmp_path / "x"}', '--to=hf')
  assert done.returncode == 1 and 'drop --to.' in done.stderr
  done = run(
      f'--source={ours}',
      f'--target={tmp_path / "x"}',
      '--tokenizer=F',
      '--config=configs/imported.py',
  )
  assert done.returncode == 1
  assert 'drop --config --tokenizer.' in done.stderr
  done = run(f'--source={TOWER}', f'--target={tmp_path / "x"}')
  assert done.returncode == 1
  assert done.stderr.startswith('error: ') and 'init.tower' in done.stderr
