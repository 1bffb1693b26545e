# SPDX-License-Identifier: Apache-2.0
"""What the commands of this folder have in common."""

from collections.abc import Callable, Sequence
import dataclasses
import sys
from typing import Any

from absl import app, flags, logging

from moellava_jax import config


def values(kind: type) -> dict[str, Any]:
  """The flags that have the names of a dataclass's fields, by name."""
  return {
      field.name: flags.FLAGS[field.name].value
      for field in dataclasses.fields(kind)
  }


def run(argv: Sequence[str], serve: Callable[[], int]) -> int:
  """Calls `serve`, with an error of the user's in one line.

  Args:
    argv: what absl has left of the command line.
    serve: returns the exit status.

  Returns:
    the exit status.
  """
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {list(argv[1:])}.')
  if flags.FLAGS.verbosity <= 0:
    logging.set_verbosity(logging.WARNING)  # Orbax narrates what it reads.
  try:
    return serve()
  except (config.UserError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
