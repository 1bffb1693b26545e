# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA-1.6B x 4: StableLM 2 and CLIP at 336 pixels.

  init="--config.init.lm=hf:stabilityai/stablelm-2-1_6b \
      --config.init.tower=hf:openai/clip-vit-large-patch14-336"
  python -m moellava_jax.train.main --config=configs/stablelm_1_6b.py $init
  python -m moellava_jax.train.main --config=configs/stablelm_1_6b.py:pretrain $init
  python -m moellava_jax.train.main --config=configs/stablelm_1_6b.py:finetune $init
  python -m moellava_jax.train.main --config=configs/stablelm_1_6b.py:moe $init

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
      'stablelm_1_6b', 'clip_l14_336', 'stablelm_1_6b', template='stablelm'
  )
  return common.select(c, stage)
