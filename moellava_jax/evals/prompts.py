# SPDX-License-Identifier: Apache-2.0
"""How a question is put: LLaVA's way, and that of two harnesses.

The files of LLaVA hold the prompt as its paper puts it ('llava'). `lmms` is
what lmms-eval asks by default (`lmms_eval/tasks/*/*.yaml`, post_prompt), and
`vlmevalkit` what VLMEvalKit asks of a model that brings no prompts of its own,
as it does of every API (`vlmeval/dataset/image_*.py`, build_prompt). Only the
question differs: the conversation template stays that of the checkpoint, and
the score that of the benchmark's own script.
"""

from collections.abc import Callable, Mapping

from moellava_jax.evals import base

PROTOCOLS = ('llava', 'lmms', 'vlmevalkit')
SHORT = 'Answer the question using a single word or phrase.'
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."

Prompt = Callable[[base.Question], str]
Prompts = Mapping[str, Prompt]  # Of the protocols other than 'llava'.


def bare(question: base.Question) -> str:
  """The question without the lines that LLaVA's files put after it."""
  text = question.text
  for line in (SHORT, UNANSWERABLE, LETTER):
    text = text.removesuffix('\n' + line)
  return text


def short(question: base.Question) -> str:
  """The question and the request for a single word or phrase."""
  return f'{bare(question).strip()}\n{SHORT}'


def choices_llava(question: str, options: Mapping[str, str]) -> str:
  """`A. ...` lines and the request for a letter.

  Args:
    question: with its hint, if any.
    options: letter -> text, in order.
  """
  lines = [f'{letter}. {text}' for letter, text in options.items()]
  return '\n'.join([question, *lines, LETTER])


def choices_vlmevalkit(
    question: str, options: Mapping[str, str], hint: str | None = None
) -> str:
  """VLMEvalKit's `ImageMCQDataset.build_prompt`.

  Args:
    question: without its hint.
    options: letter -> text, in order; none of an open question.
    hint: what to know for an answer.
  """
  text = f'Hint: {hint}\n' if hint else ''
  text += f'Question: {question}\n'
  if options:
    text += 'Options:\n'
    text += ''.join(f'{key}. {item}\n' for key, item in options.items())
    text += 'Please select the correct answer from the options above. \n'
  return text
