# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA-2.7B x 4: Phi-2 and CLIP at 336 pixels.

  init="--config.init.lm=hf:microsoft/phi-2 \
      --config.init.tower=hf:openai/clip-vit-large-patch14-336"
  python -m moellava_jax.train.main --config=configs/phi2.py $init
  python -m moellava_jax.train.main --config=configs/phi2.py:pretrain $init
  python -m moellava_jax.train.main --config=configs/phi2.py:finetune $init
  python -m moellava_jax.train.main --config=configs/phi2.py:moe $init

The first runs all stages, the others one each.
The data are expected in moe_llava_data/ (a link will do), laid out as
published. Your own replace those of every stage, or of one:

  --config.data.json=F --config.data.images=DIR
  --config.moe.data.json=F1,F2 --config.moe.data.images=DIR

Phi-2 trains with a residual dropout of 0.1 in all stages, as the original does
(--config.model.llm.residual_dropout=0.0).

Ablations of the paper (tables 5 and 6), each an override of stage III:

  --config.model.moe.layers=first_half     or second_half, all, interval, 0,2,5
  --config.model.moe.num_experts=2         2, 4, 8; 1 with top_k=1
  --config.model.moe.top_k=1
  --config.model.moe.capacity_factor=1.0
  --config.model.moe.aux_loss_weight=0.0
  --config.model.moe.second_choice=argmax  the original samples it
  --config.model.moe.upcycle=random        experts that are no copies
  --config.moe.whole_lm=True               more than FFNs and experts
  --config.model.moe.use_residual=True     PR-MoE

The grids of `python -m moellava_jax.analysis.ablation` run and compare them.
"""

import ml_collections

from configs import common


def get_config(stage: str = 'all') -> ml_collections.ConfigDict:
  """`stage` is all, pretrain, finetune or moe."""
  c = common.paper('phi2', 'clip_l14_336', 'phi2', template='phi')
  return common.select(c, stage)
