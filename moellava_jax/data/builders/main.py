# SPDX-License-Identifier: Apache-2.0
"""Writes one of MoE-LLaVA's data groups with TensorFlow Datasets.

  python -m moellava_jax.data.builders.main --group=llava_pt \\
      --manual_dir=DIR --data_dir=DIR [--on_bad=error]

`manual_dir` holds the published files (`groups`). Train from the result with
--config.data.json=DATA_DIR/llava_pt/1.0.0, or read it anywhere:

  tfds.data_source('llava_pt', split='train', data_dir=DIR)
"""

import os
import sys

from absl import app, flags

from moellava_jax import config
from moellava_jax.data import census_report, shards

_GROUP = flags.DEFINE_enum(
    'group', None, ('llava_pt', 'hybrid_ft', 'llava_ft'), 'Which group.'
)
_MANUAL_DIR = flags.DEFINE_string('manual_dir', None, 'The published files.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Where datasets are written.')
_ON_BAD = flags.DEFINE_enum(
    'on_bad',
    'skip',
    ('error', 'skip'),
    'A bad row: stop, or repair or drop it and count it. The published files'
    ' have some: ids that repeat, GIFs called JPEG.',
)
_WORKERS = flags.DEFINE_integer(
    'workers', os.cpu_count() or 1, 'Processes; 0: none but this.'
)


def prepare(
    group: str, manual_dir: str, data_dir: str, on_bad: str, workers: int
) -> str:
  """Returns the directory of the dataset.

  Raises:
    DataError: a missing file, or a bad row under `on_bad='error'`.
  """
  import tensorflow_datasets as tfds

  from moellava_jax.data.builders import groups

  builder = groups.GROUPS[group](data_dir=data_dir, file_format='array_record')
  builder.options = groups.Options(on_bad, workers)
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
  )
  if builder.census is not None:  # None: it was there already.
    census_report.show(builder.census)
    shards.write_json(
        os.path.join(builder.data_dir, 'report.json'),
        census_report.to_json(builder.census, 'words'),
    )
  return str(builder.data_dir)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  if None in (_GROUP.value, _MANUAL_DIR.value, _DATA_DIR.value):
    raise app.UsageError('--group, --manual_dir and --data_dir are required.')
  try:
    path = prepare(
        _GROUP.value or '',
        _MANUAL_DIR.value or '',
        _DATA_DIR.value or '',
        _ON_BAD.value,
        _WORKERS.value or 0,
    )
  except config.UserError as error:
    sys.exit(f'error: {error}')
  print(f'Written to {path}.')


if __name__ == '__main__':
  app.run(main)
