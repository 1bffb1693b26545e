# SPDX-License-Identifier: Apache-2.0
"""Which option an answer to a multiple-choice question names.

`can_infer` of VLMEvalKit's `vlmeval/utils/matching_util.py`, with which the
server of MMBench begins too; what these rules leave open it asks a language
model. Earlier versions had neither the length limit of `by_text` nor the
position limit of `by_letter`.
"""

from collections.abc import Mapping
import re

NONE = 'Z'  # A refusal: none of the options.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    'Cannot determine the answer',
)
_FAILED = 'Failed to obtain answer via API'
_BLANKS = str.maketrans(dict.fromkeys('.()[],:;!*#{}', ' '))
_LAST_WORDS = 5


def infer(text: str, options: Mapping[str, str]) -> str | None:
  """The letter of the option that `text` names, `NONE`, or None if unclear.

  Args:
    text: an answer.
    options: letter -> text.
  """
  return by_letter(text, options) or by_text(text, options)


def by_letter(text: str, options: Mapping[str, str]) -> str | None:
  """The one letter that stands as a word, among the last words if by itself.

  The article A is a letter as well: `A cat.` is option A.
  """
  if _FAILED in text:
    return None
  if any(refusal in text for refusal in _REFUSALS):
    return NONE
  words = text.translate(_BLANKS).split()
  found = [letter for letter in options if letter in words]
  if not found and NONE in words:
    return NONE
  if len(found) == 1 and words.index(found[0]) > len(words) - _LAST_WORDS:
    return found[0]
  return None


def by_text(text: str, options: Mapping[str, str]) -> str | None:
  """The one option whose text occurs, unless the answer is far longer."""
  text = text.lower()
  if len(text) > 2 * sum(map(len, options.values())):
    return None
  found = [key for key, item in options.items() if item.lower() in text]
  return found[0] if len(found) == 1 else None


def matching(question: str, options: Mapping[str, str], text: str) -> str:
  """What a language model is asked about an answer that the rules leave open.

  `build_prompt` and `build_prompt_cn` of VLMEvalKit
  (`vlmeval/dataset/utils/multiple_choice.py`).
  """
  template = _MATCH_CN if _CHINESE.search(question) else _MATCH
  listed = ''.join(f'{key}. {item}\n' for key, item in options.items())
  listed = f'There are several options: \n{listed}'
  return template.format(question, listed, text.strip())


_CHINESE = re.compile('[\u4e00-\u9fff]')
_MATCH = (
    'You are an AI assistant who will help me to match an answer with several'
    ' options of a single-choice question. You are provided with a question,'
    ' several options, and an answer, and you need to find which option is most'
    ' similar to the answer. If the meaning of all options are significantly'
    ' different from the answer, output Z. Your should output a single uppercase'
    ' character in A, B, C, D (if they are valid options), and Z. \n'
    'Example 1: \n'
    'Question: What is the main object in image?\n'
    'Options: A. teddy bear B. rabbit C. cat D. dog\n'
    'Answer: a cute teddy bear\n'
    'Your output: A\n'
    'Example 2: \n'
    'Question: What is the main object in image?\n'
    'Options: A. teddy bear B. rabbit C. cat D. dog\n'
    'Answer: Spider\n'
    'Your output: Z\n'
    'Example 3: \n'
    'Question: {}?\nOptions: {}\nAnswer: {}\nYour output: '
)
_MATCH_CN = (
    '你是一个帮助我匹配答案与单选题中多个选项的 AI 助手。'
    '你会被提供：一个问题，多个选项，一个答案。你的任务是找到与答案意义最相近的选项。'
    '如果所有选项的意义都与答案显著不同，则输出 Z。'
    '你应该输出一个单个的大写字母，例如 A, B, C, D（如果它们是有效选项），或 Z。'
    '例 1:'
    '问题: 图中最主要的物体是什么?\n选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n'
    '答案: 一只可爱的泰迪熊\n输出: A\n'
    '例 2: \n'
    '问题: 图中最主要的物体是什么?\n选项: A. 泰迪熊 B. 兔子 C. 猫 D. 狗\n'
    '答案: 蜘蛛\n输出: Z\n'
    '例 3: \n'
    '问题: {}?\n选项: {}\n答案: {}\n输出: '
)
