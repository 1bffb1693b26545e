# SPDX-License-Identifier: Apache-2.0
"""GQA: the official rates of six questions, worked out by hand."""

import json

import pytest

from moellava_jax.evals import base, gqa


def _entry(answer, structural, group, entailed=(), **changes):
  return {
      'isBalanced': True,
      'answer': answer,
      'question': 'Is it red ?',
      'semantic': [
          {'operation': 'select', 'argument': 'car (1)'},
          {'operation': 'query', 'argument': 'name'},
      ],
      'types': {
          'structural': structural,
          'semantic': 'attr',
          'detailed': 'color',
      },
      'groups': {'global': group},
      'entailed': list(entailed),
      **changes,
  }


COMMON = {'structural': 'compare', 'semantic': 'obj', 'detailed': 'twoCommon'}
EXIST = [
    {'operation': 'select', 'argument': 'car'},
    {'operation': 'exist', 'argument': '?'},
    {'operation': 'choose name', 'argument': 'a|b'},
    {'operation': 'verify color', 'argument': 'red'},
]
QUESTIONS = {
    '1': _entry('red', 'query', 'color', ['1', '2', '6']),
    '2': _entry('yes', 'verify', None, ['1']),
    '3': _entry('blue', 'query', 'color', question='What is the color ?'),
    '4': _entry('color', 'compare', None, types=COMMON, semantic=EXIST),
    '5': _entry('red', 'query', 'color', ['5']),
    '6': _entry('no', 'verify', 'x', isBalanced=False),
}
TEXTS = {
    '1': 'Red.',  # Right.
    '2': 'yes..',  # Right.
    '3': 'red',
    '4': 'Shape',
    '5': 'a red',
    '6': 'yes',
}
CHOICES = {
    '1': {'valid': ['red', 'blue'], 'plausible': ['red']},
    '2': {'valid': ['yes', 'no'], 'plausible': ['yes', 'no']},
    '3': {'valid': ['red', 'blue'], 'plausible': ['blue']},
    '4': {'valid': ['cat'], 'plausible': ['cat']},
    '5': {'valid': ['red'], 'plausible': ['red']},
    '6': {'valid': ['yes'], 'plausible': ['yes']},
}
PREDICTIONS = {key: gqa.prediction(text) for key, text in TEXTS.items()}


def test_predictions_lose_final_full_stops_and_case_only():
  assert gqa.prediction('.A Dog..') == '.a dog'
  assert gqa.prediction(' dog. ') == ' dog. '


def test_rates_by_hand():
  rates = gqa.rates(QUESTIONS, PREDICTIONS, choices=CHOICES, consistency=True)
  assert rates == {
      'binary': 1 / 2,  # 2 of 2 and 4.
      'open': 1 / 3,  # 1 of 1, 3 and 5.
      'accuracy': 2 / 5,
      # 1 entails 2, right, and 6, wrong; 2 entails 1, right.
      'consistency': (1 / 2 + 1) / 2,
      'validity': 4 / 5,  # 4 is about what is common: "shape" is valid.
      'plausibility': 3 / 5,
      # In "color" red is expected 2 and said 2, blue 1 and 0: 1 of 1 group.
      'distribution': 1.0 / 100,
      'structural_type': {
          'compare': {'accuracy': 0.0, 'questions': 1},
          'query': {'accuracy': 1 / 3, 'questions': 3},
          'verify': {'accuracy': 1.0, 'questions': 1},
      },
      'semantic_type': {
          'attr': {'accuracy': 1 / 2, 'questions': 4},
          'obj': {'accuracy': 0.0, 'questions': 1},
      },
      'steps': {
          '1': {'accuracy': 1 / 2, 'questions': 4},
          '2': {'accuracy': 0.0, 'questions': 1},
      },
      'words': {
          '4': {'accuracy': 1 / 2, 'questions': 4},
          '5': {'accuracy': 0.0, 'questions': 1},
      },
  }


def test_distribution_weighs_groups_by_their_size():
  questions = {
      '1': _entry('a', 'query', 'big'),
      '2': _entry('a', 'query', 'big'),
      '3': _entry('a', 'query', 'big'),
      '4': _entry('b', 'query', 'small'),
  }
  said = {'1': 'a', '2': 'z', '3': 'z', '4': 'a'}
  # (1 - 3)^2 / 3 of three, (0 - 1)^2 / 1 of one.
  assert gqa.rates(questions, said)['distribution'] == pytest.approx(
      ((4 / 3) * 3 + 1 * 1) / 4 / 100, rel=1e-12
  )
  alone = {'2': QUESTIONS['2']}
  assert gqa.rates(alone, {'2': 'no'})['distribution'] == 0.0


def test_a_table_is_sorted_as_numbers():
  questions = {
      str(n): _entry('a', 'query', None, question='w ' * n) for n in (10, 9)
  }
  rates = gqa.rates(questions, {'10': 'a', '9': 'b'})
  assert list(rates['words']) == ['9', '10']


def test_a_prediction_that_is_needed_must_be_there():
  some = {key: PREDICTIONS[key] for key in '12345'}
  assert gqa.rates(QUESTIONS, some)['accuracy'] == 2 / 5
  with pytest.raises(base.EvalError, match=r"No prediction for .* 1 \('6'\)"):
    gqa.rates(QUESTIONS, some, consistency=True)


@pytest.fixture
def files(tmp_path, write_jsonl):
  """LLaVA's question file and the official ones, with choices."""

  def make(keys, choices, official='123456'):
    write_jsonl(
        'q.jsonl',
        [
            {'question_id': k, 'image': 'a', 'text': k, 'category': 'default'}
            for k in keys
        ],
    )
    # The folder's name stays as it is.
    folder = tmp_path / 'val_questions'
    folder.mkdir(exist_ok=True)
    path = folder / 'val_all_questions.json'
    path.write_text(json.dumps({key: QUESTIONS[key] for key in official}))
    if choices:
      (folder / 'val_choices.json').write_text(json.dumps(CHOICES))
    return gqa.load(str(tmp_path / 'q.jsonl'), str(path))

  return make


def _answers(keys):
  return {'q': [base.Answer(k, k, TEXTS[k], '', 'm', {}) for k in keys]}


def test_a_score_has_what_the_files_allow(files):
  questions = files('123456', choices=True)
  assert [q.answer for q in questions['q']][:3] == ['red', 'yes', 'blue']
  full = gqa.rates(QUESTIONS, PREDICTIONS, choices=CHOICES, consistency=True)
  assert gqa.score(questions, _answers('123456')) == full
  # 6 is entailed and not asked, as it is not balanced.
  less = gqa.score(files('12345', choices=True), _answers('12345'))
  assert set(full) - set(less) == {'consistency'}
  # 5 entails itself alone.
  alone = gqa.score(files('345', True, '345'), _answers('345'))
  assert 'consistency' not in alone


def test_without_choices_there_is_no_validity(files):
  scores = gqa.score(files('123456', choices=False), _answers('123456'))
  assert not {'validity', 'plausibility'} & set(scores)
  assert scores['consistency'] == 3 / 4


def test_files_of_another_release_are_an_error(files, tmp_path):
  with pytest.raises(base.EvalError, match=r"no entry for questions 1 \('7'\)"):
    files('17', choices=False)
  with pytest.raises(base.EvalError, match='--annotations=testdev_bal'):
    gqa.load(str(tmp_path / 'q.jsonl'), None)
  with pytest.raises(base.EvalError, match=r"missing: 1 \('2'\)"):
    gqa.score(files('12', False, '12'), _answers('1'))


def test_no_score_of_a_part_of_the_balanced_questions(files):
  with pytest.raises(
      base.EvalError, match=r"no question for 1 \('2'\) of the 5"
  ):
    files('13456', choices=True)
