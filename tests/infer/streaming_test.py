# SPDX-License-Identifier: Apache-2.0
"""Pieces of a text are certain, and together they are the text."""

import pytest

from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.infer import streaming

TEXT = '  A red square, \u00fcber 3 \U0001f600\U0001f469\u200d\U0001f680 and\n\n### done ##  x  '


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train(
      ['A red square is left of a blue circle.'] * 4, 300
  )


def _pieces(tokenizer, ids, **options):
  options = {'max_new_tokens': 10**6, **options}
  stream = streaming.TextStream(tokenizer, **options)
  return [*(stream.push(int(i)) for i in ids), stream.close()], stream


def _ids(tokenizer, text):
  return tokenizer.encode_with_offsets(text)[0]


def test_pieces_together_are_the_text(tokenizer):
  ids = _ids(tokenizer, TEXT)
  pieces, stream = _pieces(tokenizer, ids)
  assert ''.join(pieces) == tokenizer.decode(ids).strip() == TEXT.strip()
  assert stream.finish_reason == 'length'
  assert stream.new_tokens == len(ids)
  (piece, *_), _ = _pieces(tokenizer, _ids(tokenizer, ' red'), stop=('x',))
  assert piece == 'red'  # A token with the space in front.
  # A piece with every token but where a character or a space is open.
  assert sum(map(bool, pieces)) > len(TEXT) / 3


def test_no_piece_holds_half_a_character(tokenizer):
  pieces, _ = _pieces(tokenizer, _ids(tokenizer, TEXT))
  assert '\ufffd' not in ''.join(pieces)
  broken = _ids(tokenizer, TEXT + '\U0001f600')[:-1]
  pieces, _ = _pieces(tokenizer, broken)
  assert pieces[-1].endswith('\ufffd')  # At the end it is what it is.


def test_the_end_token_ends_and_is_not_counted(tokenizer):
  ids = [*_ids(tokenizer, 'red'), tokenizer.eos_id, *_ids(tokenizer, 'blue')]
  pieces, stream = _pieces(tokenizer, ids)
  assert ''.join(pieces) == 'red'
  assert stream.finish_reason == 'stop'
  assert stream.new_tokens == len(_ids(tokenizer, 'red'))


def test_a_stop_string_is_cut_and_never_shown_in_part(tokenizer):
  for text, stop, expected in (
      ('a ## b ### c', ('###',), 'a ## b'),
      ('a ## b ### c', ('b', '###'), 'a ##'),
      ('a\n\nb', ('\n\n',), 'a'),
      ('a ##', ('###',), 'a ##'),
      ('ababac', ('abac',), 'ab'),
      ('a b', ('',), 'a b'),
  ):
    pieces, stream = _pieces(tokenizer, _ids(tokenizer, text), stop=stop)
    assert ''.join(pieces) == expected
    cut = expected != text
    assert stream.finish_reason == ('stop' if cut else 'length')
    for n in range(len(pieces)):  # Nothing is taken back.
      assert expected.startswith(''.join(pieces[:n]))


def test_a_special_token_may_be_a_stop_string(tokenizer):
  ids = [*_ids(tokenizer, 'red'), tokenizer.pad_id, *_ids(tokenizer, 'blue')]
  pieces, stream = _pieces(tokenizer, ids, stop=(tokenizer_lib.PAD,))
  assert ''.join(pieces) == 'red'
  assert stream.finish_reason == 'stop'


def test_the_length_ends_a_text(tokenizer):
  ids = _ids(tokenizer, 'A red square')
  _, stream = _pieces(tokenizer, ids, max_new_tokens=2)
  assert (stream.new_tokens, stream.finish_reason) == (2, 'length')
  pieces, _ = _pieces(tokenizer, ids, max_new_tokens=2)
  assert ''.join(pieces) == tokenizer.decode(ids[:2]).strip()
