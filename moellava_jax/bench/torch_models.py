# SPDX-License-Identifier: Apache-2.0
"""The peers' programs: a sparse layer, a training step, generation.

They have our sizes, and blocks of LLaMA (RMSNorm, SwiGLU, full rotary embedding,
no biases), which our decoder and transformers' both are. The implementations:

  dense       LLaVA on LLaMA; of the layer, an FFN k times as wide as an expert
  loop        Mixtral's sparse block, a loop over experts ('eager')
  grouped_mm  Mixtral's sparse block by grouped products, its default
  deepspeed   Mixtral with its sparse blocks replaced by `torch_moe.EinsumMoe`

Mixtral is sparse in all layers. Where our model is not, its other blocks get
LLaMA's FFN, which transformers has no setting for. As ours, the peers train
what the stage trains, by AdamW (its fused kernels). They hold everything in the
compute dtype, while ours keeps fp32 masters and moments; and of them only
`deepspeed` adds the balance loss. Both favour the peer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
import transformers
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

from moellava_jax import config
from moellava_jax.bench import torch_moe, torch_process

_IMPLEMENTATIONS = {'loop': 'eager', 'grouped_mm': 'grouped_mm'}
_RATE = 1e-4


def build(
    work: torch_process.Work, compiled: bool
) -> dict[str, Callable[[], Any]]:
  """The parts of a program, by name; each runs it once.

  Weights and inputs are random.
  """
  transformers.logging.set_verbosity_error()
  torch.manual_seed(0)
  dtype = getattr(torch, work.model.compute_dtype)
  make = {'layer': _layer, 'train': _train, 'decode': _decode}[work.kind]
  return make(work, dtype, compiled)


def text_config(model: config.ModelConfig) -> Any:
  """Of a LlamaModel, or of a MixtralModel if the model is sparse."""
  llm, moe = model.llm, model.moe
  given: dict[str, Any] = dict(
      vocab_size=llm.vocab_size,
      hidden_size=llm.width,
      intermediate_size=llm.mlp_width,
      num_hidden_layers=llm.depth,
      num_attention_heads=llm.num_heads,
      num_key_value_heads=llm.num_kv_heads,
      head_dim=llm.head_dim,
      rms_norm_eps=llm.norm_eps,
      rope_parameters={'rope_type': 'default', 'rope_theta': llm.rotary_base},
      tie_word_embeddings=llm.tied_head,
      bos_token_id=None,
      eos_token_id=None,
  )
  if moe is None:
    return transformers.LlamaConfig(**given)
  return transformers.MixtralConfig(
      **given, num_local_experts=moe.num_experts, num_experts_per_tok=moe.top_k
  )


def llava(model: config.ModelConfig, implementation: str) -> Any:
  """A LlavaForConditionalGeneration with random weights, fp32.

  The last id of the vocabulary stands for a patch.
  """
  vision, text = model.vision, text_config(model)
  tower = transformers.CLIPVisionConfig(
      hidden_size=vision.width,
      intermediate_size=vision.mlp_width,
      num_hidden_layers=vision.depth,
      num_attention_heads=vision.num_heads,
      image_size=vision.image_size,
      patch_size=vision.patch_size,
      layer_norm_eps=vision.norm_eps,
      hidden_act=vision.activation,
  )
  made: Any = transformers.LlavaForConditionalGeneration(
      transformers.LlavaConfig(
          vision_config=tower,
          text_config=text,
          image_token_index=model.llm.vocab_size - 1,
          image_seq_length=vision.num_tokens,
          vision_feature_layer=vision.select_layer,
      )
  )
  if model.moe is None:
    return made
  sparse = model.moe.layer_ids(model.llm.depth)
  for n, layer in enumerate(made.model.language_model.layers):
    if n not in sparse:
      layer.mlp = modeling_llama.LlamaMLP(_dense_like(text))
    elif implementation == 'deepspeed':
      layer.mlp = _einsum(model)
  if implementation in _IMPLEMENTATIONS:
    text_model = made.model.language_model
    text_model.set_experts_implementation(_IMPLEMENTATIONS[implementation])
  return made


def _dense_like(text: Any) -> transformers.LlamaConfig:
  """Of a LlamaMLP of the sizes of a Mixtral."""
  return transformers.LlamaConfig(
      hidden_size=text.hidden_size, intermediate_size=text.intermediate_size
  )


def _einsum(model: config.ModelConfig) -> torch_moe.EinsumMoe:
  moe = model.moe
  assert moe is not None and moe.top_k == 2, moe
  return torch_moe.EinsumMoe(
      model.llm.width,
      model.llm.mlp_width,
      moe.num_experts,
      moe.capacity_factor,
      moe.second_choice == 'sampled',
  )


def _layer(work, dtype, compiled):
  model = work.model
  text = text_config(model)
  if work.implementation == 'dense':
    layer = torch_moe.Swiglu(
        model.llm.width, model.moe.top_k * model.llm.mlp_width
    )
  elif work.implementation == 'deepspeed':
    layer = _einsum(model)
  else:
    text._experts_implementation = _IMPLEMENTATIONS[work.implementation]
    layer = modeling_mixtral.MixtralSparseMoeBlock(text)
    for p in layer.parameters():  # They are made empty.
      nn.init.normal_(p, std=p.shape[-1] ** -0.5)
  layer = layer.to(work.device, dtype)
  run = torch.compile(layer) if compiled else layer
  shape = (work.rows, work.length, model.llm.width)
  x_BTD = torch.randn(shape, device=work.device, dtype=dtype)
  x_BTD.requires_grad_()

  def forward():
    with torch.no_grad():
      return run(x_BTD)

  def forward_backward():
    x_BTD.grad = None
    layer.zero_grad()
    run(x_BTD).float().square().sum().backward()

  return {'forward': forward, 'forward_backward': forward_backward}


def _inputs(work: torch_process.Work, dtype) -> dict[str, torch.Tensor]:
  """Rows of one image, behind a first token, and text."""
  model = work.model
  shape = (work.rows, work.length)
  tokens_BT = torch.randint(model.llm.vocab_size - 1, shape)
  tokens_BT[:, 1 : 1 + model.vision.num_tokens] = model.llm.vocab_size - 1
  size = model.vision.image_size
  return {
      'input_ids': tokens_BT.to(work.device),
      'pixel_values': torch.randn(work.rows, 3, size, size).to(
          work.device, dtype
      ),
  }


def trained(model: Any, sparse: bool) -> Iterator[tuple[str, nn.Parameter]]:
  """What stage II or, if `sparse`, stage III trains."""
  for name, p in model.named_parameters():
    ffn = 'language_model' in name and '.mlp.' in name
    lm = not sparse and ('language_model' in name or 'lm_head' in name)
    if 'multi_modal_projector' in name or ffn or lm:
      yield name, p


def _train(work, dtype, compiled):
  model = llava(work.model, work.implementation).to(work.device, dtype)
  model.requires_grad_(False)
  parts = [p for _, p in trained(model, work.model.moe is not None)]
  for p in parts:
    p.requires_grad_()
  if work.model.remat == 'full':
    model.gradient_checkpointing_enable()
  model.train()
  optimizer = torch.optim.AdamW(parts, lr=_RATE, weight_decay=0.0, fused=True)
  batch = _inputs(work, dtype)
  labels_BT = batch['input_ids'].clone()
  labels_BT[:, : work.model.vision.num_tokens + 2] = -100
  gates = [m for m in model.modules() if isinstance(m, torch_moe.EinsumMoe)]
  weight = work.model.moe.aux_loss_weight if gates else 0.0

  def loss_of(input_ids, pixel_values, labels):
    loss = model(
        input_ids=input_ids,
        pixel_values=pixel_values,
        labels=labels,
        use_cache=False,
    ).loss
    for gate in gates:
      loss = loss + weight * gate.balance_loss
    return loss

  run = torch.compile(loss_of) if compiled else loss_of

  def step():
    optimizer.zero_grad()
    loss = run(**batch, labels=labels_BT)
    loss.backward()
    optimizer.step()
    return float(loss.detach())

  return {'step': step}


def _decode(work, dtype, compiled):
  model = llava(work.model, work.implementation).to(work.device, dtype).eval()
  batch = _inputs(work, dtype)
  mask_BT = torch.ones_like(batch['input_ids'])
  options: dict[str, Any] = {}
  if compiled:
    # The way of transformers: a cache of fixed size, and the steps compiled.
    how: Any = transformers.CompileConfig(mode='default')
    how._compile_all_devices = True  # The CPU too.
    options = {'cache_implementation': 'static', 'compile_config': how}

  def generate(new):
    found = model.generate(
        **batch,
        **options,
        attention_mask=mask_BT,
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
    )
    assert found.shape == (work.rows, work.length + new), found.shape

  return {
      'prefill': lambda: generate(1),
      'answer': lambda: generate(work.new),
  }
