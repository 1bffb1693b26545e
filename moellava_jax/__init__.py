# SPDX-License-Identifier: Apache-2.0
"""MoE-LLaVA on JAX and Flax: train sparse vision-language models."""

from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
  from moellava_jax.infer import chat as chat_lib

__version__ = '0.1.0'


def load(path: str, cpu_devices: int = 1, mesh: Any = None) -> 'chat_lib.Chat':
  """A model to talk to; see `moellava_jax.infer.chat.load`."""
  # Imported here because whoever scores answers or reads configs needs no JAX.
  from moellava_jax.infer import chat

  return chat.load(path, cpu_devices, mesh)
