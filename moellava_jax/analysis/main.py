# SPDX-License-Identifier: Apache-2.0
r"""Records where the tokens of a question set go, as OUT/routing.json.

  python -m moellava_jax.analysis.main --model=runs/shapes/moe \
      --questions=runs/shapes/data --images=runs/shapes/data \
      --out=runs/shapes/routing
"""

import os
import sys

from absl import app, flags, logging

_MODEL = flags.DEFINE_string(
    'model',
    None,
    'Checkpoint: RUN, STAGE, STEP or final directory.',
    required=True,
)
_QUESTIONS = flags.DEFINE_string(
    'questions',
    None,
    'A question file, or the data directory of Shapes.',
    required=True,
)
_IMAGES = flags.DEFINE_string(
    'images', None, 'Root of the image paths.', required=True
)
_CPU_DEVICES = flags.DEFINE_integer(
    'cpu_devices', 1, 'Devices to simulate where there is only a CPU.'
)
_OUT = flags.DEFINE_string('out', None, 'Directory to write.', required=True)


def run(
    model: str, questions_path: str, images: str, out: str, cpu_devices: int = 1
) -> None:
  """Writes OUT/routing.json; ValueError for what the user can mend."""
  from moellava_jax import run_folder
  from moellava_jax.analysis import routing
  from moellava_jax.evals import base, shapes
  from moellava_jax.infer import chat as chat_lib

  if os.path.isdir(questions_path):
    files = shapes.load(questions_path, None)
    questions = [q for part in files.values() for q in part]
  else:
    questions = base.read_questions(questions_path)
  chat = chat_lib.load(model, cpu_devices)
  rows = routing.conversations(questions)
  if not rows:
    raise ValueError(
        f'{questions_path} has no answers ("label" or "answer"), and routing is'
        ' measured on whole conversations.'
    )
  summary = routing.summarise(chat, rows, images)
  os.makedirs(out, exist_ok=True)
  path = os.path.join(out, 'routing.json')
  run_folder.write_json(path, summary)
  for layer, load in zip(
      summary['layers'], summary['expert_load'], strict=True
  ):
    shares = '  '.join(f'{100 * share:.1f} %' for share in load)
    print(f'layer {layer}: load of the experts {shares}')
  print(f'Wrote {path}.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  if flags.FLAGS.verbosity <= 0:
    logging.set_verbosity(logging.WARNING)  # Orbax narrates what it reads.
  try:
    run(
        _MODEL.value,
        _QUESTIONS.value,
        _IMAGES.value,
        _OUT.value,
        _CPU_DEVICES.value,
    )
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main)
