# SPDX-License-Identifier: Apache-2.0
"""The one door to a trained model: a checkpoint directory -> `Chat`."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from moellava_jax import backbones, checkpoint, config, sharding, trees
from moellava_jax.data import images, templates
from moellava_jax.data import tokenizer as tokenizer_lib
from moellava_jax.infer import answering, sampling, tracing
from moellava_jax.infer import generate as generate_lib
from moellava_jax.infer import requests as requests_lib
from moellava_jax.model import llava

Request = requests_lib.Request
Answer = answering.Answer


class Chat(NamedTuple):
  """A model with its tokenizer and template; make one with `load`."""

  name: str
  digest: str  # Identifies the weights, whatever they are rounded to here.
  model: llava.Llava
  params: Any
  mesh: jax.sharding.Mesh
  config: config.TrainConfig
  stage: str
  tokenizer: tokenizer_lib.Tokenizer
  template: templates.Template
  max_positions: int | None  # Of prompt and answer; None: no limit is known.
  image_aspect: str  # How images become squares, see `images.preprocess`.

  @property
  def stop(self) -> tuple[str, ...]:
    """The template's own stop strings, beside the end token."""
    own = self.template.stop
    return () if own == self.tokenizer.special['eos_token'] else (own,)

  def encode(self, request: Request) -> generate_lib.Prompt:
    """Renders, tokenises and expands a request.

    Raises:
      UserError: as many `<image>` marks as images are required, and an image
        must be readable.
    """
    tokens_L = self._tokens(request)
    pixels = [np.asarray(self.shrink(image)) for image in request.images]
    size = self.model.cfg.vision.image_size
    return generate_lib.Prompt(
        tokens_L, np.array(pixels, np.uint8).reshape(-1, size, size, 3)
    )

  def positions(self, request: Request) -> int:
    """The length of the prompt; its images are not read.

    Raises:
      UserError: as many `<image>` marks as images are required.
    """
    return len(self._tokens(request))

  def _tokens(self, request: Request) -> np.ndarray:
    segments = templates.render(self.template, request.turns)
    ids_L, _ = tokenizer_lib.tokenize(segments, self.tokenizer)
    marks = int(np.sum(ids_L == config.IMAGE_TOKEN))
    if marks != len(request.images):
      raise config.UserError(
          f'The conversation has {marks} <image> marks, but'
          f' {len(request.images)} images were given; write one mark for each'
          ' image.'
      )
    patches = self.model.cfg.vision.num_tokens
    return np.repeat(ids_L, np.where(ids_L == config.IMAGE_TOKEN, patches, 1))

  def shrink(self, image: requests_lib.Picture) -> Image.Image:
    """What the model sees of an image; to shrink that again changes nothing.

    For those who hold many images: this one may be asked about instead.

    Raises:
      ImageError: it cannot be read, or is far too long or thin.
    """
    if isinstance(image, (str, os.PathLike)):
      image = images.load(image)
    if image.mode != 'RGB':  # A copy of a large one may be too much.
      image = image.convert('RGB')
    vision = self.model.cfg.vision
    pixels_HWC = images.preprocess(
        image,
        vision.image_size,
        self.image_aspect,
        vision.resize,
        vision.mean,
    )
    return Image.fromarray(pixels_HWC)

  def check_positions(self, positions: int, what: str) -> None:
    """Raises UserError if `what` takes more positions than the model has."""
    if self.max_positions is not None and positions > self.max_positions:
      raise config.UserError(
          f'{what} takes {positions} positions, but'
          f' {self.model.cfg.llm.name} was made for {self.max_positions}'
          f' (an image takes {self.model.cfg.vision.num_tokens}). Shorten the'
          ' conversation, or ask for fewer new tokens.'
      )

  def generate(
      self,
      requests: Sequence[Request],
      *,
      max_new_tokens: int,
      temperature: float = 0.0,
      top_p: float = 1.0,
      top_k: int = 0,
      seed: int = 0,
      stop: Sequence[str] = (),
      batch_size: int = 16,
  ) -> list[str]:
    """Answers many requests; the order and the batch size change nothing.

    Args:
      requests: see `Request`.
      max_new_tokens: of an answer.
      temperature: 0 is greedy and deterministic.
      top_p: nucleus of sampling.
      top_k: that many tokens are sampled from; 0: all.
      seed: of sampling; request n is answered as one alone with `seed + n` is.
      stop: strings that end an answer, beside the template's own.
      batch_size: rows that are computed together, also if there are fewer
        requests: every number of rows is a program of its own.
    """
    options = [
        sampling.Options(temperature, top_p, top_k, seed + n)
        for n in range(len(requests))
    ]
    found = self.answer(
        requests,
        options,
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=batch_size,
    )
    return [answer.text for answer in found]

  def answer(
      self,
      requests: Sequence[Request],
      options: Sequence[sampling.Options],
      *,
      max_new_tokens: int,
      stop: Sequence[str] = (),
      batch_size: int = 16,
      trace: bool = False,
  ) -> list[Answer]:
    """`generate` with options of each request, and all that is known then.

    Args:
      requests: see `Request`.
      options: as many.
      max_new_tokens: of an answer.
      stop: strings that end an answer, beside the template's own.
      batch_size: see `generate`.
      trace: whether to record the routing of prompts and answers. The last
        token of an answer is not routed, as nothing follows it.

    Raises:
      UserError: a request or an option that cannot be, or a trace of a dense
        model.
    """
    if trace:
      tracing.require_experts(self.model.cfg, self.name)
    found: list[Answer] = []
    writer = self._writer(max_new_tokens, stop)
    for first in range(0, len(requests), batch_size):
      part = slice(first, first + batch_size)
      prompts = [self.encode(request) for request in requests[part]]
      for n, prompt in enumerate(prompts, first):
        self._check_room(prompt, max_new_tokens, f'Request {n} (from 0)')
      found += writer.answers(
          prompts, options[part], rows=batch_size, trace=trace
      )
    return found

  def _writer(self, max_new_tokens, stop) -> answering.Writer:
    if max_new_tokens < 1:
      raise config.UserError(
          f'max_new_tokens={max_new_tokens}: expected at least 1.'
      )
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    return answering.Writer(
        self.model,
        self.params,
        self.tokenizer,
        self.mesh,
        tuple(dict.fromkeys((*self.stop, *stop))),
        max_new_tokens,
    )

  def _check_room(self, prompt, max_new_tokens, what) -> None:
    positions = len(prompt.tokens_L) + max_new_tokens
    self.check_positions(
        positions, f'{what} with its {max_new_tokens} new tokens'
    )

  def chat(
      self,
      image: Any,
      text: str | Sequence[str],
      *,
      history: Sequence[requests_lib.Exchange] = (),
      stream: bool = False,
      max_new_tokens: int = 256,
      temperature: float = 0.0,
      top_p: float = 1.0,
      top_k: int = 0,
      seed: int = 0,
      stop: Sequence[str] = (),
  ) -> Any:
    """Answers a question about an image, or a batch of them.

    Args:
      image: a PIL image, the path of a file, a list of these, or None. For a
        list of texts a list with one such entry for each of them.
      text: the question, or a list of questions that are answered together.
        `<image>` says where an image is; without, images come first.
      history: earlier (question, answer) turns of the conversation.
      stream: return an iterator of pieces of the answer, as they are written.
      max_new_tokens: of an answer.
      temperature: 0 is greedy and deterministic.
      top_p: nucleus of sampling.
      top_k: that many tokens are sampled from; 0: all.
      seed: of sampling; that of question n of a list is `seed + n`.
      stop: strings that end an answer, beside the template's own.

    Returns:
      str, the answer without white space at its ends; list[str] for a list of
      texts; with `stream` Iterator[str], its pieces.

    Raises:
      UserError: marks and images do not match, an image cannot be read, the
        conversation is too long for the model, or an option that cannot be.
    """
    options = sampling.Options(temperature, top_p, top_k, seed)
    options.check()
    if not isinstance(text, str):
      if stream:
        raise config.UserError(
            f'stream=True goes with one text, not with a list of {len(text)}.'
        )
      asked = requests_lib.conversations(image, text, history)
      return self.generate(
          asked,
          max_new_tokens=max_new_tokens,
          **options._asdict(),
          stop=stop,
          batch_size=max(len(asked), 1),
      )
    request = requests_lib.conversation(image, text, history)
    if stream:
      writer = self._writer(max_new_tokens, stop)
      prompt = self.encode(request)
      self._check_room(prompt, max_new_tokens, 'The conversation')
      return writer.pieces(prompt, options)
    (answer,) = self.answer(
        [request],
        [options],
        max_new_tokens=max_new_tokens,
        stop=stop,
        batch_size=1,
    )
    return answer.text

  def trace(
      self,
      image: Any,
      text: str,
      answer: str | None = None,
      *,
      history: Sequence[requests_lib.Exchange] = (),
      max_new_tokens: int = 256,
  ) -> tracing.Routing:
    """Which experts a conversation goes to, its answer included.

    Args:
      image: see `chat`.
      text: the question.
      answer: None: the model's own, greedily.
      history: earlier turns.
      max_new_tokens: of the model's own answer.

    Raises:
      UserError: the model is dense, or what `chat` raises.
    """
    tracing.require_experts(self.model.cfg, self.name)
    if answer is None:
      answer = self.chat(
          image, text, history=history, max_new_tokens=max_new_tokens
      )
    request = requests_lib.conversation(image, text, history)
    before = self.encode(request)
    whole = self.encode(
        request._replace(turns=(*request.turns, ('gpt', answer)))
    )
    self.check_positions(len(whole.tokens_L), 'The conversation')
    return tracing.trace(
        self.model, self.params, whole, len(before.tokens_L), self.mesh
    )


def load(
    path: str,
    cpu_devices: int = 1,
    mesh: jax.sharding.Mesh | str | None = None,
    *,
    as_stored: bool = False,
) -> Chat:
  """Loads a RUN, STAGE, STEP or final directory.

  Stages 0 and I have not seen a conversation; they are asked in the template
  of stage II. Kernels are held in the dtype of the products they enter
  (`llava.stored_dtype`), which changes no answer.

  Args:
    path: a RUN, STAGE, STEP or final directory.
    cpu_devices: devices to simulate where there is only a CPU; batches are
      split over all devices.
    mesh: where the parameters lie, split by the rules of `sharding`, such as
      `sharding.make_mesh` makes for a model that is larger than a device; or
      its sizes, such as 'fsdp=2,expert=2'. None: all devices, each with all
      parameters.
    as_stored: keeps the dtypes of the checkpoint, for who reads the kernels.

  Raises:
    CheckpointError: nothing to load there.
    UserError: a mesh that the devices cannot make.
  """
  sharding.simulate_devices(cpu_devices)
  if mesh is None:
    mesh = sharding.data_mesh()
  elif isinstance(mesh, str):
    mesh = sharding.parse_mesh(mesh)
  cfg, stage = checkpoint.describe(path)
  model = llava.Llava(_kernel_optional(cfg.stage_model(stage)))
  stored = {}

  def keep(path: str, x: jax.Array) -> jax.Array:
    stored[path] = checkpoint.checksum(x)
    if as_stored:
      return x
    return x.astype(llava.stored_dtype(path, model.cfg, x.dtype))

  with sharding.use(mesh):
    found = checkpoint.load(
        path, places(model, mesh), sharding.replicated(mesh), keep
    )
  asked = _asked(cfg, stage)
  return Chat(
      os.path.basename(os.path.normpath(path)),
      checkpoint.fingerprint_of(
          {path: stored[path] for path in trees.flatten(found.params)}
      ),
      model,
      found.params,
      mesh,
      cfg,
      stage,
      tokenizer_lib.load(found.tokenizer_dir),
      templates.get(asked.template),
      backbones.POSITIONS.get(cfg.model.llm.name),
      asked.image_aspect or cfg.data.image_aspect,
  )


def _kernel_optional(model: config.ModelConfig) -> config.ModelConfig:
  """Where 'flash' was demanded for training, answers take it if it is there."""
  if model.attention != 'flash':
    return model
  return dataclasses.replace(model, attention='auto')


def _asked(cfg: config.TrainConfig, stage: str) -> config.StageConfig:
  """The section that says how a model of a stage is asked."""
  return cfg.stage('finetune' if stage in ('warmup', 'pretrain') else stage)


def places(model: llava.Llava, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Path of a parameter -> its sharding, where the mesh splits parameters."""
  if mesh.size == mesh.shape['data']:
    return {}
  rng = jax.random.key(0)
  boxed = jax.eval_shape(
      lambda: model.init(
          {'params': rng, 'router': rng},
          **llava.dummy_inputs(model.cfg),
          train=False,
      )['params']
  )
  return trees.flatten(sharding.of_parameters(boxed, mesh))
