# SPDX-License-Identifier: Apache-2.0
"""Checks LLaVA JSON and its images, and writes them for training.

  python -m moellava_jax.data.prepare --config=configs/phi2.py:moe \\
      --json=F[,F2] --images=DIR --out=DIR
  python -m moellava_jax.data.prepare ... --report    only checks
  python -m moellava_jax.data.prepare --out=DIR --verify

Train from the result with --config.data.json=DIR. Without --json and --images,
the stage's own are taken. Every row and image is opened once, by the rules of
`data/check.py`; the first one that is not as it should be stops, unless the
config has data.on_bad=skip, as those of the paper do, or --report is given.

DIR gets shards (`data/records.py`), report.json, dropped.jsonl (every row left
out, and why) and lengths.png. The same command goes on after a crash: shards
that are finished stay.

Tokens are counted with the tokenizer of the run in workdir, or else that of
--config.init.tokenizer, .checkpoint or .lm; without one, words are.
"""

import os
import sys

from absl import app, flags
from etils import epath
from ml_collections import config_flags

from moellava_jax import config, run_folder
from moellava_jax.data import (
    conversion,
    inspection,
    records,
    rows,
    tokenizer_files,
)

_HUB = 'hf:'  # As in `interop.hub`.
_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'Config file with :stage.', lock_config=True
)
_JSON = flags.DEFINE_string(
    'json', None, "LLaVA JSON files, joined by commas; default: the stage's."
)
_IMAGES = flags.DEFINE_string(
    'images', None, "The root of image paths; default: the stage's."
)
_OUT = flags.DEFINE_string('out', None, 'The directory to write.')
_REPORT = flags.DEFINE_bool('report', False, 'Only check; write no shards.')
_VERIFY = flags.DEFINE_bool(
    'verify', False, 'Only compare the files in --out with their hashes.'
)
_STORE_SIZE = flags.DEFINE_integer(
    'store_size', None, 'Store images resized for the tower: its pixels a side.'
)
_STORE_AS = flags.DEFINE_enum(
    'store_as',
    'jpeg',
    ('jpeg', 'raw'),
    'With --store_size: JPEG of quality 95, or the very pixels (6 times the'
    ' size at 336 pixels).',
)
_WORKERS = flags.DEFINE_integer(
    'workers',
    os.cpu_count() or 1,
    'Processes; 0: none but this.',
    lower_bound=0,
)
_SHARD_ROWS = flags.DEFINE_integer(
    'shard_rows',
    4096,
    'Rows of a shard, which is what a crash may cost.',
    lower_bound=1,
)


def _settings(
    cfg: config.TrainConfig, stage: str, images: str | None, report: bool
) -> inspection.Settings:
  """What the config says about the rows of a stage."""
  section, data = cfg.stage(stage), cfg.data
  stored_as = None
  if _STORE_SIZE.value is not None:
    vision = cfg.model.vision
    if _STORE_SIZE.value != vision.image_size:
      raise config.UserError(
          f'--store_size={_STORE_SIZE.value}: the tower of this config takes'
          f' images of {vision.image_size} pixels.'
      )
    stored_as = rows.StoredAs(
        vision.image_size,
        section.image_aspect or data.image_aspect,
        vision.resize,
        vision.mean,
        _STORE_AS.value,
    )
  tokenizer, family = _tokenizer(cfg)
  return inspection.Settings(
      images or cfg.stage_data(stage).images,
      'skip' if report else data.on_bad,
      stage == 'warmup',
      stored_as,
      tokenizer,
      family,
      section.template,
      cfg.model.vision.num_tokens,
  )


def _tokenizer(cfg: config.TrainConfig) -> tuple[str | None, str | None]:
  """(directory, family) of the tokenizer that training would take."""
  kept = os.path.join(cfg.workdir, 'tokenizer')
  run_folder.check(kept)
  if (epath.Path(kept) / 'tokenizer.json').exists():
    return kept, None
  init = cfg.init
  given = init.tokenizer or init.checkpoint or init.lm
  if given is None:
    return None, None
  given = _fetched(given) if given.startswith(_HUB) else given
  inner = os.path.join(given, 'tokenizer')  # Of a checkpoint of ours.
  if os.path.isdir(inner):
    return inner, None
  if not os.path.isdir(given):
    raise config.UserError(
        f'{given} is no directory; name one with a tokenizer'
        ' (--config.init.tokenizer=DIR), or leave it out: words are counted'
        ' then.'
    )
  # Templates are called after the families of the models they were made for.
  family = cfg.moe.template if init.checkpoint or init.lm else None
  return given, family if family in tokenizer_files.FAMILIES else None


def _fetched(name: str) -> str:
  """The tokenizer of a repository of the Hugging Face Hub."""
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return huggingface_hub.snapshot_download(
        name.removeprefix(_HUB),
        allow_patterns=['*.json', '*.txt', '*.model', '*.tiktoken', '*.jinja'],
    )
  except (
      errors.HfHubHTTPError,
      errors.HFValidationError,
      errors.LocalEntryNotFoundError,
      errors.OfflineModeIsEnabled,
  ) as error:
    raise config.UserError(
        f'{name} cannot be fetched: {error}. Name a local directory'
        ' (--config.init.tokenizer=DIR), or leave it out: words are counted'
        ' then.'
    ) from error


def _options(argv: list[str]) -> tuple[conversion.Options, inspection.Settings]:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  if _CONFIG.value is None or _OUT.value is None:
    raise app.UsageError('--config=FILE:stage and --out=DIR are required.')
  cfg = config.from_dict(_CONFIG.value)
  if len(cfg.stages) != 1:
    raise config.UserError(
        f'The config has the stages {cfg.stages}; name one, as in'
        ' --config=configs/phi2.py:moe.'
    )
  (stage,) = cfg.stages
  paths = _JSON.value or cfg.stage_data(stage).json
  options = conversion.Options(
      tuple(path.strip() for path in paths.split(',')),
      _OUT.value,
      _REPORT.value,
      _WORKERS.value or 0,
      _SHARD_ROWS.value,
      cfg.stage(stage).row_length,
  )
  return options, _settings(cfg, stage, _IMAGES.value, options.report)


def main(argv):
  try:
    if _VERIFY.value:
      if _OUT.value is None:
        raise app.UsageError('--out=DIR is required.')
      size = records.verify(_OUT.value)
      print(f'{_OUT.value}: {size} bytes are as they were written.')
      return
    options, settings = _options(argv)
    conversion.run(options, settings)
    print(f'Written to {options.out}.')
  except config.UserError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main)
