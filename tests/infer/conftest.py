# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a tiny sparse model that was never trained."""

import dataclasses

from etils import epath
import pytest

from moellava_jax import checkpoint
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.infer import chat as chat_lib
from tests import tiny


def _write(path, stage, cfg):
  tokenizer = tokenizer_lib.train(['Is there a red square? Yes. No.'] * 9, 300)
  model = tiny.model_config(moe=tiny.moe_config(), vocab_size=320)
  cfg = dataclasses.replace(cfg, model=model)
  checkpoint.write_final(
      epath.Path(path),
      tiny.params_of(cfg.stage_model(stage)),
      cfg,
      stage,
      {},
      tokenizer.save,
  )
  return str(path)


@pytest.fixture(scope='session')
def checkpoint_dir(tmp_path_factory):
  """A final/ of stage moe."""
  path = tmp_path_factory.mktemp('run') / 'moe' / 'final'
  return _write(path, 'moe', tiny.train_config())


@pytest.fixture(scope='session')
def dense_dir(tmp_path_factory):
  """A final/ of stage finetune."""
  path = tmp_path_factory.mktemp('run') / 'finetune' / 'final'
  return _write(path, 'finetune', tiny.train_config())


@pytest.fixture(scope='session')
def chat(checkpoint_dir):
  """The sparse model on all devices."""
  return chat_lib.load(checkpoint_dir)
