# SPDX-License-Identifier: Apache-2.0
"""The embedded task: all stages in minutes on two CPU cores.

  python -m moellava_jax.train.main --config=configs/shapes.py
  python -m moellava_jax.train.main --config=configs/shapes.py:moe
  python -m moellava_jax.train.main --config=configs/shapes.py:smoke

Your own images and conversations, through the same stages (only the warm-up
of the tiny tower and LM stays on Shapes):

  python -m moellava_jax.train.main --config=configs/shapes.py \
      --config.workdir=runs/mine --config.data.json=F --config.data.images=DIR
"""

import ml_collections

from configs import common


def get_config(stage: str = 'all') -> ml_collections.ConfigDict:
  """`stage` is all, one stage, or smoke (a few steps of each)."""
  smoke = stage == 'smoke'
  c = common.run('shapes', 'shapes')
  c.workdir = 'runs/shapes_smoke' if smoke else 'runs/shapes'
  c.stages = ('warmup', 'pretrain', 'finetune', 'moe')
  c.log_every = 50

  c.data.on_long = 'error'
  c.data.shapes = ml_collections.ConfigDict()
  c.data.shapes.dir = c.get_ref('workdir') + '/data'
  data = c.data.shapes.get_ref('dir')
  c.data.shapes.seed = c.get_ref('seed')
  c.data.shapes.train_scenes = 300 if smoke else 8000
  c.data.shapes.heldout_scenes = 60 if smoke else 600

  # Copying experts this small is quicker than sending tokens to them, and
  # one-hot products would take as long as the experts themselves.
  c.mesh.expert = 1
  c.model.moe.dispatch = 'auto'

  # Short runs: a shorter memory of squared gradients, and clipping.
  c.optimizer.b2 = 0.98
  c.optimizer.clip_norm = 0.5

  c.warmup = common.stage()
  steps = {'warmup': 1000, 'pretrain': 1000, 'finetune': 2600, 'moe': 600}
  lrs = {'warmup': 1.5e-3, 'pretrain': 3e-3, 'finetune': 1.5e-3, 'moe': 7e-4}
  templates = {
      'warmup': 'plain',
      'pretrain': 'plain',
      'finetune': 'bare',
      'moe': 'bare',
  }
  for name in c.stages:
    s = c[name]
    s.data.json = data + f'/{name}.json'
    s.data.images = data
    s.batch_size = 16
    s.steps = 4 if smoke else steps[name]
    s.lr = lrs[name]
    s.template = templates[name]
    s.eval_every = 2 if smoke else 500
    s.eval_batches = 2 if smoke else 8
  c.warmup.data.eval_json = data + '/heldout_texts.json'
  c.pretrain.data.eval_json = data + '/heldout_captions.json'
  c.finetune.data.eval_json = data + '/heldout.json'
  c.moe.data.eval_json = data + '/heldout.json'
  c.checkpoint.every = 2 if smoke else 200
  return c if smoke else common.select(c, stage)
