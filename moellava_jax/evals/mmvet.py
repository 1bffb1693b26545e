# SPDX-License-Identifier: Apache-2.0
"""MM-Vet: open questions that need several capabilities, graded by a model.

arXiv 2308.02490, graded as the official `mm-vet_evaluator.py` does, with its
prompt and one run. --questions is `llava-mm-vet.jsonl`, --annotations the
official `mm-vet.json`. The paper's judge is gpt-4-0613; scores of other judges
do not compare with it. --submission writes the file that the official grader
and its web page take.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from moellava_jax.evals import base, judge, prompts

MAX_NEW_TOKENS = 1024  # As LLaVA's runner.
_REPLY_TOKENS = 3
# Temperatures at which an unclear grade is asked for again. The script asks at
# 2.0 as well, but does not read the reply.
_AGAIN = (0.0, 0.5, 1.0, 1.5)
_HINT = '\nPredict the correctness of the answer (digit): '

PROMPTS: prompts.Prompts = {
    'lmms': lambda q: (
        'First please perform reasoning, and think step by step to provide best'
        f' answer to the following question: \n\n{q.text}'
    ),
    'vlmevalkit': lambda q: q.text,
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  `answer` is the ground truth, `extra` the official entry.

  Raises:
    EvalError: a file is missing or malformed, or they do not belong together.
  """
  if annotations is None:
    raise base.EvalError(
        'mmvet has its answers apart: give --annotations=mm-vet.json.'
    )
  official = base.read_json(annotations)
  questions = base.read_questions(questions_path)
  found = {official_id(q.question_id) for q in questions}
  if wrong := sorted(found ^ set(official)):
    raise base.EvalError(
        f'{questions_path} and {annotations} are of different sets; ids in one'
        f' only: {base.listed(wrong)}.'
    )
  loaded = []
  for question in questions:
    entry = official[official_id(question.question_id)]
    if lacking := {'question', 'answer', 'capability'} - set(entry):
      raise base.EvalError(
          f'{annotations}: entry {question.question_id!r} has no'
          f' {sorted(lacking)}.'
      )
    loaded.append(
        dataclasses.replace(question, answer=entry['answer'], extra=entry)
    )
  return {pathlib.Path(questions_path).stem: loaded}


def official_id(question_id: int | str) -> str:
  """`v1_0` of question 0, as LLaVA's `convert_mmvet_for_eval.py` has it."""
  return f'v1_{question_id}'


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Raises UnscoredError, or EvalError if the answers are not complete."""
  ((key, group),) = questions.items()
  base.check_complete(group, answers[key])
  raise base.UnscoredError(
      'mmvet is graded by a language model: give --judge_url and'
      ' --judge_model, or take the file of --submission=FILE.json to'
      ' https://huggingface.co/spaces/whyu/MM-Vet_Evaluator.'
  )


def requests(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> list[judge.Request]:
  """What `grade` asks first."""
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  return [_request(q, texts[q.question_id]) for q in group]


def grade(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
    judged: judge.Judge,
) -> dict[str, Any]:
  """Points of 100, rounded as the official script rounds them.

  Returns:
    `{total, ungraded, capability, integration}`: `ungraded` answers got no
    grade in five tries, and 0; the last two are tables of
    `{name: {score, questions}}`, by each capability and by what a question
    needs together.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  grades = judged.map(
      lambda q: _grade(judged, _request(q, texts[q.question_id])), group
  )
  single: dict[str, list[float]] = {}
  joint: dict[str, list[float]] = {}
  for question, found in zip(group, grades, strict=True):
    needed = sorted(set(question.extra['capability']))
    joint.setdefault('_'.join(needed), []).append(found or 0.0)
    for name in needed:
      single.setdefault(name, []).append(found or 0.0)
  return {
      'total': _points([found or 0.0 for found in grades]),
      'ungraded': grades.count(None),
      'capability': _table(single),
      'integration': _table(joint),
  }


def _grade(judged: judge.Judge, request: judge.Request) -> float | None:
  """The first reply that is a number in [0, 1]."""
  ((_, content),) = request.messages
  again = [
      request._replace(
          messages=(('user', content + _HINT),), temperature=temperature
      )
      for temperature in _AGAIN
  ]
  for asked in (request, *again):
    reply = judged.ask(asked).split(' ')[0].strip()
    try:
      found = float(reply)
    except ValueError:
      continue
    if 0.0 <= found <= 1.0:
      return found
  return None


def _request(question: base.Question, text: str) -> judge.Request:
  entry = question.extra
  gold = entry['answer'].replace('<AND>', ' <AND> ').replace('<OR>', ' <OR> ')
  row = ' | '.join([entry['question'], gold, text, ''])
  return judge.Request((('user', f'{PROMPT}\n{row}'),), 0.0, _REPLY_TOKENS)


def _points(grades: Sequence[float]) -> float:
  total = 0.0
  for value in grades:  # Not sum(), which rounds otherwise since Python 3.12.
    total += value
  # The script rounds a number of numpy, which is not rounded as a float is.
  return float(round(np.float64(total / len(grades) * 100), 1))


def _table(groups: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """The largest groups first."""
  return {
      name: {'score': _points(grades), 'questions': len(grades)}
      for name, grades in sorted(
          groups.items(), key=lambda item: (-len(item[1]), item[0])
      )
  }


def submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes `{"v1_0": answer, ...}`.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  found = {official_id(i): text for i, text in texts.items()}
  path.write_text(json.dumps(found, indent=2), encoding='utf-8')


# Of `mm-vet_evaluator.py`, word for word.
_MEME = (
    'Can you explain this meme? | This meme is poking fun at the fact that the'
    ' names of the countries Iceland and Greenland are misleading. Despite its'
    ' name, Iceland is known for its beautiful green landscapes, while Greenland'
    ' is mostly covered in ice and snow. The meme is saying that the person has'
    ' trust issues because the names of these countries do not accurately'
    ' represent their landscapes. | '
)
PROMPT = (
    'Compare the ground truth and prediction from AI models, to give a'
    ' correctness score for the prediction. <AND> in the ground truth means it'
    ' is totally right only when all elements in the ground truth are present in'
    ' the prediction, and <OR> means it is totally right when any one element in'
    ' the ground truth is present in the prediction. The correctness score is'
    ' 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0'
    ' (totally right). Just complete the last space of the correctness score.\n'
    '\n'
    'Question | Ground truth | Prediction | Correctness\n'
    '--- | --- | --- | ---\n'
    'What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n'
    'What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n'
    'What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n'
    'What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n'
    'What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n'
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that"
    " despite their names, Iceland is not very icy and Greenland isn't very"
    ' green. | 0.4\n'
    f'{_MEME}The meme is using humor to point out the misleading nature of'
    " Iceland's and Greenland's names. Iceland, despite its name, has lush green"
    ' landscapes while Greenland is mostly covered in ice and snow. The text'
    " 'This is why I have trust issues' is a playful way to suggest that these"
    ' contradictions can lead to distrust or confusion. The humor in this meme'
    ' is derived from the unexpected contrast between the names of the countries'
    ' and their actual physical characteristics. | 1.0\n'
)
