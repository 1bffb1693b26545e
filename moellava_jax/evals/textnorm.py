# SPDX-License-Identifier: Apache-2.0
"""Answers as VQA challenges compare them: no case, no articles, digits.

`normalize` is what `EvalAIAnswerProcessor` of LLaVA's `m4c_evaluator.py` (from
MMF, after the official VQA evaluation) does to an answer, with its
peculiarities; TextVQA and the submissions of VQAv2 and VizWiz use it.
`official` is what the VQA evaluation itself does (`vqaEval.py` of
https://github.com/GT-Vision-Lab/VQA).
"""

from collections.abc import Sequence
import re

# A mark beside a space anywhere vanishes everywhere; else it becomes a space.
# (The comma and the question mark are already gone; see `normalize`.)
_MARKS = ';/[]"{}()=+\\_-><@`!'
# The official expression begins with a misspelt look-behind, which is always
# satisfied, so that a full stop vanishes after a digit as well ...
_FULL_STOP = re.compile(r'\.(?!\d)')
# ... and a flag is passed in place of the number of replacements.
_MOST_FULL_STOPS = 32
_DIGITS = re.compile(r'\d,\d')

_ARTICLES = ('a', 'an', 'the')
_NUMBERS = {
    'none': '0',
    'zero': '0',
    'one': '1',
    'two': '2',
    'three': '3',
    'four': '4',
    'five': '5',
    'six': '6',
    'seven': '7',
    'eight': '8',
    'nine': '9',
    'ten': '10',
}

# The official table of 120, `^` being the apostrophe that is added. Words with
# a capital are never met, nor those that have lost their 's before.
_APOSTROPHES = """
    ain^t aren^t can^t could^ve couldn^t couldn't^ve couldn^t've didn^t doesn^t
    don^t hadn^t hadn^t've hadn't^ve hasn^t haven^t he^d he^d've he'd^ve he^s
    how^d how^ll how^s I^d've I'd^ve I^m I^ve isn^t it^d it^d've it'd^ve it^ll
    let's ma^am mightn^t mightn^t've mightn't^ve might^ve mustn^t must^ve
    needn^t not^ve o^clock oughtn^t ^ow's'at 'ow^s'at 'ow's^at shan^t she^d've
    she'd^ve she's should^ve shouldn^t shouldn^t've shouldn't^ve somebody^d've
    somebody'd^ve somebody^ll somebody^s someone^d someone^d've someone'd^ve
    someone^ll someone^s something^d something^d've something'd^ve something^ll
    that^s there^d there^d've there'd^ve there^re there^s they^d they^d've
    they'd^ve they^ll they^re they^ve ^twas wasn^t we^d've we'd^ve we^ve
    weren^t what^ll what^re what^s what^ve when^s where^d where^s where^ve
    who^d who^d've who'd^ve who^ll who^s who^ve why^ll why^re why^s won^t
    would^ve wouldn^t wouldn^t've wouldn't^ve y^all y^all'll y'all^ll
    y^all'd've y'all^d've y'all'd^ve you^d you^d've you'd^ve you^ll you^re
    you^ve
"""
_CONTRACTIONS = {
    word.replace('^', ''): word.replace('^', "'")
    for word in _APOSTROPHES.split()
}
# The wrong way round, as it is there.
_CONTRACTIONS["somebody'd"] = 'somebodyd'


def normalize(text: str) -> str:
  """Returns what an exact match compares of an answer."""
  text = text.lower().replace(',', '').replace('?', '').replace("'s", " 's")
  text = text.strip().replace('\n', ' ').replace('\t', ' ').strip()
  return _words(_punctuation(text, _MARKS))


def official(text: str) -> str:
  """Returns what the VQA evaluation compares where people disagree.

  A comma between digits anywhere takes all marks away; else a comma or a
  question mark is treated as the other marks are.
  """
  return _words(_punctuation(text, f'{_MARKS},?'))


def _punctuation(text: str, marks: str) -> str:
  before = text
  bare = _DIGITS.search(before) is not None
  for mark in marks:
    beside_space = f'{mark} ' in before or f' {mark}' in before
    text = text.replace(mark, '' if bare or beside_space else ' ')
  return _FULL_STOP.sub('', text, count=_MOST_FULL_STOPS)


def _words(text: str) -> str:
  words = [_NUMBERS.get(word, word) for word in text.lower().split()]
  return ' '.join(
      _CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES
  )


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
  """The VQA accuracy of an answer, given those of ten people.

  The mean over leaving one person out of min(1, how many others said it / 3).
  Only where people disagree are answers normalised; else letters must match,
  though not their case.
  """
  answers, text = [_one_line(answer) for answer in answers], _one_line(text)
  if len(set(answers)) > 1:
    answers, text = [official(answer) for answer in answers], official(text)
  same = [answer.lower() == text.lower() for answer in answers]
  total = 0.0
  for left_out in same:
    total += min(1.0, (sum(same) - left_out) / 3)
  return total / len(same)


def _one_line(text: str) -> str:
  return text.replace('\n', ' ').replace('\t', ' ').strip()
