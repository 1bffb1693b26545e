# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA-7B x 4: OpenChat 3.5 (Mistral 7B) and CLIP at 336 pixels.

  init="--config.init.lm=hf:openchat/openchat-3.5-1210 \
      --config.init.tower=hf:openai/clip-vit-large-patch14-336"
  python -m moellava_jax.train.main --config=configs/openchat_7b.py $init
  python -m moellava_jax.train.main --config=configs/openchat_7b.py:pretrain $init
  python -m moellava_jax.train.main --config=configs/openchat_7b.py:finetune $init
  python -m moellava_jax.train.main --config=configs/openchat_7b.py:moe $init

The first runs all stages, the others one each.
The data are expected in moe_llava_data/ (a link will do), laid out as
published. Your own replace those of every stage, or of one:

  --config.data.json=F --config.data.images=DIR
  --config.moe.data.json=F1,F2 --config.moe.data.images=DIR

Ablations: the overrides that configs/phi2.py lists.
"""

import ml_collections

from configs import common


def get_config(stage: str = 'all') -> ml_collections.ConfigDict:
  """`stage` is all, pretrain, finetune or moe."""
  c = common.paper(
      'openchat_7b', 'clip_l14_336', 'openchat_7b', template='openchat'
  )
  c.moe.accumulate = 4  # The scripts: 8 GPUs x 4 rows x 4.
  return common.select(c, stage)
