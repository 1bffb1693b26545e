# SPDX-License-Identifier: Apache-2.0
"""Batches of one modality and similar lengths: the original's sampler.

`get_modality_length_grouped_indices` of `moellava/train/llava_trainer.py`; only
its random numbers are others, and where a chunk lies in its batch. Of W chunks,
each what a GPU of the original takes at a time, chunk c has the rows c, c + W,
c + 2W, ... So, if `accumulate` divides W, the step cuts a batch between chunks
and never through one; with `accumulate` = W a micro-batch is a chunk.
"""

from collections.abc import Sequence

import numpy as np

from moellava_jax.data import packing, shuffling


def batches(
    items_N: np.ndarray,
    words_N: np.ndarray,
    has_image_N: np.ndarray,
    *,
    batch_size: int,
    world: int,
    key: Sequence[int],
) -> packing.Plan:
  """A row for each conversation, batch by batch.

  The last batch is filled with empty rows, where the original has a smaller
  one; it is not dealt out, so that each micro-batch has as many rows of it.

  Args:
    items_N: numbers of conversations.
    words_N: their lengths, words between white space in all turns.
    has_image_N: bool.
    batch_size: the original's `world` times its rows per device, and so a
      multiple of it.
    world: devices times micro-batches.
    key: decides the order.
  """
  modalities = []
  for number, mask_N in enumerate((has_image_N, ~has_image_N)):
    chosen = np.flatnonzero(mask_N)
    if len(chosen):
      order = shuffling.permutation(len(chosen), *key, number)
      chosen = chosen[order]
      modalities.append(
          _alike(chosen, words_N[chosen], batch_size=batch_size, world=world)
      )
  if len(modalities) == 1:
    order = np.concatenate(modalities[0])
  else:
    whole = [batch for found in modalities for batch in found[:-1]]
    shuffled = shuffling.permutation(len(whole), *key, 2)
    rest = np.concatenate([found[-1] for found in modalities])
    rest = rest[np.argsort(items_N[rest], kind='stable')]
    order = np.concatenate([*(whole[n] for n in shuffled), rest])
  plan = packing.alone(items_N[_dealt(order, batch_size, world)])
  empty = np.full(-len(order) % batch_size, len(order))
  return plan._replace(ends_R=np.concatenate([plan.ends_R, empty]))


def _dealt(order: np.ndarray, batch_size: int, world: int) -> np.ndarray:
  """Whole batches with their chunks side by side, not behind each other."""
  whole = len(order) - len(order) % batch_size
  chunks = order[:whole].reshape(-1, world, batch_size // world)
  return np.concatenate([chunks.swapaxes(1, 2).reshape(-1), order[whole:]])


def _alike(
    chosen_N: np.ndarray, words_N: np.ndarray, *, batch_size: int, world: int
) -> list[np.ndarray]:
  """Cuts a shuffled list into batches, each divided evenly by length."""
  batches = []
  for start in range(0, len(chosen_N), batch_size):
    part = slice(start, start + batch_size)
    longest_first = np.argsort(-words_N[part], kind='stable')
    order = _even(words_N[part][longest_first].tolist(), world)
    batches.append(chosen_N[part][longest_first[order]])
  return batches


def _even(words: list[int], chunks: int) -> list[int]:
  """Divides a descending list into chunks of equal size and similar sum."""
  if len(words) % chunks:
    return [i for c in range(chunks) for i in range(c, len(words), chunks)]
  size = len(words) // chunks
  divided: list[list[int]] = [[] for _ in range(chunks)]
  sums = [0.0] * chunks
  for number, count in enumerate(words):
    shortest = sums.index(min(sums))
    divided[shortest].append(number)
    sums[shortest] += count
    if len(divided[shortest]) == size:
      sums[shortest] = float('inf')
  return [number for chunk in divided for number in chunk]
