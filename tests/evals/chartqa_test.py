# SPDX-License-Identifier: Apache-2.0
"""ChartQA: five per cent by hand, and both splits."""

import json

import pytest

from moellava_jax.evals import base, chartqa, prompts


@pytest.mark.parametrize(
    'text, gold, right',
    [
        ('105', '100', True),  # Just within.
        ('105.1', '100', False),
        ('95', '100', True),
        ('-96', '-100', True),
        ('96', '-100', False),
        ('12%', '0.12', True),
        ('12%', '12', False),
        ('1,000', '1000', False),  # No number to the script, so no match.
        ('1,000', '1,000', True),
        ('0.01', '0', False),  # Within any share of nothing: nothing.
        ('0', '0', True),
        ('0.0', '0', False),  # A gold of 0 is compared as text.
        ('Blue', 'blue', True),
        ('light blue', 'blue', False),
        ('nan', '5', False),
        ('', 'x', False),
    ],
)
def test_relaxed_accuracy(text, gold, right):
  assert chartqa.is_right(text, gold) is right


@pytest.fixture
def files(tmp_path):
  for split, rows in {
      'human': [('a.png', 'How many?', '3'), ('a.png', 'Which?', 'Yes')],
      'augmented': [('b.png', 'What share?', 40)],
  }.items():
    (tmp_path / f'test_{split}.json').write_text(
        json.dumps(
            [
                {'imgname': image, 'query': query, 'label': label}
                for image, query, label in rows
            ]
        )
    )
  return tmp_path


def test_both_splits_and_all(files):
  questions = chartqa.load(str(files), None)
  assert questions['human'][1].text == f'Which?\n{prompts.SHORT}'
  answers = {
      'human': [
          base.Answer('human_0', '', ' 3 ', '', 'm', {}),
          base.Answer('human_1', '', 'No', '', 'm', {}),
      ],
      'augmented': [base.Answer('augmented_0', '', '41', '', 'm', {})],
  }
  assert chartqa.score(questions, answers) == {
      'human': 0.5,
      'augmented': 1.0,
      'accuracy': pytest.approx(2 / 3),
  }
  with pytest.raises(base.EvalError, match=r"missing: 1 \('human_1'\)"):
    chartqa.score(questions, {**answers, 'human': answers['human'][:1]})


def test_bad_files_are_named(files):
  (files / 'test_human.json').write_text('[{"query": "x"}]')
  with pytest.raises(base.EvalError, match='human.json, item 0: expected'):
    chartqa.load(str(files), None)
  (files / 'test_human.json').unlink()
  with pytest.raises(base.EvalError, match='test_human.json: no such file'):
    chartqa.load(str(files), None)
  with pytest.raises(base.EvalError, match='is the directory with test_human'):
    chartqa.load(str(files / 'gone'), None)
