# SPDX-License-Identifier: Apache-2.0
"""Every setting of a run, as frozen dataclasses without defaults.

`configs/*.py` is the only home of a default. `from_dict` turns such a
`ConfigDict` into a `TrainConfig` and rejects what it does not know, so a
misspelt option is an error and never a silent no-op. The result is hashable:
parts of it are Flax module fields and static arguments of `jax.jit`.
"""

from collections.abc import Mapping
import dataclasses
import json
import types
import typing
from typing import Any, Literal

from moellava_jax import trees

# The id that stands for one patch of an image in `tokens_BT` (the original's
# IMAGE_TOKEN_INDEX). It is never embedded: the model puts a patch feature there.
IMAGE_TOKEN = -200

STAGES = ('warmup', 'pretrain', 'finetune', 'moe')

# Settings of `data` that a stage may have of its own; None: those of `data`.
_OF_STAGE = ('image_aspect', 'arrangement', 'grouped_world')


class UserError(ValueError):
  """A mistake in settings or files; its message is all that one needs."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """A ViT tower (CLIP, SigLIP and the tiny one of Shapes)."""

  name: str
  image_size: int  # Pixels a side.
  patch_size: int
  width: int
  depth: int  # Layers of the published tower, used or not.
  num_heads: int
  mlp_width: int
  activation: Literal['quick_gelu', 'gelu_tanh', 'gelu']
  norm_eps: float
  class_token: bool
  patch_bias: bool
  pre_norm: bool
  select_layer: int  # -2: features after all layers but the last.
  select_feature: Literal['patch', 'cls_patch']
  resize: Literal[
      'short_edge', 'exact'
  ]  # CLIP crops a square; SigLIP squeezes.
  mean: tuple[float, float, float]  # Of RGB in [0, 1].
  std: tuple[float, float, float]

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def num_tokens(self) -> int:
    """Positions an image takes in the decoder (P).

    `patch` drops the first position whether or not it is a class token, as
    the original does: 576 for CLIP-L/336 but 728, not 729, for SigLIP-384.
    """
    positions = self.num_patches + self.class_token
    return positions - (self.select_feature == 'patch')

  @property
  def num_layers(self) -> int:
    """Layers that are computed: those up to `select_layer`."""
    if self.select_layer >= 0:
      return self.select_layer
    return self.depth + 1 + self.select_layer


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder LM as a row of switches; one module implements all of them."""

  name: str
  vocab_size: int  # Rows of the embedding.
  width: int
  depth: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  mlp: Literal['gelu_tanh', 'swiglu']
  norm: Literal['layernorm', 'rmsnorm']
  norm_eps: float
  parallel_block: bool  # x + attn(n(x)) + mlp(n(x)), one norm a layer (Phi-2).
  rotary_fraction: float
  rotary_base: float
  qk_norm: bool  # RMSNorm of each query and key head (Qwen3).
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  head_bias: bool
  tied_head: bool
  residual_dropout: float
  # MiniCPM: token embeddings, the residual branches and the input of the head
  # times a constant. The original scales the embeddings only where no images
  # come with them ('without_images'): not in training, nor a prompt with an
  # image, but the answer to it.
  embed_scale: float
  embed_scale_at: Literal['always', 'without_images']
  residual_scale: float
  head_scale: float


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """The sparse layers of stage III; what the original does is a switch."""

  layers: str  # interval | first_half | second_half | all | '0,2,5'.
  num_experts: int
  top_k: int
  capacity_factor: float
  eval_capacity_factor: float | None  # None: never drop.
  min_capacity: int
  group: Literal['row', 'batch']
  max_group_size: int  # Tokens; a longer row is split.
  route_padding: bool
  second_choice: Literal['sampled', 'argmax']
  eval_second_choice: Literal['sampled', 'argmax']
  aux_loss_weight: float
  z_loss_weight: float
  # How tokens get to their experts. einsum and index give the same results, by
  # products and by gathers, and auto is one of the two, by platform; ragged
  # drops nothing in training, whatever capacity_factor is.
  dispatch: Literal['einsum', 'index', 'ragged', 'auto']
  upcycle: Literal['copy', 'random']
  # Top-1 only: when an expert overflows, random tokens stay and not the first
  # (DeepSpeed's `use_rts`).
  random_token_selection: bool
  # The dense FFN stays beside the experts, mixed in by a learned coefficient
  # (PR-MoE, arXiv 2201.05596).
  use_residual: bool

  def layer_ids(self, depth: int) -> tuple[int, ...]:
    """Indices of the sparse layers among `depth` decoder layers."""
    named = {
        'interval': range(0, depth, 2),
        'first_half': range(depth // 2),
        'second_half': range(depth // 2, depth),
        'all': range(depth),
    }
    if self.layers in named:
      return tuple(named[self.layers])
    try:
      ids = tuple(
          sorted(
              {int(i) for i in self.layers.strip('()').split(',') if i.strip()}
          )
      )
    except ValueError:
      ids = ()
    if not ids or ids[0] < 0 or ids[-1] >= depth:
      raise UserError(
          f'moe.layers={self.layers!r}: expected one of {sorted(named)} or'
          f' layer numbers in [0, {depth}) such as "0,2".'
      )
    return ids


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  vision: VisionConfig
  llm: DecoderConfig
  projector: str  # linear | mlpNx_gelu.
  moe: MoeConfig | None
  compute_dtype: Literal['auto', 'float32', 'bfloat16']
  # What the backward pass computes again, and what of a layer is kept for it.
  # none: all is kept. full: only its input. dots: results of all products;
  # dots_no_batch: of those with weights that are not experts'; expert_io: what
  # experts receive and return, so that nothing is exchanged again.
  # offload_dots: dots_no_batch, kept in host memory.
  remat: Literal[
      'none', 'full', 'dots', 'dots_no_batch', 'expert_io', 'offload_dots'
  ]
  # Layers that repeat are one loop in the training step: it compiles faster.
  scan_layers: bool
  # Columns of the logits that exist at once in training, at most; the head is
  # multiplied again backward where the vocabulary is larger.
  loss_chunk: int
  # How training and prompts attend. einsum: products, by blocks of queries in
  # rows of more than 128 positions, whose scores are computed again backward.
  # flash: a kernel of the accelerator, which has no scores in memory. auto:
  # flash on GPUs and TPUs, in rows of 256 positions or more, where it works.
  attention: Literal['auto', 'einsum', 'flash']

  def segments(self) -> tuple[trees.Segment, ...]:
    """The decoder's layers, cut where their kinds stop repeating."""
    depth = self.llm.depth
    sparse = () if self.moe is None else self.moe.layer_ids(depth)
    return trees.segments([n in sparse for n in range(depth)])


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Where a run begins; None: random weights, a tokenizer of its own.

  A directory each, or `hf:org/name` to fetch one from the Hugging Face Hub.
  """

  checkpoint: str | None  # Of a run, of LLaVA or of MoE-LLaVA: all weights.
  lm: str | None  # A language model and a tower, if not a checkpoint.
  tower: str | None  # Beside a checkpoint: instead of the tower inside.
  projector: str | None  # The `mm_projector.bin` of a stage I, or its folder.
  tokenizer: str | None  # None: the checkpoint's or the LM's, or a new one.


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1 (whatever is left)."""

  data: int
  fsdp: int | None  # None: as few parts as fit into the devices' memory.
  expert: int | None  # None: as many as share the experts evenly, up to 4.
  tensor: int
  # Devices to simulate where there is only a CPU. XLA runs small products on
  # one core per device, so 2 are faster on two cores.
  cpu_devices: int
  print_table: bool  # What lies where, leaf by leaf, when a stage begins.
  # Where optimizer state and the sum of the micro-batches' gradients wait.
  optimizer_memory: Literal['device', 'pinned_host']


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
  """The embedded task, written to `dir` when it is not there yet."""

  dir: str
  seed: int
  train_scenes: int
  heldout_scenes: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Settings of the input pipeline, and overrides for all stages at once."""

  json: str | None
  images: str | None
  weights: tuple[float, ...] | None
  eval_json: str | None
  # A row of a batch holds one conversation, in random order ('shuffled') or
  # in batches of alike ones, as the original's sampler makes them ('grouped');
  # or as many as fit ('packed').
  arrangement: Literal['shuffled', 'grouped', 'packed']
  # Devices times micro-batches of the run that 'grouped' repeats.
  grouped_world: int
  on_bad: Literal['error', 'skip']  # A row that breaks a rule of data/check.
  on_long: Literal['error', 'cut']  # A conversation longer than its row.
  image_aspect: Literal['pad', 'square']
  parity_truncation: bool
  parity_mask: bool
  shapes: ShapesConfig | None
  # Where stage I keeps the features of its frozen tower; None: nowhere.
  feature_cache: str | None
  cache_mb: int  # Decoded images and rows are kept in memory up to this.
  # 'fast' scales JPEG files while decoding; held-out data is always 'exact'.
  decode: Literal['exact', 'fast']
  num_threads: int  # In each process that reads.
  num_workers: int  # Processes that read; 0: the one that trains.
  prefetch: int  # Batches.


@dataclasses.dataclass(frozen=True)
class StageDataConfig:
  json: str  # LLaVA JSON, prepared or TFDS directories, joined by commas.
  images: str  # The root of their relative image paths.
  # Of each file its share of an epoch, as relative weights; None: each row
  # once an epoch.
  weights: tuple[float, ...] | None
  eval_json: str | None


@dataclasses.dataclass(frozen=True)
class StageConfig:
  data: StageDataConfig
  template: str
  # See `DataConfig`; None: that of `data`.
  image_aspect: Literal['pad', 'square'] | None
  arrangement: Literal['shuffled', 'grouped', 'packed'] | None
  grouped_world: int | None
  # Positions of a row after expansion of the images. None: as long as the
  # longest conversation, which has to fit into memory to be known.
  row_length: int | None
  max_images: int  # Image slots of a row (I).
  batch_size: int  # Rows of one optimizer step, over all devices.
  accumulate: int  # Micro-batches of an optimizer step.
  steps: int | None  # None: `epochs` times the data.
  epochs: float
  lr: float
  projector_lr: float | None
  eval_every: int
  eval_batches: int
  # Stage III: all of the LM is trained, not only its FFNs and experts (the row
  # "All" of the paper's Table 6a).
  whole_lm: bool


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  warmup_ratio: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float | None
  loss_normalization: Literal['token', 'microbatch']


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int  # Steps.
  minutes: float | None  # Also when the last one is that old.
  keep: int  # The newest ones of a stage.
  keep_every: int | None  # Those of its multiples stay for good.


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
  """Minutes after which a process that makes no progress ends; None: never."""

  step_minutes: float | None
  # The first step (with compilation), reading and writing a model, evaluation.
  other_minutes: float | None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One run: all stages, in the order of `stages`."""

  workdir: str
  stages: tuple[str, ...]
  seed: int
  model: ModelConfig
  init: InitConfig
  mesh: MeshConfig
  data: DataConfig
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  watchdog: WatchdogConfig
  log_every: int
  warmup: StageConfig | None
  pretrain: StageConfig
  finetune: StageConfig
  moe: StageConfig

  def stage(self, name: str) -> StageConfig:
    section = getattr(self, name) if name in STAGES else None
    if section is None:
      raise UserError(f'No section for stage {name!r}; known: {STAGES}.')
    return section

  def stage_data(self, name: str) -> StageDataConfig:
    """Data of a stage, after the overrides in `data`.

    The warm-up keeps its own data: it needs attribute labels, which only the
    embedded task has.
    """
    own = self.stage(name).data
    if self.data.json is None or name == 'warmup':
      return own
    return StageDataConfig(
        json=self.data.json,
        images=own.images if self.data.images is None else self.data.images,
        weights=self.data.weights,
        eval_json=self.data.eval_json,
    )

  def stage_pipeline(self, name: str) -> DataConfig:
    """`data` with what a stage has of its own."""
    section = self.stage(name)
    own = {field: getattr(section, field) for field in _OF_STAGE}
    if name == 'warmup':  # Of each row, the labels belong to its one image.
      own['arrangement'] = 'shuffled'
    given = {k: value for k, value in own.items() if value is not None}
    return dataclasses.replace(self.data, **given)

  def stage_model(self, name: str) -> ModelConfig:
    """The model of a stage: dense before stage III."""
    if name == 'moe':
      return self.model
    return dataclasses.replace(self.model, moe=None)


def from_dict(raw: Mapping[str, Any]) -> TrainConfig:
  """Builds a `TrainConfig` from a `ConfigDict` or its `to_dict()`.

  Raises:
    UserError: a field is missing, unknown or of the wrong type; the message
      names the path (`model.moe.num_expertz`) and the known fields.
  """
  cfg = build(TrainConfig, raw, 'config')
  _check(cfg)
  return cfg


def _check(cfg: TrainConfig) -> None:
  """Raises UserError for values that would only fail in a later stage."""
  if unknown := sorted(set(cfg.stages) - set(STAGES)):
    raise UserError(f'config.stages has {unknown}; known: {STAGES}.')
  if cfg.model.moe is not None:
    moe = cfg.model.moe
    moe.layer_ids(cfg.model.llm.depth)
    if not 1 <= moe.top_k <= moe.num_experts:
      raise UserError(
          f'config.model.moe.top_k is {moe.top_k}; expected 1 to num_experts='
          f'{moe.num_experts}.'
      )
    if moe.dispatch == 'ragged' and cfg.mesh.expert not in (None, 1):
      raise UserError(
          f"config.model.moe.dispatch is 'ragged' and mesh.expert is"
          f' {cfg.mesh.expert}; expected 1: rows sorted by expert stay on their'
          ' device, which needs all experts. Set mesh.expert=1, or dispatch to'
          " 'index'."
      )
  if cfg.model.loss_chunk < 1:
    raise UserError(
        f'config.model.loss_chunk={cfg.model.loss_chunk}; expected at least 1'
        ' column (16384 is the default).'
    )
  if cfg.model.scan_layers and all(
      segment.repeats == 1 for segment in cfg.model.segments()
  ):
    moe, depth = cfg.model.moe, cfg.model.llm.depth
    raise UserError(
        'config.model.scan_layers is set, but no kind of layer repeats:'
        f' {depth} layers with model.moe.layers='
        f'{moe.layers if moe else None!r}. Loops need a placement with a'
        ' period, at least twice: interval (period 2; 4 layers or more), all,'
        ' first_half, second_half, or a list such as "0,3,6,9" of 12.'
    )
  if cfg.data.json is None and (
      cfg.data.images or cfg.data.eval_json or cfg.data.weights
  ):
    raise UserError(
        'config.data.images, .weights and .eval_json go with config.data.json,'
        ' which is not set.'
    )
  _check_data(cfg)
  positive = (
      'batch_size',
      'accumulate',
      'steps',
      'row_length',
      'max_images',
      'eval_every',
      'max_group_size',
      'every',
      'keep',
      'keep_every',
      'log_every',
      'grouped_world',
  )
  minutes = ('minutes', 'step_minutes', 'other_minutes')
  for path, value in _flatten(dataclasses.asdict(cfg)):
    if path.split('.')[-1] in positive and value is not None and value < 1:
      raise UserError(f'config.{path} is {value}; expected at least 1.')
    if path.split('.')[-1] in minutes and value is not None and value <= 0:
      raise UserError(f'config.{path} is {value}; expected more than 0.')
  section = cfg.checkpoint
  if section.keep_every is not None and section.keep_every % section.every:
    raise UserError(
        f'config.checkpoint.keep_every is {section.keep_every}; expected a'
        f' multiple of checkpoint.every={section.every}: no others are saved.'
    )


def _check_data(cfg: TrainConfig) -> None:
  for path, value in _flatten(dataclasses.asdict(cfg)):
    if 'data.' in path and isinstance(value, str) and '://' in value:
      raise UserError(
          f'config.{path} is {value}, but data are read from a disk: name a'
          f' folder there, of every host, with --config.{path}=DIR.'
      )
  for name in STAGES:
    if getattr(cfg, name) is None:
      continue
    _check_arrangement(cfg, name)
    if name != 'moe' and cfg.stage(name).whole_lm:
      raise UserError(
          f'config.{name}.whole_lm is set, but only stage moe has the choice.'
      )
    where = cfg.stage_data(name)
    files = len(where.json.split(','))
    if where.weights is not None and (
        len(where.weights) != files
        or min(where.weights) < 0
        or sum(where.weights) <= 0
    ):
      raise UserError(
          f'The weights of the data of stage {name!r} are {where.weights};'
          f' expected one for each of its {files} files, none below 0, and not'
          ' all of them 0.'
      )


def _check_arrangement(cfg: TrainConfig, name: str) -> None:
  data, rows = cfg.stage_pipeline(name), cfg.stage(name).batch_size
  if data.arrangement == 'packed' and data.parity_truncation:
    raise UserError(
        'config.data.parity_truncation makes the rows of the original, which'
        f' does not pack, as stage {name!r} would: choose arrangement=shuffled'
        ' or grouped with it.'
    )
  if data.arrangement == 'grouped' and rows % max(data.grouped_world, 1):
    raise UserError(
        f'config.{name}.batch_size is {rows}; expected a multiple of'
        f' grouped_world={data.grouped_world}, among which it is divided: set'
        f' --config.{name}.grouped_world.'
    )


def build(cls: type, raw: Mapping[str, Any], where: str) -> Any:
  """Builds the dataclass `cls` from a mapping with exactly its fields."""
  hints = typing.get_type_hints(cls)
  fields = [f.name for f in dataclasses.fields(cls)]
  given = dict(raw.items())
  if unknown := sorted(set(given) - set(fields)):
    raise UserError(f'{where} has no fields {unknown}; it has {fields}.')
  if missing := sorted(set(fields) - set(given)):
    raise UserError(f'{where} lacks the fields {missing}.')
  return cls(
      **{k: _convert(hints[k], given[k], f'{where}.{k}') for k in fields}
  )


def _convert(hint: Any, value: Any, where: str) -> Any:
  """`value` as the type `hint`, or a ValueError that names `where`."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    if value is None:
      return None
    (hint,) = [a for a in args if a is not type(None)]
    return _convert(hint, value, where)
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):  # pyright: ignore[reportArgumentType]
      return value
    if not hasattr(value, 'items'):
      raise UserError(f'{where} is {value!r}; expected a section.')
    return build(hint, value, where)  # pyright: ignore[reportArgumentType]
  if origin is Literal:
    if value not in args:
      raise UserError(f'{where} is {value!r}; expected one of {list(args)}.')
    return value
  if origin is tuple:
    if isinstance(value, str) or not hasattr(value, '__iter__'):
      raise UserError(f'{where} is {value!r}; expected a tuple.')
    items = tuple(value)
    if args[-1] is Ellipsis:
      args = args[:1] * len(items)
    if len(items) != len(args):
      raise UserError(f'{where} is {items}; expected {len(args)} values.')
    return tuple(
        _convert(a, v, where) for a, v in zip(args, items, strict=True)
    )
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if where.endswith('moe.layers') and isinstance(value, (list, tuple)):
    return ','.join(str(i) for i in value)
  if type(value) is not hint:
    raise UserError(f'{where} is {value!r}; expected {hint.__name__}.')
  return value


def to_json(config: Any) -> str:
  """A frozen config as sorted JSON: the form in which checkpoints keep it."""
  return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=1)


# Settings that may differ between a checkpoint and the run that resumes it.
_VOLATILE = (
    'workdir',
    'stages',
    'log_every',
    'mesh.',
    'model.remat',
    'model.scan_layers',
    'model.loss_chunk',
    'model.attention',
    'checkpoint.',
    'watchdog.',
    'data.num_threads',
    'data.num_workers',
    'data.feature_cache',
    'data.prefetch',
)


def settings(cfg: TrainConfig, stage: str) -> dict[str, Any]:
  """What decides the parameters of `stage`: dotted path -> value.

  Those of the stages before it belong to it; paths are relative to RUN.
  """
  later = STAGES[STAGES.index(stage) + 1 :]
  flat = {}
  for path, value in _flatten(dataclasses.asdict(cfg)):
    if path.startswith(_VOLATILE) or path.split('.')[0] in later:
      continue
    if path.endswith(('eval_every', 'eval_batches', 'eval_json')):
      continue
    if stage != 'moe' and path.startswith('model.moe.'):
      continue
    if path == 'model.moe.dispatch' and value in ('index', 'auto'):
      value = 'einsum'  # The same results.
    if isinstance(value, str):
      value = value.replace(cfg.workdir, 'RUN')
    flat[path] = value
  return flat


def differences(
    saved: TrainConfig, current: TrainConfig, stage: str
) -> list[str]:
  """What decides the parameters of `stage` and is not the same, as text.

  Paths inside the run directory are compared relative to it, so that a run may
  be moved. Sections of later stages do not matter.
  """
  old, new = settings(saved, stage), settings(current, stage)
  return [
      f'{path}: {old.get(path)!r} in the checkpoint, {new.get(path)!r} now'
      for path in sorted(old.keys() | new.keys())
      if old.get(path) != new.get(path)
  ]


def _flatten(raw: Mapping[str, Any], prefix: str = ''):
  for key, value in raw.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value
