# SPDX-License-Identifier: Apache-2.0
"""GQA: compositional questions about images, by exact match.

arXiv 1902.09506, scored as the official `eval.py` scores what LLaVA's
`convert_gqa_for_eval.py` makes of the answers. --questions is
`llava_gqa_testdev_balanced.jsonl`, --annotations the official
`testdev_balanced_questions.json`; where `..._choices.json` lies beside it,
validity and plausibility are scored too.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any

from moellava_jax.evals import base, prompts

MAX_NEW_TOKENS = 128  # As LLaVA's runner.
PROMPTS: prompts.Prompts = {
    'lmms': prompts.short,
    'vlmevalkit': prompts.short,
}
# Steps of a question's program that are not counted.
_FINAL = ('exist', 'query: name', 'choose name')
# Tables of accuracies: what the questions are grouped by.
_TABLES: dict[str, Callable[[Mapping[str, Any]], int | str]] = {
    'structural_type': lambda q: q['types']['structural'],
    'semantic_type': lambda q: q['types']['semantic'],
    'steps': lambda q: sum(
        not any(s in f'{c["operation"]}: {c["argument"]}' for s in _FINAL)
        for c in q['semantic']
    ),
    'words': lambda q: len(q['question'].split()),
}

Annotations = Mapping[int | str, Mapping[str, Any]]


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  `extra` is the official entry, with `valid` and `plausible` answers if there
  are choices.

  Raises:
    EvalError: a file is missing or malformed, a question not annotated, or one
      that is balanced not asked.
  """
  if annotations is None:
    raise base.EvalError(
        'gqa has its answers apart: give'
        ' --annotations=testdev_balanced_questions.json.'
    )
  official = base.read_json(annotations)
  path = pathlib.Path(annotations)
  name = re.sub('(_all)?_questions', '_choices', path.name)
  choices = {}
  if name != path.name and path.with_name(name).is_file():
    choices = base.read_json(path.with_name(name))
  questions = base.read_questions(questions_path)
  if unknown := [
      q.question_id for q in questions if q.question_id not in official
  ]:
    raise base.EvalError(
        f'{annotations}: no entry for questions {base.listed(unknown)} of'
        f' {questions_path}.'
    )
  base.check_asked(
      [i for i, entry in official.items() if entry['isBalanced']],
      {q.question_id for q in questions},
      questions_path,
      annotations,
  )
  loaded = []
  for question in questions:
    entry = official[question.question_id]
    extra = {**entry, **choices.get(question.question_id, {})}
    loaded.append(
        dataclasses.replace(question, answer=entry['answer'], extra=extra)
    )
  return {pathlib.Path(questions_path).stem: loaded}


def prediction(text: str) -> str:
  """What is compared with the answer; nothing else is normalised."""
  return text.rstrip('.').lower()


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """`rates` of the one question file.

  `consistency` is there if all that follows from an answer is asked as well,
  `validity` and `plausibility` if there are choices.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  entries = {q.question_id: q.extra for q in group}
  balanced = {i: entry for i, entry in entries.items() if entry['isBalanced']}
  entailed = {o for i, q in balanced.items() for o in q['entailed'] if o != i}
  choices = all('valid' in entry for entry in balanced.values())
  found = rates(
      entries,
      {i: prediction(text) for i, text in texts.items()},
      choices=entries if choices else None,
      consistency=bool(entailed) and entailed <= set(entries),
  )
  if not choices:
    del found['validity'], found['plausibility']
  return found


def submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes the predictions that the official script and server take.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  rows = [
      {'questionId': i, 'prediction': prediction(text)}
      for i, text in texts.items()
  ]
  path.write_text(json.dumps(rows), encoding='utf-8')


def rates(
    questions: Annotations,
    predictions: Mapping[int | str, str],
    *,
    choices: Annotations | None = None,
    consistency: bool = False,
) -> dict[str, Any]:
  """The official scores, over the questions that are `isBalanced`.

  Args:
    questions: official entries by id.
    predictions: from `prediction`, by id.
    choices: `valid` and `plausible` answers by id.
    consistency: whether to score what each right answer entails.

  Returns:
    `binary`, `open`, `accuracy`, with `consistency` that, `validity` and
    `plausibility` (0 without `choices`), all in [0, 1]; `distribution` (chi
    square over 100, lower is better); and the tables `structural_type`,
    `semantic_type`, `steps` and `words` of `{group: {accuracy, questions}}`.

  Raises:
    EvalError: a prediction that is needed is missing.
  """
  balanced = {i: q for i, q in questions.items() if q['isBalanced']}
  needed = questions if consistency else balanced
  if missing := [i for i in needed if i not in predictions]:
    raise base.EvalError(f'No prediction for questions {base.listed(missing)}.')
  right = {i: predictions[i] == q['answer'] for i, q in balanced.items()}
  is_open = {
      i: q['types']['structural'] == 'query' for i, q in balanced.items()
  }
  tables: dict[str, dict[int | str, list[bool]]] = {
      name: {} for name in _TABLES
  }
  for i, question in balanced.items():
    for name, group_of in _TABLES.items():
      tables[name].setdefault(group_of(question), []).append(right[i])
  found = {
      'binary': _mean([right[i] for i in balanced if not is_open[i]]),
      'open': _mean([right[i] for i in balanced if is_open[i]]),
      'accuracy': _mean([*right.values()]),
  }
  if consistency:
    found['consistency'] = _consistency(questions, predictions, right)
  for rate, kind in (('validity', 'valid'), ('plausibility', 'plausible')):
    found[rate] = _mean(
        [
            choices is not None
            and _belongs(predictions[i], choices[i][kind], question)
            for i, question in balanced.items()
        ]
    )
  return {
      **found,
      'distribution': _distribution(balanced, predictions) / 100,
      **{
          name: {
              str(group): {'accuracy': _mean(hits), 'questions': len(hits)}
              for group, hits in sorted(table.items())
          }
          for name, table in tables.items()
      },
  }


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values) if values else 0.0


def _belongs(
    said: str, group: Sequence[str], question: Mapping[str, Any]
) -> bool:
  # What two things have in common is one of these, whatever the file lists.
  if 'Common' in question['types']['detailed']:
    group = ('color', 'material', 'shape')
  return said in group


def _consistency(
    questions: Annotations,
    predictions: Mapping[int | str, str],
    right: Mapping[int | str, bool],
) -> float:
  """Mean accuracy over what right answers entail, first by right answer."""
  means = []
  for i in right:
    others = [other for other in questions[i]['entailed'] if other != i]
    if right[i] and others:
      means.append(
          _mean([predictions[o] == questions[o]['answer'] for o in others])
      )
  return _mean(means)


def _distribution(
    questions: Annotations, predictions: Mapping[int | str, str]
) -> float:
  """Chi square of the answers to each group of questions, weighted by size.

  Answers that are never right do not count. The official script divides by
  zero where no question has a group; the result is 0 here.
  """
  golds: dict[str, list[str]] = {}
  saids: dict[str, list[str]] = {}
  for i, question in questions.items():
    group = question['groups']['global']
    if group is not None:
      golds.setdefault(group, []).append(question['answer'])
      saids.setdefault(group, []).append(predictions[i])
  total = 0.0
  for group, gold in golds.items():
    square = 0.0
    for answer in dict.fromkeys(gold):
      expected, observed = gold.count(answer), saids[group].count(answer)
      square += float(observed - expected) ** 2 / expected
    total += square * len(gold)
  count = sum(map(len, golds.values()))
  return total / count if count else 0.0
