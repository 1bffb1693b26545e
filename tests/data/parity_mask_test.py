# SPDX-License-Identifier: Apache-2.0
"""Every difference between the mask from spans and the original's, by count.

The tables are complete for the recorded conversations and for odd ones: a
difference that is not listed, or is listed and gone, fails.
"""

import json
import pathlib

import numpy as np
import pytest

from moellava_jax.data import parity, templates, tokenizer

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens/text'
TRAIN = json.loads((GOLDENS / 'train_preprocess.json').read_text())
TOKENIZERS = {
    name: tokenizer.load(str(GOLDENS / f'tokenizer_{name}'))
    for name in ('byte', 'llama')
}
TOKENIZERS['openchat'] = tokenizer.load(str(GOLDENS / 'tokenizer_llama'))
TOKENIZERS['openchat'].backend.add_special_tokens(['<|end_of_turn|>'])

# One template of each way to render and count.
TEMPLATES = {
    'phi': 'byte',
    'stablelm': 'byte',
    'mpt': 'byte',
    'plain': 'byte',
    'v1': 'llama',
    'minicpm': 'llama',
    'openchat': 'openchat',
    'llama_2': 'llama',
    'v1_mmtag': 'llama',
    'llava_v0': 'llama',
}
_STOPS = '</s> or <|endoftext|> or <|im_end|> or <|end_of_turn|> or ###'
# Name -> whether there is an image, and the turns.
ODD = {
    'empty_answer': (False, ['Is it?', '', 'And now?', 'No.']),
    'space_first': (False, ['Is it?', ' No.', 'And now?', '  Yes.']),
    'unicode': (False, ['Où est-il ?', 'Là-bas: 漢字 עברית, e\u0301.']),
    'emoji': (True, ['<image>\n👩‍👩‍👧?', '👍🏽 🇩🇪']),
    'role_in_answer': (False, ['Repeat.', 'I say ASSISTANT: no.']),
    'role_first': (False, ['Repeat.', 'ASSISTANT: no.']),
    'stop_in_answer': (False, ['Which?', f'It is {_STOPS}.', 'Sure?', 'Yes.']),
    'odd_space': (
        True,
        ['  What?\n\n<image> ', '\n A dog. \n', '\t Now?\n', 'No. '],
    ),
}
CONVERSATIONS = {
    **{
        name: (c['has_image'], [(m['from'], m['value']) for m in c['messages']])
        for name, c in TRAIN['conversations'].items()
    },
    **{
        name: (
            has_image,
            [(('human', 'gpt')[n % 2], text) for n, text in enumerate(texts)],
        )
        for name, (has_image, texts) in ODD.items()
    },
}

# The original counts another number of tokens than there are, so it warns and
# masks the whole sample, while spans keep every answer:
# - a stop string, or ` ASSISTANT: `, in a turn makes other rounds of it
#   (`ASSISTANT:` right behind the opening has no space before it: no harm);
# - `mpt` takes the open turn of an empty answer for the end.
BLANK = {
    'phi': {'eos_in_text', 'role_in_answer', 'stop_in_answer'},
    'stablelm': {'eos_in_text', 'role_in_answer', 'stop_in_answer'},
    'v1': {'eos_in_text', 'role_in_answer', 'stop_in_answer'},
    'minicpm': {'eos_in_text', 'role_in_answer', 'stop_in_answer'},
    'v1_mmtag': {'eos_in_text', 'role_in_answer', 'stop_in_answer'},
    'openchat': {'role_in_answer', 'stop_in_answer'},
    'llama_2': {'eos_in_text', 'stop_in_answer'},
    'mpt': {'empty_answer', 'stop_in_answer'},
}
# It fails, and trains on another row, picked at random: a caption row has to
# be one exchange about an image.
ERROR = {'plain': set(CONVERSATIONS) - {'image_1turn', 'image_end', 'emoji'}}
# The text itself is another: what spans teach, and what the original teaches.
TEXT = {
    # An empty answer is left out with its stop string: it is not learnt.
    ('phi', 'empty_answer'): (
        ' <|endoftext|> No.<|endoftext|>',
        ' No.<|endoftext|>',
    ),
    ('stablelm', 'empty_answer'): (
        ' <|endoftext|> No.<|endoftext|>',
        ' No.<|endoftext|>',
    ),
    ('v1', 'empty_answer'): ('</s> No.</s>', 'No.</s>'),
    ('minicpm', 'empty_answer'): ('</s> No.</s>', 'No.</s>'),
    ('v1_mmtag', 'empty_answer'): ('</s> No.</s>', 'No.</s>'),
    ('openchat', 'empty_answer'): (
        '<|end_of_turn|> No.<|end_of_turn|>',
        'No.<|end_of_turn|>',
    ),
    ('llama_2', 'empty_answer'): (' </s> No. </s>', 'No. </s>'),
    # A format of its own: speakers' names and the last `###` are taught, an
    # answer is not ended, and the mask of a later turn slips, as every piece
    # is counted with its own BOS. Every conversation differs, here are two.
    ('llava_v0', 'image_1turn'): (
        'A red dog.###',
        '### Assistant: A red dog.\n### ',
    ),
    ('llava_v0', 'image_2turn'): (
        "There is a small dog on the red sofa.### No, it isn't.###",
        '### Assistant: There is a small dog on the red sofa.\n### Human: Is'
        " it isn't.\n### ",
    ),
}


def _both(name, conversation):
  tok = TOKENIZERS[TEMPLATES[name]]
  template = templates.get(name)
  has_image, turns = CONVERSATIONS[conversation]
  ids_T, supervised_T = tokenizer.tokenize(
      templates.render(template, turns), tok
  )
  try:
    theirs = parity.encode(
        template, turns, tok, has_image=has_image, max_length=2048
    )
  except ValueError:
    theirs = None
  return tok, ids_T, np.where(supervised_T, ids_T, parity.IGNORE), theirs


def _taught(tok, labels_T):
  return tok.decode(labels_T[labels_T >= 0], skip_special=False)


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('conversation', CONVERSATIONS)
def test_masks_differ_only_where_listed(name, conversation):
  tok, ids_T, labels_T, theirs = _both(name, conversation)
  if conversation in ERROR.get(name, ()):
    assert theirs is None
    return
  assert theirs is not None
  blank = conversation in BLANK.get(name, ())
  assert (theirs.mismatch is not None) == blank
  if blank:
    assert set(theirs.labels_T) == {parity.IGNORE}
    assert labels_T.max() > 0
    return
  if (name, conversation) in TEXT:
    expected = TEXT[name, conversation]
    assert (_taught(tok, labels_T), _taught(tok, theirs.labels_T)) == expected
    assert theirs.ids_T.tolist() != ids_T.tolist()
  elif name == 'llava_v0':
    assert _taught(tok, theirs.labels_T).startswith('### Assistant:')
  else:
    np.testing.assert_array_equal(theirs.ids_T, ids_T)
    np.testing.assert_array_equal(theirs.labels_T, labels_T)


def test_tables_name_what_there_is():
  assert set(BLANK) | set(ERROR) | {t for t, _ in TEXT} == set(TEMPLATES)
  listed = {c for _, c in TEXT}.union(*BLANK.values(), *ERROR.values())
  assert listed <= set(CONVERSATIONS)
