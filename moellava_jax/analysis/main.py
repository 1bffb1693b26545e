# SPDX-License-Identifier: Apache-2.0
r"""Shows where the tokens of a question set go: figures, tables, one page.

  python -m moellava_jax.analysis.main --model=runs/shapes/moe \
      --questions=runs/shapes/data --images=runs/shapes/data \
      --out=runs/shapes/routing

runs whole conversations, the known answers included, through the model. From
what `evals.main --routing_trace` recorded, without running anything:

  python -m moellava_jax.analysis.main --out=DIR \
      --traces=OUT/pope.routing [--model=DIR, to check that they are its own]

Writes OUT/routing.html, which stands alone, OUT/routing.json, and every figure
as .png and .svg with its numbers as .csv.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import shlex
import sys
from typing import Any

from absl import app, flags, logging


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags."""

  model: str | None
  questions: str | None
  images: str | None
  traces: Sequence[str]
  run: str | None
  cpu_devices: int
  mesh: str | None
  out: str


def define_flags() -> None:
  flags.DEFINE_string(
      'model', None, 'Checkpoint: RUN, STAGE, STEP or final directory.'
  )
  flags.DEFINE_string(
      'questions',
      None,
      'A question file with answers, or the data directory of Shapes.',
  )
  flags.DEFINE_string('images', None, 'Root of the image paths.')
  flags.DEFINE_multi_string(
      'traces',
      [],
      'Folder that evals.main --routing_trace wrote, instead of --questions;'
      ' several of one model are added up.',
  )
  flags.DEFINE_string(
      'run',
      None,
      'Run whose metrics.jsonl shows the load over the steps. Unset: the one'
      ' that --model lies in, if any.',
  )
  flags.DEFINE_integer(
      'cpu_devices', 1, 'Devices to simulate where there is only a CPU.'
  )
  flags.DEFINE_string(
      'mesh',
      None,
      'Split the parameters: fsdp=2,expert=2; unset: all on every device.',
  )
  flags.DEFINE_string('out', None, 'Directory to write.', required=True)


def run(options: Options) -> None:
  """Writes what the flags ask for.

  Raises:
    ValueError: what the user can mend; before any model is loaded wherever
      that is possible.
  """
  from moellava_jax import run_folder
  from moellava_jax.analysis import counts as counts_lib
  from moellava_jax.analysis import exhibits, routing, routing_page

  _check(options)
  if options.traces:
    counts, about = _recorded(options)
  else:
    counts, about = _measured(options)
  rows, whence = _training(options)
  shown, absent = routing_page.collect(counts, rows, whence)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'routing.json'
  run_folder.write_json(path, {**about, **routing.summary(counts)})
  figures = [exhibits.write(exhibit, out) for exhibit in shown]
  page = routing_page.render(counts, about, figures, absent, _command(options))
  (out / 'routing.html').write_text(page, encoding='utf-8')
  for layer, load_E in zip(
      counts.layers, counts_lib.load_LE(counts), strict=True
  ):
    shares = '  '.join(f'{100 * share:.1f} %' for share in load_E)
    print(f'layer {layer}: load of the experts {shares}')
  for line in absent:
    print(f'absent: {line}')
  print(f'Wrote {path}, {out / "routing.html"} and {len(shown)} figures.')


def _check(options: Options) -> None:
  """Raises UserError for flags that do not go together."""
  from moellava_jax import config

  needed = {
      '--model': options.model,
      '--questions': options.questions,
      '--images': options.images,
  }
  if options.traces:
    if wrong := [n for n in ('--questions', '--images') if needed[n]]:
      raise config.UserError(
          f'{" and ".join(wrong)}: the questions of --traces were asked when'
          ' they were recorded. Give either --traces or --questions.'
      )
  elif missing := [name for name, value in needed.items() if not value]:
    raise config.UserError(
        f'{" and ".join(missing)} missing: give --model, --questions and'
        ' --images to run a model, or --traces of one that was run.'
    )


def _measured(options: Options) -> tuple[Any, dict[str, Any]]:
  """Counts of the questions' conversations, and what is known beside."""
  from moellava_jax import checkpoint, config
  from moellava_jax.analysis import routing
  from moellava_jax.evals import base, shapes
  from moellava_jax.infer import chat as chat_lib

  model, questions = options.model, options.questions
  assert model and questions and options.images
  cfg, stage = checkpoint.describe(model)
  routing.require_experts(cfg.stage_model(stage), model, stage)
  if os.path.isdir(questions):
    files = shapes.load(questions, None)
    asked = [q for part in files.values() for q in part]
  else:
    asked = base.read_questions(questions)
  rows = routing.conversations(asked)
  if not rows:
    raise config.UserError(
        f'{questions} has no answers ("label" or "answer"), and routing is'
        " measured on whole conversations. To measure it on the model's own"
        ' answers run `python -m moellava_jax.evals.main --routing_trace` and'
        ' give what it records as --traces.'
    )
  chat = chat_lib.load(model, options.cpu_devices, options.mesh, as_stored=True)
  counts, found = routing.measure(chat, rows, options.images)
  return counts, {'source': os.path.abspath(questions), **found}


def _recorded(options: Options) -> tuple[Any, dict[str, Any]]:
  """Counts of the traces, and what is known beside."""
  from moellava_jax import checkpoint
  from moellava_jax.analysis import recorded, routing
  from moellava_jax.infer import chat as chat_lib

  about = recorded.about(options.traces)
  if options.model:
    cfg, stage = checkpoint.describe(options.model)
    model = cfg.stage_model(stage)
    routing.require_experts(model, options.model, stage)
    assert model.moe is not None
    expected = about._replace(
        layers=tuple(model.moe.layer_ids(model.llm.depth)),
        num_experts=model.moe.num_experts,
    )
    # What the config says is known at once; the weights have to be read.
    recorded.check(options.traces[0], about, expected, options.model)
    digest = chat_lib.load(
        options.model, options.cpu_devices, options.mesh
    ).digest
    expected = expected._replace(digest=digest)
    recorded.check(options.traces[0], about, expected, options.model)
  return recorded.count(options.traces), {
      'source': ', '.join(os.path.abspath(path) for path in options.traces),
      'digest': about.digest,
      'control': about.control,
  }


def _training(options: Options) -> tuple[list[dict[str, Any]], str]:
  """Rows of the sparse stage that the model was trained in; where from."""
  from moellava_jax import config
  from moellava_jax.analysis import run_files

  if options.run:
    path = pathlib.Path(options.run) / 'metrics.jsonl'
    if not path.is_file():
      raise config.UserError(
          f'{path} is missing: --run takes the workdir of a training run.'
      )
  else:
    model = pathlib.Path(options.model or '').absolute()
    folders = [model, *model.parents][:3] if options.model else []
    files = [folder / 'metrics.jsonl' for folder in folders]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
      return [], ''
  rows = run_files.read_metrics(path).get(run_files.FINAL, [])
  return [row for row in rows if row.get('moe')], str(path)


def _command(options: Options) -> str:
  words = ['python', '-m', 'moellava_jax.analysis.main']
  for name, value in dataclasses.asdict(options).items():
    if name == 'traces':
      words += [f'--traces={folder}' for folder in value]
    elif value is not None and not (name == 'cpu_devices' and value == 1):
      words.append(f'--{name}={value}')
  return shlex.join(words)


def main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {list(argv[1:])}.')
  if flags.FLAGS.verbosity <= 0:
    logging.set_verbosity(logging.WARNING)  # Orbax narrates what it reads.
  values: dict[str, Any] = {
      field.name: flags.FLAGS[field.name].value
      for field in dataclasses.fields(Options)
  }
  try:
    run(Options(**values))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  define_flags()
  app.run(main)
