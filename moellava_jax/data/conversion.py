# SPDX-License-Identifier: Apache-2.0
"""LLaVA JSON and its images -> a prepared directory, or a report alone.

The work of `prepare`. A shard is a fixed range of the input's rows, and exists
once its description is written; a run that was stopped goes on behind the last
one. Memory holds the rows in flight and the names of the images.
"""

from collections.abc import Iterator
import itertools
import json
import os
from typing import Any, NamedTuple

import numpy as np

import moellava_jax
from moellava_jax.data import census as census_lib
from moellava_jax.data import (
    census_report,
    check,
    inspection,
    lengths,
    records,
    rows,
    shards,
)
from moellava_jax.data import tokenizer as tokenizer_lib


class Options(NamedTuple):
  """What is to be done; see the flags."""

  json: tuple[str, ...]
  out: str
  report: bool
  workers: int
  shard_rows: int
  row_length: int | None


def run(options: Options, settings: inspection.Settings) -> dict[str, Any]:
  """Inspects all rows and writes the directory; returns the report.

  Raises:
    DataError: a bad row under `on_bad=error`, no row at all, or a directory
      that holds something else.
  """
  os.makedirs(options.out, exist_ok=True)
  if options.report:
    census = _report_only(options, settings)
    manifest = None
  else:
    plan = _plan(options, settings)
    if records.is_prepared(options.out):
      _check_same(records.read_manifest(options.out)['plan'], plan, options.out)
      print(f'{options.out} is complete; nothing to do.')
      with open(os.path.join(options.out, 'report.json')) as file:
        return json.load(file)
    census, written = _write_shards(options, settings, plan)
    manifest = _manifest(plan, written)
  if not census.total('kept'):
    raise rows.DataError(
        f'{",".join(options.json)}: no usable row; dropped:'
        f' {dict(census.reasons)}.'
    )
  unit = 'words and image positions'
  if settings.tokenizer is not None:
    unit = 'positions'
  report = census_report.to_json(census, unit)
  _write_report(options, census, report, unit)
  if manifest is not None:
    _finish(options.out, manifest, census)
  census_report.show(census)
  return report


def _write_report(options: Options, census, report, unit: str) -> None:
  shards.write_json(os.path.join(options.out, 'report.json'), report)
  census_report.histogram(
      census, os.path.join(options.out, 'lengths.png'), unit, options.row_length
  )
  path = os.path.join(options.out, 'dropped.jsonl')
  with open(path, 'w', encoding='utf-8', errors='replace') as file:
    for drop in census.dropped:
      file.write(json.dumps(drop._asdict()) + '\n')


def _report_only(options, settings) -> census_lib.Census:
  census = census_lib.Census()
  seen: set[str] = set()
  with inspection.Pool(settings, options.workers) as pool, _Bar(
      options.json
  ) as bar:
    for found in pool.inspect(_raws(options.json, bar), seen.__contains__):
      seen.update(found.files)
      census.add(found)
      bar.done()
  return census


def _plan(options: Options, settings: inspection.Settings) -> dict[str, Any]:
  """What decides the shards. They go on only if it is the same."""
  inputs = []
  for path in options.json:
    if not os.path.isfile(path):
      raise rows.DataError(f'--json: {path} does not exist, or is no file.')
    inputs.append(
        {
            'path': path,
            'bytes': os.path.getsize(path),
            'sha256': records.hash_file(path),
        }
    )
  key = None
  if settings.tokenizer is not None:
    tok = tokenizer_lib.load(settings.tokenizer, settings.family)
    key = lengths.key_of(tok, settings.template, settings.image_tokens)
  return {
      'version': records.VERSION,
      'inputs': inputs,
      'images': settings.images,
      'on_bad': settings.on_bad,
      'attributes': settings.attributes,
      'stored_as': settings.stored_as and settings.stored_as._asdict(),
      'shard_rows': options.shard_rows,
      'lengths': key and key._asdict(),
  }


def _check_same(old: dict[str, Any], new: dict[str, Any], out: str) -> None:
  new = json.loads(json.dumps(new))  # Tuples become lists.
  differ = [k for k in sorted(new) if old.get(k) != new[k]]
  if differ:
    raise rows.DataError(
        f'{out} was begun with other settings: '
        + '; '.join(f'{k} was {old.get(k)}, now {new[k]}' for k in differ)
        + '. Remove it, or choose another --out.'
    )


def _write_shards(options: Options, settings, plan):
  """Goes on where an earlier run was stopped."""
  begun = os.path.join(options.out, 'plan.json')
  if os.path.exists(begun):
    with open(begun, encoding='utf-8') as file:
      _check_same(json.load(file), plan, options.out)
  elif os.listdir(options.out):
    raise rows.DataError(
        f'{options.out} is not empty, and not of this command; choose another'
        ' --out.'
    )
  shards.write_json(begun, plan)
  census, written = census_lib.Census(), []
  places: dict[str, tuple[int, int]] = {}  # Of the images.
  with inspection.Pool(settings, options.workers) as pool, _Bar(
      options.json
  ) as bar:
    raws = _raws(options.json, bar)
    for number in itertools.count():
      batch = itertools.islice(raws, options.shard_rows)
      if (shard := _finished(options.out, number)) is not None:
        for _ in batch:
          bar.done()
      else:
        if (first := next(batch, None)) is None:
          break
        found = pool.inspect(
            itertools.chain([first], batch), places.__contains__
        )
        shard = _shard(options.out, number, found, places, bar)
      part = census_lib.Census.from_json(shard.pop('census'))
      for record, path in enumerate(shard.pop('paths')):
        places[path] = number, record
      census.merge(part)
      written.append(shard)
  return census, written


def _finished(out: str, number: int) -> dict[str, Any] | None:
  path = shards.description_path(out, number)
  if not os.path.exists(path):
    return None
  with open(path, encoding='utf-8') as file:
    return json.load(file)


def _shard(out: str, number: int, found, places, bar) -> dict[str, Any]:
  writer = shards.ShardWriter(out, number)
  census = census_lib.Census()
  for item in found:
    census.add(item)
    for path, data in item.files.items():
      if path not in places:
        places[path] = writer.add_image(path, data)
    if item.row is not None:
      writer.add_row(item.row, [places[path] for path in item.row.images])
    bar.done()
  # As read back, so that a run that was stopped gives the same.
  return json.loads(json.dumps(writer.finish({'census': census.to_json()})))


def _manifest(plan, written) -> dict[str, Any]:
  return {
      'format': records.FORMAT,
      'version': records.VERSION,
      'moellava_jax': moellava_jax.__version__,
      'plan': plan,
      'stored_as': plan['stored_as'],
      'shards': written,
      'rows': sum(s['rows']['records'] for s in written if s['rows']),
      'images': sum(s['images']['records'] for s in written if s['images']),
      'lengths': [],
  }


def _finish(out: str, manifest, census) -> None:
  """Lengths first, the manifest last: with it, the directory is complete."""
  key = manifest['plan']['lengths']
  if key is not None:
    key = lengths.Key(**key)
    manifest['lengths'] = [{'file': key.file, **key._asdict()}]
  manifest['digest'] = records.digest(manifest)
  if key is not None:
    lengths.write(out, manifest['digest'], key, np.array(census.lengths))
  shards.write_json(os.path.join(out, records.MANIFEST), manifest)
  for shard in manifest['shards']:
    os.remove(shards.description_path(out, shard['number']))
  os.remove(os.path.join(out, 'plan.json'))


class _Bar:
  """Progress through the files; silent where nobody looks."""

  def __init__(self, paths: tuple[str, ...]):
    from rich import console, progress

    screen = console.Console(stderr=True)
    self._bar = progress.Progress(
        progress.TextColumn('{task.fields[rows]} rows'),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    size = sum(os.path.getsize(p) for p in paths if os.path.exists(p))
    self._task = self._bar.add_task('', total=size, rows=0)
    self._rows = 0

  def __enter__(self) -> '_Bar':
    self._bar.start()
    return self

  def __exit__(self, *_) -> None:
    self._bar.stop()

  def read(self, characters: int) -> None:
    self._bar.advance(self._task, characters)

  def done(self) -> None:
    self._rows += 1
    self._bar.update(self._task, rows=self._rows)


def _raws(paths: tuple[str, ...], bar: _Bar) -> Iterator[check.Raw]:
  for path in paths:
    yield from check.read(path, bar.read)
