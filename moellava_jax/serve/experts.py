# SPDX-License-Identifier: Apache-2.0
"""A picture of which experts processed the tokens of an answer, as HTML."""

import html
from typing import NamedTuple

import numpy as np

from moellava_jax.infer import chat as chat_lib
from moellava_jax.infer import streaming, tracing

# Okabe and Ito, to be told apart by everyone, and what is readable on them.
_COLOURS = (
    ('#0072b2', '#fff'),
    ('#e69f00', '#000'),
    ('#009e73', '#000'),
    ('#cc79a7', '#000'),
    ('#56b4e9', '#000'),
    ('#d55e00', '#000'),
    ('#f0e442', '#000'),
    ('#999999', '#000'),
)
_LABEL_FROM = 0.1  # Narrower segments of a bar have no room for a number.

CSS = """
.experts { color: var(--body-text-color); font-size: var(--text-sm); }
.experts p { margin: 0 0 8px; }
.experts .key { display: flex; flex-wrap: wrap; gap: 4px 12px; }
.experts .key i { display: inline-block; width: 10px; height: 10px;
  margin-right: 4px; border-radius: 2px; }
.experts .layers { max-height: 300px; overflow-y: auto; }
.experts .layer { display: flex; align-items: center; margin-top: 4px; }
.experts .layer b { flex: 0 0 64px; font-weight: normal; }
.experts .bar { display: flex; flex: 1; height: 20px; overflow: hidden;
  border-radius: 4px; background: var(--border-color-primary); }
.experts .bar span { text-align: center; line-height: 20px; font-size: 11px;
  overflow: hidden; white-space: nowrap; }
.experts .tokens { display: flex; flex-wrap: wrap; gap: 6px;
  max-height: 360px; overflow-y: auto; }
.experts .token { display: flex; flex-direction: column; min-width: 34px;
  align-items: center; padding: 2px 6px; border-radius: 4px;
  border: 1px solid var(--border-color-primary); }
.experts .token code { white-space: normal; background: none; padding: 0;
  color: inherit; }
.experts .token .bar { flex: none; width: 100%; height: 6px; }
.experts .token small { font-size: 11px; }
.experts .full { text-decoration: line-through; }
"""


class Routed(NamedTuple):
  """The tokens of an answer. M counts sparse layers, N tokens, k choices."""

  layers: tuple[int, ...]  # Which of the decoder's layers are sparse.
  num_experts: int
  texts: tuple[str, ...]  # N.
  choice_MNk: np.ndarray  # int32, the likeliest first.
  weight_MNk: np.ndarray  # float32.
  kept_MNk: np.ndarray  # bool, False: the expert was full.


def of_answer(routing: tracing.Routing, chat: chat_lib.Chat) -> Routed:
  """The part of `routing` that is the answer, up to the token that ends it.

  The end token is not processed while an answer is written.
  """
  assert chat.model.cfg.moe is not None
  at_N = np.flatnonzero(routing.is_answer_T)
  ends = streaming.end_tokens(chat.tokenizer, chat.stop)
  is_end_N = np.isin(routing.tokens_T[at_N], ends)
  if is_end_N.any():
    at_N = at_N[: int(np.argmax(is_end_N))]
  return Routed(
      routing.layers,
      chat.model.cfg.moe.num_experts,
      tuple(chat.tokenizer.decode([int(t)]) for t in routing.tokens_T[at_N]),
      routing.choice_MTk[:, at_N],
      routing.weight_MTk[:, at_N],
      routing.kept_MTk[:, at_N],
  )


def shares_ME(routed: Routed) -> np.ndarray:
  """The part of a layer's choices that each expert has, float64, sums of 1.

  Choices of experts that were full are not counted.
  """
  experts_E = np.arange(routed.num_experts)
  chosen_MNkE = routed.choice_MNk[..., None] == experts_E
  counts_ME = (chosen_MNkE & routed.kept_MNk[..., None]).sum((1, 2))
  return counts_ME / np.maximum(counts_ME.sum(1, keepdims=True), 1)


def note(text: str) -> str:
  """The panel where there is no picture."""
  return f'<div class="experts"><p>{html.escape(text)}</p></div>'


def layers(routed: Routed) -> str:
  """A bar for each sparse layer: how its experts share the answer."""
  key = ''.join(
      f'<span><i style="background:{_colour(e)[0]}"></i>expert {e}</span>'
      for e in range(routed.num_experts)
  )
  rows = ''.join(
      f'<div class="layer"><b>layer {layer}</b>{_shared(share_E)}</div>'
      for layer, share_E in zip(routed.layers, shares_ME(routed), strict=True)
  )
  count, each = len(routed.texts), routed.choice_MNk.shape[-1]
  return (
      f'<div class="experts"><p>Share of each expert in the {count}'
      f' token{"s" * (count != 1)} of the answer, {each} expert'
      f'{"s" * (each != 1)} a token, in %</p><div class="key">{key}</div>'
      f'<div class="layers">{rows}</div></div>'
  )


def tokens(routed: Routed, layer: int) -> str:
  """The tokens of the answer with their experts in one layer.

  Args:
    routed: the answer.
    layer: one of `routed.layers`.
  """
  m = routed.layers.index(layer)
  rows = zip(
      routed.texts,
      routed.choice_MNk[m].tolist(),
      routed.weight_MNk[m].tolist(),
      routed.kept_MNk[m].tolist(),
      strict=True,
  )
  shown = ''.join(_token(*row) for row in rows)
  return (
      f'<div class="experts"><p>Experts of each token in layer {layer}, the'
      ' likeliest first; the bar says how much each counts</p>'
      f'<div class="tokens">{shown}</div></div>'
  )


def _token(
    text: str, chosen: list[int], weights: list[float], kept: list[bool]
) -> str:
  visible = text.replace('\n', '⏎').replace('\t', '⇥')
  if not visible.strip():
    visible = visible.replace(' ', '␣') or '∅'
  parts, said, names = [], [], []
  whole = sum(w for w, k in zip(weights, kept, strict=True) if k) or 1.0
  for expert, weight, has_room in zip(chosen, weights, kept, strict=True):
    if has_room:
      parts.append(_segment(expert, weight / whole, ''))
      said.append(f'expert {expert} counts {100 * weight:.0f} %')
      names.append(f'<span>{expert}</span>')
    else:
      said.append(f'expert {expert} was full')
      names.append(f'<span class="full">{expert}</span>')
  return (
      f'<div class="token" title="{", ".join(said)}"><code>'
      f'{html.escape(visible)}</code><div class="bar">{"".join(parts)}</div>'
      f'<small>{", ".join(names)}</small></div>'
  )


def _shared(share_E: np.ndarray) -> str:
  parts = [
      _segment(expert, share, f'{100 * share:.0f}' * (share >= _LABEL_FROM))
      for expert, share in enumerate(share_E.tolist())
      if share
  ]
  return f'<div class="bar">{"".join(parts)}</div>'


def _segment(expert: int, share: float, label: str) -> str:
  back, front = _colour(expert)
  return (
      f'<span title="expert {expert}: {100 * share:.0f} %" style="width:'
      f'{100 * share:.2f}%;background:{back};color:{front}">{label}</span>'
  )


def _colour(expert: int) -> tuple[str, str]:
  if expert < len(_COLOURS):
    return _COLOURS[expert]
  # The golden angle keeps the hues of any number of experts apart.
  return f'hsl({expert * 137.5 % 360:.0f} 60% 65%)', '#000'
