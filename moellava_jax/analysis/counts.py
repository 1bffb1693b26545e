# SPDX-License-Identifier: Apache-2.0
"""What tokens did at the routers, as whole numbers; and the shares in them.

`tally` makes them. Whatever is drawn or written of routing is computed here.

Letters: L sparse layers, M modality (0 text, 1 image), E experts, N tokens, k
choices of a token, C pathways.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from moellava_jax.analysis import pathways

MODALITIES = ('text', 'image')


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
  """Sums over tokens. Choices count whether they were kept or not."""

  layers: tuple[int, ...]  # Numbers of the sparse layers in the decoder.
  num_experts: int
  top_k: int
  conversations: int
  tokens_M: np.ndarray  # int64.
  first_LME: np.ndarray  # int64, first choices.
  assigned_LME: np.ndarray  # int64, all k choices.
  kept_LME: np.ndarray  # int64, choices that found room.
  pairs_LMEE: np.ndarray  # int64, tokens that chose both; symmetric, not ee.
  entropy_LM: np.ndarray | None  # float64, sums in nats; None: not recorded.
  paths_M: tuple[pathways.Views, ...]


# Shares. Where nothing was counted they are 0, never NaN.


def load_LE(counts: Counts, modality: int | None = None) -> np.ndarray:
  """Every expert's part of the choices of a layer; None: of both modalities."""
  of_LE = _of(counts.assigned_LME, modality)
  return _share(of_LE, of_LE.sum(-1, keepdims=True))


def image_part_LE(counts: Counts) -> np.ndarray:
  """The part of image tokens in an expert's choices, the modalities balanced.

  As if there were as many image tokens as text tokens (the original's figures
  do the same): 0.5 is no preference. An expert without a token has 0, and
  `text_part_LE` too.
  """
  text_LE, image_LE = load_LE(counts, 0), load_LE(counts, 1)
  return _share(image_LE, text_LE + image_LE)


def text_part_LE(counts: Counts) -> np.ndarray:
  """The part of text tokens; see `image_part_LE`."""
  text_LE, image_LE = load_LE(counts, 0), load_LE(counts, 1)
  return _share(text_LE, text_LE + image_LE)


def drop_rate_L(counts: Counts, modality: int | None = None) -> np.ndarray:
  """The part of the choices that found their expert full."""
  assigned_L = _of(counts.assigned_LME, modality).sum(-1)
  kept_L = _of(counts.kept_LME, modality).sum(-1)
  return _share(assigned_L - kept_L, assigned_L)


def entropy_L(counts: Counts, modality: int | None = None) -> np.ndarray | None:
  """Mean entropy of the router in nats; None where it was not recorded."""
  if counts.entropy_LM is None:
    return None
  tokens = (
      counts.tokens_M.sum() if modality is None else counts.tokens_M[modality]
  )
  return _share(_of(counts.entropy_LM, modality), tokens)


def pairs_LEE(counts: Counts, modality: int | None = None) -> np.ndarray:
  """The part of a layer's tokens that chose both experts, symmetric."""
  tokens = (
      counts.tokens_M.sum() if modality is None else counts.tokens_M[modality]
  )
  return _share(_of(counts.pairs_LMEE, modality), tokens)


def present(counts: Counts) -> list[int]:
  """The modalities that have tokens."""
  return [m for m in range(len(MODALITIES)) if counts.tokens_M[m]]


def _of(values_LM: np.ndarray, modality: int | None) -> np.ndarray:
  return values_LM.sum(1) if modality is None else values_LM[:, modality]


def _share(part: np.ndarray, whole: Any) -> np.ndarray:
  return part / np.where(whole == 0, 1, whole)


# As JSON.


def to_json(counts: Counts) -> dict[str, Any]:
  """Plain numbers and lists; `from_json` is the inverse."""

  def plain(value):
    if isinstance(value, np.ndarray):
      return value.tolist()
    if isinstance(value, pathways.Views):
      return {name: plain(v) for name, v in value._asdict().items()}
    return [plain(v) for v in value] if isinstance(value, tuple) else value

  fields = dataclasses.fields(counts)
  return {field.name: plain(getattr(counts, field.name)) for field in fields}


def from_json(data: Mapping[str, Any]) -> Counts:
  """What `to_json` wrote; KeyError or ValueError if it did not."""
  layers = len(data['layers'])

  def paths(value):
    return pathways.Views(
        int(value['tokens']),
        int(value['distinct']),
        np.array(value['top_CL'], np.uint8).reshape(-1, layers),
        np.array(value['top_count_C'], np.int64),
        np.array(value['component_CL'], np.uint8).reshape(-1, layers),
        np.array(value['variance_C'], np.float64),
    )

  entropy = data['entropy_LM']
  return Counts(
      layers=tuple(data['layers']),
      num_experts=int(data['num_experts']),
      top_k=int(data['top_k']),
      conversations=int(data['conversations']),
      tokens_M=np.array(data['tokens_M'], np.int64),
      first_LME=np.array(data['first_LME'], np.int64),
      assigned_LME=np.array(data['assigned_LME'], np.int64),
      kept_LME=np.array(data['kept_LME'], np.int64),
      pairs_LMEE=np.array(data['pairs_LMEE'], np.int64),
      entropy_LM=None if entropy is None else np.array(entropy, np.float64),
      paths_M=tuple(paths(value) for value in data['paths_M']),
  )
