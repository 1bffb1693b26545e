# SPDX-License-Identifier: Apache-2.0
"""The page of a chat: what it shows, and what its controls do."""

from collections.abc import Iterator
import json
import os
from typing import Any

from moellava_jax.infer import chat as chat_lib
from moellava_jax.serve import experts, media, talk

_EXAMPLES = 6
MOST_TEMPERATURE = 2.0

_ASK = 'Here is shown which experts process the tokens of the answer.'
_BUSY = 'The answer is being written; the first one waits for compiling.'


def examples(model: str) -> list[tuple[str, str]]:
  """Questions of the run that `model` is in, of different kinds.

  Args:
    model: a RUN, STAGE, STEP or final directory.

  Returns:
    (question, image file) pairs; none where the run keeps no questions.
  """
  path = os.path.realpath(model)
  for _ in range(4):
    data = os.path.join(path, 'data')
    file = os.path.join(data, 'questions_exact.jsonl')
    if os.path.isfile(file):
      return _choose(file, data)
    path = os.path.dirname(path)
  return []


def _choose(file: str, data: str) -> list[tuple[str, str]]:
  found, seen = [], set()
  with open(file, encoding='utf-8') as lines:
    for line in lines:
      row = json.loads(line)
      image = os.path.join(data, row['image'])
      # Another kind and another image each time.
      if {row['kind'], image} & seen or not os.path.isfile(image):
        continue
      seen |= {row['kind'], image}
      found.append((row['text'], image))
      if len(found) == _EXAMPLES:
        break
  return found


def messages(told: talk.Talk) -> list[dict[str, Any]]:
  """The conversation in the form that `gradio.Chatbot` shows."""
  shown: list[dict[str, Any]] = []
  for turn in told.turns:
    files = [{'path': path} for path in turn.images]
    text = [_text(turn.text)] if turn.text else []
    shown.append({'role': 'user', 'content': [*files, *text]})
    if turn.notice:
      shown.append(
          {
              'role': 'assistant',
              'content': [_text(turn.notice)],
              'metadata': {'title': 'No answer'},
          }
      )
    elif turn.answer:
      shown.append({'role': 'assistant', 'content': [_text(turn.answer)]})
  return [message for message in shown if message['content']]


def _text(text: str) -> dict[str, str]:
  # Of a bare str Gradio would strip the indentation.
  return {'type': 'text', 'text': text}


class Page:
  """What the controls of one model's page do."""

  def __init__(
      self,
      chat: chat_lib.Chat,
      limits: media.Limits,
      max_new_tokens: int,
  ):
    """Limits.

    Args:
      chat: the model.
      limits: of an image; `image_root` is the folder of uploads.
      max_new_tokens: the longest answer one can ask for.
    """
    moe = chat.model.cfg.moe
    self.title = f'{chat.name} ({chat.stage})'
    self.layers = () if moe is None else moe.layer_ids(chat.model.cfg.llm.depth)
    self.max_new_tokens = min(
        max_new_tokens, chat.max_positions or max_new_tokens
    )
    self._name = chat.name
    self._talker = talk.Talker(chat, limits)

  def ask(
      self,
      message: dict[str, Any],
      told: talk.Talk,
      temperature: float,
      max_new_tokens: float,
  ) -> Iterator[tuple]:
    """Sent: the text box, the messages, the conversation and the panel."""
    steps = self._talker.ask(
        told,
        message['text'] or '',
        message['files'] or (),
        temperature=min(max(float(temperature), 0.0), MOST_TEMPERATURE),
        max_new_tokens=min(max(int(max_new_tokens), 1), self.max_new_tokens),
    )
    for _ in steps:
      panel = self._panel(told, None, _BUSY)
      yield {'text': '', 'files': []}, messages(told), told, *panel

  def trace(self, told: talk.Talk, layer: int | None) -> tuple:
    """Answered: the messages, the conversation and the panel."""
    self._talker.trace(told)
    return messages(told), told, *self._panel(told, layer, _ASK)

  def show(self, told: talk.Talk, layer: int | None) -> str:
    """Another layer: its tokens."""
    return self._panel(told, layer, _ASK)[1]

  def stop(self, told: talk.Talk) -> None:
    self._talker.stop(told)

  def clear(self, told: talk.Talk) -> tuple:
    """The messages, the conversation and the panel of a new beginning."""
    self._talker.clear(told)
    return [], told, *self.empty()

  def empty(self) -> tuple[str, str]:
    """The panel before anything was asked."""
    return self._panel(talk.Talk(), None, _ASK)

  def _panel(
      self, told: talk.Talk, layer: int | None, empty: str
  ) -> tuple[str, str]:
    """The experts of all layers, and those of the tokens in one."""
    if not self.layers:
      text = f'{self._name} is a dense model: it has no experts to show.'
      return experts.note(text), ''
    if told.routed is None:
      return experts.note(told.no_experts or empty), ''
    chosen = layer if layer in self.layers else self.layers[0]
    return experts.layers(told.routed), experts.tokens(told.routed, chosen)
