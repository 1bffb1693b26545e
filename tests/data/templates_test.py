# SPDX-License-Identifier: Apache-2.0
"""Rendered text, ids and loss mask against recordings of the original."""

import json
import pathlib

import numpy as np
import pytest

from moellava_jax.data import templates, tokenizer

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/text'
TRAIN = json.loads((GOLDENS / 'train_preprocess.json').read_text())
EVAL = json.loads((GOLDENS / 'eval_prompts.json').read_text())

# Where we differ on purpose: (template, conversation) -> what the original
# does, and the supervised text that we keep instead.
DIFFERENCES = {
    # A stop string in a question upsets the original's count of rounds: it
    # warns of a "tokenization mismatch" and trains on nothing of the sample.
    ('phi', 'eos_in_text'): ('blank', ' Yes.<|endoftext|>'),
    ('v1', 'eos_in_text'): ('blank', ' Yes.</s>'),
    # It asserts that a caption row is one exchange, about an image.
    ('plain', 'image_2turn'): (
        'error',
        'There is a small dog on the red sofa.\n',
    ),
    ('plain', 'text_2turn'): ('error', 'Two people, 3 cats and 10 birds.\n'),
    ('plain', 'gpt_first'): ('error', 'No.\n'),
    ('plain', 'eos_in_text'): ('error', 'Yes.\n'),
}


def _name(result):
  wrapped = '-im_start_end' if result['mm_use_im_start_end'] else ''
  return f"{result['template']}-{result['conversation']}{wrapped}"


def _turns(result):
  """The turns of a recording; `mm_use_im_start_end` only wraps the tag."""
  tag = '<im_start><image><im_end>'
  return [
      (
          m['from'],
          m['value'].replace('<image>', tag)
          if result['mm_use_im_start_end']
          else m['value'],
      )
      for m in TRAIN['conversations'][result['conversation']]['messages']
  ]


def _tokenize(result, turns):
  segments = templates.render(templates.get(result['template']), turns)
  tok = tokenizer.load(GOLDENS / f"tokenizer_{result['tokenizer']}")
  return segments, *tokenizer.tokenize(segments, tok)


@pytest.mark.parametrize('result', TRAIN['results'], ids=_name)
def test_training_text_ids_and_mask_equal_the_original(result):
  segments, ids_T, supervised_T = _tokenize(result, _turns(result))
  kept = ''.join(s.text for s in segments if s.supervised)
  known = DIFFERENCES.get((result['template'], result['conversation']))
  if known is not None:
    behaviour, expected = known
    if behaviour == 'error':
      assert 'AssertionError' in result['error']
    else:
      assert 'tokenization mismatch' in result['stdout']
      assert set(result['labels']) == {-100}
      assert templates.text(segments) == result['get_prompt']
      np.testing.assert_array_equal(ids_T, result['input_ids'])
    assert kept == expected
    assert supervised_T.any()
    return
  if 'get_prompt' in result:  # The original cannot render captions this way.
    assert templates.text(segments) == result['get_prompt']
  np.testing.assert_array_equal(ids_T, result['input_ids'])
  labels_T = np.where(supervised_T, ids_T, -100)
  np.testing.assert_array_equal(labels_T, result['labels'])


def test_list_of_differences_is_complete_and_needed():
  seen = {(r['template'], r['conversation']) for r in TRAIN['results']}
  assert set(DIFFERENCES) <= seen
  for result in TRAIN['results']:
    odd = 'error' in result or result['stdout'] != ''
    key = (result['template'], result['conversation'])
    assert odd == (key in DIFFERENCES), key


@pytest.mark.parametrize('result', EVAL)
def test_inference_prompts_equal_the_original(result):
  segments, ids_T, supervised_T = _tokenize(
      result, [('human', result['question'])]
  )
  template = templates.get(result['template'])
  assert templates.text(segments) == result['prompt']
  assert template.keyword == template.stop == result['stop_str']
  np.testing.assert_array_equal(ids_T, result['input_ids'])
  assert not supervised_T.any()


_USER = (
    'A chat between a curious user and an artificial intelligence assistant.'
    " The assistant gives helpful, detailed, and polite answers to the user's"
    ' questions.'
)
_HUMAN = (
    'A chat between a curious human and an artificial intelligence assistant.'
    ' The assistant gives helpful, detailed, and polite answers to the'
    " human's questions."
)
_MMTAG = (
    'A chat between a curious user and an artificial intelligence assistant.'
    ' The assistant is able to understand the visual content that the user'
    ' provides, and assist the user with a variety of tasks using natural'
    ' language.The visual content will be provided with the following format:'
    ' <Image>visual content</Image>.'
)
_TWO = ' USER: a ASSISTANT:« bEND»USER: c ASSISTANT:« dEND»USER: e ASSISTANT:'
_SINGLE = (
    '###Human: a###Assistant:« b###»Human: c###Assistant:« d###»Human:'
    ' e###Assistant:'
)
# What is taught stands between « and ».
RENDERED = {
    'phi': _USER + _TWO.replace('END', '<|endoftext|>'),
    'stablelm': _USER + _TWO.replace('END', '<|endoftext|>'),
    'openchat': _USER + _TWO.replace('END', '<|end_of_turn|>'),
    'mistral': _USER + _TWO.replace('END', '</s>'),
    'minicpm': _USER + _TWO.replace('END', '</s>'),
    'v1': _USER + _TWO.replace('END', '</s>'),
    'llava_v1': _HUMAN + _TWO.replace('END', '</s>'),
    'v1_mmtag': _MMTAG + _TWO.replace('END', '</s>'),
    'bare': _TWO[1:].replace('END', '<|endoftext|>'),
    'llava_v0': _HUMAN + _SINGLE,
    'v0_mmtag': _MMTAG + _SINGLE,
    'llava_llama_2': (
        '[INST] <<SYS>>\nYou are a helpful language and vision assistant. You'
        ' are able to understand the visual content that the user provides, and'
        ' assist the user with a variety of tasks using natural language.\n'
        '<</SYS>>\n\na [/INST]« b </s>»<s>[INST] c [/INST]« d </s>»<s>[INST] e'
        ' [/INST]'
    ),
    'mpt': (
        '<|im_start|>system\nA conversation between a user and an LLM-based AI'
        ' assistant. The assistant gives helpful and honest'
        ' answers.<|im_end|><|im_start|>user\na<|im_end|><|im_start|>assistant'
        '\n«b<|im_end|>»<|im_start|>user\nc<|im_end|><|im_start|>assistant\n'
        '«d<|im_end|>»<|im_start|>user\ne<|im_end|><|im_start|>assistant\n'
    ),
}
TURNS = [('human', 'a'), ('gpt', 'b'), ('human', 'c'), ('gpt', 'd')]
TURNS += [('human', 'e')]


def _marked(name, turns):
  segments = templates.render(templates.get(name), turns)
  return ''.join(f'«{s.text}»' if s.supervised else s.text for s in segments)


@pytest.mark.parametrize('name', RENDERED)
def test_turns_are_rendered_to_the_character(name):
  assert _marked(name, TURNS) == RENDERED[name]


def test_vicuna_v0_shows_an_exchange_that_it_does_not_teach():
  text = _marked('v0', TURNS)
  before, after = text.split('Human: a###')
  assert 'Human: a###' + after == RENDERED['llava_v0'].split('###', 1)[1]
  assert before.startswith(
      f'{_HUMAN}###Human: What are the key differences between renewable and'
      ' non-renewable energy sources?###Assistant: Renewable energy sources'
  )
  assert before.endswith('economic and social instability.\n###')
  assert len(before) == 1646 and '»' not in before


def test_llama_2_has_its_system_prompt():
  text = _marked('llama_2', TURNS)
  assert 'while being safe.  Your answers should not include' in text
  assert 'positive in nature.\n\nIf a question does not make' in text
  assert text.endswith(RENDERED['llava_llama_2'].split('<</SYS>>')[1])


def test_names_of_the_original_are_known():
  same = [('phi', 'qwen'), ('v1', 'vicuna_v1'), ('plain', 'v0_plain')]
  for a, b in [*same, ('v0', 'default')]:
    assert templates.get(a) == templates.get(b)
  known = {n for n in RENDERED if n != 'bare'}
  known |= {n for pair in same for n in pair} | {'v0', 'default', 'llama_2'}
  assert set(templates.TEMPLATES) == known | {'bare'}
  assert len(known) == 19


def test_keyword_is_the_stop_string_except_for_llama_2():
  for name, template in templates.TEMPLATES.items():
    expected = '<s>' if template.style == 'llama_2' else template.stop
    assert template.keyword == expected, name
  assert templates.get('llama_2').stop == '</s>'


@pytest.mark.parametrize(
    'version, name',
    [
        ('phi', 'phi'),
        ('plain', 'plain'),
        ('llava_v0', 'llava_v0'),
        ('v0', 'v1'),  # Never set, so the global default.
        ('v0.5', 'v1'),
        ('unheard_of', 'v1'),
        ('bare', 'v1'),
    ],
)
def test_version_names_a_template_as_in_the_original(version, name):
  assert templates.of_version(version) is templates.get(name)


@pytest.mark.parametrize('name', ['phi', 'v1', 'bare'])
def test_open_question_ends_without_a_space(name):
  template = templates.get(name)
  turns = [('human', 'a'), ('gpt', 'b'), ('human', 'c')]
  segments = templates.render(template, turns)
  expected = f'USER: a ASSISTANT: b{template.stop}USER: c ASSISTANT:'
  assert templates.text(segments).endswith(expected)
  assert [s.text for s in segments if s.supervised] == [f' b{template.stop}']


def test_bare_is_phi_without_the_system_prompt():
  turns = [('human', '<image>\na'), ('gpt', 'b'), ('human', 'c'), ('gpt', 'd')]
  phi = templates.text(templates.render(templates.get('phi'), turns))
  bare = templates.text(templates.render(templates.get('bare'), turns))
  assert bare.startswith('USER: <image>\na ASSISTANT: b<|endoftext|>USER: c')
  assert phi.endswith("to the user's questions. " + bare)


@pytest.mark.parametrize('name', ['v1_mmtag', 'v0_mmtag'])
def test_images_come_as_the_system_prompt_announces_them(name):
  turns = [('human', '<image>\na <image>'), ('gpt', 'b')]
  turns += [('human', 'c <image>')]
  text = _marked(name, turns).replace(_MMTAG, '')
  # As in the original, of a turn that begins with one.
  wrapped = '<Image><image></Image>'
  assert f': {wrapped}\na {wrapped}' in text
  assert ': c <image>' in text


def test_training_text_begins_with_the_inference_prompt():
  # Otherwise a model is asked in another way than it was taught.
  for name in ('phi', 'v1', 'v1_mmtag', 'bare'):
    template = templates.get(name)
    turns = [('human', '<image>\na'), ('gpt', 'b')]
    prompt = templates.text(templates.render(template, turns[:1]))
    full = templates.text(templates.render(template, turns))
    assert full == f'{prompt} b{template.stop}'


def test_caption_keeps_images_and_first_answer_and_counts_the_rest():
  plain = templates.get('plain')
  turns = [('human', 'x <image> y <image>'), ('gpt', 'b')]
  turns += [('human', 'c'), ('gpt', 'd'), ('human', 'e')]
  segments = templates.render(plain, turns)
  assert segments == [('<image><image>', False), ('b\n', True)]
  assert templates.ignored_answers(plain, turns) == 1
  assert templates.ignored_answers(templates.get('phi'), turns) == 0
  assert templates.ignored_answers(plain, turns[:1]) == 0


def test_empty_answer_is_taught_to_be_empty():
  # The original leaves out the stop string, and so blanks the sample.
  turns = [('human', 'a'), ('gpt', ''), ('human', 'c'), ('gpt', 'd')]
  text = templates.text(templates.render(templates.get('bare'), turns))
  assert text == (
      'USER: a ASSISTANT: <|endoftext|>USER: c ASSISTANT: d<|endoftext|>'
  )


@pytest.mark.parametrize(
    'roles, message',
    [
        (['human', 'human'], "Turn 1 (from 0) is from 'human'"),
        (['gpt', 'gpt'], "Turn 1 (from 0) is from 'gpt'"),
        (['gpt', 'human', 'user'], "Turn 2 (from 0) is from 'user'"),
        (['gpt'], 'has no question'),
        ([], 'has no question'),
    ],
)
def test_bad_turns_are_named(roles, message):
  with pytest.raises(ValueError) as error:
    templates.render(templates.get('phi'), [(role, 'x') for role in roles])
  assert message in str(error.value)


def test_unknown_template_lists_the_known():
  with pytest.raises(ValueError, match=r"'nope'.*bare.*phi.*plain.*v1"):
    templates.get('nope')
