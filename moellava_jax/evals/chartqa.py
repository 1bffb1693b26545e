# SPDX-License-Identifier: Apache-2.0
"""ChartQA: questions about charts; numbers may be off by a twentieth.

arXiv 2203.10244, section 5.1: relaxed accuracy, as pix2struct's
`relaxed_correctness` has it, which Qwen-VL, lmms-eval and VLMEvalKit took over.
--questions is the directory of the official `test_human.json` and
`test_augmented.json`, --images the directory of its pictures (`test/png`).
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from moellava_jax.evals import base, prompts

MAX_NEW_TOKENS = 128
SPLITS = ('human', 'augmented')
PROMPTS: prompts.Prompts = {
    'lmms': prompts.short,
    'vlmevalkit': prompts.short,
}
_TOLERANCE = 0.05


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions of both files, as 'human' and 'augmented'.

  Raises:
    EvalError: a file is missing or malformed.
  """
  if annotations is not None:
    raise base.EvalError(
        'chartqa has its answers in the question files; drop --annotations.'
    )
  folder = pathlib.Path(questions_path)
  if not folder.is_dir():
    raise base.EvalError(
        f'{folder}: no such directory; --questions of chartqa is the directory'
        ' with test_human.json and test_augmented.json.'
    )
  return {name: _read(folder / f'test_{name}.json', name) for name in SPLITS}


def _read(path: pathlib.Path, split: str) -> list[base.Question]:
  rows = base.read_json(path)
  if not isinstance(rows, list) or not rows:
    raise base.EvalError(f'{path}: expected a list of questions.')
  questions = []
  for number, row in enumerate(rows):
    try:
      image, query, label = row['imgname'], row['query'], row['label']
    except (KeyError, TypeError) as e:
      raise base.EvalError(
          f'{path}, item {number}: expected {{"imgname", "query", "label"}}, got'
          f' {row!r:.200}.'
      ) from e
    questions.append(
        base.Question(
            question_id=f'{split}_{number}',
            image=image,
            text=f'{query}\n{prompts.SHORT}',
            category=split,
            answer=str(label),
            extra={},
        )
    )
  return questions


def is_right(text: str, gold: str) -> bool:
  """Within 5 % of a number, or the same but for case.

  `12%` is the number 0.12; `1,200` is none, and a gold of 0 is not taken for
  one: these are compared letter by letter.
  """
  said, meant = _number(text), _number(gold)
  if said is not None and meant:
    return abs(said - meant) / abs(meant) <= _TOLERANCE
  return text.lower() == gold.lower()


def _number(text: str) -> float | None:
  try:
    if text.endswith('%'):
      return float(text.rstrip('%')) / 100
    return float(text)
  except ValueError:
    return None


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Relaxed accuracies in [0, 1]: `{human, augmented, accuracy}`.

  `accuracy` is over all questions; the splits of the test set are of one size,
  so that it is their mean as well.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  right = {}
  for split, group in questions.items():
    texts = base.check_complete(group, answers[split])
    right[split] = [
        is_right(texts[q.question_id].strip(), q.answer or '') for q in group
    ]
  every = [hit for hits in right.values() for hit in hits]
  return {
      **{split: sum(hits) / len(hits) for split, hits in right.items()},
      'accuracy': sum(every) / len(every),
  }
