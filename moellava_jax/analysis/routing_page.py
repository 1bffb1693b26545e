# SPDX-License-Identifier: Apache-2.0
"""The page of `analysis.main`: all that is to be seen of one routing."""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any

from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import exhibits, html, routing_exhibits


def collect(
    counts: counts_lib.Counts,
    rows: Sequence[Mapping[str, Any]],
    whence: str,
) -> tuple[list[exhibits.Exhibit], list[str]]:
  """Figures of counts and of training, and why others are absent.

  Args:
    counts: of the conversations.
    rows: rows of `metrics.jsonl` with MoE layers; may be none.
    whence: the file they are from; '' if there is none.
  """
  shown, absent = routing_exhibits.of_counts(counts)
  of_training = exhibits.of_training(rows)
  if not of_training:
    absent.append(
        'Load over the steps: '
        + (
            f'{whence} has no row of a sparse stage.'
            if whence
            else 'no metrics.jsonl; give the training run as --run.'
        )
    )
  return [*shown, *of_training], absent


def table(counts: counts_lib.Counts, about: Mapping[str, Any]) -> html.Table:
  """One row per sparse layer; a dash where something is not known.

  Args:
    counts: of the conversations.
    about: the other entries of `routing.json`.
  """
  entropy_L = counts_lib.entropy_L(counts)
  distance_L = about.get('expert_distance')
  rows = []
  for n, layer in enumerate(counts.layers):
    load_E = counts_lib.load_LE(counts)[n]
    rows.append(
        (
            str(layer),
            f'{100 * load_E.max():.1f}',
            f'{100 * load_E.min():.1f}',
            f'{100 * counts_lib.drop_rate_L(counts)[n]:.1f}',
            '–' if entropy_L is None else f'{entropy_L[n]:.3f}',
            '–' if distance_L is None else f'{distance_L[n]:.4f}',
        )
    )
  loss = ''
  if 'loss' in about:
    loss = (
        f' The loss is {about["loss"]:.4f} nats, and'
        f' {about["loss_shuffled_experts"]:.4f} when tokens are sent to other'
        ' experts than the router chose: the closer, the less the experts have'
        ' specialised.'
    )
  return html.Table(
      f'{counts.conversations:,} conversations of {counts.tokens_M[0]:,} text'
      f' and {counts.tokens_M[1]:,} image tokens. An even load is'
      f' {100 / counts.num_experts:.3g} % for each of the {counts.num_experts}'
      ' experts. The entropy of the router is 0 where it is certain and'
      f' {math.log(counts.num_experts):.2f} where it does not tell experts'
      ' apart; an expert distance of 0 means that the experts are still'
      f' copies.{loss}',
      (
          'MoE layer',
          'most load (%)',
          'least load (%)',
          'dropped (%)',
          'entropy (nats)',
          'expert distance',
      ),
      tuple(rows),
  )


def render(
    counts: counts_lib.Counts,
    about: Mapping[str, Any],
    figures: Sequence[html.Figure],
    absent: Sequence[str],
    command: str,
) -> str:
  """The page as HTML."""
  facts = [
      f'{counts.num_experts} experts, top {counts.top_k}',
      *(
          f'{name} {about[name]}'
          for name in ('stage', 'digest', 'control', 'source')
          if about.get(name) is not None
      ),
  ]
  return html.render(
      html.Page(
          title='Where tokens go',
          subtitle=', '.join(facts),
          absent=tuple(absent),
          results=(),
          scores=(),
          training=(),
          losses=(),
          routing=(table(counts, about),),
          experts=tuple(figures),
          samples=(),
          images=pathlib.Path(),
          commands=(command,),
          details=(),
      )
  )
