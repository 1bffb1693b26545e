# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong before any time is spent on it.

Do all processes run the same code on the same config, have as many devices as
the mesh needs, reach each other's devices, and see one folder that they may
write to?
"""

from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import queue
import threading
import time
from typing import Any
import uuid

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

import moellava_jax
from moellava_jax import config, run_folder, sharding, trees
from moellava_jax.train import about, cluster, placement

_SUM_S = 300  # The first collective of a large cluster connects all devices.
_FILES_S = 120  # A network file system that is gone answers never.
_SEE_S = 10  # Network file systems remember what was not there.
_BYTES = 1 << 20


def check(cfg: config.TrainConfig) -> dict[str, jax.sharding.Mesh]:
  """Returns the mesh of every stage when everything is as it has to be.

  Raises:
    config.UserError: in every process, as `cluster.ClusterError` if there are
      several: they differ, the mesh does not fit, a collective fails, or the
      run folder cannot be written by all.
  """
  run_folder.check(cfg.workdir)
  code = _code()
  settings = trees.flatten(dataclasses.asdict(cfg))
  cluster.agree(
      'config and code',
      code
      | {f'config.{k.replace("/", ".")}': repr(v) for k, v in settings.items()},
  )
  # Not `together`: the others may wait in here for one that cannot start.
  local = jax.local_devices()
  cluster.agree(
      'devices', {'devices': f'{len(local)} x {local[0].device_kind}'}
  )
  seconds = _sum(sharding.data_mesh())
  # These depend on what is equal in all processes by now.
  meshes = {stage: placement.mesh_for(cfg, stage) for stage in cfg.stages}
  free = _files(cfg.workdir)
  digest = hashlib.sha256(config.to_json(cfg).encode()).hexdigest()[:12]
  processes = jax.process_count()
  cluster.say(
      f'preflight: {len(local)} x {local[0].device_kind} in'
      f' {processes} process{"es" if processes > 1 else ""}; a sum over all'
      f' took {seconds:.1f} s'
  )
  cluster.say(
      f'preflight: config {digest}, code {code["revision"][:12]}, jax'
      f' {code["jax"]}; {cfg.workdir} can be written{free}'
  )
  return meshes


def _code() -> dict[str, str]:
  """What decides the compiled program beside the config."""
  words = os.environ.get('XLA_FLAGS', '').split()
  return {
      'moellava_jax': moellava_jax.__version__,
      'revision': about.revision(),
      'source files': _source(),
      **about.versions(),
      # Dumps may go elsewhere in each process.
      'XLA_FLAGS': ' '.join(x for x in words if '_dump_' not in x),
      'LIBTPU_INIT_ARGS': os.environ.get('LIBTPU_INIT_ARGS', ''),
  }


def _source() -> str:
  """A hash of the package, which may be no git clone or have changes."""
  digest = hashlib.sha256()
  root = pathlib.Path(moellava_jax.__file__).parent
  for path in sorted(root.rglob('*.py')):
    digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _within(seconds: float, function: Callable[[], Any]) -> Any:
  """What `function` returns, called in a thread that is left if it hangs.

  Raises:
    TimeoutError: it has not returned by then; or whatever it raises.
  """
  answer: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

  def call() -> None:
    try:
      answer.put((function(), None))
    except Exception as error:
      answer.put((None, error))

  threading.Thread(target=call, daemon=True).start()
  try:
    result, error = answer.get(timeout=seconds)
  except queue.Empty:
    raise TimeoutError(f'no result after {seconds:g} s') from None
  if error is not None:
    raise error
  return result


def _sum(mesh: jax.sharding.Mesh) -> float:
  """Seconds of a sum over all devices.

  Raises:
    config.UserError: it is wrong, fails, or does not return.
  """
  count = mesh.size
  spec = jax.sharding.PartitionSpec(sharding.AXES)
  numbers = np.arange(1, count + 1, dtype=np.int32)
  began = time.monotonic()

  def add() -> int:
    x = jax.make_array_from_callback(
        (count,), jax.sharding.NamedSharding(mesh, spec), numbers.__getitem__
    )
    return int(jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(x))

  try:
    total = _within(_SUM_S, add)
    found = f'gave {total} for {numbers.sum()}'
  except Exception as error:
    total, found = None, f'failed: {error}'
  if total != numbers.sum():
    raise config.UserError(
        f'A sum over all {count} devices {found}. The processes have found each'
        ' other, so look at what connects their devices: the network between'
        ' the hosts (firewall, NCCL_SOCKET_IFNAME) and the devices themselves.'
    )
  return time.monotonic() - began


def _files(root: str) -> str:
  """Writes to, reads from and deletes in `root`, from every process.

  Returns:
    How much room there is, as the end of a sentence, where that is known.
  """
  folder = epath.Path(root)
  token = cluster.gather('a token', uuid.uuid4().hex)[0]
  mine = folder / f'.preflight-{token}-{cluster.process()}'

  def write():
    _note_if_gone(folder)
    content = os.urandom(_BYTES)
    try:
      folder.mkdir(parents=True, exist_ok=True)
      mine.write_bytes(content)
      same = mine.read_bytes() == content
    except Exception as error:
      raise config.UserError(
          f'The run folder {root} cannot be written: {run_folder.reason(error)}.'
          ' Make room there, or mend its permissions, or choose another'
          ' --config.workdir.'
      ) from error
    if not same:
      raise config.UserError(
          f'{root} returns other bytes than were written to it.'
      )

  def see():
    theirs = folder / f'.preflight-{token}-0'
    deadline = time.monotonic() + _SEE_S
    while not theirs.exists():
      if time.monotonic() > deadline:
        raise config.UserError(
            f'does not see what {cluster.name(0)} has written to {root}. All'
            ' processes need one folder that they share: name a path on a'
            ' common file system with --config.workdir.'
        )
      time.sleep(0.2)

  def remove():
    with contextlib.suppress(Exception):  # Where nothing could be written.
      mine.unlink(missing_ok=True)

  def answer(function):
    try:
      return _within(_FILES_S, function)
    except TimeoutError as error:
      raise config.UserError(
          f'The run folder {root} does not answer: {error}. Look at the file'
          ' system it is on (is it mounted, can its server be reached?), or'
          ' choose another --config.workdir.'
      ) from error

  try:
    cluster.together('writing to the run folder', lambda: answer(write))
    cluster.together('reading from the run folder', lambda: answer(see))
  finally:
    with contextlib.suppress(TimeoutError):
      _within(_SEE_S, remove)
  free = answer(lambda: run_folder.room(root))
  return '' if free is None else f', {free / 1e9:,.1f} GB free'


def _note_if_gone(folder: epath.Path) -> None:
  """Says that a requeued job begins anew: its file system may not be mounted.

  No error, because a job may be requeued before it has made its folder.
  """
  restarts = os.environ.get('SLURM_RESTART_COUNT', '0')
  if restarts != '0' and run_folder.is_gone(folder):
    cluster.say(
        f'note: the run folder {folder} is not there, though this job has been'
        f' requeued (SLURM_RESTART_COUNT={restarts}): the run begins at its'
        ' first step. If it had begun before, is its file system mounted?'
    )
