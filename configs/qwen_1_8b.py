# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA-1.8B x 4: Qwen (the first) and CLIP at 336 pixels.

  init="--config.init.lm=hf:Qwen/Qwen-1_8B \
      --config.init.tower=hf:openai/clip-vit-large-patch14-336"
  python -m moellava_jax.train.main --config=configs/qwen_1_8b.py $init
  python -m moellava_jax.train.main --config=configs/qwen_1_8b.py:pretrain $init
  python -m moellava_jax.train.main --config=configs/qwen_1_8b.py:finetune $init
  python -m moellava_jax.train.main --config=configs/qwen_1_8b.py:moe $init

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
  c = common.paper('qwen_1_8b', 'clip_l14_336', 'qwen_1_8b', template='qwen')
  return common.select(c, stage)
