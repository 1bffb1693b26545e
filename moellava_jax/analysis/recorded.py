# SPDX-License-Identifier: Apache-2.0
"""Counts from traces on disk, which `evals.main --routing_trace` writes."""

from collections.abc import Sequence

from moellava_jax import config
from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import tally
from moellava_jax.evals import traces


def about(folders: Sequence[str]) -> traces.About:
  """Whose choices the folders hold, which may be those of several benchmarks.

  Raises:
    UserError: nothing is recorded there, or not by one model under one control.
  """
  found = [traces.about(folder) for folder in folders]
  for folder, other in zip(folders, found, strict=True):
    check(folder, other, found[0], folders[0])
  return found[0]


def check(
    folder: str, found: traces.About, expected: traces.About, of: str
) -> None:
  """Raises UserError if the traces of `folder` are not by the model `of`.

  Args:
    folder: of traces.
    found: what it says about itself.
    expected: what it should say.
    of: where `expected` is from.
  """
  for what, mine, theirs in zip(
      ('sparse layers', 'experts', 'digest of the weights', 'control'),
      found,
      expected,
      strict=True,
  ):
    if mine != theirs:
      raise config.UserError(
          f'{folder} holds traces of another model than {of}: {what} {mine}'
          f' instead of {theirs}. Record them again with `python -m'
          ' moellava_jax.evals.main --routing_trace`, or give what belongs'
          ' together.'
      )


def count(folders: Sequence[str]) -> counts_lib.Counts:
  """Counts of all conversations of the folders.

  A trace holds choices, not probabilities: `entropy_LM` is None.

  Raises:
    UserError: see `about`; or a file cannot be read.
  """
  whose = about(folders)
  return tally.tally(
      whose.layers,
      whose.num_experts,
      (
          tally.Tokens(1, t.is_image_T, t.choice_LTk, t.kept_LTk, None)
          for folder in folders
          for t in traces.read(folder)
      ),
  )
