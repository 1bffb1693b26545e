# SPDX-License-Identifier: Apache-2.0
"""All that a run reads, checked before anything is compiled."""

import dataclasses
import json
import os
from typing import Any, NamedTuple

from etils import epath
import jax

from moellava_jax import checkpoint, config, run_folder
from moellava_jax.data import pipeline, shapes, sources, templates
from moellava_jax.data import rows as rows_lib
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.interop import hf, hub, lms
from moellava_jax.train import cluster, data_report, init


class Inputs(NamedTuple):
  """Data by stage; stages without held-out rows are not in `held_out`."""

  examples: dict[str, pipeline.Examples]
  held_out: dict[str, pipeline.Examples]
  tokenizer: tokenizer_lib.Tokenizer


def read(cfg: config.TrainConfig, stages: list[str]) -> Inputs:
  """Reads, checks and encodes the data of `stages`, and makes the tokenizer.

  Raises:
    sources.DataError: a row that cannot be used.
    config.UserError: a tokenizer that fits neither template nor model; a
      feature cache for several processes.
  """
  cached = cfg.data.feature_cache is not None and 'pretrain' in stages
  if cached and jax.process_count() > 1:
    raise config.UserError(
        f'config.data.feature_cache={cfg.data.feature_cache} works for one'
        f' process, not for {jax.process_count()}; leave it empty.'
    )
  if cfg.data.shapes is not None:
    task = cfg.data.shapes
    cluster.first('writing Shapes', lambda: shapes.write(task))
    # A folder that the hosts do not share is written on each.
    cluster.together('reading Shapes', lambda: shapes.write(task))
  cluster.first('making the tokenizer', lambda: _make_tokenizer(cfg))
  found = cluster.together(
      'reading the data', lambda: _read(cfg, stages, _kept_tokenizer(cfg))
  )
  cluster.agree('the data', _summary(found))
  return found


def _read(
    cfg: config.TrainConfig, stages: list[str], tok: tokenizer_lib.Tokenizer
) -> Inputs:
  if tok.vocab_size > cfg.model.llm.vocab_size:
    given = cfg.init.lm or cfg.init.checkpoint
    raise config.UserError(
        f'The tokenizer has {tok.vocab_size} ids, but model.llm.vocab_size is'
        f' {cfg.model.llm.vocab_size}; '
        + (
            f'take the tokenizer that belongs to {given}.'
            if given
            else 'raise it to at least that.'
        )
    )
  examples, held_out = {}, {}
  for stage in stages:
    tokenizer_lib.check_stop(cfg.stage(stage).template, tok)
    where = cfg.stage_data(stage)
    examples[stage] = _examples(cfg, stage, tok)
    data_report.print_summary(stage, examples[stage], where.json)
    if where.eval_json is not None:
      held_out[stage] = _held_out(cfg, stage, where.eval_json, tok)
      data_report.print_summary(stage, held_out[stage], where.eval_json)
  return Inputs(examples, held_out, tok)


def _summary(found: Inputs) -> dict[str, str]:
  """What all processes must have read alike."""
  parts = {
      **found.examples,
      **{f'{stage}, held out': rows for stage, rows in found.held_out.items()},
  }
  return {
      'ids of the tokenizer': str(found.tokenizer.vocab_size),
      **{
          part: f'{len(rows)} rows of {rows.format.length} positions'
          for part, rows in parts.items()
      },
  }


def _rows(cfg: config.TrainConfig, stage: str) -> rows_lib.Rows:
  where = cfg.stage_data(stage)
  return sources.read(
      where.json,
      where.images,
      attributes=stage == 'warmup',
      on_bad=cfg.data.on_bad,
  )


def _examples(cfg, stage, tok) -> pipeline.Examples:
  where = cfg.stage_data(stage)
  return _checked(
      _rows(cfg, stage), where, _format(cfg, stage), where.weights, tok
  )


def _held_out(cfg, stage, path: str, tok) -> pipeline.Examples:
  where = cfg.stage_data(stage)
  fmt = _format(cfg, stage)
  fmt = fmt._replace(data=dataclasses.replace(fmt.data, decode='exact'))
  rows = sources.read(path, where.images, on_bad=cfg.data.on_bad)
  return _checked(rows, where, fmt, None, tok)


def _checked(rows, where, fmt, weights, tok) -> pipeline.Examples:
  sources.check_stored(rows, fmt.vision, fmt.data.image_aspect)
  examples = pipeline.Examples(rows, where.images, fmt, tok, weights=weights)
  examples.counts.dropped.update(rows.dropped)
  examples.counts.repaired.update(rows.repaired)
  return examples


def _format(cfg: config.TrainConfig, stage: str) -> pipeline.Format:
  section = cfg.stage(stage)
  return pipeline.Format(
      section.template,
      section.row_length,
      section.max_images,
      cfg.model.vision,
      cfg.stage_pipeline(stage),
  )


def _kept_tokenizer(cfg: config.TrainConfig) -> tokenizer_lib.Tokenizer:
  return tokenizer_lib.load(os.path.join(cfg.workdir, 'tokenizer'))


def _make_tokenizer(cfg: config.TrainConfig) -> None:
  """Puts a tokenizer in the run, given or trained on its texts.

  One that is left over from other settings is made anew, unless a checkpoint
  depends on it: then comparing the configs tells the user.
  """
  kept = os.path.join(cfg.workdir, 'tokenizer')
  described = epath.Path(kept) / 'origin.json'
  origin = _origin(cfg)
  if described.exists():
    same = json.loads(described.read_text()) == origin
    if same or _has_checkpoint(cfg):
      return
  if (given := _given(cfg.init)) is not None:
    tok = tokenizer_lib.load(given, _family(cfg.init))
  else:
    tok = tokenizer_lib.train(_texts(cfg), cfg.model.llm.vocab_size)
  tok.save(kept)
  run_folder.write_json(described, origin)


def _given(init_cfg: config.InitConfig) -> str | None:
  """The tokenizer that comes with what the run starts from."""
  if init_cfg.tokenizer is not None:
    return hub.local(init_cfg.tokenizer)
  if init_cfg.checkpoint is not None:
    path = hub.local(init_cfg.checkpoint)
    if hf.is_theirs(path):
      return path
    return checkpoint.tokenizer_of(checkpoint.find(path))
  return None if init_cfg.lm is None else hub.local(init_cfg.lm)


def _family(init_cfg: config.InitConfig) -> str | None:
  """Whose special tokens apply: those of the weights of others, if any."""
  for given in (init_cfg.checkpoint, init_cfg.lm):
    if given is not None and hf.is_theirs(hub.local(given)):
      family = hf.describe(hub.local(given)).family
      return None if family is None else lms.FAMILIES[family].tokenizer
  return None


def _origin(cfg: config.TrainConfig) -> dict[str, Any]:
  """The settings that decide the tokenizer, paths relative to the run."""
  data = {
      stage: [
          cfg.stage_data(stage).json.replace(cfg.workdir, 'RUN'),
          cfg.stage(stage).template,
      ]
      for stage in init.sections(cfg)
  }
  return {
      'data': data,
      'vocab_size': cfg.model.llm.vocab_size,
      'tokenizer': cfg.init.tokenizer,
      'checkpoint': cfg.init.checkpoint,
      'lm': cfg.init.lm,
  }


def _has_checkpoint(cfg: config.TrainConfig) -> bool:
  return any(
      checkpoint.final_of(cfg.workdir, stage) is not None
      or checkpoint.newest_step(cfg.workdir, stage) is not None
      for stage in config.STAGES
  )


def _texts(cfg: config.TrainConfig):
  """Texts of all stages, whichever are to be trained now: one stage at a time
  must give the tokenizer of all at once. As rendered, so that the words of the
  templates become tokens too.
  """
  for stage in init.sections(cfg):
    template = templates.get(cfg.stage(stage).template)
    for row in _rows(cfg, stage):
      yield templates.text(templates.render(template, row.turns))
