# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import numpy as np
from PIL import Image
import pytest

from moellava_jax import config
from moellava_jax.data import encode, pipeline, sources
from moellava_jax.data import tokenizer as tokenizer_lib
from tests import tiny

TOKENIZER = tokenizer_lib.train(
    ['USER: What is it? ASSISTANT: A red dog.<|endoftext|>'] * 3, 300
)


def _row(number, *, image=True, turns=1):
  mark = '<image>\n' if image else ''
  conversation = []
  for turn in range(turns):
    conversation += [
        {
            'from': 'human',
            'value': (mark if not turn else '') + f'What {turn}?',
        },
        {'from': 'gpt', 'value': f'A dog {number}.'},
    ]
  row = {'id': f'row{number}', 'conversations': conversation}
  return {**row, 'image': f'{number}.png'} if image else row


@pytest.fixture
def corpus(tmp_path):
  """Twelve rows, every third without an image."""
  rows = [_row(n, image=n % 3 != 2, turns=1 + n % 2) for n in range(12)]
  rng = np.random.default_rng(0)
  for n in range(12):
    pixels = rng.integers(0, 256, (60 + n, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f'{n}.png')
  (tmp_path / 'rows.json').write_text(json.dumps(rows), encoding='utf-8')
  return tmp_path


def _format(**changes):
  cfg = tiny.train_config()
  data = dataclasses.replace(cfg.data, **changes.pop('data', {}))
  fmt = pipeline.Format('bare', 96, 1, cfg.model.vision, data)
  return fmt._replace(**changes)


def _examples(corpus, fmt=None, name='rows.json'):
  rows = sources.read(str(corpus / name), str(corpus))
  return pipeline.Examples(rows, str(corpus), fmt or _format(), TOKENIZER)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _batches(examples, start=0, process=0, processes=1, seed=7):
  share = np.split(np.arange(4), processes)[process]
  return pipeline.train_batches(examples, 4, seed, start, share=share)


def test_row_has_an_image_per_mark_and_supervises_answers_only(corpus):
  fmt = _format()
  row = sources.read(str(corpus / 'rows.json'), str(corpus))[1]
  example = encode.encode(row, fmt, TOKENIZER)
  batch = pipeline.stack([_examples(corpus)[1]])
  patches = fmt.vision.num_tokens
  assert int(np.sum(batch.tokens_BT == config.IMAGE_TOKEN)) == patches
  supervised = batch.targets_BT[batch.loss_weight_BT > 0]
  assert TOKENIZER.decode(supervised, skip_special=False) == (
      ' A dog 1.<|endoftext|> A dog 1.<|endoftext|>'
  )
  real = int(batch.segment_ids_BT.sum())
  assert real == len(example.tokens_L)
  assert not batch.loss_weight_BT[0, real - 1 :].any()
  # A target is the token that follows.
  where = np.flatnonzero(batch.loss_weight_BT[0])
  np.testing.assert_array_equal(
      batch.targets_BT[0, where], batch.tokens_BT[0, where + 1]
  )


def test_text_rows_have_no_image_tokens(corpus):
  batch = pipeline.stack([_examples(corpus)[2]])
  assert not (batch.tokens_BT == config.IMAGE_TOKEN).any()
  assert not batch.images_BIHWC.any()


@pytest.mark.parametrize('threads', [0, 3])
def test_resume_in_the_middle_of_an_epoch(corpus, threads):
  fmt = _format(data={'num_threads': threads})
  whole = _take(_batches(_examples(corpus, fmt)), 7)
  rest = _take(_batches(_examples(corpus, fmt), start=4), 3)
  for one, other in zip(whole[4:], rest, strict=True):
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a, b)


def test_every_epoch_has_each_row_once_in_another_order(corpus):
  ids = np.array([b.ids_B for b in _take(_batches(_examples(corpus)), 6)])
  first, second = ids[:3].ravel(), ids[3:].ravel()
  assert len(set(first)) == 12 and set(first) == set(second)
  assert list(first) != list(second)
  other = np.array(
      [b.ids_B for b in _take(_batches(_examples(corpus), seed=8), 3)]
  )
  assert list(other.ravel()) != list(first)


def test_processes_share_the_batches_of_one(corpus):
  whole = _take(_batches(_examples(corpus)), 3)
  parts = [
      _take(_batches(_examples(corpus), process=p, processes=2), 3)
      for p in (0, 1)
  ]
  for n in range(3):
    for one, first, second in zip(
        whole[n], parts[0][n], parts[1][n], strict=True
    ):
      np.testing.assert_array_equal(one, np.concatenate([first, second]))


def test_large_data_is_read_on_access_with_the_same_result(corpus):
  eager, lazy = (
      _examples(corpus, _format(data={'cache_mb': mb})) for mb in (64, 0)
  )
  assert eager.eager and not lazy.eager
  for one, other in zip(
      _take(_batches(eager), 2), _take(_batches(lazy), 2), strict=True
  ):
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('cache_mb', [64, 0])
def test_unreadable_image(corpus, cache_mb):
  (corpus / '4.png').write_bytes((corpus / '4.png').read_bytes()[:200])
  with pytest.raises(sources.DataError, match=r'rows.json row 4 .*4\.png'):
    examples = _examples(corpus, _format(data={'cache_mb': cache_mb}))
    examples[4]
  fmt = _format(data={'on_bad': 'skip', 'cache_mb': cache_mb})
  examples = _examples(corpus, fmt)
  rows = [examples[n] for n in range(len(examples))]
  assert examples.counts.dropped == {'unreadable image': 1}
  if cache_mb:
    assert len(rows) == 11
  else:  # The order stays, the row is empty.
    assert not rows[4].segment_ids_BT.any()


def test_overlong_conversation(corpus):
  with pytest.raises(sources.DataError, match='row 0 .*positions.*row_length'):
    _examples(corpus, _format(row_length=20))
  fmt = _format(row_length=24, data={'on_long': 'cut'})
  row = sources.read(str(corpus / 'rows.json'), str(corpus))[0]
  full = encode.encode(row, _format(), TOKENIZER)
  cut = encode.encode(row, fmt, TOKENIZER)
  np.testing.assert_array_equal(cut.tokens_L, full.tokens_L[:24])
  with pytest.raises(sources.DataError, match='images reach beyond'):
    _examples(corpus, fmt._replace(row_length=8))


def test_truncation_of_the_original_counts_an_image_as_one(corpus):
  row = sources.read(str(corpus / 'rows.json'), str(corpus))[0]
  full = encode.encode(row, _format(), TOKENIZER)
  patches = _format().vision.num_tokens
  text = len(full.tokens_L) - patches + 1  # The image counts as one.
  fmt = _format(row_length=text - 1, data={'parity_truncation': True})
  cut = encode.encode(row, fmt, TOKENIZER)
  np.testing.assert_array_equal(cut.tokens_L, full.tokens_L[:-1])
  assert cut.cut and not full.cut
  assert fmt.length == text - 1 + patches - 1


def test_truncation_of_the_original_has_a_length_of_its_own(corpus):
  full = encode.LONGEST_ROW
  answer = {'from': 'gpt', 'value': 'x ' * full}
  raw = _row(0)
  raw['conversations'][1] = answer
  (corpus / 'long.json').write_text(json.dumps([raw]), encoding='utf-8')
  fmt = _format(row_length=None, max_images=2, data={'parity_truncation': True})
  patches = fmt.vision.num_tokens
  long = _examples(corpus, fmt, 'long.json')
  assert int(long[0].segment_ids_BT.sum()) == full - 1 + patches
  assert long.counts.cut == 1
  assert long.format.row_length == full
  # Where nothing is cut, it is the longest text, of which an image is one.
  short = _examples(corpus, fmt)
  taken = [int(short[n].segment_ids_BT.sum()) for n in range(12)]
  text = max(
      length - (patches - 1) * (n % 3 != 2) for n, length in enumerate(taken)
  )
  assert short.format.row_length == -(-text // 8) * 8
  assert short.format.length == short.format.row_length + 2 * (patches - 1)


def _rows(corpus, *conversations):
  """Text rows of one exchange each; a question that begins with a mark has
  the image `0.png`.
  """
  raw = []
  for n, (question, answer) in enumerate(conversations):
    turns = [('human', question), ('gpt', answer)]
    row = {'conversations': [{'from': r, 'value': v} for r, v in turns]}
    image = {'image': '0.png'} if question.startswith('<image>') else {}
    raw.append({'id': f'r{n}', **row, **image})
  (corpus / 'text.json').write_text(json.dumps(raw), encoding='utf-8')
  return sources.read(str(corpus / 'text.json'), str(corpus))


def test_label_mask_of_the_original_blanks_and_counts_rows(corpus):
  _rows(corpus, ('Is <|endoftext|> it?', 'Yes.'), ('What?', 'No.'))
  data = {'parity_mask': True}
  fmt = _format(template='phi', row_length=400, data=data)
  examples = _examples(corpus, fmt, 'text.json')
  weights = [examples[n].loss_weight_BT.sum() for n in range(2)]
  assert weights[0] == 0 and weights[1] > 0
  assert examples.counts.blanked == 1 and not examples.counts.dropped
  own = _format(template='phi', row_length=400)
  examples = _examples(corpus, own, 'text.json')
  assert examples[0].loss_weight_BT.any() and examples.counts.blanked == 0
  assert examples[1].loss_weight_BT.sum() == weights[1]


def test_label_mask_of_the_original_cuts_texts_without_images(corpus):
  text, image = _rows(corpus, ('What is it?', 'A dog.'), ('<image>\na', 'b'))
  fmt = _format(template='phi', row_length=400)
  full = encode.encode(text, fmt, TOKENIZER)
  length = len(full.tokens_L) - 2
  data = {'parity_mask': True, 'on_long': 'error'}
  fmt = _format(template='phi', row_length=length, data=data)
  cut = encode.encode(text, fmt, TOKENIZER)
  np.testing.assert_array_equal(cut.tokens_L, full.tokens_L[:-2])
  np.testing.assert_array_equal(cut.supervised_L, full.supervised_L[:-2])
  assert cut.cut and not cut.blanked
  with pytest.raises(sources.DataError, match='row 1 .*positions'):
    encode.encode(image, fmt._replace(row_length=length // 2), TOKENIZER)


def test_label_mask_of_the_original_never_teaches_a_patch(corpus):
  raw = _row(0, turns=1)
  raw['conversations'][0]['value'] = 'Look.'
  raw['conversations'][1]['value'] = 'Here: <image> it is.'
  (corpus / 'odd.json').write_text(json.dumps([raw]), encoding='utf-8')
  row = sources.read(str(corpus / 'odd.json'), str(corpus))[0]
  fmt = _format(template='phi', row_length=400, data={'parity_mask': True})
  example = encode.encode(row, fmt, TOKENIZER)
  images_L = example.tokens_L == config.IMAGE_TOKEN
  assert images_L.sum() == fmt.vision.num_tokens
  assert not example.supervised_L[images_L].any()
  assert example.supervised_L.any()


def test_rows_without_a_mask_in_the_original_name_themselves(corpus):
  rows = _rows(corpus, ('What?', 'A dog.'))
  for template, message in (('plain', 'two'), ('bare', 'parity_mask=False')):
    fmt = _format(template=template, data={'parity_mask': True})
    with pytest.raises(sources.DataError, match=rf'row 0 \(id r0\).*{message}'):
      encode.encode(rows[0], fmt, TOKENIZER)
  # The warm-up is ours alone.
  image = _rows(corpus, ('<image>\nWhat?', 'A dog.'))[0]
  warmup = image._replace(attributes=[[0, 1]])
  encode.encode(warmup, fmt, TOKENIZER)


def test_an_open_row_length_follows_the_data(corpus):
  fmt = _format(row_length=None)
  examples = _examples(corpus, fmt)
  longest = max(int(examples[n].segment_ids_BT.sum()) for n in range(12))
  assert examples.format.row_length == -(-longest // 8) * 8
  with pytest.raises(sources.DataError, match='set the stage'):
    _examples(
        corpus, fmt._replace(data=dataclasses.replace(fmt.data, cache_mb=0))
    )


def test_held_out_batches_cover_all_rows_and_are_filled_up(corpus):
  examples = _examples(corpus)
  found = pipeline.eval_batches(examples, 5, 99, share=np.arange(5))
  assert [b.tokens_BT.shape[0] for b in found] == [5, 5, 5]
  assert [int(b.segment_ids_BT.any(1).sum()) for b in found] == [5, 5, 2]
  assert len(pipeline.eval_batches(examples, 5, 2, share=np.arange(5))) == 2


@pytest.mark.parametrize(
    'change, message',
    [
        ({'conversations': []}, 'row 3 .*"conversations"'),
        ({'image': 'none.png'}, r"row 3 .*'none.png' does not exist"),
        ({'image': '../3.png'}, 'row 3 .*out of the image root'),
        ({'image': '/etc/passwd'}, 'row 3 .*absolute'),
        ({'image': 5}, 'row 3 .*"image" is 5'),
        ({'image': None}, 'row 3 .*"image" is None'),
        ({'image': ['3.png', '4.png']}, 'row 3 .*1 <image> marks and 2 images'),
        (
            {
                'conversations': [
                    {'from': 'human', 'value': 'No mark'},
                    {'from': 'gpt', 'value': 'x'},
                ]
            },
            'row 3 .*0 <image> marks and 1 images',
        ),
        (
            {'conversations': [{'from': 'system', 'value': '<image>'}]},
            "row 3 .*turn 0 is from 'system'",
        ),
        (
            {
                'conversations': [
                    {'from': 'human', 'value': '<image>'},
                    {'from': 'gpt', 'value': '  '},
                ]
            },
            'row 3 .*turn 1 is an empty answer',
        ),
        (
            {
                'conversations': [
                    {'from': 'human', 'value': '<image>'},
                    {'from': 'human', 'value': 'again'},
                ]
            },
            'row 3 .*turn 1 is from',
        ),
        (
            {'conversations': [{'from': 'human', 'value': '<image>'}]},
            'row 3 .*no answer',
        ),
        ({'conversations': [{'from': 'human'}]}, 'row 3 .*turn 0'),
    ],
)
def test_malformed_rows_are_named(corpus, change, message):
  rows = json.loads((corpus / 'rows.json').read_text())
  rows[3].update(change)
  (corpus / 'rows.json').write_text(json.dumps(rows))
  with pytest.raises(sources.DataError, match=message):
    sources.read(str(corpus / 'rows.json'), str(corpus))


@pytest.mark.parametrize(
    'content, message',
    [
        ('[{"id": 1,', 'not valid JSON.*line 1'),
        ('{"a": 1}', 'holds a dict; expected an array'),
        ('[]', 'holds no rows'),
        ('[7]', 'row 0 is a int'),
    ],
)
def test_malformed_files_are_named(tmp_path, content, message):
  path = tmp_path / 'bad.json'
  path.write_text(content)
  with pytest.raises(sources.DataError, match=f'bad.json.*{message}'):
    sources.read(str(path), str(tmp_path))
  with pytest.raises(sources.DataError, match='does not exist'):
    sources.read(str(tmp_path / 'none.json'), str(tmp_path))


def test_several_files_are_joined(corpus):
  path = str(corpus / 'rows.json')
  assert len(sources.read(f'{path},{path}', str(corpus))) == 24
