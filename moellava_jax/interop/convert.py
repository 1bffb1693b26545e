# SPDX-License-Identifier: Apache-2.0
"""Whole directories in and out; what `interop.main` does.

A target appears under its name when it is complete, never before.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import re
from typing import Any, NamedTuple
import uuid

from etils import epath
import jax
import numpy as np

from moellava_jax import checkpoint, config, trees
from moellava_jax.interop import (
    config_json,
    export,
    files,
    hf,
    lms,
    load,
    native,
    shards,
)

# The vocabularies of Qwen 1 and StableLM 2.
RANKS = ('qwen.tiktoken', 'arcade100k.tiktoken')
# Files that make up a tokenizer; the rest of a directory is not copied.
TOKENIZER = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.jinja',
    'tokenizer.model',
    'vocab.json',
    'merges.txt',
    *RANKS,
)
IMAGE = '<image>'
# In the names of others; a projector's numbers are no layers of its own kind.
_LAYER = re.compile(r'\b(layers|h)\.\d+')
_EXPERT = re.compile(r'experts\.\d+')


class Moved(NamedTuple):
  """Tensors of one kind, whatever their layers and experts."""

  theirs: str
  ours: str  # Empty: left out, and `note` says why.
  count: int
  dtype: str
  note: str


class Report(NamedTuple):
  """What a conversion did."""

  target: str
  moved: list[Moved]
  notes: list[str]


@contextlib.contextmanager
def _appearing(target: str) -> Iterator[epath.Path]:
  """A directory that gets the name `target` when the block ends well.

  Raises:
    UserError: there is something at `target`.
  """
  path = epath.Path(target).absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise config.UserError(
        f'--target={target} exists and is not empty; name another directory,'
        ' or delete it.'
    )
  hidden = path.parent / f'.{path.name}.{uuid.uuid4().hex[:8]}'
  hidden.mkdir(parents=True)
  try:
    yield hidden
    if path.exists():
      path.rmdir()
    hidden.rename(path)
  except BaseException:
    hidden.rmtree(missing_ok=True)
    raise


def _copy(source: str, target: str, only: tuple[str, ...]) -> list[str]:
  """Copies the files of `only` that there are; returns their names."""
  found = [n for n in only if (epath.Path(source) / n).is_file()]
  if found:
    epath.Path(target).mkdir(parents=True, exist_ok=True)
  for name in found:
    data = (epath.Path(source) / name).read_bytes()
    (epath.Path(target) / name).write_bytes(data)
  return found


def import_model(
    source: str,
    target: str,
    base: config.TrainConfig,
    *,
    tower: str | None = None,
    tokenizer: str | None = None,
) -> Report:
  """A LLaVA or MoE-LLaVA directory -> a `final/` of ours.

  Parameters keep the dtype they have in the files.

  Args:
    source: the directory.
    target: to be made.
    base: everything that the source does not say: the switches of routing
      that the original does not have, data, optimizer.
    tower: directory of the tower; its weights replace those inside, as the
      original does. It may hold its config.json only.
    tokenizer: directory of the tokenizer; None: the source.

  Raises:
    UserError: see `hf.describe`, `load.model_of` and `load.open_llava`.
  """
  described = hf.describe(source)
  model = load.model_of(described, tower, base.model)
  inside = tower is None or not files.has_weights(tower)
  opened = load.open_llava(described, model, None if inside else tower)
  family = described.family
  assert family is not None
  stage = 'finetune' if model.moe is None else 'moe'
  cfg = _with_template(base, lms.FAMILIES[family].template)
  if model.moe is None:
    model = dataclasses.replace(model, moe=base.model.moe)
  cfg = dataclasses.replace(cfg, model=model)
  where = str(epath.Path(source))
  own = [r for r in opened.tensors() if r['where'] == where]
  notes = list(described.notes)
  with _appearing(target) as path:
    origin = path / 'origin'
    origin.mkdir()
    export.write_json(origin / 'config.json', described.raw)
    export.write_json(
        origin / 'tensors.json', {'family': family, 'tensors': own}
    )
    words = tokenizer or source
    copied = _copy(words, str(path / 'tokenizer'), TOKENIZER)
    if not {'tokenizer.json', *RANKS} & set(copied):
      notes.append(
          f'{words} has no tokenizer.json; to chat with the model, import it'
          ' with --tokenizer=DIR'
      )
    _, size = _vocabulary(str(path / 'tokenizer'))
    if size > model.llm.vocab_size:
      notes.append(
          f'{words} has {size} ids, but the model {model.llm.vocab_size} rows of'
          ' vocabulary; it is the tokenizer of another model'
      )
    # As arrays of JAX: Orbax copies all of NumPy's at once.
    params = trees.unflatten(
        {name: jax.device_put(x, _host()) for name, x in opened.read()}
    )
    checkpoint.write_final(
        path, params, cfg, stage, {'source': source}, lambda _: None
    )
  return Report(target, _moved(opened.tensors()), notes)


def _with_template(
    cfg: config.TrainConfig, template: str
) -> config.TrainConfig:
  return dataclasses.replace(
      cfg,
      pretrain=dataclasses.replace(cfg.pretrain, template='plain'),
      finetune=dataclasses.replace(cfg.finetune, template=template),
      moe=dataclasses.replace(cfg.moe, template=template),
  )


def _host() -> Any:
  """Where weights are converted, whatever accelerator there is."""
  return jax.local_devices(backend='cpu')[0]


class _Ours(NamedTuple):
  """A checkpoint of ours, ready to be written in another layout."""

  leaves: dict[str, Any]
  model: config.ModelConfig
  config: config.TrainConfig
  stage: str
  tokenizer: str
  path: str

  def leaf(self, path: str) -> np.ndarray:
    return np.asarray(self.leaves[path])


def _load(source: str) -> _Ours:
  host = jax.sharding.SingleDeviceSharding(_host())
  found = checkpoint.load(source, default=host)
  return _Ours(
      trees.flatten(found.params),
      found.config.stage_model(found.stage),
      found.config,
      found.stage,
      found.tokenizer_dir,
      found.path,
  )


def export_original(
    source: str,
    target: str,
    *,
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int,
) -> Report:
  """A checkpoint of ours -> the layout of MoE-LLaVA.

  Args:
    source: RUN, STAGE, STEP or final directory.
    target: to be made.
    family: a key of `lms.FAMILIES`; None: the one it came from, else the one
      that its switches belong to.
    dtype: of all tensors; None: those it came with, else as they are kept.
    shard_bytes: size of a file.

  Raises:
    UserError: no family can express the model, or values do not fit `dtype`.
  """
  ours = _load(source)
  origin = export.read_origin(ours.path)
  if family is not None and family not in lms.FAMILIES:
    raise config.UserError(
        f'--family={family}: expected one of {sorted(lms.FAMILIES)}.'
    )
  if origin is not None and family in (None, origin.family):
    family = origin.family
  else:
    origin, family = None, family or config_json.deduce(ours.model.llm)
  kind = None if dtype is None else files.dtype(dtype)
  planned = export.planned(ours.model, family, origin, ours.leaf, kind)
  if origin is None:
    about = config_json.llava(ours.model, family, _extra(ours, planned))
  else:
    about = origin.config
  with _appearing(target) as path:
    export.write_json(path / 'config.json', about)
    _copy(ours.tokenizer, str(path), TOKENIZER)
    shards.write(str(path), planned, shard_bytes)
  links = export.links(ours.model, family, origin)
  names = {item.theirs: item.ours for item in links}
  return Report(target, _moved(_records(names, planned)), [])


def export_native(
    source: str,
    target: str,
    *,
    tower: str | None = None,
    dtype: str | None = None,
    shard_bytes: int,
) -> Report:
  """A checkpoint of ours -> `LlavaForConditionalGeneration`.

  Args: as `export_original`; and
    tower: directory of the whole tower, for its layers that LLaVA never uses;
      None: zeros.

  Raises:
    UserError: transformers has no class for the model.
  """
  ours = _load(source)
  size, image_token = _image_token(ours)
  kind = None if dtype is None else files.dtype(dtype)
  made = native.make(
      ours.model,
      ours.leaf,
      image_token=image_token,
      tower=None if tower is None else files.open_weights(tower),
      dtype=kind,
      extra={},
  )
  made.config.update(_extra(ours, made.tensors))
  vision = ours.model.vision
  with _appearing(target) as path:
    export.write_json(path / 'config.json', made.config)
    if _copy(ours.tokenizer, str(path), TOKENIZER) and size == image_token:
      _add_image_token(path, image_token)
    for name, about in (
        ('processor_config.json', native.processor_config(vision)),
        ('preprocessor_config.json', native.preprocessor_config(vision)),
    ):
      export.write_json(path / name, about)
    shards.write(str(path), made.tensors, shard_bytes)
  return Report(target, _moved(_records(made.ours, made.tensors)), made.notes)


def _vocabulary(directory: str) -> tuple[dict[str, int], int]:
  """(ids of the added tokens, ids in all) of a tokenizer.json, if any."""
  path = epath.Path(directory) / 'tokenizer.json'
  if not path.is_file():
    return {}, 0
  raw = files.read_json(path)
  added = {t['content']: t['id'] for t in raw.get('added_tokens', [])}
  vocab = raw['model'].get('vocab', {})
  ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
  return added, 1 + max([*added.values(), *ids], default=-1)


def _image_token(ours: _Ours) -> tuple[int, int]:
  """(ids of the tokenizer, the id that is to stand for an image)."""
  added, size = _vocabulary(ours.tokenizer)
  if IMAGE in added:
    return size, added[IMAGE]
  return size, size or ours.model.llm.vocab_size


def _add_image_token(path: epath.Path, image_token: int) -> None:
  raw = files.read_json(path / 'tokenizer.json')
  raw.setdefault('added_tokens', []).append(
      {
          'id': image_token,
          'content': IMAGE,
          'single_word': False,
          'lstrip': False,
          'rstrip': False,
          'normalized': False,
          'special': True,
      }
  )
  text = json.dumps(raw, indent=2, ensure_ascii=False)
  (path / 'tokenizer.json').write_text(text + '\n')


def _extra(ours: _Ours, planned: list[shards.Planned]) -> dict[str, Any]:
  """What config.json says beside the sizes."""
  added, _ = _vocabulary(ours.tokenizer)
  extra: dict[str, Any] = {
      'image_aspect_ratio': ours.config.stage_pipeline(ours.stage).image_aspect,
      'torch_dtype': str(planned[0].dtype),
  }
  path = epath.Path(ours.tokenizer) / 'tokenizer_config.json'
  special = files.read_json(path) if path.is_file() else {}
  for role in ('bos', 'eos', 'pad'):
    token = special.get(f'{role}_token')
    token = token.get('content') if isinstance(token, dict) else token
    if token in added:
      extra[f'{role}_token_id'] = added[token]
  return extra


def _records(
    ours: dict[str, str], planned: list[shards.Planned]
) -> list[dict[str, Any]]:
  """One record per tensor; those that `ours` lacks are filled in."""
  return [
      {
          'name': tensor.name,
          'dtype': str(tensor.dtype),
          'ours': [ours[tensor.name]] if tensor.name in ours else [],
          'discarded': None,
      }
      for tensor in planned
  ]


def _moved(records: list[dict[str, Any]]) -> list[Moved]:
  """Records that differ in layer and expert only, as one each.

  Those left out for the same reason are one, too.
  """
  groups: dict[tuple[str, ...], list[str]] = {}
  for record in records:
    theirs = _EXPERT.sub('experts.{e}', record['name'])
    theirs = _LAYER.sub(r'\1.{n}', theirs)
    ours = ', '.join(record['ours'])
    ours = re.sub(r'(?<=layers_)\d+', '{n}', re.sub(r'\[\d+\]', '[e]', ours))
    why = record['discarded'] or ''
    key = ('' if why else theirs, ours, record['dtype'], why)
    groups.setdefault(key, []).append(theirs)
  return [
      Moved(theirs if not why else _all(found), ours, len(found), dtype, why)
      for (theirs, ours, dtype, why), found in groups.items()
  ]


def _all(names: list[str]) -> str:
  kinds = list(dict.fromkeys(names))
  more = f' and {len(kinds) - 1} more' if len(kinds) > 1 else ''
  return kinds[0] + more
