# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA-2.7B x 4 at 384 pixels: Phi-2 and SigLIP.

  init="--config.init.lm=hf:microsoft/phi-2 \
      --config.init.tower=hf:google/siglip-so400m-patch14-384"
  python -m moellava_jax.train.main --config=configs/phi2_384.py $init
  python -m moellava_jax.train.main --config=configs/phi2_384.py:pretrain $init
  python -m moellava_jax.train.main --config=configs/phi2_384.py:finetune $init
  python -m moellava_jax.train.main --config=configs/phi2_384.py:moe $init

The first runs all stages, the others one each.
The data are expected in moe_llava_data/ (a link will do), laid out as
published. Your own replace those of every stage, or of one:

  --config.data.json=F --config.data.images=DIR
  --config.moe.data.json=F1,F2 --config.moe.data.images=DIR

An image takes 728 positions, as in the original, which drops the first patch
of a tower without a class token
(--config.model.vision.select_feature=cls_patch keeps all 729).

Ablations: the overrides that configs/phi2.py lists.
"""

import ml_collections

from configs import common


def get_config(stage: str = 'all') -> ml_collections.ConfigDict:
  """`stage` is all, pretrain, finetune or moe."""
  c = common.paper('phi2_384', 'siglip_so400m_384', 'phi2', template='phi')
  return common.select(c, stage)
