# SPDX-License-Identifier: Apache-2.0
"""Options are read from answers as VLMEvalKit reads them."""

import pytest

from moellava_jax.evals import options

CHOICES = {'A': 'cat', 'B': 'a dog', 'C': 'bird'}


@pytest.mark.parametrize(
    'text, found',
    [
        ('B', 'B'),
        ('(B)', 'B'),
        ('B. a dog', 'B'),
        ('b', None),
        ('A or B', None),  # Two letters, and no text of an option.
        ('The answer is C.', 'C'),
        ('A bird', 'A'),  # The article is a letter too.
        ('A bird sits on the wire', 'C'),  # But not so far from the end.
        ('It is a dog', 'B'),
        ('cat and bird', None),
        ('It has a tail, whiskers and paws: a cat it is', None),  # Too long.
        ('Z', 'Z'),
        ("Sorry, I can't help with images of people yet.", 'Z'),
        ('Failed to obtain answer via API', None),
        ('', None),
    ],
)
def test_the_option_that_an_answer_names(text, found):
  assert options.infer(text, CHOICES) == found


def test_a_judge_is_asked_in_the_language_of_the_question():
  english = options.matching('What', {'A': 'x', 'B': 'y'}, ' the first ')
  assert english.endswith(
      'Question: What?\nOptions: There are several options: \nA. x\nB. y\n\n'
      'Answer: the first\nYour output: '
  )
  chinese = options.matching('什么', {'A': 'x'}, 'y')
  assert chinese.startswith('你是一个') and chinese.endswith('y\n输出: ')
