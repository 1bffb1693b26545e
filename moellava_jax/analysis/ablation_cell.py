# SPDX-License-Identifier: Apache-2.0
"""A finished cell as one small JSON file, and the questions beside it.

  OUT/cells/ROW.seedN.json           settings, scores, times, what was right
  OUT/cells/questions-DIGEST.json    categories, labels and images, by question

Which questions a cell got right is packed: a bit each, zlib, base64. With the
questions beside it every score and every interval is computed again without
model, images or text; for benchmarks that are not scored question by question
(all but Shapes and POPE) the cell has the score alone.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any
import zlib

import numpy as np

from moellava_jax import config, run_folder
from moellava_jax.analysis import ablation_commands, ablation_plan
from moellava_jax.evals import base, benchmarks, pope, scores, shapes

FORMAT = 1
# Benchmark -> where its one score is in an entry of scores.json. Those of
# `BY_QUESTION` are computed again from the answers.
HEADLINES: Mapping[str, tuple[str, ...]] = {
    'ai2d': ('accuracy',),
    'chartqa': ('accuracy',),
    'gqa': ('accuracy',),
    'llava_bench': ('all', 'ratio'),
    'mmbench': ('accuracy',),
    'mme': ('total',),
    'mmmu': ('accuracy',),
    'mmvet': ('total',),
    'scienceqa': ('accuracy_img',),
    'seed': ('image',),
    'textvqa': ('accuracy',),
}
BY_QUESTION = ('shapes', 'pope')
_YES_NO = 'yes_no'
_EXACT = 'exact'


@dataclasses.dataclass(frozen=True)
class Part:
  """A question file, N questions, and what a model made of it.

  Attributes:
    kind: `yes_no` is scored by F1, `exact` by the share of right answers; both
      as means over the categories.
    categories: their names, in the order of the numbers in `category_N`.
    category_N: int, number of the category.
    image_N: int, number of the image; questions about one are not independent.
    yes_N: bool, the label; all False where kind is `exact`.
    right_N: bool, whether the answer is right.
  """

  kind: str
  categories: tuple[str, ...]
  category_N: np.ndarray
  image_N: np.ndarray
  yes_N: np.ndarray
  right_N: np.ndarray


def pack(values_N: np.ndarray) -> str:
  """Bools as bits, other values as uint16; zlib, base64."""
  if values_N.dtype == bool:
    data = np.packbits(values_N).tobytes()
  else:
    if values_N.size and not 0 <= values_N.min() <= values_N.max() < 1 << 16:
      raise ValueError(f'{values_N.min()} to {values_N.max()} is no uint16.')
    data = values_N.astype('<u2').tobytes()
  return base64.b64encode(zlib.compress(data, 9)).decode()


def unpack(text: str, count: int | None) -> np.ndarray:
  """The inverse of `pack`; `count` bools, or with None all integers."""
  data = zlib.decompress(base64.b64decode(text))
  if count is None:
    return np.frombuffer(data, '<u2').astype(int)
  bits_N = np.unpackbits(np.frombuffer(data, np.uint8), count=count)
  return bits_N.astype(bool)


def parts_of(
    benchmark: str,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Part]:
  """By question file; empty for benchmarks that are not in `BY_QUESTION`.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  if benchmark not in BY_QUESTION:
    return {}
  found = {}
  for name, group in questions.items():
    yes_no = benchmark == 'pope' or name == 'pope'
    texts = base.check_complete(group, answers[name])
    right = pope_right if yes_no else exact_right
    categories = tuple(sorted({q.category for q in group}))
    images = dict.fromkeys(q.image for q in group)
    numbers = {image: i for i, image in enumerate(images)}
    found[name] = Part(
        kind=_YES_NO if yes_no else _EXACT,
        categories=categories,
        category_N=np.array([categories.index(q.category) for q in group]),
        image_N=np.array([numbers[q.image] for q in group]),
        yes_N=np.array([yes_no and q.answer == 'yes' for q in group]),
        right_N=np.array([right(q, texts[q.question_id]) for q in group]),
    )
  return found


def pope_right(question: base.Question, text: str) -> bool:
  return pope.decide(text) == question.answer


def exact_right(question: base.Question, text: str) -> bool:
  return shapes.normalize(text) == shapes.normalize(question.answer or '')


def _questions_json(parts: Mapping[str, Part]) -> dict[str, Any]:
  return {
      name: {
          'kind': part.kind,
          'count': len(part.right_N),
          'categories': list(part.categories),
          'category': pack(part.category_N),
          'image': pack(part.image_N),
          'yes': pack(part.yes_N),
      }
      for name, part in parts.items()
  }


def path_of(out: str, name: str) -> pathlib.Path:
  return pathlib.Path(out) / 'cells' / f'{name}.json'


def write(
    cell: ablation_plan.Cell, out: str, benchmark: ablation_commands.Benchmark
) -> None:
  """Writes the JSON of a cell whose runs and answers are complete.

  Raises:
    UserError: answers or scores are missing or malformed.
  """
  stage = cell.run.last
  folder = pathlib.Path(ablation_commands.answers(cell, out))
  entries = scores.read(folder / 'scores.json')
  try:
    entry = entries[stage]['none'][benchmark.name]
  except KeyError as error:
    raise config.UserError(
        f'{folder}/scores.json has no scores of {stage} on {benchmark.name}.'
    ) from error
  # Folders of this machine mean nothing elsewhere.
  kept: dict[str, Any] = {
      'scores': {k: v for k, v in entry.items() if k != 'model'}
  }
  if benchmark.name in BY_QUESTION:
    source, _ = ablation_commands.sources(cell, out, benchmark)
    questions = benchmarks.get(benchmark.name).load(
        source, benchmark.annotations
    )
    answers = {
        key: base.read_answers(folder / f'{stage}.{key}.jsonl')
        for key in questions
    }
    parts = parts_of(benchmark.name, questions, answers)
    kept['questions'] = _write_questions(parts, out)
    kept['right'] = {k: pack(part.right_N) for k, part in parts.items()}
  path = path_of(out, cell.name)
  before = read_json(path) if path.exists() else {}
  same = before.get('digest') == cell.digest
  known = before['benchmarks'] if same else {}
  content = {**_about(cell, out), 'benchmarks': {**known, benchmark.name: kept}}
  path.parent.mkdir(parents=True, exist_ok=True)
  run_folder.write_json(path, content)


def _write_questions(parts: Mapping[str, Part], out: str) -> str:
  """Writes the questions once for all cells that answer them."""
  content = _questions_json(parts)
  text = json.dumps(content, sort_keys=True)
  name = f'questions-{hashlib.sha256(text.encode()).hexdigest()[:12]}'
  path = path_of(out, name)
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(path, content)
  return name


def _about(cell: ablation_plan.Cell, out: str) -> dict[str, Any]:
  """Settings, parameters, times and environment, from the runs' folders."""
  stages: dict[str, Any] = {}
  environment: dict[str, Any] = {}
  for run in cell.run.chain:
    folder = pathlib.Path(run.folder(out))
    stages |= read_json(folder / 'stages.json')
    environment = read_json(folder / 'environment.json')
  last = stages[cell.run.last]
  return {
      'format': FORMAT,
      'row': cell.row.key,
      'seed': cell.seed,
      'config': cell.config,
      'digest': cell.digest,
      'overrides': {
          name: value for run in cell.run.chain for name, value in run.overrides
      },
      'parameters': {
          key: last[key] for key in last if key.endswith('parameters')
      },
      'stages': {
          name: {'steps': row['steps'], 'seconds': row['seconds']}
          for name, row in stages.items()
      },
      'revision': environment.get('revision'),
      'versions': environment.get('versions'),
      'device': environment.get('device'),
      'python': environment.get('python'),
  }


def read_json(path: os.PathLike[str] | str) -> dict[str, Any]:
  """Raises UserError for a file that is not there or no JSON object."""
  try:
    found = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise config.UserError(
        f'{path} cannot be read ({run_folder.reason(error)}). Delete it and run'
        ' the grid again.'
    ) from error
  if not isinstance(found, dict):
    raise config.UserError(f'{path}: expected a JSON object.')
  return found


def read(out: str, name: str, benchmark: str) -> dict[str, Any] | None:
  """The JSON of a cell that was asked a benchmark; None if it was not yet."""
  path = path_of(out, name)
  if not path.exists():
    return None
  content = read_json(path)
  return content if benchmark in content['benchmarks'] else None


def read_parts(
    out: str, content: Mapping[str, Any], benchmark: str
) -> dict[str, Part]:
  """What a cell got right, by question file; empty if only scores were kept."""
  kept = content['benchmarks'][benchmark]
  if 'questions' not in kept:
    return {}
  found = {}
  for name, about in read_json(path_of(out, kept['questions'])).items():
    count = about['count']
    found[name] = Part(
        kind=about['kind'],
        categories=tuple(about['categories']),
        category_N=unpack(about['category'], None),
        image_N=unpack(about['image'], None),
        yes_N=unpack(about['yes'], count),
        right_N=unpack(kept['right'][name], count),
    )
  return found


def headline(content: Mapping[str, Any], benchmark: str) -> float:
  """The score of a benchmark that is not in `BY_QUESTION`.

  Raises:
    UserError: it has none in one number, or a server computes it.
  """
  value: Any = content['benchmarks'][benchmark]['scores']
  for key in HEADLINES.get(benchmark, ('?',)):
    value = value.get(key) if isinstance(value, Mapping) else None
  if not isinstance(value, int | float):
    raise config.UserError(
        f'{benchmark} has no single score to compare rows by; choose one of'
        f' {", ".join(sorted((*HEADLINES, *BY_QUESTION)))}.'
    )
  return float(value)
