# SPDX-License-Identifier: Apache-2.0
"""Steps write into the cache where it is."""

import re

import jax
import numpy as np
import pytest

from moellava_jax import sharding
from moellava_jax.infer import generate, sampling
from moellava_jax.model import llava
from tests import tiny

_RESULT = re.compile(r' = f32\[([\d,]+)\]\S* (\w+)\(')


@pytest.mark.parametrize('rows', [1, 3])
def test_a_step_copies_no_cache(rows):
  cfg = tiny.model_config(moe=tiny.moe_config())
  model, params = llava.Llava(cfg), tiny.params_of(cfg)
  auto = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
  mesh = jax.make_mesh((1, 1, 1, 1), sharding.AXES, auto)
  image_HWC = (cfg.vision.image_size,) * 2 + (3,)
  prompt = generate.Prompt(
      np.arange(4, 21, dtype=np.int32), np.zeros((0, *image_HWC), np.uint8)
  )
  batch = generate.Batch(
      model,
      params,
      [prompt] * rows,
      [sampling.Options()] * rows,
      max_new_tokens=6,
      ends=(),
      rows=rows,
      mesh=mesh,
  )
  with sharding.use(mesh):
    program = generate._advance.lower(
        model,
        params,
        batch._run,
        np.zeros(rows, bool),
        np.full(8, -1, np.int32),
        np.int32(6),
        mesh=mesh,
    ).compile()
  caches = jax.tree.leaves(batch._run.state.cache)
  size = caches[0].size
  made = [
      operation
      for shape, operation in _RESULT.findall(str(program.as_text()))
      if np.prod([int(n) for n in shape.split(',')]) == size
  ]
  # Bitcasts and elements of tuples are other names of the same memory; what is
  # left is a fusion for each array, the write, which XLA does in place.
  assert 'copy' not in made
  assert made.count('fusion') <= len(caches)
