# SPDX-License-Identifier: Apache-2.0
"""The order depends on the seed and the step alone, in every mode."""

import collections
import itertools
import json
import pickle
import time
import zlib

import numpy as np
import pytest

from moellava_jax import config
from moellava_jax.data import grouping, order, pipeline, shuffling, sources
from moellava_jax.train import data_report
from moellava_jax.train import step as step_lib
from tests.data import conversations

ARRANGEMENTS = ('shuffled', 'grouped', 'packed')
WORLD = {'grouped_world': 2}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  conversations.mixed(folder, 27)
  return folder


def _data(folder, arrangement, **changes):
  return conversations.read(
      folder,
      str(folder / 'rows.json'),
      arrangement=arrangement,
      **WORLD,
      **changes,
  )


def test_the_order_of_a_seed_never_changes():
  # A checkpoint goes on in it, whatever versions are installed then.
  assert shuffling.permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
  assert shuffling.permutation(8, 1, 0).tolist() != [3, 2, 1, 6, 0, 7, 4, 5]
  assert sorted(shuffling.permutation(1000, 5)) == list(range(1000))


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_an_epoch_has_each_conversation_once(folder, arrangement):
  layout = _data(folder, arrangement).layout(3, 4)
  first = layout.rows(1)
  ends = [layout.rows(epochs) for epochs in range(5)]
  epochs = [
      [int(i) for r in range(begin, end) for i in layout[r]]
      for begin, end in itertools.pairwise(ends)
  ]
  assert [sorted(epoch) for epoch in epochs] == [list(range(27))] * 4
  assert len(set(map(tuple, epochs))) == 4
  if arrangement == 'packed':
    assert first < 27
  if arrangement == 'grouped':
    assert first == 28  # The last batch is filled up.


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_any_row_can_be_asked_for_first(folder, arrangement):
  data = _data(folder, arrangement)
  layout = data.layout(3, 4)
  rows = [layout[r].tolist() for r in range(80)]
  for r in (79, 0, 30, 31):
    fresh = _data(folder, arrangement).layout(3, 4)
    assert fresh[r].tolist() == rows[r]
  copied = pickle.loads(pickle.dumps(layout))
  assert [copied[r].tolist() for r in range(80)] == rows
  other = data.layout(4, 4)
  assert [other[r].tolist() for r in range(80)] != rows


@pytest.mark.parametrize('arrangement', ARRANGEMENTS)
def test_going_on_is_exact_at_another_number_of_processes(folder, arrangement):
  whole = conversations.batches(_data(folder, arrangement), 12)
  for start in (5, 9):  # In and behind the first epoch.
    parts = [
        conversations.batches(
            _data(folder, arrangement, cache_mb=0, num_threads=3),
            3,
            start,
            process=process,
            processes=2,
        )
        for process in (0, 1)
    ]
    joined = [
        [np.concatenate(fields) for fields in zip(*pair, strict=True)]
        for pair in zip(*parts, strict=True)
    ]
    conversations.same(whole[start : start + 3], joined)


def test_worker_processes_do_not_change_batches(folder):
  for arrangement in ('shuffled', 'packed'):
    data = _data(folder, arrangement)
    whole = conversations.batches(data, 9)
    lazy = _data(folder, arrangement, cache_mb=0, num_workers=2)
    conversations.same(whole[4:], conversations.batches(lazy, 5, start=4))


def test_an_error_of_a_worker_names_the_row(folder, tmp_path):
  (tmp_path / '0.png').write_bytes((folder / '0.png').read_bytes()[:90])
  raws = [conversations.row(n, ('0.png',)) for n in range(4)]
  path = conversations.write(tmp_path, raws)
  data = conversations.read(tmp_path, path, num_workers=1, cache_mb=0)
  with pytest.raises(Exception, match=r'rows.json row \d .*cannot be read'):
    conversations.batches(data, 1)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('arrangement', ['shuffled', 'packed'])
def test_what_is_left_out_anywhere_is_counted_here(
    workers, arrangement, tmp_path, capsys
):
  path = conversations.mixed(tmp_path, 12)
  raws = json.loads((tmp_path / 'rows.json').read_text())
  for number, name in ((0, 'bad.png'), (3, 'odd.jpg'), (6, 'odd.jpg')):
    raws[number]['image'] = [name]
  conversations.write(tmp_path, raws)
  (tmp_path / 'odd.jpg').write_bytes((tmp_path / '0.png').read_bytes())
  (tmp_path / 'bad.png').write_bytes((tmp_path / '0.png').read_bytes()[:90])
  data = conversations.read(
      tmp_path,
      path,
      arrangement=arrangement,
      num_workers=workers,
      cache_mb=0,
      on_bad='skip',
  )
  assert not data.counts.dropped
  two_epochs = pipeline.steps(data, 4, 7, 2.0)
  found = pipeline.train_batches(data, 4, 7, 0, share=np.arange(4))
  batches = data_report.aloud('moe', data, found)
  for _ in range(two_epochs):
    next(batches)
  assert data.counts.dropped == {'unreadable image': 1}  # Twice, one row.
  assert data.counts.repaired == {'a format that is not what the name says': 2}
  data_report.print_read('moe', data)
  first, *rest = capsys.readouterr().out.splitlines()
  assert 'rows.json row 0 (id row0): ' in first and 'bad.png' in first
  assert 'dropped 1 rows: unreadable image; the first: ' in rest[0]
  assert rest[1].startswith('moe, read by process 0: repaired 2 rows: ')
  assert len(rest) == 2


def _epoch_with_restarts(data, size, restarts):
  """Ids of one epoch, read by workers that are stopped on the way."""
  steps = pipeline.steps(data, size, 7, 1.0)
  stops = [*(steps * n // (restarts + 1) for n in range(restarts + 1)), steps]
  ids = []
  for start, stop in itertools.pairwise(stops):
    for batch in conversations.batches(data, stop - start, start, size=size):
      real = batch.segment_ids_BT.any(1)
      ids += [int(i) for i in batch.ids_B[real]]
  return ids


def _text_rows(folder, count):
  rows = [
      sources.Row(
          f'row {n}', f'row{n}', (), (('human', 'a'), ('gpt', 'b')), None
      )
      for n in range(count)
  ]
  fmt = conversations.format_of(24, 1, cache_mb=0, num_workers=2)
  return pipeline.Examples(rows, str(folder), fmt, conversations.TOKENIZER)


def _ids_of(count):
  return collections.Counter(
      zlib.crc32(f'row{n}'.encode()) for n in range(count)
  )


def test_an_epoch_of_workers_has_each_row_once_after_restarts(tmp_path):
  data = _text_rows(tmp_path, 960)
  ids = _epoch_with_restarts(data, 32, 2)
  assert collections.Counter(ids) == _ids_of(960)


@pytest.mark.slow
@pytest.mark.large
def test_a_long_epoch_of_workers_has_each_row_once_after_restarts(tmp_path):
  data = _text_rows(tmp_path, 100_000)
  ids = _epoch_with_restarts(data, 500, 5)
  assert collections.Counter(ids) == _ids_of(100_000)


def test_grouped_batches_are_of_one_modality_and_alike():
  rng = np.random.default_rng(0)
  words_N = rng.integers(1, 500, 1000)
  has_image_N = rng.random(1000) < 0.7
  items_N = np.arange(1000, dtype=np.int32)
  plan = grouping.batches(
      items_N, words_N, has_image_N, batch_size=32, world=4, key=(0, 0)
  )
  assert sorted(plan.items_N) == list(range(1000))
  assert len(plan.ends_R) % 32 == 0
  images = int(has_image_N.sum())
  whole = 32 * ((images - 1) // 32 + (999 - images) // 32)
  batches = [plan.items_N[n : n + 32] for n in range(0, whole, 32)]
  kinds = [set(has_image_N[batch]) for batch in batches]
  assert all(len(kind) == 1 for kind in kinds)
  assert {True} in kinds and {False} in kinds
  # Each device's part of a batch has nearly the same number of words.
  shares = np.array([words_N[b].reshape(8, 4).sum(0) for b in batches])
  assert np.all(np.ptp(shares, axis=1) < 0.2 * shares.mean())
  random = words_N[rng.permutation(1000)[:whole]].reshape(-1, 4, 8).sum(2)
  assert np.ptp(shares, axis=1).mean() < 0.3 * np.ptp(random, axis=1).mean()
  # What is left of both kinds comes last, in the order of the data.
  rest = plan.items_N[whole:]
  assert 32 < len(rest) < 64
  first = rest[:32].reshape(8, 4).T.reshape(-1)
  assert [*first, *rest[32:]] == sorted(rest)


def _even_chunks(items, words, count):
  """`split_to_even_chunks` of LLaVA's trainer."""
  size = len(items) // count
  chunks, sums = [[] for _ in range(count)], [0.0] * count
  for item in sorted(items, key=lambda item: -words[item]):
    shortest = sums.index(min(sums))
    chunks[shortest].append(int(item))
    sums[shortest] += words[item]
    if len(chunks[shortest]) == size:
      sums[shortest] = float('inf')
  return {frozenset(chunk) for chunk in chunks}


@pytest.mark.parametrize('accumulate', [2, 4, 8])
def test_a_grouped_batch_is_cut_between_the_chunks_of_the_original(accumulate):
  words_N = np.random.default_rng(0).permutation(96) + 1
  items_N = np.arange(96, dtype=np.int32)
  plan = grouping.batches(
      items_N, words_N, np.ones(96, bool), batch_size=32, world=8, key=(0,)
  )
  for start in range(0, 96, 32):
    batch = plan.items_N[start : start + 32]
    chunks = _even_chunks(batch, words_N, 8)
    micro = step_lib.micro_batches(batch, accumulate)
    for rows in map(set, np.asarray(micro).tolist()):
      whole = [chunk for chunk in chunks if chunk <= rows]
      assert len(whole) == 8 // accumulate
      assert frozenset().union(*whole) == rows


def test_grouped_batches_of_one_kind_are_filled_up():
  items_N = np.arange(10, dtype=np.int32)
  words_N = np.arange(10, 0, -1)
  plan = grouping.batches(
      items_N, words_N, np.ones(10, bool), batch_size=8, world=2, key=(0,)
  )
  assert [len(plan.row(r)) for r in range(16)] == 10 * [1] + 6 * [0]
  # The longest to the shortest chunk, while it is not full.
  one, other = words_N[plan.items_N[:8]].reshape(4, 2).T.tolist()
  assert sorted(one, reverse=True) == one
  assert abs(sum(one) - sum(other)) <= 2


def test_a_batch_that_cannot_be_divided_is_an_error(folder):
  data = _data(folder, 'grouped')
  with pytest.raises(config.UserError, match='grouped_world=2'):
    next(pipeline.train_batches(data, 5, 0, 0, share=np.arange(5)))
  with pytest.raises(config.UserError, match='grouped_world=2'):
    pipeline.steps(data, 5, 0, 1.0)


def test_data_that_is_read_on_access_is_packed_alike(folder):
  eager, lazy = (_data(folder, 'packed', cache_mb=mb) for mb in (64, 0))
  assert eager.eager and not lazy.eager
  one, other = (
      [data.layout(1, 4)[r].tolist() for r in range(20)]
      for data in (eager, lazy)
  )
  assert one == other


def test_what_no_row_takes_is_left_out_of_the_plan(folder):
  changes = {'cache_mb': 0, 'on_bad': 'skip', 'on_long': 'cut'}
  data = _data(folder, 'packed', max_images=1, row_length=64, **changes)
  two = sum(n % 5 == 4 and n % 3 != 2 for n in range(27))
  dropped = sum(data.counts.dropped.values())
  assert dropped > two  # And those whose answer lies behind the end.
  layout = data.layout(1, 4)
  used = [int(i) for r in range(layout.rows(1)) for i in layout[r]]
  assert len(used) == len(set(used)) == 27 - dropped
  for batch in conversations.batches(data, 3):
    assert batch.segment_ids_BT.any(1).all()


def test_steps_follow_the_packed_rows(folder):
  data = _data(folder, 'packed')
  rows = data.layout(7, 4).rows(1)
  assert pipeline.steps(data, 4, 7, 1.0) == -(-rows // 4)
  assert pipeline.steps(data, 4, 7, 0.5) == -(-round(rows / 2) // 4)
  shuffled = _data(folder, 'shuffled')
  assert pipeline.steps(shuffled, 4, 7, 2.0) == 14


def test_held_out_rows_are_packed_too(folder):
  data = _data(folder, 'packed')
  found = pipeline.eval_batches(data, 4, 99, share=np.arange(4))
  weight = sum(batch.loss_weight_BT.sum() for batch in found)
  alone = pipeline.eval_batches(
      _data(folder, 'shuffled'), 4, 99, share=np.arange(4)
  )
  assert weight == sum(batch.loss_weight_BT.sum() for batch in alone)
  assert len(found) < len(alone) == 7


def test_an_epoch_is_planned_in_seconds():
  rng = np.random.default_rng(0)
  count = 60_000
  images_N = (rng.random(count) < 0.94).astype(np.int32)
  text_N = np.minimum(np.exp(rng.normal(5, 0.8, count)), 1400).astype(np.int32)
  lengths_N = images_N * 576 + text_N + 1
  source_N = np.zeros(count, int)
  known = order.Known(('all',), source_N, lengths_N, images_N, None)
  plan = order.Plan('packed', None, 128, 16, 2048, 3)
  began = time.process_time()
  layout = order.Layout(plan, known, 0)
  assert 0 < layout.rows(1) < count
  assert time.process_time() - began < 10  # 0.3 s where nothing else runs.
