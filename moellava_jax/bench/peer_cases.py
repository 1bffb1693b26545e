# SPDX-License-Identifier: Apache-2.0
"""What `peers` compares, in small and in full size."""

import dataclasses
from typing import NamedTuple

from moellava_jax import backbones, config
from moellava_jax.bench import sizes, torch_process

# Of each kind of case, what is timed.
PARTS = {
    'layer': ('forward', 'forward_backward'),
    'train': ('step',),
    'decode': ('prefill', 'answer'),
}
# What a peer is at its best of, see `torch_models`.
IMPLEMENTATIONS = {
    'dense': ('dense',),
    'deepspeed': ('deepspeed',),
    'loop': ('loop',),
    'grouped_mm': ('grouped_mm',),
    'mixtral': ('loop', 'grouped_mm'),
}
_TOWER = backbones.TOWERS['clip_l14_336']  # 576 tokens an image.


class Case(NamedTuple):
  """What is compared with which peers."""

  kind: str  # A key of PARTS.
  model: config.ModelConfig
  rows: int
  length: int  # Positions of a row, or of a prompt.
  new: int  # Tokens of an answer.
  peers: tuple[str, ...]  # Keys of IMPLEMENTATIONS.
  device: str  # Of the peer: cpu | cuda.
  settings: tuple[torch_process.Setting, ...]

  @property
  def name(self) -> str:
    llm, sort = self.model.llm, 'dense' if self.model.moe is None else 'sparse'
    parts = [self.kind]
    if self.kind != 'layer':
      parts += [sort, llm.name]
    parts += [f'D={llm.width}', f'F={llm.mlp_width}']
    if self.kind != 'layer':
      parts.append(f'layers={llm.depth}')
    parts += [f'{self.rows}x{self.length}', *self.peers]
    return ' '.join(parts)

  def work(self, implementation: str) -> torch_process.Work:
    return torch_process.Work(
        self.kind,
        implementation,
        self.model,
        self.rows,
        self.length,
        self.new,
        self.device,
    )


def cases(device: str, smoke: bool) -> list[Case]:
  """Those of a suite: on the CPU, or full-size models on a GPU."""
  on_cpu, on_gpu = torch_process.CPU_SETTINGS, torch_process.GPU_SETTINGS
  if smoke:
    all_settings = on_cpu if device == 'cpu' else on_gpu
    return _smoke(_small(16, 1, 28), all_settings)
  if device == 'cpu':
    model = _small(256, 4, 336)
    return _cases(model, 'cpu', on_cpu, (4, 1024), (768, 32), (1, 8))
  found = []
  for name in ('stablelm_1_6b', 'qwen_1_8b'):
    found += _cases(_full(name), 'cuda', on_gpu, (2, 2048), (768, 128), (1, 8))
  return found


def _smoke(
    model: config.ModelConfig, settings: tuple[torch_process.Setting, ...]
) -> list[Case]:
  """One of each kind; compiling takes long, so that only one peer does."""
  dense, few = dataclasses.replace(model, moe=None), settings[:1]
  two = (settings[0], settings[0]._replace(compiled=True))
  return [
      Case('layer', model, 2, 16, 0, ('deepspeed',), 'cpu', two),
      Case('train', model, 2, 16, 0, ('mixtral', 'deepspeed'), 'cpu', few),
      Case('decode', dense, 1, 16, 4, ('dense',), 'cpu', few),
  ]


def _cases(
    model: config.ModelConfig,
    device: str,
    settings: tuple[torch_process.Setting, ...],
    train: tuple[int, int],
    decode: tuple[int, int],
    batches: tuple[int, ...],
) -> list[Case]:
  """All cases of a sparse model and of the dense one of the same sizes.

  Args:
    model: the sparse one.
    device: of the peers.
    settings: of the peers.
    train: rows and positions of a step; the layer gets as many tokens.
    decode: positions of a prompt and tokens of an answer.
    batches: rows of prompts.
  """
  dense = dataclasses.replace(model, moe=None)

  def case(kind, model, shape: tuple[int, int, int], *peers):
    return Case(kind, model, *shape, peers, device, settings)

  layers = ('dense', 'deepspeed', 'loop', 'grouped_mm')
  found = [
      case('layer', model, (*train, 0), *layers),
      case('train', dense, (*train, 0), 'dense'),
  ]
  sparse = ('mixtral', 'deepspeed')
  if device == 'cpu':
    found.append(case('train', model, (*train, 0), *sparse))
  else:  # There may be no room for both.
    found += [case('train', model, (*train, 0), peer) for peer in sparse]
  for rows in batches:
    found.append(case('decode', dense, (rows, *decode), 'dense'))
    found.append(case('decode', model, (rows, *decode), 'mixtral'))
  return found


def _small(width: int, depth: int, image_size: int) -> config.ModelConfig:
  """LLaMA and CLIP of any size, sparse in all layers as Mixtral is."""
  heads = max(width // 64, 2)
  llm = dataclasses.replace(
      backbones.LMS['llama2_7b'],
      name='small',
      vocab_size=512,
      width=width,
      depth=depth,
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=width // heads,
      mlp_width=4 * width,
  )
  tower = dataclasses.replace(
      _TOWER,
      image_size=image_size,
      width=width // 4,
      depth=3,
      num_heads=2,
      mlp_width=width // 2,
  )
  return _model(tower, llm, 'all', 'float32')


def _full(name: str) -> config.ModelConfig:
  """Sizes of a published model, and blocks of LLaMA; every other is sparse."""
  like, given = backbones.LMS['llama2_7b'], backbones.LMS[name]
  llm = dataclasses.replace(
      like,
      name=name,
      vocab_size=given.vocab_size,
      width=given.width,
      depth=given.depth,
      num_heads=given.num_heads,
      num_kv_heads=given.num_kv_heads,
      head_dim=given.head_dim,
      mlp_width=given.mlp_width,
  )
  return _model(_TOWER, llm, 'interval', 'bfloat16')


def _model(
    tower: config.VisionConfig,
    llm: config.DecoderConfig,
    layers: str,
    dtype: str,
) -> config.ModelConfig:
  """With the second choice of the original, which it draws in training."""
  made = sizes.model(llm, tower, dtype)
  assert made.moe is not None
  moe = dataclasses.replace(made.moe, layers=layers, second_choice='sampled')
  return dataclasses.replace(made, moe=moe)
