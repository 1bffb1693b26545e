# SPDX-License-Identifier: Apache-2.0
"""Conversation -> text whose supervised spans are known.

A template renders turns to one string, as the `get_prompt` of MoE-LLaVA
(`moellava/conversation.py`) does, and says which characters of it are
answers. The loss mask is taken from those spans once the text is tokenised,
and never from tokenising pieces again and counting, as the original does;
`parity` repeats its counting for those who compare.
"""

from collections.abc import Sequence
import dataclasses
from typing import Literal, NamedTuple

from moellava_jax import config
from moellava_jax.data import prompts

IMAGE = '<image>'

# One turn: ('human' | 'gpt', text), the `from` and `value` of LLaVA JSON.
Turn = tuple[str, str]

_ROLES = ('human', 'gpt')
_USER = ('USER', 'ASSISTANT')


@dataclasses.dataclass(frozen=True)
class Template:
  """The text around the turns; fields as in the original's `Conversation`.

  Attributes:
    style: how the parts are joined, see `_parts`. `plain` keeps of a row its
      images and its first answer.
    system: comes first.
    roles: the names of the two sides.
    sep: ends a question, or with `single` and `mpt` every part.
    sep2: ends an answer, if that is not `sep`.
    version: the original chooses its label mask by it, see `parity`, and
      whether images are wrapped; None: a template that it does not have.
    example: turns that come before every conversation, never supervised.
  """

  style: Literal['two', 'single', 'mpt', 'llama_2', 'plain']
  system: str
  roles: tuple[str, str]
  sep: str
  sep2: str | None
  version: str | None = 'Unknown'
  example: tuple[Turn, ...] = ()

  @property
  def caption_only(self) -> bool:
    return self.style == 'plain'

  @property
  def stop(self) -> str:
    """What ends an answer.

    For all but `plain` it has to be the end token of the tokenizer
    (`tokenizer.check_stop`), or an answer would never end.
    """
    return self.sep if self.sep2 is None else self.sep2

  @property
  def wraps_images(self) -> bool:
    """Whether its system prompt announces `<Image>visual content</Image>`."""
    return 'mmtag' in (self.version or '')

  @property
  def keyword(self) -> str:
    """What the original looks for in an answer to end it.

    For the `llama_2` style that is `<s>`, which no answer holds.
    """
    return self.stop if self.style == 'two' else self.sep


def _chat(sep2: str, version: str, system: str = prompts.USER) -> Template:
  return Template('two', system, _USER, ' ', sep2, version)


def _llama_2(system: str) -> Template:
  return Template('llama_2', system, _USER, '<s>', '</s>', 'llama_v2')


_HUMAN = ('Human', 'Assistant')
_CHATML = ('<|im_start|>user\n', '<|im_start|>assistant\n')
_V0 = Template('single', prompts.HUMAN, _HUMAN, '###', None)
_PHI = _chat('<|endoftext|>', 'phi')
_V1 = _chat('</s>', 'v1')
_PLAIN = Template('plain', '', ('', ''), '\n', None)
_EXAMPLE = (('human', prompts.QUESTION), ('gpt', prompts.ANSWER))
_VICUNA_V0 = dataclasses.replace(_V0, example=_EXAMPLE)

# All names of the original, and `bare`.
TEMPLATES = {
    'plain': _PLAIN,
    'v0_plain': _PLAIN,
    'phi': _PHI,
    'qwen': _PHI,
    'stablelm': _chat('<|endoftext|>', 'stablelm'),
    'openchat': _chat('<|end_of_turn|>', 'openchat'),
    'mistral': _chat('</s>', 'mistral'),
    'minicpm': _chat('</s>', 'minicpm'),
    'v1': _V1,
    'vicuna_v1': _V1,
    'llava_v1': _chat('</s>', 'v1', prompts.HUMAN),
    'v1_mmtag': _chat('</s>', 'v1_mmtag', prompts.MMTAG),
    'llama_2': _llama_2(prompts.LLAMA_2),
    'llava_llama_2': _llama_2(prompts.LLAVA_LLAMA_2),
    'mpt': Template('mpt', prompts.MPT, _CHATML, '<|im_end|>', None, 'mpt'),
    'default': _VICUNA_V0,
    'v0': _VICUNA_V0,
    'llava_v0': _V0,
    'v0_mmtag': dataclasses.replace(
        _V0, system=prompts.MMTAG, version='v0_mmtag'
    ),
    # For tiny models, to which the system prompt costs more than the question.
    'bare': Template('two', '', _USER, ' ', '<|endoftext|>', None),
}


class Segment(NamedTuple):
  text: str
  supervised: bool


def get(name: str) -> Template:
  if name not in TEMPLATES:
    raise config.UserError(
        f'template={name!r}: expected one of {sorted(TEMPLATES)}.'
    )
  return TEMPLATES[name]


def of_version(version: str) -> Template:
  """The template that the original trains with under `--version`.

  It never sets one for `v0`, nor for `v0.5`, and falls back for an unknown
  name: then it is `vicuna_v1`.
  """
  template = TEMPLATES.get(version, _V1)
  return _V1 if version == 'v0' or template.version is None else template


def render(template: Template, turns: Sequence[Turn]) -> list[Segment]:
  """Returns the text of a conversation as segments, in order.

  An answer's supervised segment runs from the space before it to the end of
  its stop string. If the last turn is a question, the text ends where the
  model is to go on: in `ASSISTANT:` without a space behind it.

  A caption-only template keeps one `<image>` for each of the question and the
  first answer, without an end token; `ignored_answers` counts the others. If
  there is no answer, it keeps the question as it stands, as the original does
  when it evaluates.

  Args:
    template: one of `TEMPLATES`.
    turns: roles alternate, beginning with `human`; a first turn of another
      role is dropped.

  Raises:
    ValueError: no question, or roles that do not alternate; it names the turn.
  """
  turns = _checked(turns)
  if template.caption_only:
    return _render_caption(template, turns)
  parts = _parts(template)
  segments = []
  unsupervised, begin = '', parts.system
  for question, answer in _exchanges(template.example):
    unsupervised += f'{begin}{question}{parts.gpt}{parts.lead}{answer}'
    unsupervised += parts.end
    begin = parts.human
  for question, answer in _exchanges(turns):
    unsupervised += begin + wrapped(template, question) + parts.gpt
    segments.append(Segment(unsupervised, False))
    if answer is not None:
      segments.append(Segment(parts.lead + answer + parts.end, True))
    unsupervised, begin = '', parts.human
  return segments


def wrapped(template: Template, value: str) -> str:
  """A turn's text with its `<image>` marks as the template announces them.

  As in the original: of a turn that begins with one.
  """
  if not template.wraps_images or not value.startswith(IMAGE):
    return value
  return value.replace(IMAGE, f'<Image>{IMAGE}</Image>')


def ignored_answers(template: Template, turns: Sequence[Turn]) -> int:
  """Returns how many answers `render` leaves out: those after a caption."""
  answers = len(_checked(turns)) // 2
  return max(answers - 1, 0) if template.caption_only else 0


def text(segments: Sequence[Segment]) -> str:
  return ''.join(segment.text for segment in segments)


class _Parts(NamedTuple):
  """`system question gpt lead answer end (human question gpt ...)*`."""

  system: str  # Up to the first question.
  human: str  # Before every other question.
  gpt: str  # Between a question and its answer.
  lead: str  # Before the answer, and taught with it.
  end: str  # Behind the answer, and taught with it.


def _parts(template: Template) -> _Parts:
  system, sep, stop = template.system, template.sep, template.stop
  human, gpt = template.roles
  if template.style == 'llama_2':
    # The original strips the first `<s>`, which is for the tokenizer to add.
    begin = '[INST] '
    system = f'{begin}<<SYS>>\n{system}\n<</SYS>>\n\n'
    return _Parts(system, sep + begin, ' [/INST]', ' ', f' {stop}')
  if template.style == 'mpt':
    return _Parts(system + sep + human, human, sep + gpt, '', stop)
  human = f'{human}: '
  system = f'{system}{sep}{human}' if system else human
  return _Parts(system, human, f'{sep}{gpt}:', ' ', stop)


def _checked(turns: Sequence[Turn]) -> Sequence[Turn]:
  """`turns` from the first question on, or a ValueError."""
  dropped = 1 if turns and turns[0][0] != 'human' else 0
  kept = turns[dropped:]
  if not kept:
    raise config.UserError(
        f'A conversation of {len(turns)} turns has no question: expected a'
        ' turn from "human" first.'
    )
  for i, (role, _) in enumerate(kept):
    if role != _ROLES[i % 2]:
      raise config.UserError(
          f'Turn {i + dropped} (from 0) is from {role!r}; expected'
          f' {_ROLES[i % 2]!r}: turns from "human" and "gpt" must alternate.'
      )
  return kept


def _exchanges(turns: Sequence[Turn]) -> list[tuple[str, str | None]]:
  questions = [value for _, value in turns[0::2]]
  answers: list[str | None] = [value for _, value in turns[1::2]]
  if len(answers) < len(questions):
    answers.append(None)
  return list(zip(questions, answers, strict=True))


def _render_caption(template: Template, turns: Sequence[Turn]) -> list[Segment]:
  question, answer = _exchanges(turns)[0]
  if answer is None:
    return [Segment(question + template.stop, False)]
  # The original keeps one `<image>` whatever their number, and so loses the
  # images behind it.
  images = IMAGE * question.count(IMAGE)
  segments = [Segment(images, False)] if images else []
  return segments + [Segment(answer + template.stop, True)]
