# SPDX-License-Identifier: Apache-2.0
"""AI2D: both public rules on the same answers."""

import pytest

from moellava_jax.evals import ai2d, base, prompts
from tests.evals import tables

ROW = {
    'index': '1',
    'question': 'What eats grass?',
    'A': 'fox',
    'B': 'rabbit',
    'C': 'owl',
    'answer': 'B',
    'category': 'food web',
    'image': 'x' * 80,
}


def _load(tmp_path, rows):
  return ai2d.load(tables.write(tmp_path / 'AI2D_TEST.tsv', rows), None)


@pytest.mark.parametrize(
    'text, accuracy, exact_match, unclear',
    [
        ('B', 1, 1, 0),
        ('b.', 0, 1, 1),  # Letters are capitals to one, not to the other.
        ('(B) rabbit', 1, 0, 0),
        ('The rabbit', 1, 0, 0),
        ('C', 0, 0, 0),
        ('deer', 0, 0, 1),
    ],
)
def test_scores_by_hand(tmp_path, text, accuracy, exact_match, unclear):
  questions = _load(tmp_path, [ROW])
  answers = {'AI2D_TEST': [base.Answer('1', '', text, '', 'm', {})]}
  assert ai2d.score(questions, answers) == {
      'accuracy': accuracy,
      'exact_match': exact_match,
      'unclear': unclear,
  }


def test_each_protocol_asks_in_its_way(tmp_path):
  (question,) = _load(tmp_path, [ROW])['AI2D_TEST']
  lines = 'A. fox\nB. rabbit\nC. owl\n'
  assert question.text == f'What eats grass?\n{lines}{prompts.LETTER}'
  assert ai2d.PROMPTS['lmms'](question) == question.text
  assert ai2d.PROMPTS['vlmevalkit'](question) == (
      f'Question: What eats grass?\nOptions:\n{lines}'
      'Please select the correct answer from the options above. \n'
  )


def test_a_bad_row_and_a_partial_set_are_errors(tmp_path):
  questions = _load(tmp_path, [ROW, {**ROW, 'index': '2'}])
  answers = {'AI2D_TEST': [base.Answer('1', '', 'B', '', 'm', {})]}
  with pytest.raises(base.EvalError, match=r"missing: 1 \('2'\)"):
    ai2d.score(questions, answers)
  for change in ({'answer': 'D'}, {'image': ''}):
    with pytest.raises(base.EvalError, match='row 1 has no image, or no answ'):
      _load(tmp_path, [{**ROW, **change}])
  with pytest.raises(base.EvalError, match='drop --annotations'):
    ai2d.load(str(tmp_path / 'AI2D_TEST.tsv'), 'x.json')
