# SPDX-License-Identifier: Apache-2.0
"""What all configs share. Every option has its default here and only here."""

import dataclasses
from typing import Any

import ml_collections
from ml_collections import config_dict

from moellava_jax import backbones, config


def model(tower: str, lm: str) -> Any:
  """The `model` section: literals of `backbones`, and the paper's MoE."""
  c = ml_collections.ConfigDict()
  c.vision = dataclasses.asdict(backbones.TOWERS[tower])
  c.llm = dataclasses.asdict(backbones.LMS[lm])
  c.projector = 'mlp2x_gelu'
  c.compute_dtype = 'auto'
  c.remat = 'none'
  c.scan_layers = False
  c.loss_chunk = 16384
  c.attention = 'auto'
  c.moe = moe()
  return c


def moe() -> Any:
  """MoE-LLaVA's stage III, with the defects of the original switched off.

  To reproduce the original exactly: group='batch', route_padding=True,
  eval_capacity_factor=2.0, eval_second_choice='sampled' and
  random_token_selection=True. A batch is then what one GPU of the original
  takes at a time only if the stage's accumulate is the number of GPUs times
  that of the scripts (see `paper`); a smaller one puts several together.
  """
  c = ml_collections.ConfigDict()
  c.layers = 'interval'  # Or first_half, second_half, all, '0,2,5'.
  c.num_experts = 4
  c.top_k = 2
  c.capacity_factor = 1.5
  # None: never drop, so that an answer does not depend on its neighbours.
  c.eval_capacity_factor = config_dict.placeholder(float)
  c.min_capacity = 0
  c.group = 'row'
  c.max_group_size = 2048
  c.route_padding = False
  c.second_choice = 'sampled'
  c.eval_second_choice = 'argmax'
  c.aux_loss_weight = 0.01
  c.z_loss_weight = 0.0
  c.dispatch = 'einsum'
  c.upcycle = 'copy'
  c.random_token_selection = False
  c.use_residual = False
  return c


def stage() -> Any:
  """A stage section; its numbers are set by the config that uses it."""
  c = ml_collections.ConfigDict()
  c.data = ml_collections.ConfigDict()
  c.data.json = ''
  c.data.images = ''
  c.data.weights = config_dict.placeholder(tuple)  # None: all rows, once.
  c.data.eval_json = config_dict.placeholder(str)
  c.template = 'plain'
  # None: those of `data`.
  c.image_aspect = config_dict.placeholder(str)
  c.arrangement = config_dict.placeholder(str)
  c.grouped_world = config_dict.placeholder(int)
  c.row_length = config_dict.placeholder(int)  # None: the longest row.
  c.max_images = 1
  c.batch_size = 128
  c.accumulate = 1
  c.steps = config_dict.placeholder(int)  # None: `epochs` over the data.
  c.epochs = 1.0
  c.lr = 2e-5
  c.projector_lr = config_dict.placeholder(float)
  c.eval_every = 500
  c.eval_batches = 8
  c.whole_lm = False  # Of stage III: True trains more than FFNs and experts.
  return c


def run(tower: str, lm: str) -> Any:
  """A whole config but for `workdir` and the numbers of the stages."""
  c = ml_collections.ConfigDict()
  c.workdir = ''
  c.stages = ('pretrain', 'finetune', 'moe')
  c.seed = 0
  c.log_every = 50
  c.model = model(tower, lm)

  c.init = ml_collections.ConfigDict()
  c.init.checkpoint = config_dict.placeholder(str)
  c.init.lm = config_dict.placeholder(str)
  c.init.tower = config_dict.placeholder(str)
  c.init.projector = config_dict.placeholder(str)
  c.init.tokenizer = config_dict.placeholder(str)

  c.mesh = ml_collections.ConfigDict()
  c.mesh.data = -1  # All devices that the other axes leave.
  # Chosen for each stage by the model, the devices and their memory.
  c.mesh.fsdp = config_dict.placeholder(int)
  c.mesh.expert = config_dict.placeholder(int)
  c.mesh.tensor = 1
  c.mesh.cpu_devices = 2
  c.mesh.print_table = False
  c.mesh.optimizer_memory = 'device'

  c.data = ml_collections.ConfigDict()
  c.data.json = config_dict.placeholder(str)  # Replaces every stage's data.
  c.data.images = config_dict.placeholder(str)
  c.data.weights = config_dict.placeholder(tuple)
  c.data.eval_json = config_dict.placeholder(str)
  c.data.arrangement = 'shuffled'  # Or packed; grouped as the original does.
  c.data.grouped_world = 16  # The scripts: 8 GPUs x 2 micro-batches.
  c.data.on_bad = 'error'  # A bad row or image (data/check.py): error | skip.
  c.data.on_long = 'cut'  # A conversation longer than the row: error | cut.
  c.data.image_aspect = 'pad'
  # The original's: a cut before images are expanded, labels by counting.
  c.data.parity_truncation = False
  c.data.parity_mask = False
  c.data.shapes = config_dict.placeholder(ml_collections.ConfigDict)
  c.data.feature_cache = config_dict.placeholder(str)  # Stage I: a folder.
  c.data.cache_mb = 2048
  c.data.decode = 'exact'  # Or fast, within one grey level: extra `jpeg`.
  c.data.num_threads = 4
  c.data.num_workers = 0  # Processes; --config.data.num_workers=8
  c.data.prefetch = 8

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.warmup_ratio = 0.03
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.999
  c.optimizer.eps = 1e-8
  c.optimizer.weight_decay = 0.0
  c.optimizer.clip_norm = config_dict.placeholder(float)
  c.optimizer.loss_normalization = 'token'

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 500
  c.checkpoint.minutes = config_dict.placeholder(float)
  c.checkpoint.keep = 2
  c.checkpoint.keep_every = config_dict.placeholder(int)

  c.watchdog = ml_collections.ConfigDict()
  c.watchdog.step_minutes = 15.0
  c.watchdog.other_minutes = 60.0

  c.warmup = config_dict.placeholder(ml_collections.ConfigDict)
  c.pretrain = stage()
  c.finetune = stage()
  c.moe = stage()
  return c


def paper(name: str, tower: str, lm: str, template: str) -> Any:
  """The three stages of MoE-LLaVA (its scripts/v1), for any backbone.

  What differs from the scripts, and what repeats them there too:

  * All rows of a stage have one length (below): data.parity_truncation=True
    with row_length=2048 cuts text before images are expanded.
  * The loss is a mean over all targets of a step, not of the means of what
    each GPU takes at a time: optimizer.loss_normalization='microbatch', with
    accumulate=8 in stage I and accumulate=grouped_world in II and III.
  * Rows are shuffled: arrangement='grouped' of finetune and moe (stage I is
    shuffled there as well), and moe.grouped_world=32 for OpenChat, whose stage
    III has 8 GPUs x 4 micro-batches. An accumulate that divides grouped_world
    keeps the rows of a GPU together; only one equal to it keeps them alone, in
    micro-batches of 8 rows (OpenChat 4) for at most so many devices.
  * Labels follow the spans of answers: data.parity_mask=True counts tokens.
  * A row with more than one image is dropped: max_images=16 keeps up to
    16, as the scripts do, and makes each row pay for 16.
  * The routing: see `moe` above.

  Args:
    name: of the run, below runs/.
    tower: a key of `backbones.TOWERS`.
    lm: a key of `backbones.LMS`.
    template: of stages II and III; stage I has captions alone.
  """
  c = run(tower, lm)
  c.workdir = f'runs/{name}'
  c.model.remat = 'full'
  # The published files have odd rows: ids that repeat, GIFs called JPEG.
  c.data.on_bad = 'skip'

  # The scripts keep 2048 tokens of text, of which an image is one, and then
  # expand the images; captions are far shorter. Rounded up to 128, the tile of
  # a TPU and a multiple of every GPU's.
  image = backbones.TOWERS[tower].num_tokens - 1
  captions = -(-(image + 128) // 128) * 128
  conversations = -(-(image + 2048) // 128) * 128

  root = 'moe_llava_data'  # As published: pt_json/, ft_json/ and the images.
  files = {
      'pretrain': ('pt_json/llava_image_',),
      'finetune': (
          'ft_json/la_tune_256k',
          'ft_json/lrv_tune_331k',
          'ft_json/lvis_tune_220k_',
          'ft_json/svit_tune_157k',
          'ft_json/nlp_tune',
      ),
      'moe': ('ft_json/llava_image_tune_', 'ft_json/nlp_tune'),
  }
  for stage_name in c.stages:
    s = c[stage_name]
    s.data.json = ','.join(f'{root}/{f}.json' for f in files[stage_name])
    s.data.images = root
    s.template = template
    s.row_length = conversations
    s.batch_size = 128  # The scripts: 8 GPUs x 8 rows x 2 micro-batches.
    s.accumulate = 2
    s.lr = 2e-5
  c.pretrain.template = 'plain'
  c.pretrain.image_aspect = 'square'
  c.pretrain.row_length = captions
  c.pretrain.batch_size = 256
  c.pretrain.accumulate = 1
  c.pretrain.lr = 1e-3
  return c


def select(
    c: ml_collections.ConfigDict, stage_name: str
) -> ml_collections.ConfigDict:
  """Restricts a config to one stage; 'all' leaves it as it is."""
  if stage_name != 'all':
    if stage_name not in config.STAGES:
      raise ValueError(
          f'Unknown stage {stage_name!r}; expected all or one of'
          f' {config.STAGES}.'
      )
    c.stages = (stage_name,)
  return c
