# SPDX-License-Identifier: Apache-2.0
"""Evaluates models on a benchmark, or scores answers that are there already.

  python -m moellava_jax.evals.main --model=DIR --benchmark=pope \\
    --questions=F --images=DIR --out=DIR
  python -m moellava_jax.evals.main --benchmark=pope --questions=F --answers=F
  python -m moellava_jax.evals.main --benchmark=paper --scores=DIR --out=DIR
  for I in 0 1 2 3; do
    python -m moellava_jax.evals.main --shard=$I/4 --model=DIR ... &
  done

The first form writes OUT/<model>[.<control>][.<protocol>].<question file>.jsonl,
continues it where an earlier run was stopped, and adds the scores to
OUT/scores.json. --model and --control may be repeated. The last one prints the scores of
scores.json files beside those of the paper, and draws its figure 1.
"""

from collections.abc import Sequence
import dataclasses
import sys
from typing import Any

from absl import app, flags, logging

from moellava_jax import config
from moellava_jax.evals import benchmarks, controls, paper, prompts, run


def define_flags() -> None:
  names = [*sorted(benchmarks.BENCHMARKS), benchmarks.PAPER]
  flags.DEFINE_string('benchmark', None, f'One of {names}.', required=True)
  flags.DEFINE_string(
      'questions',
      None,
      'Question file; a directory where the benchmark has several.',
  )
  flags.DEFINE_multi_string('model', [], 'RUN, STAGE or STEP directory.')
  flags.DEFINE_multi_string(
      'control', ['none'], f'What is shown, of {list(controls.CONTROLS)}.'
  )
  flags.DEFINE_string(
      'protocol',
      prompts.PROTOCOLS[0],
      f'Whose way of asking, of {list(prompts.PROTOCOLS)}.',
  )
  flags.DEFINE_multi_string('answers', [], 'Score these; load no model.')
  flags.DEFINE_string(
      'images',
      None,
      'Root of the image paths. The images of a .tsv are unpacked there, or'
      ' into OUT/images.',
  )
  flags.DEFINE_string(
      'annotations',
      None,
      'Labels that are not in the question file: pope, the directory of'
      ' coco_pope_<category>.json; scienceqa, that of problems.json and'
      ' pid_splits.json; mme, MME_Benchmark_release_version; llava_bench, the'
      ' directory of context.jsonl and answers_gpt4.jsonl; gqa, textvqa, mmvet,'
      ' seed, vqav2 and vizwiz, the official file.',
  )
  flags.DEFINE_string('out', None, 'Directory of answers and scores.json.')
  flags.DEFINE_string(
      'submission', None, 'Write what the server or official script takes.'
  )
  flags.DEFINE_integer('batch_size', 64, 'Questions answered at a time.')
  flags.DEFINE_integer(
      'cpu_devices', 1, 'Devices to simulate where there is only a CPU.'
  )
  flags.DEFINE_string(
      'mesh',
      None,
      'Split the parameters: fsdp=2,expert=2; unset: all on every device.',
  )
  flags.DEFINE_integer(
      'max_new_tokens', None, 'Unset: the benchmark decides.', lower_bound=1
  )
  flags.DEFINE_float('temperature', 0.0, '0: greedy.', lower_bound=0.0)
  flags.DEFINE_enum(
      'image_aspect',
      None,
      ['pad', 'square'],
      'How images become squares: padded, or as the image processor does alone'
      ' (CLIP: the middle is cropped). Unset: as in training.',
  )
  flags.DEFINE_string(
      'shard',
      None,
      'I/N: answer the part of process I of N, from 0. All of them get the same'
      ' other flags; the last to finish merges the parts and scores.',
  )
  flags.DEFINE_bool(
      'routing_trace',
      False,
      'Record the experts of every token, in OUT/<answers file>.routing/.',
  )
  _define_judge_flags()
  flags.DEFINE_multi_string(
      'scores', [], 'paper: scores.json files or their directories.'
  )
  flags.DEFINE_multi_string(
      'server_score',
      [],
      'paper: MODEL:BENCHMARK:POINTS, what a server said; kept in'
      ' OUT/scores.json.',
  )


def _define_judge_flags() -> None:
  flags.DEFINE_string(
      'judge_url',
      None,
      'Where a language model grades: the address of an OpenAI-compatible API'
      ' up to /v1. llava_bench and mmvet need one, mmbench may use it.',
  )
  flags.DEFINE_string('judge_model', None, 'Its name there.')
  flags.DEFINE_string(
      'judge_key', 'OPENAI_API_KEY', 'Environment variable with the API key.'
  )
  flags.DEFINE_list(
      'judge_prices', [], 'Dollars per million tokens in and out: 30,60.'
  )
  flags.DEFINE_bool('yes', False, 'Send what was estimated.')


def main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {list(argv[1:])}.')
  if flags.FLAGS.verbosity <= 0:
    logging.set_verbosity(logging.WARNING)  # Orbax narrates what it reads.
  values: dict[str, Any] = {
      field.name: flags.FLAGS[field.name].value
      for field in dataclasses.fields(run.Options)
  }
  options = run.Options(**values)
  try:
    if options.benchmark == benchmarks.PAPER:
      paper.compare(options.scores, options.server_score, options.out)
    else:
      run.evaluate(options)
  except (config.UserError, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  define_flags()
  app.run(main)
