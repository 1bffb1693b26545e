# SPDX-License-Identifier: Apache-2.0
"""Compares the logits of a checkpoint with those that torch computes.

  python -m moellava_jax.infer.verify --ours=DIR --theirs=DIR [--tower=DIR]

`theirs` is what `ours` was imported from or exported to: a directory of LLaVA
or MoE-LLaVA, or LlavaForConditionalGeneration. Both run in fp32, on the same
random image and ids. Experts never drop a token, and the second one is the
likeliest: the original samples it, so that it does not agree with itself.

Needs torch: pip install -e .[parity].
"""

import dataclasses
import sys
from typing import Any, NamedTuple

from absl import app, flags, logging
import numpy as np

from moellava_jax import checkpoint, config

_OURS = flags.DEFINE_string('ours', None, 'RUN, STAGE, STEP or final.')
_THEIRS = flags.DEFINE_string('theirs', None, 'The directory of others.')
_TOWER = flags.DEFINE_string(
    'tower', None, 'Directory of the tower, if --theirs does not hold it.'
)
_ATOL = flags.DEFINE_float('atol', 1e-3, 'Largest difference of two logits.')

_LENGTH = 24  # Ids of text, beside the image.
_BEFORE = 5  # Of them, those before the image.


class Inputs(NamedTuple):
  ids_T: np.ndarray  # Text alone.
  image_HWC: np.ndarray  # uint8.


class Comparison(NamedTuple):
  largest: float  # Difference of two logits.
  scale: float  # The largest logit.
  agree: float  # Share of positions with the same likeliest token.


def inputs(model: config.ModelConfig, seed: int = 0) -> Inputs:
  """Random ids and pixels."""
  rng = np.random.default_rng(seed)
  size = model.vision.image_size
  ids_T = rng.integers(0, model.llm.vocab_size, _LENGTH).astype(np.int32)
  return Inputs(ids_T, rng.integers(0, 256, (size, size, 3)).astype(np.uint8))


def our_logits(path: str):
  """(model config of the run, inputs, logits_TV) of a checkpoint of ours."""
  import jax.numpy as jnp

  from moellava_jax.model import llava

  found = checkpoint.load(path)
  model = found.config.stage_model(found.stage)
  moe = model.moe
  if moe is not None:
    moe = dataclasses.replace(
        moe, eval_capacity_factor=None, eval_second_choice='argmax'
    )
  model = dataclasses.replace(
      model, moe=moe, compute_dtype='float32', attention='einsum'
  )
  given = inputs(model)
  marks_P = np.full(model.vision.num_tokens, config.IMAGE_TOKEN, np.int32)
  ids_T = np.concatenate(
      [given.ids_T[:_BEFORE], marks_P, given.ids_T[_BEFORE:]]
  )
  ids_BT = jnp.asarray(ids_T)[None]
  out = llava.forward(
      llava.Llava(model),
      found.params,
      ids_BT,
      jnp.ones_like(ids_BT),
      jnp.arange(len(ids_T))[None],
      jnp.asarray(given.image_HWC)[None, None],
      train=False,
  )
  return found.config.model, given, np.asarray(out.logits_BTV[0])


def compare(ours: str, theirs: str, tower: str | None = None) -> Comparison:
  """Runs both; see the module.

  Raises:
    UserError: torch is missing, or transformers cannot compute `theirs`.
  """
  try:
    from moellava_jax.infer import reference
  except ImportError as error:
    raise config.UserError(
        f'{error}: verifying needs torch, pip install -e .[parity].'
    ) from error
  model, given, ours_TV = our_logits(ours)
  theirs_TV = reference.logits(
      theirs, tower, model, given.ids_T, given.image_HWC, _BEFORE
  )
  # An export may have gained rows of vocabulary.
  theirs_TV = theirs_TV[:, : ours_TV.shape[1]]
  if theirs_TV.shape != ours_TV.shape:
    raise config.UserError(
        f'{ours} has logits of shape {ours_TV.shape}, {theirs} of'
        f' {theirs_TV.shape}; they are not the same model.'
    )
  return Comparison(
      float(np.abs(ours_TV - theirs_TV).max()),
      float(np.abs(theirs_TV).max()),
      float((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).mean()),
  )


def main(argv: list[str]) -> Any:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  if _OURS.value is None or _THEIRS.value is None:
    raise app.UsageError('--ours=DIR and --theirs=DIR are required.')
  if flags.FLAGS.verbosity <= 0:
    logging.set_verbosity(logging.WARNING)
  try:
    found = compare(_OURS.value, _THEIRS.value, _TOWER.value)
  except config.UserError as error:
    sys.exit(f'error: {error}')
  print(
      f'largest difference {found.largest:.2e} of logits up to'
      f' {found.scale:.3g}; the likeliest token is the same at'
      f' {found.agree:.1%} of the positions'
  )
  if not found.largest <= _ATOL.value:
    sys.exit(f'error: the difference is above --atol={_ATOL.value:g}.')


if __name__ == '__main__':
  app.run(main)
