# SPDX-License-Identifier: Apache-2.0
"""AI2D (arXiv 1603.07396): multiple choice about diagrams of school books.

--questions is VLMEvalKit's `AI2D_TEST.tsv` (letters in the place of labels) or
`AI2D_TEST_NO_MASK.tsv`, with the images in it. Two public rules are in use and
both are given: `accuracy` reads the answer as VLMEvalKit does
(`mcq_vanilla_eval`, `exact_matching`), `exact_match` is lmms-eval's, the letter
without regard to case and punctuation.
"""

from collections.abc import Mapping, Sequence
import pathlib
import string
from typing import Any

from moellava_jax.evals import base, options, prompts, tsv

MAX_NEW_TOKENS = 128
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def _llava(question: base.Question) -> str:
  row = question.extra
  return prompts.choices_llava(row['question'], tsv.options(row))


PROMPTS: prompts.Prompts = {
    'lmms': _llava,
    'vlmevalkit': lambda q: prompts.choices_vlmevalkit(
        q.extra['question'], tsv.options(q.extra), q.extra.get('hint')
    ),
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the rows of a .tsv under its stem; `extra` is the row.

  Raises:
    EvalError: the file is missing or malformed, or a row has no answer.
  """
  if annotations is not None:
    raise base.EvalError(
        'ai2d has its answers in the question file; drop --annotations.'
    )
  images = tsv.image_names(questions_path)
  questions = []
  for row in tsv.rows(questions_path, ('question', 'answer', 'A', 'B')):
    index = str(row['index'])
    listed = tsv.options(row)
    if row['answer'] not in listed or not images[index]:
      raise base.EvalError(
          f'{questions_path}: row {index} has no image, or no answer among its'
          f' options {list(listed)}; got {row["answer"]!r}.'
      )
    questions.append(
        base.Question(
            question_id=index,
            image=images[index][0],
            text=prompts.choices_llava(row['question'] or '', listed),
            category=row.get('category') or '',
            answer=row['answer'],
            extra=row,
        )
    )
  return {pathlib.Path(questions_path).stem: questions}


def exact(text: str) -> str:
  """What lmms-eval's exact match compares."""
  return text.lower().translate(_NO_PUNCTUATION)


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """`{accuracy, exact_match, unclear}`, rates in [0, 1].

  `unclear` answers name no option by VLMEvalKit's rules; they are wrong.

  Raises:
    EvalError: the answers are not those of exactly these questions.
  """
  ((key, group),) = questions.items()
  texts = base.check_complete(group, answers[key])
  letters = {
      q.question_id: options.infer(texts[q.question_id], tsv.options(q.extra))
      for q in group
  }
  right = sum(letters[q.question_id] == q.answer for q in group)
  same = sum(
      exact(texts[q.question_id]) == exact(q.answer or '') for q in group
  )
  return {
      'accuracy': right / len(group),
      'exact_match': same / len(group),
      'unclear': sum(letter is None for letter in letters.values()),
  }
