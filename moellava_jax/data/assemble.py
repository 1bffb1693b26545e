# SPDX-License-Identifier: Apache-2.0
"""Encoded conversations -> rows -> batches."""

from collections.abc import Sequence
from typing import NamedTuple
import zlib

import numpy as np

from moellava_jax.data import batch as batch_lib
from moellava_jax.data import encode, sources


class Loaded(NamedTuple):
  """A conversation and its pixels."""

  example: encode.Example
  images: list[np.ndarray]  # uint8 [H, W, 3] each.


def fill_row(loaded: Sequence[Loaded], fmt: encode.Format) -> batch_lib.Batch:
  """A row (a `Batch` without its leading axis) of any number of conversations.

  Each is a segment of its own, counted from 1, whose positions begin at 0.
  Nothing predicts the first token of the next one.

  Raises:
    DataError: they do not fit; the lengths that were planned with are wrong.
  """
  length = fmt.length
  total = sum(len(example.tokens_L) for example, _ in loaded)
  slots = sum(len(pixels) for _, pixels in loaded)
  if total > length or slots > fmt.max_images:
    raise sources.DataError(
        f'{len(loaded)} conversations that were to share a row take {total}'
        f' positions and {slots} images; a row has {length} and'
        f' {fmt.max_images}. The known lengths are those of other data:'
        ' count them again.'
    )
  row = empty_row(fmt)
  begin = slot = 0
  for segment, (example, pixels) in enumerate(loaded, 1):
    end = begin + len(example.tokens_L)
    row.tokens_BT[begin:end] = example.tokens_L
    row.segment_ids_BT[begin:end] = segment
    row.positions_BT[begin:end] = np.arange(end - begin)
    taught = slice(begin, end - 1)
    row.loss_weight_BT[taught] = example.supervised_L[1:]
    row.targets_BT[taught] = np.maximum(example.tokens_L[1:], 0)
    begin = end
    for pixels_HWC in pixels:
      row.images_BIHWC[slot] = pixels_HWC
      slot += 1
  row.targets_BT[row.loss_weight_BT == 0] = 0
  return row._replace(
      attributes_BIPA=_attributes(loaded, row.attributes_BIPA),
      ids_B=_identity([example.id for example, _ in loaded]),
  )


def empty_row(fmt: encode.Format) -> batch_lib.Batch:
  """A row of padding."""
  length, size = fmt.length, fmt.vision.image_size
  return batch_lib.Batch(
      tokens_BT=np.zeros(length, np.int32),
      targets_BT=np.zeros(length, np.int32),
      loss_weight_BT=np.zeros(length, np.float32),
      segment_ids_BT=np.zeros(length, np.int32),
      positions_BT=np.arange(length, dtype=np.int32),
      images_BIHWC=np.zeros((fmt.max_images, size, size, 3), np.uint8),
      attributes_BIPA=np.zeros((fmt.max_images, 0, 0), np.int32),
      ids_B=np.zeros((), np.uint32),
  )


def _attributes(loaded: Sequence[Loaded], none: np.ndarray) -> np.ndarray:
  """Those of the warm-up, whose rows hold one conversation each."""
  if len(loaded) != 1 or loaded[0].example.attributes is None:
    return none
  return loaded[0].example.attributes


def _identity(ids: Sequence[int]) -> np.ndarray:
  if len(ids) < 2:
    return np.asarray(sum(ids), np.uint32)
  return np.asarray(zlib.crc32(np.array(ids, np.uint32).tobytes()), np.uint32)
