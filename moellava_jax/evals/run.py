# SPDX-License-Identifier: Apache-2.0
"""Asks models the questions of a benchmark, or scores answers that are there."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

from moellava_jax import trees
from moellava_jax.evals import (
    ask,
    base,
    benchmarks,
    controls,
    judge,
    parts,
    scores,
    tsv,
)


@dataclasses.dataclass(frozen=True)
class Options:
  """The flags."""

  benchmark: str
  questions: str | None
  model: Sequence[str]
  control: Sequence[str]
  protocol: str
  answers: Sequence[str]
  images: str | None
  annotations: str | None
  out: str | None
  submission: str | None
  judge_url: str | None
  judge_model: str | None
  judge_key: str  # The environment variable that has it.
  judge_prices: Sequence[str]
  yes: bool
  scores: Sequence[str]
  server_score: Sequence[str]
  batch_size: int
  max_new_tokens: int | None  # None: the benchmark's.
  temperature: float
  image_aspect: str | None  # None: the model's.
  cpu_devices: int
  mesh: str | None  # None: all parameters on every device.
  shard: str | None
  routing_trace: bool


def evaluate(options: Options) -> None:
  """Runs what the flags ask for.

  Raises:
    EvalError: a mistake in options or files, found before any model is loaded
      wherever that is possible.
  """
  benchmark = benchmarks.get(options.benchmark)
  if options.questions is None:
    raise base.EvalError('Give --questions=FILE.')
  if bool(options.model) == bool(options.answers):
    raise base.EvalError(
        'Give either --model (to generate and score) or --answers (to score).'
    )
  if options.submission is not None and benchmark.submission is None:
    having = [k for k, b in benchmarks.BENCHMARKS.items() if b.submission]
    raise base.EvalError(
        f'{options.benchmark} has no submission; drop --submission. Those that'
        f' have: {", ".join(having)}.'
    )
  _judge(options)
  questions = benchmarks.put(
      options.benchmark,
      benchmark.load(options.questions, options.annotations),
      options.protocol,
  )
  if options.answers:
    _check_scores_only(options)
    _score_answers(options, questions)
    return
  options = _with_images(options)
  names = _check_generation(options, questions)
  for name, path in names.items():
    _evaluate_model(name, path, options, questions)


def _check_scores_only(options: Options) -> None:
  """Raises EvalError for flags that mean something only with a model."""
  given = {
      '--shard': options.shard is not None,
      '--routing_trace': options.routing_trace,
      '--image_aspect': options.image_aspect is not None,
      '--mesh': options.mesh is not None,
  }
  if wrong := [flag for flag, is_set in given.items() if is_set]:
    raise base.EvalError(
        f'{", ".join(wrong)}: goes with --model; --answers are only scored.'
    )


def _judge(options: Options) -> judge.Judge | None:
  """The judge that the flags name; raises EvalError if they are no judge."""
  if options.judge_url is None and options.judge_model is None:
    return None
  if benchmarks.get(options.benchmark).grade is None:
    raise base.EvalError(
        f'{options.benchmark} is scored by rules; drop --judge_url.'
    )
  return judge.from_flags(
      options.judge_url,
      options.judge_model,
      os.environ.get(options.judge_key),
      options.judge_prices,
      options.out,
  )


def _with_images(options: Options) -> Options:
  """The images of a .tsv unpacked, into --images or OUT/images/STEM."""
  path = pathlib.Path(options.questions or '')
  if path.suffix != '.tsv' or options.out is None:
    return options
  folder = pathlib.Path(options.out) / 'images' / path.stem
  if options.images is not None:
    folder = pathlib.Path(options.images)
  tsv.unpack(path, folder)
  return dataclasses.replace(options, images=str(folder))


def _check_generation(
    options: Options, questions: benchmarks.Questions
) -> dict[str, str]:
  """Returns {model name: its path}; raises EvalError before hours are lost."""
  if options.out is None:
    raise base.EvalError('Give --out=DIR for the answers and scores.json.')
  parts.parse(options.shard)
  for control in options.control:
    controls.check(control)
  if options.batch_size < 1:
    raise base.EvalError(f'--batch_size={options.batch_size}: at least 1.')
  if options.submission and len(options.model) * len(options.control) > 1:
    raise base.EvalError(
        '--submission is one file; give one --model and one --control.'
    )
  names: dict[str, str] = {}
  for path in options.model:
    # A path with a colon is a hub id or a bucket.
    if ':' not in path and not pathlib.Path(path).is_dir():
      raise base.EvalError(f'--model={path}: no such directory.')
    name = os.path.basename(os.path.abspath(path))
    if name in names:
      raise base.EvalError(
          f'--model={names[name]} and --model={path} would both be called'
          f' {name!r}; evaluate them into different --out directories.'
      )
    names[name] = path
  ask.check_images(
      [q for group in questions.values() for q in group],
      options.images,
      pathlib.Path(options.out) / 'missing_images.txt',
  )
  for group in questions.values():
    for control in options.control:
      controls.shown_images([n for q in group for n in q.images], control)
  return names


def _evaluate_model(
    name: str, path: str, options: Options, questions: benchmarks.Questions
) -> None:
  # Imported here because scoring alone needs neither a model nor JAX.
  from moellava_jax.infer import chat as chat_lib

  assert options.out is not None
  out = pathlib.Path(options.out)
  try:
    chat = chat_lib.load(path, options.cpu_devices, options.mesh)
  except (OSError, ValueError) as e:
    raise base.EvalError(f'--model={path}: {e}') from e
  most = benchmarks.get(options.benchmark).max_new_tokens
  settings = ask.Settings(
      max_new_tokens=options.max_new_tokens or most,
      temperature=options.temperature,
      batch_size=options.batch_size,
      routing_trace=options.routing_trace,
      image_aspect=options.image_aspect,
  )
  shard = parts.parse(options.shard)
  if options.routing_trace and chat.model.cfg.moe is None:
    raise base.EvalError(
        f'--routing_trace: {path} is a dense model, which routes nothing. Give'
        ' a checkpoint of stage moe.'
    )
  for key, group in questions.items():
    ask.check_prompts(chat, group, settings.max_new_tokens, key)
  for control in options.control:
    words = [name, control, options.protocol]
    prefix = '.'.join(w for w in words if w not in ('none', 'llava'))
    paths = {key: out / f'{prefix}.{key}.jsonl' for key in questions}
    rows = {
        key: ask.ask(
            chat,
            group,
            options.images,
            paths[key],
            control,
            settings,
            model_id=name,
            shard=shard,
        )
        for key, group in questions.items()
    }
    # Only now: while this process answers the last file, the others finish.
    found = {key: ask.collect(rows[key], paths[key], shard) for key in rows}
    answers = {key: group for key, group in found.items() if group is not None}
    if len(answers) < len(found):
      print(
          f'{name}, control {control}: shard {options.shard} is answered. The'
          ' last process to finish merges and scores.'
      )
      continue
    source = {
        'model': path,
        'digest': chat.digest,
        'activated_parameters': activated(chat.params, chat.model.cfg),
        'image_size': chat.model.cfg.vision.image_size,
        **_shown_as(options.image_aspect),
    }
    try:
      _report(name, control, options, questions, answers, source)
    except base.UnscoredError as e:
      print(f'{name}, control {control}: answers written. {e}')


def activated(params: Any, cfg: Any) -> int:
  """Parameters of the decoder that one token uses, as the paper counts them."""
  sizes = {
      path: math.prod(leaf.shape)
      for path, leaf in trees.flatten(params['llm']).items()
  }
  idle = 0
  if cfg.moe is not None:
    experts = sum(n for path, n in sizes.items() if '/moe/experts/' in path)
    unused = cfg.moe.num_experts - cfg.moe.top_k
    idle = experts * unused // cfg.moe.num_experts
  return sum(sizes.values()) - idle


def _score_answers(options: Options, questions: benchmarks.Questions) -> None:
  files = _answer_files(options.answers, list(questions))
  answers = {key: base.read_answers(path) for key, path in files.items()}
  rows = [answer for group in answers.values() for answer in group]
  # Files of the original say nothing about control and weights.
  sources = {
      (
          row.model_id,
          row.metadata.get('control', 'none'),
          row.metadata.get('digest'),
          row.metadata.get('image_aspect'),
      )
      for row in rows
  }
  if len(sources) > 1:
    raise base.EvalError(
        'The answers differ in image_aspect, or are of several models or'
        f' controls: {base.listed(sorted(map(str, sources)))}.'
    )
  ((name, control, digest, aspect),) = sources
  source = {'model': None, 'digest': digest, **_shown_as(aspect)}
  try:
    _report(name, control, options, questions, answers, source)
  except base.UnscoredError as e:
    if options.submission is None:
      raise
    print(f'{name}, control {control}: {e}')


def _answer_files(paths: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
  """The answers file of each question file."""
  if len(keys) == 1 and len(paths) == 1:
    return {keys[0]: paths[0]}
  files = {
      key: [p for p in paths if p.endswith(f'.{key}.jsonl')] for key in keys
  }
  if len(paths) != len(keys) or any(len(f) != 1 for f in files.values()):
    raise base.EvalError(
        f'Give {len(keys)} times --answers, one for each of'
        f' {", ".join(f"*.{key}.jsonl" for key in keys)}; got {list(paths)}.'
    )
  return {key: found[0] for key, found in files.items()}


def _report(
    name: str,
    control: str,
    options: Options,
    questions: benchmarks.Questions,
    answers: benchmarks.Answers,
    source: Mapping[str, Any],
) -> None:
  """Submits, scores, prints and, with --out, records."""
  benchmark = benchmarks.get(options.benchmark)
  if options.submission is not None and benchmark.submission is not None:
    path = pathlib.Path(options.submission)
    path.parent.mkdir(parents=True, exist_ok=True)
    benchmark.submission(path, questions, answers)
    print(f'{path}: written for the server or the official script.')
  entry = {
      **_scores(options, questions, answers),
      'questions': sum(map(len, questions.values())),
      'answers': _digest(answers),
      **source,
  }
  if options.protocol != 'llava':
    entry['protocol'] = options.protocol
  scores.show(f'{name}, control {control}: {options.benchmark}', entry)
  if options.out is not None:
    key = '.'.join(
        p for p in (options.benchmark, options.protocol) if p != 'llava'
    )
    scores.merge(
        pathlib.Path(options.out) / 'scores.json', name, control, key, entry
    )


def _digest(answers: benchmarks.Answers) -> str:
  """Tells answers apart, whatever their order."""
  texts = sorted(
      sorted((str(a.question_id), a.prompt, a.text) for a in group)
      for group in answers.values()
  )
  return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _shown_as(aspect: str | None) -> dict[str, str]:
  """What an entry says of the image aspect: nothing, if it is the model's."""
  return {} if aspect is None else {'image_aspect': aspect}


def _scores(
    options: Options,
    questions: benchmarks.Questions,
    answers: benchmarks.Answers,
) -> dict[str, Any]:
  """By rules, or with the judge that the flags name."""
  benchmark = benchmarks.get(options.benchmark)
  judged = _judge(options)
  if judged is None or benchmark.grade is None or benchmark.requests is None:
    return benchmark.score(questions, answers)
  judged.agree(benchmark.requests(questions, answers), options.yes)
  graded = benchmark.grade(questions, answers, judged)
  return {**graded, 'judge': options.judge_model}
