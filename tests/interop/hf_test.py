# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest

from moellava_jax import config
from moellava_jax.interop import hf, hub, load, towers
from tests import tiny

PHI = dict(
    model_type='phi',
    vocab_size=51200,
    hidden_size=2560,
    num_hidden_layers=32,
    num_attention_heads=32,
    intermediate_size=10240,
    partial_rotary_factor=0.4,
    resid_pdrop=0.1,
)
MOE = dict(
    moe_enable=True,
    moe_mode='sparse',
    moe_layers_idx=[0, 5],
    num_experts=[8, 8],
    top_k_experts=1,
    capacity_factor=1.25,
    eval_capacity_factor=2.5,
    min_capacity=3,
    use_residual=True,
    router_aux_loss_coef=0.02,
)


def _write(path, **raw):
  (path / 'config.json').write_text(json.dumps(raw))
  return str(path)


def test_a_published_config_is_the_published_size(tmp_path):
  from moellava_jax import backbones

  llm = hf.describe(_write(tmp_path, **PHI)).llm
  assert llm == backbones.LMS['phi2'].__class__(
      **{**vars(backbones.LMS['phi2']), 'name': 'phi'}
  )


def test_every_field_of_the_moe_section(tmp_path):
  raw = {**PHI, 'model_type': 'moe_llava_phi', 'moe': MOE}
  found = hf.describe(_write(tmp_path, **raw)).moe
  assert found == dict(
      layers='0,5',
      num_experts=8,
      top_k=1,
      capacity_factor=1.25,
      eval_capacity_factor=2.5,
      min_capacity=3,
      use_residual=True,
      aux_loss_weight=0.02,
  )
  base = tiny.train_config().model
  moe = config.MoeConfig(**{**vars(base.moe), **found})
  assert moe.layer_ids(32) == (0, 5)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(moe_layers_idx=[0, 32]), r'moe_layers_idx is \[0, 32\]'),
        (dict(num_experts=[4, 8]), 'num_experts.*the same number'),
        (dict(moe_layers_idx=None, moe_mode='odd'), 'moe_mode'),
        (dict(top_k_experts=None), 'top_k_experts'),
    ],
)
def test_a_moe_section_that_makes_no_sense(tmp_path, change, message):
  raw = {**PHI, 'model_type': 'moe_llava_phi', 'moe': {**MOE, **change}}
  with pytest.raises(config.UserError, match=message):
    hf.describe(_write(tmp_path, **raw))


def test_placements_without_a_list(tmp_path):
  for mode, layers in (('sparse', 'interval'), ('dense', 'all')):
    moe = {**MOE, 'moe_layers_idx': None, 'moe_mode': mode}
    raw = {**PHI, 'model_type': 'moe_llava_phi', 'moe': moe}
    assert hf.describe(_write(tmp_path, **raw)).moe['layers'] == layers


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(model_type='gemma'), "'gemma'.*known are.*'phi'.*'stablelm'"),
        (dict(hidden_act='relu'), "hidden_act is 'relu'"),
        (dict(qk_layernorm=True), 'qk_layernorm is True'),
        (
            dict(rope_scaling={'type': 'linear', 'factor': 2}),
            "rope scaling is 'linear'",
        ),
        (
            dict(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1e4}),
            "rope scaling is 'yarn'",
        ),
        (dict(vocab_size=None), "no 'vocab_size'"),
        (dict(model_type='mixtral'), "'mixtral'.*known are"),
    ],
)
def test_configs_that_cannot_be_run(tmp_path, change, message):
  with pytest.raises(config.UserError, match=message):
    hf.describe(_write(tmp_path, **{**PHI, **change}))


def test_files_that_are_not_there(tmp_path):
  with pytest.raises(config.UserError, match='config.json does not exist'):
    hf.describe(str(tmp_path))
  (tmp_path / 'config.json').write_text('{"model_type"')
  with pytest.raises(config.UserError, match='config.json is not JSON'):
    hf.describe(str(tmp_path))
  with pytest.raises(config.UserError, match='no "model_type"'):
    hf.describe(_write(tmp_path, hidden_size=1))


def test_llava_1_5_as_its_authors_released_it(tmp_path):
  raw = dict(
      model_type='llava',
      vocab_size=32000,
      hidden_size=4096,
      num_hidden_layers=32,
      num_attention_heads=32,
      intermediate_size=11008,
      rms_norm_eps=1e-5,
      mm_vision_tower='openai/clip-vit-large-patch14-336',
      mm_projector_type='mlp2x_gelu',
      mm_vision_select_layer=-2,
  )
  described = hf.describe(_write(tmp_path, **raw))
  model = load.model_of(described, None, tiny.train_config().model)
  assert described.family == 'llama' and model.projector == 'mlp2x_gelu'
  assert model.vision.num_tokens == 576 and model.moe is None


def test_llava_of_transformers_leaves_out_what_is_usual(tmp_path):
  raw = dict(
      model_type='llava',
      text_config=dict(model_type='llama', vocab_size=32064, rms_norm_eps=1e-5),
      vision_config=dict(
          model_type='clip_vision_model',
          hidden_size=1024,
          image_size=336,
          intermediate_size=4096,
          num_attention_heads=16,
          num_hidden_layers=24,
          patch_size=14,
      ),
      vision_feature_select_strategy='full',
  )
  described = hf.describe(_write(tmp_path, **raw))
  assert described.llm.width == 4096 and described.llm.depth == 32
  model = load.model_of(described, None, tiny.train_config().model)
  assert model.vision.num_tokens == 577


def test_the_named_tower_has_to_have_the_layer(tmp_path):
  raw = dict(model_type='siglip', vision_config=dict(num_hidden_layers=3))
  folder = _write(tmp_path, **raw)
  assert towers.read(folder, towers.Select(-4, 'patch')).num_layers == 0
  assert towers.read(folder, towers.SELECT).num_tokens == 195
  with pytest.raises(config.UserError, match='has 3 layers'):
    towers.read(folder, towers.Select(-5, 'patch'))
  with pytest.raises(config.UserError, match="'dinov2'.*known are"):
    towers.read(_write(tmp_path, model_type='dinov2'), towers.SELECT)


def test_a_language_model_is_no_llava(tmp_path):
  described = hf.describe(_write(tmp_path, **PHI))
  with pytest.raises(config.UserError, match=r'--config.init.lm'):
    load.model_of(described, None, tiny.train_config().model)


def test_only_named_repositories_are_fetched(tmp_path, monkeypatch):
  import huggingface_hub

  calls = []

  def listed(repository):
    return {
        'org/new': ['model.safetensors', 'pytorch_model.bin'],
        'org/old': ['mm_projector.bin', 'config.json'],
    }[repository]

  def fetched(repository, *, allow_patterns):
    calls.append((repository, allow_patterns[-1]))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'list_repo_files', listed)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetched)
  assert hub.local(str(tmp_path)) == str(tmp_path) and not calls
  assert hub.local('hf:org/new') == str(tmp_path)
  hub.local('hf:org/old')
  assert calls == [('org/new', '*.safetensors'), ('org/old', '*.bin')]


def test_offline_a_repository_that_was_never_fetched():
  with pytest.raises(config.UserError, match='has not been fetched before'):
    hub.local('hf:moellava-jax/is-not-there')
  for name in ('org/name', './org/name', 'org/name/'):
    with pytest.raises(config.UserError, match='write hf:org/name\\.$'):
      hub.local(name)


def test_without_a_network_the_error_says_what_to_do():
  # A port that nobody listens on; read when huggingface_hub is imported.
  env = os.environ | {
      'HF_ENDPOINT': 'http://127.0.0.1:9',
      'HF_HUB_OFFLINE': '0',
  }
  script = """
from moellava_jax import config
from moellava_jax.interop import hub
try:
  hub.local('hf:org/name')
except config.UserError as error:
  print('refused:', error)
"""
  done = subprocess.run(
      [sys.executable, '-c', script],
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )
  assert 'refused: hf:org/name cannot be reached' in done.stdout, done.stderr
  assert 'hf download org/name' in done.stdout


def test_a_path_is_no_repository(tmp_path):
  with pytest.raises(config.UserError, match='write hf:org/name\\.$'):
    hub.local(str(tmp_path / 'not' / 'there'))


def test_weights_without_a_config_are_somebody_elses(tmp_path):
  assert not hf.is_theirs(str(tmp_path))
  (tmp_path / 'pytorch_model.bin').write_bytes(b'')
  with pytest.raises(config.UserError, match='weights but no config.json'):
    hf.is_theirs(str(tmp_path))
