# SPDX-License-Identifier: Apache-2.0
"""ScienceQA: multiple choice; SQA-IMG is the part of it with images.

arXiv 2209.09513, scored as LLaVA's `eval_science_qa.py` scores it. --questions
is `llava_test_CQM-A.json` (conversations), --annotations the directory with
`problems.json` and `pid_splits.json`. An answer in which no letter is found is
wrong. So is, by the official script (`grade`), a problem without an answer;
`score` does not take a partial set.
"""

from collections.abc import Mapping, Sequence
import pathlib
import re
from typing import Any

from moellava_jax.evals import base, prompts

MAX_NEW_TOKENS = 1024  # As LLaVA's runner.
OPTIONS = ('A', 'B', 'C', 'D', 'E')
FAILED = 'FAILED'
# Any character ends the sentence: in the official expression the full stop is
# not escaped.
_SENTENCE = re.compile(r'The answer is ([A-Z]).')
_MARK = base.IMAGE_MARK.strip()


def _options(question: base.Question) -> dict[str, str]:
  return dict(zip(OPTIONS, question.extra['choices'], strict=False))


def _lmms(question: base.Question) -> str:
  """lmms-eval's `sqa_doc_to_text`."""
  hint = question.extra.get('hint')
  context = f'Context: {hint}\n' if hint else ''
  text = context + question.extra['question']
  return prompts.choices_llava(text, _options(question))


PROMPTS: prompts.Prompts = {
    'lmms': _lmms,
    'vlmevalkit': lambda q: prompts.choices_vlmevalkit(
        q.extra['question'], _options(q), q.extra.get('hint')
    ),
}


def load(
    questions_path: str, annotations: str | None
) -> dict[str, list[base.Question]]:
  """Returns the test problems under the stem of the question file's name.

  The answer of a question is its letter; `extra` is its entry in
  problems.json, the category whether it has an image.

  Raises:
    EvalError: a file is missing or malformed, or they do not belong together.
  """
  if annotations is None:
    raise base.EvalError(
        'scienceqa has its labels apart: give --annotations=DIR with'
        ' problems.json and pid_splits.json.'
    )
  problems = read_problems(annotations, 'test')
  asked = _read_conversations(questions_path)
  base.check_asked(problems, asked, questions_path, annotations)
  questions = [
      base.Question(
          question_id=key,
          image=asked[key][0],
          text=asked[key][1],
          category='text' if asked[key][0] is None else 'image',
          answer=OPTIONS[problem['answer']],
          extra=problem,
      )
      for key, problem in problems.items()
  ]
  return {pathlib.Path(questions_path).stem: questions}


def _read_conversations(
    path: str,
) -> dict[int | str, tuple[str | None, str]]:
  """The image and the prompt of each id."""
  asked = {}
  for number, row in enumerate(base.read_json(path)):
    try:
      text = row['conversations'][0]['value'].replace(_MARK, '').strip()
      asked[row['id']] = row.get('image'), f'{text}\n{prompts.LETTER}'
    except (KeyError, IndexError, TypeError) as e:
      raise base.EvalError(
          f'{path}, item {number}: expected {{"id", "conversations": [{{"from",'
          f' "value"}}, ...]}}, got {row!r:.200}.'
      ) from e
  return asked


def read_problems(folder: str, split: str) -> dict[int | str, Any]:
  """The problems of a split in its order, each with `choices` and `answer`.

  Raises:
    EvalError: a file or problem is missing, or an answer is none of A to E.
  """
  root = pathlib.Path(folder)
  splits = base.read_json(root / 'pid_splits.json')
  problems = base.read_json(root / 'problems.json')
  if split not in splits:
    raise base.EvalError(
        f'{root}/pid_splits.json: no split {split!r} in {sorted(splits)}.'
    )
  found = {key: problems.get(key) or {} for key in splits[split]}
  if bad := [
      key
      for key, problem in found.items()
      if 'choices' not in problem
      or problem.get('answer') not in range(len(OPTIONS))
  ]:
    raise base.EvalError(
        f'{root}/problems.json: no "choices", or no "answer" from 0 to'
        f' {len(OPTIONS) - 1}, in {base.listed(bad)}.'
    )
  return found


def parse(text: str) -> str:
  """The letter in an answer, or 'FAILED'.

  A letter alone; `B. ` and anything; or one single `The answer is B.`.
  """
  if text in OPTIONS:
    return text
  if text[:1] in OPTIONS and text[1:3] == '. ':
    return text[0]
  found = _SENTENCE.findall(text)
  return found[0] if len(found) == 1 else FAILED


def choice(letter: str, num_choices: int) -> int:
  """The index of a letter among the choices of a problem, or -1."""
  options = OPTIONS[:num_choices]
  return options.index(letter) if letter in options else -1


def grade(
    problems: Mapping[int | str, Mapping[str, Any]],
    answers: Mapping[int | str, base.Answer],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What the official script writes to --output-file and --output-result."""
  output: dict[str, Any] = {'correct': [], 'incorrect': []}
  chosen, texts = {}, {}
  for key, problem in problems.items():
    answer = answers.get(key)
    prompt = 'Unknown' if answer is None else answer.prompt
    texts[key] = FAILED if answer is None else answer.text
    letter = parse(texts[key])
    chosen[key] = choice(letter, len(problem['choices']))
    right = chosen[key] == problem['answer']
    output['correct' if right else 'incorrect'].append(
        {
            'question_id': key,
            'parsed_ans': letter,
            'ground_truth': OPTIONS[problem['answer']],
            'question': prompt,
            'pred': texts[key],
            'is_multimodal': _MARK in prompt,
        }
    )
  correct, count = len(output['correct']), len(problems)
  return output, {
      'acc': correct / count * 100,
      'correct': correct,
      'count': count,
      'results': chosen,
      'outputs': texts,
  }


def score(
    questions: Mapping[str, Sequence[base.Question]],
    answers: Mapping[str, Sequence[base.Answer]],
) -> dict[str, Any]:
  """Accuracies in [0, 1] over all problems and over those with an image.

  Returns:
    `{accuracy, accuracy_img, correct, count, correct_img, count_img, failed}`:
    `failed` answers have no letter.

  Raises:
    EvalError: the answers are not those of exactly these problems.
  """
  ((key, group),) = questions.items()
  # By id alone: an answers file of the original has the prompt without the
  # last line where its runner was told so.
  base.check_complete(group, [a._replace(prompt='') for a in answers[key]])
  problems = {question.question_id: question.extra for question in group}
  found = {answer.question_id: _as_asked(answer) for answer in answers[key]}
  output, result = grade(problems, found)
  failed = [
      text for text in result['outputs'].values() if parse(text) == FAILED
  ]
  return {**rates(output), 'failed': len(failed)}


def rates(output: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
  """What the official script prints, accuracies in [0, 1].

  Without any image it divides by zero and dies; the accuracy is 0 here.
  """
  correct, wrong = output['correct'], output['incorrect']
  count = len(correct) + len(wrong)
  correct_img = sum(row['is_multimodal'] for row in correct)
  count_img = correct_img + sum(row['is_multimodal'] for row in wrong)
  return {
      'accuracy': len(correct) / count,
      'accuracy_img': correct_img / count_img if count_img else 0.0,
      'correct': len(correct),
      'count': count,
      'correct_img': correct_img,
      'count_img': count_img,
  }


def _as_asked(answer: base.Answer) -> base.Answer:
  """The prompt as the original's runner records it, with the image mark."""
  if answer.metadata.get('image') is None:
    return answer
  return answer._replace(prompt=base.IMAGE_MARK + answer.prompt)
