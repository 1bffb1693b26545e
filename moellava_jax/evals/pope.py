# SPDX-License-Identifier: Apache-2.0
"""POPE: does the model see objects that are not there?

arXiv 2305.10355, scored as LLaVA's `eval_pope.py` scores it. Questions ask for
one object and are answered yes or no; the categories differ in how the absent
objects are chosen (random, popular, adversarial). Published single numbers are
the mean of the F1 of the categories.

Labels are either in the question file ("label": "yes" | "no") or, in the
official layout, in `coco_pope_<category>.json` files (--annotations=DIR) whose
n-th line belongs to the n-th question of that category.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
import statistics
from typing import Any

from moellava_jax.evals import base, prompts

MAX_NEW_TOKENS = 128  # As LLaVA's runner; only the first sentence counts.
_LABELS = ('yes', 'no')
PROMPTS: prompts.Prompts = {
    'lmms': prompts.short,
    'vlmevalkit': prompts.bare,
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the labelled questions under the stem of their file's name."""
  questions = base.read_questions(questions_path)
  if annotations is not None:
    questions = _with_annotations(questions, pathlib.Path(annotations))
  check_labels(questions, questions_path)
  return {pathlib.Path(questions_path).stem: questions}


def check_labels(
    questions: Sequence[base.Question], path: str | os.PathLike[str]
) -> None:
  """Raises EvalError unless every question is labelled yes or no."""
  bad = [q.question_id for q in questions if q.answer not in _LABELS]
  if bad:
    raise base.EvalError(
        f'{path}: questions without a label "yes" or "no":'
        f' {base.listed(bad)}. Official files have the labels apart: give'
        ' --annotations=DIR with coco_pope_<category>.json.'
    )


def _with_annotations(
    questions: Sequence[base.Question], folder: pathlib.Path
) -> list[base.Question]:
  """Labels from the official files, paired by position in the category."""
  labelled = {}
  for category in dict.fromkeys(q.category for q in questions):
    path = folder / f'coco_pope_{category}.json'
    rows = base.read_jsonl(path)
    group = [q for q in questions if q.category == category]
    if len(rows) != len(group):
      raise base.EvalError(
          f'{path}: {len(rows)} labels for {len(group)} questions of category'
          f' {category!r}; labels and questions are of different releases.'
      )
    for number, (question, row) in enumerate(zip(group, rows, strict=True), 1):
      image = row.get('image', question.image)
      if 'label' not in row or image != question.image:
        raise base.EvalError(
            f'{path}, line {number}: expected the "label" of question'
            f' {question.question_id!r} about {question.image!r}, got {row}.'
        )
      labelled[question.question_id] = dataclasses.replace(
          question, answer=row['label']
      )
  return [labelled[q.question_id] for q in questions]


def decide(text: str) -> str:
  """Reads an answer as the official script does: 'no' or else 'yes'.

  Only the text before the first full stop counts, split at single spaces, and
  only the words `No`, `not` and `no`. So `NO`, `Not visible`, `no!` and an
  empty answer are a yes.
  """
  words = text.split('.')[0].replace(',', '').split(' ')
  return 'no' if {'No', 'not', 'no'} & set(words) else 'yes'


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """`rates` of the one question file."""
  ((key, group),) = questions.items()
  return rates(group, answers[key])


def rates(
    questions: Sequence[base.Question], answers: Sequence[base.Answer]
) -> dict[str, Any]:
  """Scores of each category, `yes` being the positive class.

  Returns:
    `{category: {accuracy, precision, recall, f1, yes_ratio, tp, fp, tn, fn}}`
    with rates in [0, 1], and beside the categories `f1_mean`, the mean of
    their F1, which papers print, and `f1_pooled`, the F1 of all questions as
    one group, which some harnesses print.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  texts = base.check_complete(questions, answers)
  pairs: dict[str, list[tuple[str, str | None]]] = {}
  for question in questions:
    pair = decide(texts[question.question_id]), question.answer
    pairs.setdefault(question.category, []).append(pair)
  categories = {name: _rates(group) for name, group in pairs.items()}
  f1 = [group['f1'] for group in categories.values()]
  pooled = _rates([pair for group in pairs.values() for pair in group])
  return {
      **categories,
      'f1_mean': statistics.fmean(f1),  # Whatever the order of categories.
      'f1_pooled': pooled['f1'],
  }


def _rates(pairs: Sequence[tuple[str, str | None]]) -> dict[str, float]:
  """Rates of (decision, label) pairs.

  The official script divides by zero and dies when nothing is answered yes,
  nothing is labelled yes, or no yes is right. A rate without a denominator is
  0 here: a model that never says yes has found nothing.
  """
  tp, fp, tn, fn = (
      pairs.count(pair)
      for pair in (('yes', 'yes'), ('yes', 'no'), ('no', 'no'), ('no', 'yes'))
  )
  precision = tp / (tp + fp) if tp + fp else 0.0
  recall = tp / (tp + fn) if tp + fn else 0.0
  both = precision + recall
  return {
      'accuracy': (tp + tn) / len(pairs),
      'precision': precision,
      'recall': recall,
      'f1': 2 * precision * recall / both if both else 0.0,
      'yes_ratio': (tp + fp) / len(pairs),
      'tp': tp,
      'fp': fp,
      'tn': tn,
      'fn': fn,
  }
