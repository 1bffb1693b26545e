# SPDX-License-Identifier: Apache-2.0
"""A corpus of what goes wrong, through both doors: training and `prepare`."""

import dataclasses
import io
import json
import os
import struct
import zlib

import numpy as np
from PIL import Image
import pytest

from moellava_jax.data import census as census_lib
from moellava_jax.data import (
    check,
    images,
    inspection,
    lengths,
    pipeline,
    rows,
    sources,
    stream,
)
from moellava_jax.data import tokenizer as tokenizer_lib
from tests import tiny

TOKENIZER = tokenizer_lib.train(
    ['USER: What is it? ASSISTANT: A red dog.<|endoftext|>'] * 3, 300
)
QUESTION = {'from': 'human', 'value': '<image>\nWhat is it?'}
ANSWER = {'from': 'gpt', 'value': 'A red dog.'}
TEXT = {'from': 'human', 'value': 'What?'}
NAN = float('nan')
LONG = 'A red dog. ' * 26_000
ENDLESS = 'a number of 9999 digits'  # Which Python does not write.
DROP = object()  # Leave the key out.


def _picture(mode='RGB', size=(20, 16), kind='png', **options) -> bytes:
  rng = np.random.default_rng(0)
  pixels_HWC = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels_HWC).convert(mode).save(file, kind, **options)
  return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
  check_sum = struct.pack('>I', zlib.crc32(kind + data))
  return struct.pack('>I', len(data)) + kind + data + check_sum


def _png(side: int, *chunks: bytes) -> bytes:
  """One bit a pixel, black; compressed line by line."""
  packer = zlib.compressobj(9)
  line = bytes(1 + -(-side // 8))
  data = b''.join(packer.compress(line) for _ in range(side)) + packer.flush()
  header = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)
  return b''.join(
      [
          b'\x89PNG\r\n\x1a\n',
          _chunk(b'IHDR', header),
          *chunks,
          _chunk(b'IDAT', data),
          _chunk(b'IEND', b''),
      ]
  )


def _deep_png() -> bytes:
  file = io.BytesIO()
  Image.fromarray(np.full((9, 9), 0x8000, np.uint16)).save(file, 'png')
  return file.getvalue()


def _animation() -> bytes:
  frames = [Image.new('RGB', (9, 9), c) for c in ('red', 'green', 'blue')]
  file = io.BytesIO()
  frames[0].save(file, 'gif', save_all=True, append_images=frames[1:])
  return file.getvalue()


def _with_bad_sum() -> bytes:
  data = bytearray(_picture())
  data[data.index(b'IDAT') + 10] ^= 0xFF
  return bytes(data)


JPEG, PNG = _picture(kind='jpeg'), _picture()
FILES = {
    'good.png': PNG,
    'sub/deep.png': PNG,
    'ocr.gif': _picture('P', kind='gif'),
    'gif.jpg': _picture('P', kind='gif'),
    'png.jpg': PNG,
    'animated.gif': _animation(),
    'cmyk.jpg': _picture('CMYK', kind='jpeg'),
    'palette.png': _picture('P'),
    'clear.png': _picture('RGBA'),
    'grey16.png': _deep_png(),
    'pixel.png': _picture(size=(1, 1)),
    'tail.jpg': JPEG + b'<html>' * 100,
    'zero.png': b'',
    'text.png': b'not an image',
    'page.jpg': b'<!DOCTYPE html><html>404</html>',
    'drawing.png': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    'cut.jpg': _picture(size=(300, 300), kind='jpeg')[:9000],
    'cut.png': PNG[:300],
    'head.jpg': JPEG[:20],
    'sum.png': _with_bad_sum(),
    'noise.jpg': bytes(range(256)) * 20,
    'bomb.png': _png(30_000),
    'large.png': _png(9_500),  # 90 million pixels: Pillow only warns.
    'chatter.png': _png(
        8, _chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(1 << 27), 9))
    ),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """FILES, and what is no file."""
  top = tmp_path_factory.mktemp('corpus')
  (top / 'outside').mkdir()
  (top / 'outside/far.png').write_bytes(PNG)
  folder = top / 'images'
  for name, data in FILES.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  (folder / 'linked.png').symlink_to(top / 'outside/far.png')
  (folder / 'linked').symlink_to(top / 'outside')
  (folder / 'nowhere.png').symlink_to(folder / 'none.png')
  (folder / 'loop.png').symlink_to(folder / 'loop.png')
  (folder / 'folder.png').mkdir()
  os.mkfifo(folder / 'pipe.png')
  return folder


def _row(**changes):
  row = {
      'id': 'bad',
      'image': 'good.png',
      'conversations': [QUESTION, ANSWER],
      **changes,
  }
  return {key: value for key, value in row.items() if value is not DROP}


def _turns(*turns, **changes):
  return _row(conversations=list(turns), **changes)


def _says(role, value):
  return _turns(
      {**QUESTION, **({'from': role[0]} if role[0] else {})},
      {'from': role[1] or 'gpt', 'value': value},
  )


def _image(path):
  return _row(image=path)


# Name -> (row, the reason it is dropped for).
DROPPED = {
    'number': (7, 'not an object'),
    'null': (None, 'not an object'),
    'text': ('row', 'not an object'),
    'list': ([1], 'not an object'),
    'nan': (NAN, 'not an object'),
    'no conversations': (_row(conversations=DROP), 'no conversation'),
    'null conversations': (_row(conversations=None), 'no conversation'),
    'object conversations': (_row(conversations={}), 'no conversation'),
    'text conversations': (_row(conversations='Hi'), 'no conversation'),
    'empty conversations': (_turns(), 'no conversation'),
    'text turn': (_turns('Hi', ANSWER), 'malformed turn'),
    'null turn': (_turns(QUESTION, None), 'malformed turn'),
    'no value': (_turns(QUESTION, {'from': 'gpt'}), 'malformed turn'),
    'no role': (_turns(QUESTION, {'value': 'A'}), 'malformed turn'),
    'null value': (_says((None, None), None), 'malformed turn'),
    'number value': (_says((None, None), 5), 'malformed turn'),
    'nan value': (_says((None, None), NAN), 'malformed turn'),
    'list value': (_says((None, None), ['A']), 'malformed turn'),
    'number role': (_says((7, None), 'A'), 'malformed turn'),
    'unknown role': (_says(('robot', None), 'A'), 'unknown role'),
    'empty role': (_says((' ', None), 'A'), 'unknown role'),
    'late system': (_says((None, 'system'), 'A'), 'unknown role'),
    'two questions': (_turns(QUESTION, TEXT, ANSWER), 'turns do not alternate'),
    'two answers': (_turns(QUESTION, ANSWER, ANSWER), 'turns do not alternate'),
    'only a question': (_turns(QUESTION), 'no answer'),
    'only an answer': (_turns(ANSWER), 'no answer'),
    'empty answer': (_says((None, None), ''), 'empty answers only'),
    'blank answer': (_says((None, None), ' \n\t'), 'empty answers only'),
    'number image': (_row(image=5), 'malformed "image"'),
    'bool image': (_row(image=True), 'malformed "image"'),
    'object image': (_row(image={'path': 'good.png'}), 'malformed "image"'),
    'null in images': (_row(image=['good.png', None]), 'malformed "image"'),
    'empty in images': (_row(image=['']), 'malformed "image"'),
    'blank image': (_row(image='  '), 'malformed "image"'),
    'null image, mark': (_row(image=None), 'malformed "image"'),
    'no images, mark': (_row(image=[]), 'malformed "image"'),
    '17 images': (
        _row(image=['good.png'] * 17),
        'more images than the original takes',
    ),
    'video': (_row(video='a.mp4', image=DROP), 'video'),
    'more images than marks': (
        _row(image=['good.png', 'ocr.gif']),
        'images and <image> marks differ',
    ),
    'more marks than images': (
        _turns({'from': 'human', 'value': '<image><image>Which?'}, ANSWER),
        'images and <image> marks differ',
    ),
    'mark without image': (
        _row(image=DROP),
        'images and <image> marks differ',
    ),
    'climbing path': (
        _image('../../../../../../../../etc/passwd'),
        'image outside the image root',
    ),
    'hidden climbing': (
        _image('sub/../../outside/far.png'),
        'image outside the image root',
    ),
    'absolute path': (_image('/etc/passwd'), 'image outside the image root'),
    'backslash climbing': (
        _image('..\\outside\\far.png'),
        'image outside the image root',
    ),
    'null byte': (_image('good.png\0.jpg'), 'image outside the image root'),
    'endless name': (_image('a' * 5000 + '.png'), 'missing image'),
    'missing': (_image('none.png'), 'missing image'),
    'dangling link': (_image('nowhere.png'), 'missing image'),
    'link to itself': (_image('loop.png'), 'missing image'),
    'folder': (_image('folder.png'), 'missing image'),
    'root': (_image('.'), 'missing image'),
    'pipe': (_image('pipe.png'), 'missing image'),
    'address': (_image('https://example.org/a.png'), 'missing image'),
    'zero bytes': (_image('zero.png'), 'unreadable image'),
    'no image': (_image('text.png'), 'unreadable image'),
    'web page': (_image('page.jpg'), 'unreadable image'),
    'drawing': (_image('drawing.png'), 'unreadable image'),
    'truncated jpeg': (_image('cut.jpg'), 'unreadable image'),
    'truncated png': (_image('cut.png'), 'unreadable image'),
    'only a header': (_image('head.jpg'), 'unreadable image'),
    'bad checksum': (_image('sum.png'), 'unreadable image'),
    'noise': (_image('noise.jpg'), 'unreadable image'),
    'bomb': (_image('bomb.png'), 'unreadable image'),
    'text bomb': (_image('chatter.png'), 'unreadable image'),
    'more pixels than Pillow likes': (_image('large.png'), 'unreadable image'),
    'one pixel': (_image('pixel.png'), 'unreadable image'),
    'second is bad': (
        _turns(
            {'from': 'human', 'value': '<image><image>Which?'},
            ANSWER,
            image=['good.png', 'cut.png'],
        ),
        'unreadable image',
    ),
}

# Name -> (row, rule, images, questions and answers it becomes).
_ROLES = 'human and gpt for other names of them'
_EMPTY = 'exchanges with an empty side left out'
_UNICODE = 'U+FFFD for what is no Unicode text'
_ID = 'the number of the row for an "id" that is none'
_PATH = 'spaces and backslashes of a path corrected'
_OTHER = 'the file of another extension'
_REPEATS = 'the number of the row behind an "id" that repeats'
_NAME = 'a format that is not what the name says'
_ASK, _SAY = QUESTION['value'], ANSWER['value']
REPAIRED = {
    'surrogate in a question': (
        _turns({**QUESTION, 'value': '<image>\ud800Hi'}, ANSWER),
        (_UNICODE, 'good.png', ('<image>\ufffdHi', _SAY)),
    ),
    'surrogate in an answer': (
        _says((None, None), 'A\udfff\ud83d.'),
        (_UNICODE, 'good.png', (_ASK, 'A\ufffd\ufffd.')),
    ),
    'surrogate in the id': (
        _row(id='a\udcff'),
        (_UNICODE, 'good.png', (_ASK, _SAY)),
    ),
    'object id': (_row(id={}), (_ID, 'good.png', (_ASK, _SAY))),
    'null id': (_row(id=None), (_ID, 'good.png', (_ASK, _SAY))),
    'endless id': (_row(id='a' * 9999), (_ID, 'good.png', (_ASK, _SAY))),
    'user and assistant': (
        _says(('user', 'assistant'), 'A.'),
        (_ROLES, 'good.png', (_ASK, 'A.')),
    ),
    'capitals': (
        _says(('Human', 'GPT'), 'A.'),
        (_ROLES, 'good.png', (_ASK, 'A.')),
    ),
    'system first': (
        _turns({'from': 'system', 'value': 'Be good.'}, QUESTION, ANSWER),
        ('a turn from "system" left out', 'good.png', (_ASK, _SAY)),
    ),
    'one empty answer': (
        _turns(QUESTION, {'from': 'gpt', 'value': ''}, TEXT, ANSWER),
        (_EMPTY, 'good.png', ('<image>\nWhat?', _SAY)),
    ),
    'one empty question': (
        _turns(QUESTION, ANSWER, {'from': 'human', 'value': ' '}, ANSWER),
        (_EMPTY, 'good.png', (_ASK, _SAY)),
    ),
    'null image': (
        _turns(TEXT, ANSWER, image=None),
        ('no image for an empty "image"', None, ('What?', _SAY)),
    ),
    'empty image': (
        _turns(TEXT, ANSWER, image=''),
        ('no image for an empty "image"', None, ('What?', _SAY)),
    ),
    'image without mark': (
        _turns(TEXT, ANSWER),
        (
            'a mark for each image before the first question',
            'good.png',
            ('<image>\nWhat?', _SAY),
        ),
    ),
    'mark in an answer': (
        _turns(QUESTION, {'from': 'gpt', 'value': 'An <image>.'}),
        ('no marks in answers', 'good.png', (_ASK, 'An .')),
    ),
    'mark in an answer to text': (
        _turns(TEXT, {'from': 'gpt', 'value': '<image> tags'}, image=DROP),
        ('no marks in answers', None, ('What?', ' tags')),
    ),
    'other extension': (_image('ocr.jpg'), (_OTHER, 'ocr.gif', (_ASK, _SAY))),
    'no extension': (_image('good'), (_OTHER, 'good.png', (_ASK, _SAY))),
    'capital extension': (
        _image('good.PNG'),
        (_OTHER, 'good.png', (_ASK, _SAY)),
    ),
    'backslashes': (
        _image('sub\\deep.png'),
        (_PATH, 'sub/deep.png', (_ASK, _SAY)),
    ),
    'spaces': (_image(' good.png '), (_PATH, 'good.png', (_ASK, _SAY))),
    'repeated id': (_row(id='row0'), (_REPEATS, 'good.png', (_ASK, _SAY))),
    'nan elsewhere': (
        _row(score=NAN, weight=[float('-inf')]),
        (stream.NO_NUMBER, 'good.png', (_ASK, _SAY)),
    ),
    'endless number': (
        _row(n=ENDLESS),
        (stream.NO_NUMBER, 'good.png', (_ASK, _SAY)),
    ),
    'answer first': (
        _turns(ANSWER, QUESTION, ANSWER),
        ('a first turn from "gpt" left out', 'good.png', (_ASK, _SAY)),
    ),
    'question last': (
        _turns(QUESTION, ANSWER, TEXT),
        (
            'a last question without answer kept, not supervised',
            'good.png',
            (_ASK, _SAY, 'What?'),
        ),
    ),
    'long': (
        _turns(QUESTION, {**ANSWER, 'value': LONG}),
        (
            'more than 131072 characters: cut at the end of its row',
            'good.png',
            (_ASK, LONG),
        ),
    ),
    **{
        name: (_image(name), (rule, name, (_ASK, _SAY)))
        for name, rule in (
            ('gif.jpg', _NAME),
            ('png.jpg', _NAME),
            ('animated.gif', 'the first frame of an animation'),
            ('cmyk.jpg', 'colours of CMYK as RGB'),
            ('grey16.png', 'grey beyond 8 bits clipped at 255'),
        )
    },
}

# Rows that are read as they are, in both modes: nothing is lost in them.
READ = {
    'number id': _row(id=12),
    'unknown fields': _row(model='', bbox=[[1, 2], None]),
    'dots in a path': _image('./sub/../good.png'),
    **{name: _image(name) for name in ('palette.png', 'clear.png', 'tail.jpg')},
    # The user's own links; a data set often lies on another disk.
    'link out': _image('linked.png'),
    'folder link out': _image('linked/far.png'),
}


def _write(path, raws):
  text = json.dumps(raws).replace(json.dumps(ENDLESS), '9' * 9999)
  path.write_text(text, encoding='utf-8')
  return str(path)


def _good(number):
  return _row(id=f'row{number}')


def _train(path, root, on_bad, on_long='cut'):
  """What training sees: (examples, dropped, repaired)."""
  cfg = tiny.train_config()
  data = dataclasses.replace(cfg.data, on_bad=on_bad, on_long=on_long)
  fmt = pipeline.Format('bare', 200, 2, cfg.model.vision, data)
  found = sources.read(path, str(root), on_bad=on_bad)
  examples = pipeline.Examples(found, str(root), fmt, TOKENIZER)
  counts = examples.counts
  return (
      examples,
      found.dropped + counts.dropped,
      found.repaired + counts.repaired,
  )


def _prepare(path, root, on_bad):
  """What `prepare` sees."""
  settings = inspection.Settings(
      str(root), on_bad, False, None, None, None, 'bare', 9
  )
  census = census_lib.Census()
  kept = []
  with inspection.Pool(settings, 0) as pool:
    for found in pool.inspect(check.read(path), lambda path: False):
      census.add(found)
      kept += [found.row] if found.row is not None else []
  return kept, census.reasons, census.repaired


DOORS = (_train, _prepare)


def test_the_corpus_is_large_enough():
  assert len(DROPPED) + len(REPAIRED) + len(READ) >= 60
  assert len(DROPPED) + len(REPAIRED) >= 60


def test_every_reason_is_documented_and_met():
  assert {reason for _, reason in DROPPED.values()} | {
      'not JSON',  # Below.
      'malformed attributes',
      'longer than the row',
      'images or answers beyond the end of the row',
      'more images than max_images',
  } == set(check.REASONS)


@pytest.mark.parametrize('name', DROPPED)
@pytest.mark.parametrize('door', DOORS)
def test_a_row_that_cannot_be_used(door, name, root, tmp_path):
  raw, reason = DROPPED[name]
  path = _write(tmp_path / 'rows.json', [_good(0), raw, _good(2)])
  kept, dropped, _ = door(path, root, 'skip')
  assert (len(kept), dict(dropped)) == (2, {reason: 1})
  with pytest.raises(rows.DataError, match=r'rows\.json row 1\b'):
    door(path, root, 'error')


def _missing(number):
  return _row(id=f'missing{number}', image='none.png')


def _text_only(number):
  return _turns(TEXT, ANSWER, image=DROP, id=f'text{number}')


@pytest.mark.parametrize(
    'raws, expected',
    [
        # All images of a source: it would train on text alone.
        (
            [_missing(0), *map(_text_only, range(9))],
            r"1 of 10 rows .* 1 of the 1 with images: {'missing image': 1}",
        ),
        # More than half of its rows, whatever the reason.
        (
            [_good(0), _missing(1), 7],
            r"2 of 3 rows .* 1 of the 2 with images: {'missing image': 1, 'not",
        ),
        ([7, 'row'], r"2 of 2 rows .* 0 of the 0 .*: {'not an object': 2}"),
        ([_good(0), _missing(1)], None),
        ([_text_only(0), _text_only(1)], None),
    ],
)
def test_a_source_of_which_little_is_left_stops(raws, expected, root, tmp_path):
  good = _write(tmp_path / 'good.json', [_good(n) for n in range(9)])
  path = _write(tmp_path / 'rows.json', raws)
  if expected is None:
    sources.read(f'{good},{path}', str(root), on_bad='skip')
    return
  with pytest.raises(rows.DataError, match=f'^[^,]*rows.json: {expected}'):
    sources.read(f'{good},{path}', str(root), on_bad='skip')


def test_what_encoding_drops_counts_too(root, tmp_path):
  def read(bad, others=()):
    path = _write(tmp_path / 'rows.json', [*others, *[_good(0)] * 3, *bad])
    good = _write(tmp_path / 'good.json', [_good(n) for n in range(9)])
    return _train(f'{good},{path}', root, 'skip')[0]

  three = _turns(
      {**QUESTION, 'value': '<image>' * 3}, ANSWER, image=['good.png'] * 3
  )
  assert len(read([three] * 3)) == 12
  # With a row that was dropped before, it is more than half.
  reasons = "{'not an object': 1, 'more images than max_images': 3}"
  with pytest.raises(rows.DataError, match=rf'rows.json: 4 of 7 .*{reasons}'):
    read([three] * 3, [7])
  path = _write(tmp_path / 'rows.json', [_image('cut.png'), _text_only(1)])
  with pytest.raises(rows.DataError, match='1 of the 1 .*unreadable image'):
    _train(path, root, 'skip')


@pytest.mark.parametrize('name', REPAIRED)
@pytest.mark.parametrize('door', DOORS)
def test_a_row_that_is_repaired(door, name, root, tmp_path):
  raw, (rule, image, said) = REPAIRED[name]
  path = _write(tmp_path / 'rows.json', [_good(0), raw, _good(2)])
  kept, dropped, repaired = door(path, root, 'skip')
  assert (len(kept), dict(dropped)) == (3, {})
  assert dict(repaired) == {rule: 1}
  with pytest.raises(rows.DataError, match=r'rows\.json row 1\b.*skip'):
    door(path, root, 'error')
  rows_read = sources.read(path, str(root), on_bad='skip')
  assert len({row.id for row in rows_read}) == 3
  row = rows_read[1]
  assert row.images == (() if image is None else (image,))
  assert tuple(value for _, value in row.turns) == said
  assert row.id.encode('utf-8')  # No surrogates are left.


@pytest.mark.parametrize('name', READ)
@pytest.mark.parametrize('door', DOORS)
def test_a_row_that_only_looks_odd(door, name, root, tmp_path):
  path = _write(tmp_path / 'rows.json', [_good(0), READ[name], _good(2)])
  for on_bad in ('skip', 'error'):
    kept, dropped, repaired = door(path, root, on_bad)
    assert (len(kept), dict(dropped), dict(repaired)) == (3, {}, {})


def test_what_odd_images_show(root):
  def first(name):
    return images.load(root / name).getpixel((0, 0))

  assert first('animated.gif') == (255, 0, 0)  # The first frame.
  assert first('grey16.png') == (255, 255, 255)  # As in the original.
  assert first('gif.jpg') == first('ocr.gif')


def test_a_bomb_is_refused_without_being_unpacked(root):
  import resource

  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(images.ImageError, match='Bomb'):
    images.load(root / 'bomb.png')
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 50_000  # KiB; unpacked it has 880,000.


def _text(*raws):
  return ','.join(json.dumps(raw) for raw in raws)


_A, _B = _good(0), _good(1)
# Name -> (content, rows that are left, whether something is lost).
CONTENTS = {
    'cut within a row': (f'[{_text(_A, _B)}'[:-9], 1, True),
    'cut behind a row': (f'[{_text(_A)}', 1, True),
    'cut behind a comma': (f'[{_text(_A)},', 1, True),
    'comma at the end': (f'[{_text(_A, _B)},]', 2, True),
    'no comma': (f'[{_text(_A)} {_text(_B)}]', 1, True),
    'text behind': (f'[{_text(_A)}] and more', 1, True),
    'quote not closed': (f'[{_text(_A)}, {{"id": "b]', 1, True),
    'single quotes': (f"[{_text(_A)}, {{'id': 1}}]", 1, True),
    'bad escape': (f'[{_text(_A)}, {{"id": "\\x"}}]', 1, True),
    'nested too deeply': (f'[{_text(_A)}, {"[" * 100_000}]', 1, True),
    'control character': (f'[{_text(_A)}, {{"id": "\n"}}]', 1, True),
    'lines, one broken': (f'{_text(_A)}\n{{"id": \n{_text(_B)}\n', 2, True),
    'lines': (f'{_text(_A)}\n\n{_text(_B)}\n', 2, False),
    'repeated key': (f'[{{"id": "a", {_text(_A)[1:]}]', 1, False),
    'spaces': (f' \r\n[\n{_text(_A)}\r\n,\t{_text(_B)}\n]\n\n', 2, False),
}


@pytest.mark.parametrize('name', CONTENTS)
@pytest.mark.parametrize('door', DOORS)
def test_files_that_are_no_json(door, name, root, tmp_path):
  content, left, lossy = CONTENTS[name]
  path = tmp_path / ('rows.jsonl' if 'lines' in name else 'rows.json')
  path.write_text(content, encoding='utf-8', newline='')
  kept, dropped, repaired = door(str(path), root, 'skip')
  assert (len(kept), dict(repaired)) == (left, {})
  assert dict(dropped) == ({'not JSON': 1} if lossy else {})
  if lossy:
    with pytest.raises(rows.DataError, match=r'rows\.json.* line \d+ column'):
      door(str(path), root, 'error')
  else:
    assert len(door(str(path), root, 'error')[0]) == left


@pytest.mark.parametrize('content', [b'', b' \n', b'[]', b'{}', b'nul', b'\0'])
@pytest.mark.parametrize('on_bad', ['skip', 'error'])
def test_files_without_rows(content, on_bad, tmp_path):
  path = tmp_path / 'rows.json'
  path.write_bytes(content)
  with pytest.raises(rows.DataError, match=r'rows\.json'):
    sources.read(str(path), str(tmp_path), on_bad=on_bad)


@pytest.mark.parametrize('door', DOORS)
def test_encodings(door, root, tmp_path):
  path = tmp_path / 'rows.json'
  text = json.dumps(
      [_turns(QUESTION, {**ANSWER, 'value': 'Né.'})], ensure_ascii=False
  )
  for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-32'):
    start = '\ufeff' if encoding == 'utf-16-le' else ''
    path.write_bytes((start + text).encode(encoding))
    kept, dropped, repaired = door(str(path), root, 'skip')
    marked = encoding != 'utf-8'
    assert (len(kept), dict(dropped)) == (1, {})
    assert dict(repaired) == ({stream.ENCODING: 1} if marked else {})
    if marked:
      with pytest.raises(rows.DataError, match=r'row 0 .*byte order mark'):
        door(str(path), root, 'error')
    row = sources.read(str(path), str(root), on_bad='skip')[0]
    assert row.turns[1][1] == 'Né.'
  path.write_bytes(text.encode('latin-1'))
  _, dropped, repaired = door(str(path), root, 'skip')
  assert (dict(dropped), dict(repaired)) == ({}, {_UNICODE: 1})
  with pytest.raises(rows.DataError, match=r'row 0 .*turn 1 .*no UTF-8'):
    door(str(path), root, 'error')


def test_rows_longer_than_the_window_are_read(root, tmp_path, monkeypatch):
  monkeypatch.setattr(stream, '_BLOCK', 7)
  path = _write(tmp_path / 'rows.json', [_good(n) for n in range(5)])
  assert [row.id for row in sources.read(path, str(root))] == [
      f'row{n}' for n in range(5)
  ]
  monkeypatch.setattr(stream, 'LONGEST', 60)
  with pytest.raises(rows.DataError, match='more than 60 characters'):
    sources.read(path, str(root))


def test_the_place_of_an_error_is_that_of_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(stream, '_BLOCK', 11)
  lines = [json.dumps({'id': n, 'conversations': []}) for n in range(9)]
  text = '[' + ',\n'.join(lines) + ',\n  {"id" 5}]'
  (tmp_path / 'rows.json').write_text(text)
  with pytest.raises(json.JSONDecodeError) as expected:
    json.loads(text)
  found = list(stream.read(str(tmp_path / 'rows.json')))[-1]
  error = expected.value
  assert f'line {error.lineno} column {error.colno}' in found.value.message


@pytest.mark.parametrize('on_long', ['cut', 'error'])
def test_long_conversations_are_cut_or_dropped_and_counted(
    on_long, root, tmp_path
):
  path = _write(tmp_path / 'rows.json', [_good(0), REPAIRED['long'][0]])
  row = sources.read(path, str(root), on_bad='skip')[1]
  assert lengths.of_row(row, TOKENIZER, 'bare', 9) > 100_000
  examples, _, _ = _train(path, root, 'skip', on_long=on_long)
  cut, dropped = examples.counts.cut, dict(examples.counts.dropped)
  if on_long == 'cut':
    assert (cut, dropped) == (1, {})
    assert examples[1].tokens_BT.shape == (200,)
  else:
    assert (cut, dropped) == (0, {'longer than the row': 1})


@pytest.mark.parametrize(
    'attributes',
    [DROP, None, [], [1], [[1], [1, 2]], [[1.5]], [['a']], [[True]]],
)
def test_attributes_of_the_warm_up(attributes, root, tmp_path):
  good = _turns(TEXT, ANSWER, attributes=[[0, 1], [2, 3]])
  bad = _turns(TEXT, ANSWER, attributes=attributes, id='bad too')
  path = _write(tmp_path / 'rows.json', [good, bad])
  found = sources.read(path, str(root), attributes=True, on_bad='skip')
  assert dict(found.dropped) == {'malformed attributes': 1}
  assert [row.attributes for row in found] == [[[0, 1], [2, 3]]]
  with pytest.raises(rows.DataError, match=r'row 1 .*"attributes"'):
    sources.read(path, str(root), attributes=True)
