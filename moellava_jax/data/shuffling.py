# SPDX-License-Identifier: Apache-2.0
"""A random order that stays the same for ever."""

import numpy as np


def permutation(size: int, *key: int) -> np.ndarray:
  """int32, a random order of `size` things, the same for the same `key`.

  Made from raw bits, which NumPy promises never to change; its `shuffle` and
  `permutation` may become others.
  """
  bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
  return np.argsort(bits, kind='stable').astype(np.int32)
