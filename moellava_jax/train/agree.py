# SPDX-License-Identifier: Apache-2.0
"""What all processes of a run do after a step, though a signal hits only one.

Every process saves and stops after the same step, or none can. JAX's own
preemption service would agree on a step too, but takes SIGTERM away from the
phases without steps (see `guard`), where it would be ignored.
"""

import jax
import jax.numpy as jnp
import numpy as np

CONTINUE, SAVE, STOP = range(3)


class Poll:
  """The greatest of the wishes of all processes, the same for all of them.

  All processes call the same methods in the same order. With one process its
  wish is the answer, and nothing runs on a device.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._devices = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(mesh.axis_names)
    )
    self._greatest = jax.jit(
        jnp.max,
        out_shardings=jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec()
        ),
    )
    self._alone = jax.process_count() == 1
    self._last: jax.Array | int = CONTINUE

  def after_step(self, wish: int) -> int:
    """The answer to the wishes of the call before, which is there already.

    That of this call would have to wait for the step that has just been
    dispatched, and the devices would idle before the next one.
    """
    if self._alone:
      return wish
    answer = int(self._last)
    self._last = self._ask(wish)
    return answer

  def saved(self) -> None:
    """To be called after a save, which is what a pending SAVE asks for.

    A process wishes it until the answer arrives: twice. A pending STOP stays.
    """
    if int(self._last) == SAVE:
      self._last = CONTINUE

  def now(self, wish: int) -> int:
    """The answer to this call; waits for all processes."""
    return wish if self._alone else int(self._ask(wish))

  def _ask(self, wish: int) -> jax.Array:
    wishes_P = jax.make_array_from_process_local_data(
        self._devices,
        np.full(jax.local_device_count(), wish, np.int32),
        (jax.device_count(),),
    )
    return self._greatest(wishes_P)
