# SPDX-License-Identifier: Apache-2.0
"""MME: yes or no about one image, asked twice so that guessing does not pay.

arXiv 2306.13394, scored as the official `eval_tool/calculation.py` scores what
LLaVA's `convert_answer_to_mme.py` makes of the answers. --questions is
`llava_mme.jsonl`, whose question_id is that of the image, so that a question
is known by it and by its words; --annotations is the directory
`MME_Benchmark_release_version`, with the official questions and answers in
TASK[/questions_answers_YN]/IMAGE.txt. A task has 100 points for the share of
right answers (acc) and 100 for that of images with both answers right (acc+).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from moellava_jax.evals import base, prompts

MAX_NEW_TOKENS = 128  # As LLaVA's runner; only four letters count.
PERCEPTION = (
    'existence',
    'count',
    'position',
    'color',
    'posters',
    'celebrity',
    'scene',
    'landmark',
    'artwork',
    'OCR',
)
COGNITION = (
    'commonsense_reasoning',
    'numerical_calculation',
    'text_translation',
    'code_reasoning',
)
_ENDING = ' Please answer yes or no.'
_PREFIX = 4  # Letters in which a yes or a no is looked for.


def _official(question: base.Question) -> str:
  return question.extra['question']


PROMPTS: prompts.Prompts = {
    'lmms': lambda q: f'{_official(q).replace(_ENDING, "")}\n{prompts.SHORT}',
    'vlmevalkit': _official,
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the questions under the stem of their file's name.

  `answer` is the official `Yes` or `No`, `extra` the official `question`, the
  category the task.

  Raises:
    EvalError: a file is missing or malformed, a question has no answer, an
      image not two questions, or a task or an image is absent or unknown.
  """
  if annotations is None:
    raise base.EvalError(
        'mme has its answers apart: give'
        ' --annotations=MME_Benchmark_release_version.'
    )
  official = read_answers(annotations)
  questions = [
      _annotated(question, official, annotations)
      for question in base.read_questions(questions_path, unique=False)
  ]
  for pair in pairs(questions).values():
    if len(pair) != 2 or pair[0].text == pair[1].text:
      raise base.EvalError(
          f'{questions_path}: image {pair[0].question_id!r} has {len(pair)}'
          ' questions; in MME every image has two different ones.'
      )
  tasks = {q.category for q in questions}
  if wrong := sorted(tasks ^ {*PERCEPTION, *COGNITION}):
    raise base.EvalError(
        f'{questions_path}: tasks that are absent or unknown: {wrong}; a total'
        ' over other tasks would be no MME score.'
    )
  base.check_asked(
      dict.fromkeys((task, image) for task, image, _ in official),
      {_image(q) for q in questions},
      questions_path,
      annotations,
  )
  return {pathlib.Path(questions_path).stem: questions}


def read_answers(folder: str) -> dict[tuple[str, str, str], str]:
  """`Yes` or `No` by task, name of the image without suffix, and question.

  Raises:
    EvalError: no such directory, or a line is not `question<tab>answer`.
  """
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise base.EvalError(f'{root}: no such directory.')
  found = {}
  for task in sorted(path for path in root.iterdir() if path.is_dir()):
    texts = task / 'questions_answers_YN'
    for path in sorted((texts if texts.is_dir() else task).glob('*.txt')):
      lines = path.read_text(encoding='utf-8').splitlines()
      for number, line in enumerate(lines, 1):
        cells = line.strip().split('\t')
        if len(cells) != 2 or cells[1].lower() not in ('yes', 'no'):
          raise base.EvalError(
              f'{path}, line {number}: expected a question, a tab, and Yes or'
              f' No; got {line!r}.'
          )
        found[task.name, path.stem, cells[0]] = cells[1]
  return found


def _image(question: base.Question) -> tuple[str, str]:
  """The task and the name of the image without suffix."""
  task, _, name = str(question.question_id).rpartition('/')
  return task.split('/')[0], name.split('.')[0]


def _annotated(
    question: base.Question,
    official: Mapping[tuple[str, str, str], str],
    folder: str,
) -> base.Question:
  """With its official words, restored as LLaVA's converter restores them."""
  task, name = _image(question)
  text = question.text.replace(prompts.SHORT, '').strip()
  if _ENDING.strip() not in text:
    # Some questions have two spaces before the ending.
    single, double = text + _ENDING, f'{text} {_ENDING}'
    text = single if (task, name, single) in official else double
  if (task, name, text) not in official:
    raise base.EvalError(
        f'{folder}: no answer to question {text!r} about'
        f' {question.question_id!r}; questions and annotations are of'
        ' different releases.'
    )
  return dataclasses.replace(
      question,
      category=task,
      answer=official[task, name, text],
      extra={**question.extra, 'question': text},
  )


def pairs(
    questions: Sequence[base.Question],
) -> dict[int | str, list[base.Question]]:
  """The questions about each image."""
  found: dict[int | str, list[base.Question]] = {}
  for question in questions:
    found.setdefault(question.question_id, []).append(question)
  return found


def decide(text: str) -> str:
  """'yes', 'no' or 'other', from the first four letters.

  So `Not sure` is a no, and `It is not` is neither.
  """
  prefix = text.lower()[:_PREFIX]
  if 'yes' in prefix:
    return 'yes'
  return 'no' if 'no' in prefix else 'other'


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Points, as the official script counts them.

  Returns:
    `{perception, cognition, total, tasks: {task: {score, acc, acc_plus,
    other, questions}}}`: `perception` of 2000, `cognition` of 800, a `score`
    of 200; `acc` and `acc_plus` in [0, 1]; `other` answers are neither yes nor
    no, and wrong.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  asked = [dataclasses.replace(q, question_id=_name(q)) for q in group]
  said = [a._replace(question_id=_name(a)) for a in answers[key]]
  texts = base.check_complete(asked, said)
  right: dict[str, list[list[bool]]] = {}
  others: dict[str, int] = {}
  for pair in pairs(group).values():
    task = pair[0].category
    decided = [decide(texts[_name(q)]) for q in pair]
    others[task] = others.get(task, 0) + decided.count('other')
    right.setdefault(task, []).append(
        [
            d == (q.answer or '').lower()
            for d, q in zip(decided, pair, strict=True)
        ]
    )
  tasks = {
      task: _task(right[task], others[task])
      for task in (*PERCEPTION, *COGNITION)
  }
  perception, cognition = (
      _total([tasks[name]['score'] for name in names])
      for names in (PERCEPTION, COGNITION)
  )
  return {
      'perception': perception,
      'cognition': cognition,
      'total': perception + cognition,
      'tasks': tasks,
  }


def _name(row: base.Question | base.Answer) -> str:
  text = row.text if isinstance(row, base.Question) else row.prompt
  return f'{row.question_id}: {text.removeprefix(base.IMAGE_MARK)}'


def _task(images: Sequence[Sequence[bool]], other: int) -> dict[str, Any]:
  hits = [hit for image in images for hit in image]
  acc = sum(hits) / len(hits)
  acc_plus = sum(all(image) for image in images) / len(images)
  return {
      'score': acc * 100 + acc_plus * 100,
      'acc': acc,
      'acc_plus': acc_plus,
      'other': other,
      'questions': len(hits),
  }


def _total(scores: Sequence[float]) -> float:
  total = 0.0
  for value in scores:  # Not sum(), which rounds otherwise since Python 3.12.
    total += value
  return total


def submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes TASK.txt for the official script into the directory `path`.

  A line is image, question, answer and prediction; a prediction of several
  lines becomes one, since the script reads two lines per image.
  """
  ((key, group),) = questions.items()
  texts = {_name(answer): answer.text for answer in answers[key]}
  path.mkdir(parents=True, exist_ok=True)
  for task in (*PERCEPTION, *COGNITION):
    lines = []
    for image, pair in pairs(group).items():
      name = str(image).split('/')[-1].split('.')[0] + '.txt'
      lines += [
          '\t'.join(
              (name, _official(q), q.answer or '', _one_line(texts[_name(q)]))
          )
          for q in pair
          if q.category == task
      ]
    text = ''.join(f'{line}\n' for line in lines)
    (path / f'{task}.txt').write_text(text, encoding='utf-8')


def _one_line(text: str) -> str:
  return ' '.join(text.split())
