# SPDX-License-Identifier: Apache-2.0
"""Which parameters each stage updates: one ordered table.

The original reaches stage III's set by switching `requires_grad` in three
places, in order: `initialize_moe_modules` freezes all but the FFNs and the
routers, `initialize_vision_modules` then frees the projector. So it trains
experts, routers, the FFNs of the *dense* layers too, and the projector (the
paper's figure 2 draws that one frozen; its code and its figure 3 do not).
"""

import re
from typing import Any

from moellava_jax import trees

# Stage -> (pattern of a whole parameter path, is it trained). First match wins.
STAGES = {
    # Stage 0 of the embedded task: tower by its probe, LM from text.
    'warmup': (
        ('(vision|probe|llm)/.*', True),
        ('projector/.*', False),
    ),
    'pretrain': (
        ('projector/.*', True),
        ('(vision|llm)/.*', False),
    ),
    'finetune': (
        ('(projector|llm)/.*', True),
        ('vision/.*', False),
    ),
    'moe': (
        ('projector/.*', True),
        (r'llm/layers_\d+/(mlp|moe)/.*', True),
        ('(vision|llm)/.*', False),
    ),
}


def mask(params: Any, stage: str, whole_lm: bool = False) -> Any:
  """Returns `params` with every leaf replaced by whether `stage` trains it.

  Args:
    params: any tree with the paths of all parameters.
    stage: its name.
    whole_lm: of the stage's section; True trains the LM as stage II does.

  Raises:
    ValueError: an unknown stage, a leaf that no pattern matches, or a pattern
      that matches no leaf.
  """
  if stage not in STAGES:
    raise ValueError(f'Unknown stage {stage!r}; expected {sorted(STAGES)}.')
  table = STAGES['finetune' if whole_lm else stage]
  unused = {pattern for pattern, _ in table}

  def is_trained(path, _):
    for pattern, trained in table:
      if re.fullmatch(pattern, path):
        unused.discard(pattern)
        return trained
    raise ValueError(
        f'Stage {stage!r} does not say whether {path!r} is trained; add a'
        ' pattern to STAGES.'
    )

  result = trees.map_paths(is_trained, params)
  if unused:
    raise ValueError(f'Stage {stage!r}: nothing matches {sorted(unused)}.')
  return result
