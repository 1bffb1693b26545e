# SPDX-License-Identifier: Apache-2.0
"""MMBench, English and Chinese: right only if right in every order.

arXiv 2307.06281. --questions is the official .tsv, such as
`mmbench_dev_20230712.tsv` or `mmbench_dev_cn_20231003.tsv`, with the images in
it. Circular evaluation: row `index + n * 1000000` is question `index` with its
options moved on, and a question is right if all its rows are. A file without
any moved row is scored by its first pass alone, unless --answers are of LLaVA's
`--all-rounds`, which moves the options itself. Answers are read
by VLMEvalKit's rules (`mcq_circular_eval`, `exact_matching`); one that names
no option by them is wrong, unless a language model is asked (--judge_url), as
the server of MMBench does.

Answers to the test set are known to that server only: it takes the .xlsx that
--submission writes, as LLaVA's `convert_mmbench_for_submission.py` does.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import pathlib
from typing import Any

from moellava_jax.evals import base, judge, options, prompts, tsv, xlsx

MAX_NEW_TOKENS = 1024  # As LLaVA's runner.
_ROLL = 10**6
_ROUND = 10**9  # The same of `--all-rounds`; beyond all rows of a file.
_LETTERS = 'ABCD'  # What LLaVA's runner asks.
_NEEDED = ('question', 'A', 'B')
_DROPPED = ('hint', 'category', 'source', 'comment', 'l2-category')
_PREDICTION_COLUMN = 6  # Counted without the columns that are dropped.
_LETTER_CN = '请直接回答选项字母。'
_GROUPS = ('l2-category', 'category')
_TRIES = 3
_REPLY_TOKENS = 256


def _lmms(question: base.Question, several: str, ask: str) -> str:
  """lmms-eval's `mmbench_doc_to_text`."""
  row = question.extra
  hint = f'{row["hint"]} ' if row.get('hint') else ''
  shown = {k: v for k, v in tsv.options(row).items() if k <= 'E'}
  lines = [several, *(f'{k}. {v}' for k, v in shown.items())]
  return f'{hint}{row["question"]} ' + '\n'.join(lines) + f'\n\n{ask}'


def _vlmevalkit(question: base.Question) -> str:
  row = question.extra
  return prompts.choices_vlmevalkit(
      row['question'], tsv.options(row), row.get('hint')
  )


PROMPTS: prompts.Prompts = {
    'lmms': lambda q: _lmms(q, 'There are several options:', prompts.LETTER),
    'vlmevalkit': _vlmevalkit,
}
PROMPTS_CN: prompts.Prompts = {
    'lmms': lambda q: _lmms(
        q, '有如下几个选项：', '请直接使用所提供的选项字母作为答案回答。'
    ),
    'vlmevalkit': _vlmevalkit,
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the rows of a .tsv under its stem; `extra` is the row.

  Raises:
    EvalError: the file is missing or malformed, or has some rows of a question
      only.
  """
  return _load(questions_path, annotations, prompts.LETTER)


def load_cn(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """The same, asked for the letter in Chinese."""
  return _load(questions_path, annotations, _LETTER_CN)


def _load(
    path: str, annotations: str | None, ask: str
) -> dict[str, list[base.Question]]:
  if annotations is not None:
    raise base.EvalError(
        'mmbench has its answers in the question file; drop --annotations.'
    )
  images = tsv.image_names(path)
  questions = []
  for row in tsv.rows(path, _NEEDED):
    index = str(row['index'])
    if not index.isdecimal() or row['question'] is None:
      raise base.EvalError(
          f'{path}: expected a number as index and a question, got {row}.'
      )
    if not images[index]:
      raise base.EvalError(f'{path}: row {index} has no image.')
    questions.append(
        base.Question(
            question_id=int(index),
            image=images[index][0],
            text=f'{_asked(row)}\n{ask}',
            category=row.get('category') or '',
            answer=row.get('answer'),
            extra=row,
        )
    )
  _is_circular(questions, path)
  return {pathlib.Path(path).stem: questions}


def _asked(row: tsv.Row) -> str:
  """Hint, question and options, without the last line."""
  lines = [row['question'] or '']
  hint = row.get('hint')
  if not _is_none(hint):
    lines.insert(0, hint or '')
  lines += [f'{letter}. {text}' for letter, text in _shown(row).items()]
  return '\n'.join(lines)


def _shown(row: tsv.Row) -> dict[str, str | None]:
  """The options up to the first that is missing or called `none`.

  These are what LLaVA's runner asks, and moves in `--all-rounds`.
  """
  letters = itertools.takewhile(lambda x: not _is_none(row.get(x)), _LETTERS)
  return {letter: row[letter] for letter in letters}


def _is_none(text: str | None) -> bool:
  return text is None or text.lower() in ('nan', 'none')


def _rolls(
    questions: Sequence[base.Question],
) -> dict[int, list[base.Question]]:
  """The rows of each question."""
  found: dict[int, list[base.Question]] = {}
  for question in questions:
    found.setdefault(int(question.question_id) % _ROLL, []).append(question)
  return found


def _is_circular(questions: Sequence[base.Question], name: str) -> bool:
  """Whether every question has a row for each of its options, or one.

  Raises:
    EvalError: some rows of a question are missing.
  """
  rolls = _rolls(questions)
  mains = {
      i: q for i, rows in rolls.items() for q in rows if q.question_id == i
  }
  if lonely := [i for i in rolls if i not in mains]:
    raise base.EvalError(
        f'{name}: moved rows without the question: {base.listed(lonely)}.'
    )
  lacking = [
      i for i, rows in rolls.items() if len(rows) < len(_shown(mains[i].extra))
  ]
  if lacking and len(rolls) < len(questions):
    raise base.EvalError(
        f'{name}: fewer rows than options: {base.listed(lacking)}. Give the'
        f' whole file, with row index + n * {_ROLL} for each further option, or'
        ' one without any such row, which is scored by its first pass alone.'
    )
  return not lacking


def _by_round(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> tuple[dict[str, Sequence[base.Question]], dict[str, list[base.Answer]]]:
  """Both with a row for each round, if the answers are of `--all-rounds`.

  Each round LLaVA's runner asks a row with its options moved on by one more.
  """
  ((key, group),) = questions.items()
  said = list(answers[key])
  if any(_round(answer) for answer in said):
    group = [_moved(q, n) for q in group for n in range(len(_shown(q.extra)))]
    said = [_as_row(answer) for answer in said]
  return {key: group}, {key: said}


def _round(answer: base.Answer) -> int:
  return answer.metadata.get('round_id', 0)


def _as_row(answer: base.Answer) -> base.Answer:
  """With the id of the row that `_moved` makes of the question."""
  if not isinstance(answer.question_id, int):
    return answer  # Not of MMBench, as will be said.
  row = answer.question_id + _round(answer) * _ROUND
  return answer._replace(question_id=row)


def _moved(question: base.Question, count: int) -> base.Question:
  """The row with its options moved on by `count`."""
  before = _shown(question.extra)
  letters, texts = [*before], [*before.values()]
  moved = dict(zip(letters, texts[count:] + texts[:count], strict=True))
  extra, answer = {**question.extra, **moved}, question.answer
  if answer in letters:
    answer = letters[letters.index(answer) - count]
  ask = question.text.removeprefix(_asked(question.extra))
  return dataclasses.replace(
      question,
      question_id=int(question.question_id) + count * _ROUND,
      text=_asked(extra) + ask,
      answer=answer,
      extra=extra,
  )


def texts_of(
    questions: Sequence[base.Question], answers: Sequence[base.Answer]
) -> dict[int | str, str]:
  """The answer to each row; those of LLaVA record no last line of a prompt."""
  asked = {_asked(q.extra): q.text for q in questions}
  return base.check_complete(
      questions,
      [a._replace(prompt=asked.get(a.prompt, a.prompt)) for a in answers],
  )


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Accuracies in [0, 1], by rules alone.

  Returns:
    `{accuracy, first_pass, questions_circular, rows, unclear, l2-category,
    category}`: `accuracy` is circular, `first_pass` that of the unmoved rows by
    the rules; `unclear` answers name no option by them; the last two are tables
    of `{name: {accuracy, questions}}`. Of unmoved rows alone `{first_pass, rows,
    unclear, l2-category, category}`, and `first_pass` for `accuracy` in the
    tables.

  Raises:
    EvalError: the answers are not those of exactly these questions.
    UnscoredError: the questions are of a test set, without answers.
  """
  return _score(*_by_round(questions, answers), lambda _, known: known)


def requests(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> list[judge.Request]:
  """What `grade` asks first."""
  questions, answers = _by_round(questions, answers)
  asked: list[judge.Request] = []

  def note(rows: Sequence[base.Question], known: dict[int | str, str | None]):
    asked.extend(_request(q, texts[q.question_id]) for q in rows)
    return known

  ((key, group),) = questions.items()
  texts = texts_of(group, answers[key])
  _score(questions, answers, note)
  return asked


def grade(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
    judged: judge.Judge,
) -> dict[str, Any]:
  """As `score`, but unclear answers are put to a language model.

  Where it does not name an option either in three tries, the official script
  draws one; here the answer is wrong.
  """
  questions, answers = _by_round(questions, answers)
  ((key, group),) = questions.items()
  texts = texts_of(group, answers[key])

  def choose(question: base.Question) -> str:
    request = _request(question, texts[question.question_id])
    for attempt in range(_TRIES):
      reply = judged.ask(request._replace(attempt=attempt))
      if letter := options.infer(reply, tsv.options(question.extra)):
        return letter
    return options.NONE

  def ask(rows: Sequence[base.Question], known: dict[int | str, str | None]):
    letters = judged.map(choose, rows)
    ids = [q.question_id for q in rows]
    return {**known, **dict(zip(ids, letters, strict=True))}

  return _score(questions, answers, ask)


def _request(question: base.Question, text: str) -> judge.Request:
  row = question.extra
  content = options.matching(row['question'], tsv.options(row), text)
  return judge.Request((('user', content),), 0.0, _REPLY_TOKENS)


def _score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
    resolve: Callable[
        [Sequence[base.Question], dict[int | str, str | None]],
        dict[int | str, str | None],
    ],
) -> dict[str, Any]:
  """The entry; `resolve` may fill in letters that the rules leave open."""
  ((key, group),) = questions.items()
  texts = texts_of(group, answers[key])
  if unknown := [q.question_id for q in group if q.answer is None]:
    raise base.UnscoredError(
        f'{key}: no answer to {base.listed(unknown)}; the test set is scored by'
        ' https://mmbench.opencompass.org.cn from the file that'
        ' --submission=FILE.xlsx writes.'
    )
  letters: dict[int | str, str | None] = {
      q.question_id: options.infer(texts[q.question_id], tsv.options(q.extra))
      for q in group
  }
  unclear = [q for q in group if letters[q.question_id] is None]
  circular, rolls = _is_circular(group, key), _rolls(group)
  mains = [q for q in group if q.question_id in rolls]
  first = [letters[q.question_id] == q.answer for q in mains]
  lost = {
      i
      for i, rows in rolls.items()
      if any(letters[q.question_id] not in (None, q.answer) for q in rows)
  }
  # A question that is lost already needs no more letters.
  open_rows = [q for q in unclear if int(q.question_id) % _ROLL not in lost]
  letters = resolve(open_rows, letters)
  hits = {
      i: all(letters[q.question_id] == q.answer for q in rows)
      for i, rows in rolls.items()
  }
  rate = 'accuracy' if circular else 'first_pass'
  found: dict[str, Any] = {rate: sum(hits.values()) / len(hits)}
  if circular:
    found['first_pass'] = sum(first) / len(first)
    found['questions_circular'] = len(hits)
  return {
      **found,
      'rows': len(group),
      'unclear': len(unclear),
      **{name: _table(mains, hits, name, rate) for name in _GROUPS},
  }


def _table(
    mains: Sequence[base.Question],
    hits: Mapping[int, bool],
    name: str,
    rate: str,
) -> dict[str, Any]:
  groups: dict[str, list[bool]] = {}
  for question in mains:
    groups.setdefault(question.extra.get(name) or 'none', []).append(
        hits[int(question.question_id)]
    )
  return {
      group: {rate: sum(found) / len(found), 'questions': len(found)}
      for group, found in sorted(groups.items())
  }


def submission(
    path: pathlib.Path,
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> None:
  """Writes the .xlsx for the server.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  if any(_round(answer) for answer in answers[key]):
    raise base.EvalError(
        'The .xlsx has one answer to a row; those of --all-rounds are several.'
        ' Drop --submission, or answer the file with the moved rows in it.'
    )
  texts = texts_of(group, answers[key])
  columns = [name for name in group[0].extra if name not in _DROPPED]
  columns.insert(_PREDICTION_COLUMN, 'prediction')
  xlsx.write(
      path,
      columns,
      (
          [
              {
                  **q.extra,
                  'index': q.question_id,
                  'prediction': texts[q.question_id],
              }[name]
              for name in columns
          ]
          for q in group
      ),
  )
