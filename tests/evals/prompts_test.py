# SPDX-License-Identifier: Apache-2.0
"""How each protocol asks the questions of LLaVA's files, word for word.

The prompts of the multiple-choice benchmarks are in the tests of each.
"""

import hashlib

import pytest

from moellava_jax.evals import (
    base,
    benchmarks,
    llava_bench,
    mmvet,
    options,
    prompts,
)

SHORT = 'Answer the question using a single word or phrase.'
NONE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."
PROBLEM = {'question': 'What?', 'hint': 'Look.', 'choices': ['x', 'y']}
OFFICIAL = {'question': 'Is it? Please answer yes or no.'}

# Benchmark: the text in LLaVA's file, the official entry, and what is asked.
FROZEN = {
    'pope': (f'Is it?\n{SHORT}', {}, f'Is it?\n{SHORT}', 'Is it?'),
    'gqa': (f'Is it?\n{SHORT}', {}, f'Is it?\n{SHORT}', f'Is it?\n{SHORT}'),
    'vqav2': (f'Is it?\n{SHORT}', {}, f'Is it?\n{SHORT}', None),
    'vizwiz': (
        f'is it?\n{NONE}\n{SHORT}',
        {},
        f'Is it?\n{NONE}\n{SHORT}',
        'is it?',
    ),
    'textvqa': (
        f'is it?\nReference OCR token: A, B\n{SHORT}',
        {'question': 'is it Me?'},
        f'Is it me?\n{SHORT}',
        f'is it Me?\n{SHORT}',
    ),
    'mme': (
        f'Is it?\n{SHORT}',
        OFFICIAL,
        f'Is it?\n{SHORT}',
        'Is it? Please answer yes or no.',
    ),
    'scienceqa': (
        f'Context: Look.\nWhat?\nA. x\nB. y\n{LETTER}',
        PROBLEM,
        f'Context: Look.\nWhat?\nA. x\nB. y\n{LETTER}',
        'Hint: Look.\nQuestion: What?\nOptions:\nA. x\nB. y\n'
        'Please select the correct answer from the options above. \n',
    ),
    'mmvet': (
        'What?',
        {},
        'First please perform reasoning, and think step by step to provide best'
        ' answer to the following question: \n\nWhat?',
        'What?',
    ),
    'llava_bench': ('What?', {}, 'What?', 'What?'),
    'chartqa': (f'Is it?\n{SHORT}', {}, f'Is it?\n{SHORT}', f'Is it?\n{SHORT}'),
}


def _put(name, protocol):
  text, extra, *_ = FROZEN[name]
  question = base.Question(1, 'a.jpg', text, 'c', None, extra)
  return benchmarks.put(name, {'q': [question]}, protocol)['q'][0].text


@pytest.mark.parametrize('name', FROZEN)
def test_prompts_are_frozen(name):
  text, _, lmms, vlmevalkit = FROZEN[name]
  assert _put(name, 'llava') == text
  assert _put(name, 'lmms') == lmms
  if vlmevalkit is not None:
    assert _put(name, 'vlmevalkit') == vlmevalkit


def test_prompts_of_judges_are_frozen():
  """By the digests of the texts in the official scripts."""
  shown = {'A': 'x', 'B': 'y'}
  assert {
      name: hashlib.sha256(text.encode()).hexdigest()[:32]
      for name, text in {
          'llava_bench': llava_bench.RULE,
          'mmvet': mmvet.PROMPT,
          'mmbench': options.matching('What', shown, 'z'),
          'mmbench_cn': options.matching('什么', shown, 'z'),
      }.items()
  } == {
      'llava_bench': '2ce22b562d6008864970ea863ac8a4d3',
      'mmvet': 'd1b3e0a5b4e72c888b77164489d705bb',
      'mmbench': '7e6f34c84467dfdce2215161dec5abd6',
      'mmbench_cn': 'f35ffea7df2a9e76fbb02f653e3d5235',
  }


def test_every_benchmark_is_asked_in_every_way_there_is():
  ways = {name: set(b.prompts) for name, b in benchmarks.BENCHMARKS.items()}
  # Shapes is our own, and VLMEvalKit has no VQAv2.
  assert ways.pop('shapes') == set()
  assert ways.pop('vqav2') == {'lmms'}
  assert {frozenset(found) for found in ways.values()} == {
      frozenset(prompts.PROTOCOLS[1:])
  }


def test_a_way_that_is_not_there_is_an_error():
  with pytest.raises(
      base.EvalError, match="vqav2 has no protocol 'vlmevalkit'"
  ):
    _put('vqav2', 'vlmevalkit')
  with pytest.raises(base.EvalError, match='there are llava, lmms, vlmevalkit'):
    _put('pope', 'mine')
