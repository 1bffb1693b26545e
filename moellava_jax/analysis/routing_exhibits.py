# SPDX-License-Identifier: Apache-2.0
"""What is to be seen of counts: figures, tables, and how to read them."""

import math

from moellava_jax.analysis import counts as counts_lib
from moellava_jax.analysis import exhibits, figures, figures_paths, look


def of_counts(
    counts: counts_lib.Counts,
) -> tuple[list[exhibits.Exhibit], list[str]]:
  """What is to be seen of `counts`, and why the rest is not."""
  absent = []
  found = [_load(counts)]
  missing = [
      counts_lib.MODALITIES[m]
      for m in range(len(counts_lib.MODALITIES))
      if m not in counts_lib.present(counts)
  ]
  if missing:
    absent.append(
        f'Modality preference: there is no {missing[0]} token in these'
        ' conversations.'
    )
  else:
    found.append(_preference(counts))
  found += [_pathways(counts), _drop_rate(counts)]
  if counts.entropy_LM is None:
    absent.append(
        'Router entropy: traces hold choices, not probabilities; it is measured'
        ' when the model is run (--model with --questions).'
    )
  else:
    found.append(_entropy(counts))
  if counts.top_k < 2:
    absent.append('Co-activation: every token chooses one expert, not a pair.')
  else:
    found.append(_coactivation(counts))
  return found, absent


def _load(counts: counts_lib.Counts) -> exhibits.Exhibit:
  rows = []
  for name, modality in _modalities():
    first_LE, assigned_LE, kept_LE = (
        x_LME.sum(1) if modality is None else x_LME[:, modality]
        for x_LME in (counts.first_LME, counts.assigned_LME, counts.kept_LME)
    )
    load_LE = counts_lib.load_LE(counts, modality)
    rows += [
        (
            layer,
            name,
            e,
            int(first_LE[n, e]),
            int(assigned_LE[n, e]),
            int(kept_LE[n, e]),
            float(load_LE[n, e]),
        )
        for n, layer in enumerate(counts.layers)
        for e in range(counts.num_experts)
    ]
  even = 100 / counts.num_experts
  many = counts.num_experts > len(look.COLOURS)
  how = (
      'The brighter, the more choices.'
      if many
      else 'The dashed lines are where the parts would meet.'
  )
  return exhibits.Exhibit(
      'load',
      'Expert load per layer',
      f'How the {counts.top_k} choice{"s" * (counts.top_k > 1)} of every token'
      f' are shared by the experts of a layer, before any is dropped; even use'
      f' is {even:.3g} % each. {how} Text and image apart show whether a'
      ' modality leans on fewer experts than the whole does (paper, figures 4'
      ' and 7 to 10).',
      figures.load(counts),
      (
          'layer',
          'tokens',
          'expert',
          'first_choices',
          'choices',
          'kept',
          'share',
      ),
      rows,
  )


def _preference(counts: counts_lib.Counts) -> exhibits.Exhibit:
  text_LE = counts.assigned_LME[:, figures.TEXT]
  image_LE = counts.assigned_LME[:, figures.IMAGE]
  balanced_LE = counts_lib.image_part_LE(counts)
  other_LE = counts_lib.text_part_LE(counts)
  return exhibits.Exhibit(
      'preference',
      'Modality preference of the experts',
      'What an expert is chosen by: image or text tokens, as if there were as'
      ' many of both. A bar that is cut at the dashed line (50 %) has no'
      ' preference; one of a single colour serves one modality only. A cross'
      ' is an expert that no token chose (paper, figures 5 and 11 to 14).',
      figures.preference(counts),
      (
          'layer',
          'expert',
          'text_choices',
          'image_choices',
          'image_part_balanced',
          'text_part_balanced',
      ),
      [
          (
              layer,
              e,
              int(text_LE[n, e]),
              int(image_LE[n, e]),
              float(balanced_LE[n, e]),
              float(other_LE[n, e]),
          )
          for n, layer in enumerate(counts.layers)
          for e in range(counts.num_experts)
      ],
  )


def _pathways(counts: counts_lib.Counts) -> exhibits.Exhibit:
  rows = []
  for name, view in zip(counts_lib.MODALITIES, counts.paths_M, strict=True):
    for kind, path_CL, number_C, part_C in (
        (
            'pathway',
            view.top_CL,
            view.top_count_C.tolist(),
            view.top_count_C / max(view.tokens, 1),
        ),
        (
            'component',
            view.component_CL,
            [None] * len(view.variance_C),
            view.variance_C,
        ),
    ):
      rows += [
          (name, kind, n + 1, '-'.join(map(str, path_L)), number, float(part))
          for n, (path_L, number, part) in enumerate(
              zip(path_CL.tolist(), number_C, part_C, strict=True)
          )
      ]
  return exhibits.Exhibit(
      'pathways',
      'Pathways of the tokens',
      'A pathway is the first choice of a token in every MoE layer. Left: those'
      ' that most tokens take, with their share of the tokens of the modality;'
      ' small shares mean that tokens take many different ways. Lines through'
      ' the same expert lie beside each other. Right: the view of the paper'
      ' (figures 6 and 15 to 18), principal components of all pathways with'
      ' their share of the variance. It cuts the score of a component at each'
      ' layer into as many parts as there are experts; no token need have taken'
      ' such a way, and up and down may be exchanged. It has fewer components'
      ' than there are layers.',
      figures_paths.pathways(counts),
      ('tokens', 'view', 'rank', 'experts', 'number', 'share'),
      rows,
  )


def _drop_rate(counts: counts_lib.Counts) -> exhibits.Exhibit:
  rows = []
  for name, modality in _modalities():
    assigned_L, kept_L = (
        (x_LME.sum(1) if modality is None else x_LME[:, modality]).sum(-1)
        for x_LME in (counts.assigned_LME, counts.kept_LME)
    )
    rows += [
        (layer, name, int(a), int(a - k), float(rate))
        for layer, a, k, rate in zip(
            counts.layers,
            assigned_L,
            kept_L,
            counts_lib.drop_rate_L(counts, modality),
            strict=True,
        )
    ]
  none = not any(row[3] for row in rows)
  return exhibits.Exhibit(
      'drop_rate',
      'Dropped choices per layer',
      'Choices that found their expert full. '
      + (
          'There are none here: unless eval_capacity_factor is set, a model'
          ' that is not trained never drops, so that an answer does not depend'
          ' on its neighbours in the batch.'
          if none
          else 'A token whose choices are all dropped passes the layer'
          ' unchanged.'
      ),
      figures.drop_rate(counts),
      ('layer', 'tokens', 'choices', 'dropped', 'share'),
      rows,
  )


def _entropy(counts: counts_lib.Counts) -> exhibits.Exhibit:
  most = math.log(counts.num_experts)
  rows = []
  for name, modality in _modalities():
    number = counts.tokens_M.sum() if modality is None else None
    number = counts.tokens_M[modality] if number is None else number
    entropy_L = counts_lib.entropy_L(counts, modality)
    assert entropy_L is not None
    rows += [
        (layer, name, int(number), float(value), most)
        for layer, value in zip(counts.layers, entropy_L, strict=True)
    ]
  return exhibits.Exhibit(
      'entropy',
      'Entropy of the router per layer',
      'Mean over tokens. At the dashed line, the logarithm of the number of'
      ' experts, the router does not tell them apart; at 0 it is certain of'
      ' one. Low entropy with an even load is what specialised experts look'
      ' like.',
      figures.entropy(counts),
      ('layer', 'tokens', 'number', 'entropy_nats', 'ln_experts'),
      rows,
  )


def _coactivation(counts: counts_lib.Counts) -> exhibits.Exhibit:
  rows = []
  for name, modality in _modalities():
    pairs_LEE = (
        counts.pairs_LMEE.sum(1)
        if modality is None
        else counts.pairs_LMEE[:, modality]
    )
    share_LEE = counts_lib.pairs_LEE(counts, modality)
    rows += [
        (layer, name, a, b, int(pairs_LEE[n, a, b]), float(share_LEE[n, a, b]))
        for n, layer in enumerate(counts.layers)
        for a in range(counts.num_experts)
        for b in range(a + 1, counts.num_experts)
    ]
  k, e = counts.top_k, counts.num_experts
  even = 100 * k * (k - 1) / (e * (e - 1))
  return exhibits.Exhibit(
      'coactivation',
      'Co-activation of experts',
      f'The share of tokens that chose both experts of a pair among their {k}'
      f' choices. If all pairs were as likely, each would have {even:.3g} %. A'
      ' bright pair works together; a dark row is an expert that is rarely'
      ' used.',
      figures_paths.coactivation(counts),
      ('layer', 'tokens', 'expert_a', 'expert_b', 'number', 'share'),
      rows,
  )


def _modalities() -> list[tuple[str, int | None]]:
  """Names of the rows of a table, also of a modality without tokens."""
  return [
      (exhibits.ALL, None),
      *((name, m) for m, name in enumerate(counts_lib.MODALITIES)),
  ]
