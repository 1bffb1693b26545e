# SPDX-License-Identifier: Apache-2.0
"""The embedded task: held-out scenes of coloured shapes on a grid.

Two files in the directory given as --questions: `questions_pope.jsonl` asks
whether a shape is there and is scored as POPE; `questions_exact.jsonl` asks
how many, which colour and where, and an answer is right or wrong.
"""

from collections.abc import Callable, Mapping, Sequence
import pathlib
import statistics
from typing import Any

from moellava_jax.evals import base, pope, prompts

MAX_NEW_TOKENS = 8  # The longest answer is two words.
CATEGORIES = ('count', 'color', 'position')
FILES = ('pope', 'exact')
PROMPTS: prompts.Prompts = {}  # Asked as trained.


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions of both files, as 'pope' and 'exact'."""
  if annotations is not None:
    raise base.EvalError(
        'shapes has its labels in the question files; drop --annotations.'
    )
  folder = pathlib.Path(questions_path)
  if not folder.is_dir():
    raise base.EvalError(
        f'{folder}: no such directory; --questions of shapes is the directory'
        ' with questions_pope.jsonl and questions_exact.jsonl.'
    )
  paths = {key: folder / f'questions_{key}.jsonl' for key in FILES}
  questions = {key: base.read_questions(path) for key, path in paths.items()}
  pope.check_labels(questions['pope'], paths['pope'])
  _check_exact(questions['exact'], paths['exact'])
  return questions


def _check_exact(
    questions: Sequence[base.Question], path: pathlib.Path
) -> None:
  for number, question in enumerate(questions, 1):
    where = f'{path}, line {number}'
    if question.category not in CATEGORIES:
      raise base.EvalError(
          f'{where}: category {question.category!r}; expected one of'
          f' {list(CATEGORIES)}.'
      )
    if question.answer is None or not isinstance(
        question.extra.get('kind'), str
    ):
      raise base.EvalError(
          f'{where}: an exact question has an "answer" and a "kind".'
      )
  absent = set(CATEGORIES) - {q.category for q in questions}
  if absent:
    raise base.EvalError(
        f'{path}: no question of {sorted(absent)}, without which the mean'
        ' would be over other categories than in other runs.'
    )


def normalize(text: str) -> str:
  """What exact match compares: no outer space, one final full stop, no case."""
  return text.strip().removesuffix('.').lower()


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Scores of both files, all in [0, 1].

  Returns:
    `{'pope': <pope.rates>, 'exact_match': {count, color, position, mean},
    'exact_match_kind': {kind: rate}}`; `mean` weighs the categories equally.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  exact = questions['exact']
  texts = base.check_complete(exact, answers['exact'])
  by_category = _exact_match(exact, texts, lambda q: q.category)
  by_category = {name: by_category[name] for name in CATEGORIES}
  by_kind = _exact_match(exact, texts, lambda q: q.extra['kind'])
  mean = statistics.fmean(by_category.values())
  return {
      'pope': pope.rates(questions['pope'], answers['pope']),
      'exact_match': {**by_category, 'mean': mean},
      'exact_match_kind': dict(sorted(by_kind.items())),
  }


def _exact_match(
    questions: Sequence[base.Question],
    texts: Mapping[int | str, str],
    group_of: Callable[[base.Question], str],
) -> dict[str, float]:
  """Share of right answers in each group."""
  right: dict[str, list[bool]] = {}
  for question in questions:
    match = normalize(texts[question.question_id]) == normalize(
        question.answer or ''
    )
    right.setdefault(group_of(question), []).append(match)
  return {name: sum(hits) / len(hits) for name, hits in right.items()}
