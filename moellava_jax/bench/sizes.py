# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: small ones for a CPU, published ones."""

import dataclasses

from moellava_jax import backbones, config

TOP_K = 2
CAPACITY_FACTOR = 1.5
# Published language models, with the tower of the paper.
FULL = ('stablelm_1_6b', 'qwen_1_8b', 'phi2')


def moe(dispatch: str, group: int, capacity_factor: float) -> config.MoeConfig:
  """Every other layer sparse, 4 experts, top-2.

  Args:
    dispatch: see `config.MoeConfig`.
    group: tokens of a group, at most.
    capacity_factor: in training; an answer drops nothing.
  """
  return config.MoeConfig(
      layers='interval',
      num_experts=4,
      top_k=TOP_K,
      capacity_factor=capacity_factor,
      eval_capacity_factor=None,
      min_capacity=0,
      group='row',
      max_group_size=group,
      route_padding=False,
      second_choice='argmax',
      eval_second_choice='argmax',
      aux_loss_weight=0.01,
      z_loss_weight=0.0,
      dispatch=dispatch,  # pyright: ignore[reportArgumentType]
      upcycle='copy',
      random_token_selection=False,
      use_residual=False,
  )


def model(
    llm: config.DecoderConfig, vision: config.VisionConfig, dtype: str
) -> config.ModelConfig:
  """A sparse model; its `moe` may be replaced."""
  return config.ModelConfig(
      vision=vision,
      llm=llm,
      projector='mlp2x_gelu',
      moe=moe('einsum', 2048, CAPACITY_FACTOR),
      compute_dtype=dtype,  # pyright: ignore[reportArgumentType]
      remat='none',
      scan_layers=False,
      loss_chunk=16384,
      attention='auto',
  )


def small(width: int, depth: int, side: int, dtype: str) -> config.ModelConfig:
  """A decoder with FFNs of 4 times `width`, and a tower of side^2 patches."""
  llm = dataclasses.replace(
      backbones.LMS['shapes'],
      width=width,
      depth=depth,
      num_heads=max(width // 64, 4),
      num_kv_heads=max(width // 64, 4),
      head_dim=width // max(width // 64, 4),
      mlp_width=4 * width,
  )
  tower = backbones.TOWERS['shapes']
  vision = dataclasses.replace(tower, image_size=side * tower.patch_size)
  return model(llm, vision, dtype)


def full(name: str) -> config.ModelConfig:
  """A language model of `backbones`, with CLIP at 336 pixels, in bf16."""
  tower = backbones.TOWERS['clip_l14_336']
  return model(backbones.LMS[name], tower, 'bfloat16')


def dense(sparse: config.ModelConfig) -> config.ModelConfig:
  """The dense control: a token meets as many weights, in FFNs all alike.

  Sparse layers count k FFNs and the others one, so that each FFN of the control
  has the width of their mean.
  """
  assert sparse.moe is not None
  llm = sparse.llm
  share = len(sparse.moe.layer_ids(llm.depth)) / llm.depth
  mean = 1 + share * (sparse.moe.top_k - 1)
  return dataclasses.replace(
      sparse,
      moe=None,
      llm=dataclasses.replace(llm, mlp_width=round(llm.mlp_width * mean)),
  )


def data(arrangement: str) -> config.DataConfig:
  """An input pipeline in the calling thread, with nothing cached to speak of."""
  return config.DataConfig(
      json=None,
      images=None,
      weights=None,
      eval_json=None,
      arrangement=arrangement,  # pyright: ignore[reportArgumentType]
      grouped_world=1,
      on_bad='error',
      on_long='cut',
      image_aspect='pad',
      parity_truncation=False,
      parity_mask=False,
      shapes=None,
      feature_cache=None,
      cache_mb=8,
      decode='exact',
      num_threads=0,
      num_workers=0,
      prefetch=1,
  )


def training(
    sizes: config.ModelConfig, rows: int, length: int
) -> config.TrainConfig:
  """A run with this model: rows with one image, one batch a step."""
  source = config.StageDataConfig('', '', weights=None, eval_json=None)
  stage = config.StageConfig(
      data=source,
      template='plain',
      image_aspect=None,
      arrangement=None,
      grouped_world=None,
      row_length=length,
      max_images=1,
      batch_size=rows,
      accumulate=1,
      steps=None,
      epochs=1.0,
      lr=2e-5,
      projector_lr=None,
      eval_every=500,
      eval_batches=8,
      whole_lm=False,
  )
  return config.TrainConfig(
      workdir='',
      stages=('pretrain', 'finetune', 'moe'),
      seed=0,
      model=sizes,
      init=config.InitConfig(None, None, None, None, None),
      mesh=config.MeshConfig(
          data=-1,
          fsdp=None,
          expert=None,
          tensor=1,
          cpu_devices=1,
          print_table=False,
          optimizer_memory='device',
      ),
      data=data('packed'),
      optimizer=config.OptimizerConfig(
          warmup_ratio=0.03,
          b1=0.9,
          b2=0.999,
          eps=1e-8,
          weight_decay=0.0,
          clip_norm=None,
          loss_normalization='token',
      ),
      checkpoint=config.CheckpointConfig(500, None, 2, None),
      watchdog=config.WatchdogConfig(None, None),
      log_every=50,
      warmup=None,
      pretrain=stage,
      finetune=stage,
      moe=stage,
  )
