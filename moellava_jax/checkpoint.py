# SPDX-License-Identifier: Apache-2.0
"""Parameters on disk, through Orbax. The only module that knows the layout.

  RUN/config.json, metrics.jsonl, stages.json, tokenizer/
  RUN/frozen/HASH/        what a stage does not train, written once
  RUN/STAGE/STEP/         trained parameters, optimizer, data state, config
  RUN/STAGE/final/        everything: parameters, config, tokenizer

`final/` can be copied elsewhere alone; a STEP needs `RUN/frozen/`. A directory
counts as soon as its parameters do: Orbax renames them into place when they
are complete (in gs:// it adds commit_success.txt), so a kill at any moment
leaves the previous state.

A step that cannot be read is an error that names it, and never passed over:
no kill leaves one, so something else is wrong, which may pass (a network disk,
memory), and whoever knows decides whether to delete it.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import math
import sys
import threading
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moellava_jax import config, run_folder, saved_config, trees

_TOO_LARGE = (
    'It is too large for its devices: split it over more of them, with'
    ' --mesh=fsdp=N, or in training with --config.mesh.fsdp=N.'
)
_DAMAGED = (
    'If its files are damaged, copy them again or take another checkpoint.'
)
_NO_ROOM = (
    'What was saved before is untouched. Make room or mend the disk, and run'
    ' the same command again to go on from there.'
)

# Bytes of arrays that are read before some of them are changed.
_PART = 1 << 30

# (path, array as it was stored) -> the array to be kept.
Each = Callable[[str, jax.Array], jax.Array]


class CheckpointError(config.UserError):
  """A checkpoint that cannot be used; the message says what to do."""


@contextlib.contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
  """Any failure inside becomes a CheckpointError: what, why, what to do."""
  try:
    yield
  except config.UserError:
    raise
  except Exception as error:
    # Orbax, TensorStore and the file systems below share no base class.
    if 'RESOURCE_EXHAUSTED' in str(error):
      advice = _TOO_LARGE
    raise CheckpointError(
        f'{what}: {run_folder.reason(error)}. {advice}'
    ) from error


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
  bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
  factor = jax.lax.iota(jnp.uint32, bits.size) * 2 + 1
  return jnp.sum(bits.reshape(-1) * factor, dtype=jnp.uint32)


def checksum(x: jax.Array) -> tuple[tuple[int, ...], str, int]:
  """What `fingerprint` wants to know of an array.

  The bits are summed up on the device with a different odd factor each, so
  that sharded arrays need not be gathered.
  """
  return x.shape, str(x.dtype), int(_sum_of_bits(x))


def fingerprint(tree: Any) -> str:
  """Twelve hex digits of the content of a tree of arrays."""
  return fingerprint_of(
      {path: checksum(x) for path, x in trees.flatten(tree).items()}
  )


def fingerprint_of(checksums: dict[str, Any]) -> str:
  """The `fingerprint` of a tree by the `checksum` of each of its paths."""
  entries = [(path, *found) for path, found in sorted(checksums.items())]
  return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:12]


def _shapes(tree: Any) -> dict[str, Any]:
  """JSON description of a tree, from which `abstract` rebuilds it."""
  return {
      path: [list(x.shape), str(x.dtype)]
      for path, x in trees.flatten(tree).items()
  }


def abstract(
    shapes: dict[str, Any],
    shardings: dict[str, Any] | None,
    default: Any = None,
) -> Any:
  """A tree of ShapeDtypeStructs from the description that a save kept.

  Leaves without a sharding (by path) get `default`, or else lie on the first
  device.
  """
  alone = default
  if default is None:
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return trees.unflatten(
      {
          path: jax.ShapeDtypeStruct(
              shape,
              jnp.dtype(dtype),
              sharding=(shardings or {}).get(path, alone),
          )
          for path, (shape, dtype) in shapes.items()
      }
  )


def _checkpointer(
    tree: Any, handler: Any = ocp.StandardCheckpointHandler
) -> ocp.Checkpointer:
  """Orbax, holding no more copies of arrays than the largest of `tree` needs.

  It would hold a second model otherwise. It takes fractions of a gigabyte,
  whatever the annotation says.
  """
  # Not by paths: the state of an optimizer has tuples in it.
  sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)]
  limit: Any = (max(sizes, default=0) + (1 << 20)) / 1e9
  return ocp.Checkpointer(
      handler(save_concurrent_gb=limit, restore_concurrent_gb=limit)
  )


def _save(path: epath.Path, tree: Any) -> None:
  with _checkpointer(tree) as checkpointer:
    checkpointer.save(path, args=ocp.args.StandardSave(tree), force=True)


def _read(path: epath.Path, abstract: Any) -> Any:
  with _checkpointer(abstract) as checkpointer:
    return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))


def _parts(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Some of the leaves at a time: `_PART` bytes, or one that is larger."""
  part, size = {}, 0
  for path, leaf in leaves.items():
    more = math.prod(leaf.shape) * leaf.dtype.itemsize
    if part and size + more > _PART:
      yield part
      part, size = {}, 0
    part[path] = leaf
    size += more
  if part:
    yield part


def _read_each(path: epath.Path, abstract: Any, each: Each) -> Any:
  """`_read`, with what `each` makes of an array in its place."""
  kept = {}
  for leaves in _parts(trees.flatten(abstract)):
    part = trees.unflatten(leaves)
    with _checkpointer(part, ocp.PyTreeCheckpointHandler) as checkpointer:
      found = checkpointer.restore(
          path,
          args=ocp.args.PyTreeRestore(
              item=part,
              restore_args=ocp.checkpoint_utils.construct_restore_args(part),
              partial_restore=True,
          ),
      )
    for name, x in trees.flatten(found).items():
      if not isinstance(x, jax.Array):  # Orbax hands back what was asked for.
        raise CheckpointError(f'{path} has no array {name}. {_DAMAGED}')
      kept[name] = each(name, x)
    del found, x
  return trees.unflatten(kept)


def _restore(path: epath.Path, abstract: Any, each: Each | None = None) -> Any:
  with _explained(f'{path} cannot be read', _DAMAGED):
    if each is None:
      return _read(path, abstract)
    return _read_each(path, abstract, each)


def _is_first() -> bool:
  """Whether this process writes what Orbax does not; readers come later.

  Orbax makes all processes wait for each other before parameters count.
  """
  return jax.process_index() == 0


def _is_complete(path: epath.Path) -> bool:
  """Whether Orbax has finished a directory of arrays, and it is there."""
  return ocp.utils.is_checkpoint_finalized(path)


def _refuse_copies(folder: epath.Path) -> None:
  """Raises CheckpointError if something in `folder` was copied from a disk.

  There Orbax marks by its name what is complete, and in gs:// by a file. It
  would take a copy for what a kill has left, and delete it.
  """
  for path in folder.iterdir() if folder.exists() else ():
    if not (path.name.isdigit() or path.name == 'params'):
      continue
    written = path / '_CHECKPOINT_METADATA'
    if _is_complete(path) or not written.exists():
      continue
    if json.loads(written.read_text())['commit_timestamp_nsecs'] is not None:
      raise CheckpointError(
          f'{path} seems to be a copy from a disk: it is complete, but without'
          ' the file commit_success.txt, which says so in gs://. Put an empty'
          ' one there (also into the folders of a step, and frozen/*/params),'
          f' or delete {path}.'
      )


def _steps(folder: epath.Path) -> list[int]:
  """The complete steps of a stage, ascending."""
  return sorted(ocp.utils.checkpoint_steps(folder))


def newest_step(run: str, stage: str) -> epath.Path | None:
  """The newest complete step of a stage, if there is one.

  Raises:
    CheckpointError: the folder of the stage cannot be read.
  """
  folder = run_folder.absolute(run) / stage
  with _explained(f'{folder} cannot be read', 'Use another --config.workdir.'):
    _refuse_copies(folder)
    _refuse_copies(folder / 'final')
    steps = _steps(folder)
  return folder / str(steps[-1]) if steps else None


def latest_meta(run: str, stage: str) -> tuple[str, dict[str, Any]] | None:
  """(path, description) of the newest step of a stage, if there is one.

  Raises:
    CheckpointError: it cannot be read.
  """
  step = newest_step(run, stage)
  if step is None:
    return None
  with _readable(step.parent, int(step.name)):
    return str(step), _read_meta(step)


@contextlib.contextmanager
def _readable(folder: epath.Path, step: int) -> Iterator[None]:
  """Explains what to do about a step that cannot be read."""
  path = folder / str(step)
  earlier = [s for s in _steps(folder) if s < step]
  goes_on = f'after step {earlier[-1]}' if earlier else 'at its first step'
  advice = (
      'If its files are damaged (a kill does not do that), delete or move'
      f' {path}: the stage then goes on {goes_on}.'
  )
  with _explained(f'Checkpoint {path} cannot be read', advice):
    yield


def _read_meta(step: epath.Path) -> dict[str, Any]:
  """May be called by one process alone."""
  # A `Checkpointer` would wait for all processes when it has read.
  return dict(
      ocp.JsonCheckpointHandler().restore(run_folder.absolute(step) / 'meta')
  )


class Stage:
  """The checkpoints of one stage of a run."""

  def __init__(self, run: str, stage: str, cfg: config.CheckpointConfig):
    self.name = stage
    self._saver = 0  # The thread that calls `save`.
    self._failed = threading.Event()
    self._run = run_folder.absolute(run)
    self._dir = self._run / stage
    policies = ocp.checkpoint_managers
    kept: list[Any] = [policies.LatestN(cfg.keep)]
    if cfg.keep_every is not None:
      kept.append(policies.EveryNSteps(cfg.keep_every))
    with _explained(
        f'{self._dir} cannot be written', 'Use another --config.workdir.'
    ):
      self._manager = ocp.CheckpointManager(
          self._dir,
          options=ocp.CheckpointManagerOptions(
              preservation_policy=policies.AnyPreservationPolicy(kept),
              create=True,
              cleanup_tmp_directories=True,  # What kills have left.
              enable_async_checkpointing=True,
              async_options=ocp.options.AsyncOptions(
                  barrier_sync_fn=self._meet
              ),
          ),
          item_names=('trained', 'optimizer', 'meta'),
      )

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    """The barrier of Orbax' threads, which a process that failed does not enter.

    Orbax would wait there for twenty minutes, for processes that wait for this
    one elsewhere, before it tells of the failure.
    """
    error = sys.exception()  # Orbax may call from a `finally`, as may ours.
    if error is not None and threading.get_ident() != self._saver:
      self._failed.set()
      raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def read_meta(self, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    with _readable(self._dir, step):
      return self._manager.restore(step, args=args)['meta']

  def save(
      self, step: int, trained: Any, optimizer: Any, meta: dict[str, Any]
  ) -> None:
    """Starts an asynchronous save; the previous one is waited for.

    Args:
      step: what the checkpoint is called.
      trained: the trained parameters.
      optimizer: what goes on with them.
      meta: JSON; `meta['frozen']` is what `save_frozen` returned.

    Raises:
      CheckpointError: this save, or the one before, has failed.
    """
    self._saver = threading.get_ident()
    self.wait()
    frozen = self._run / 'frozen' / meta['frozen'] / 'params'
    gone = [self._dir] if run_folder.is_gone(self._dir) else []
    if meta['frozen'] and not _is_complete(frozen):
      gone.append(frozen)
    if gone:
      raise CheckpointError(
          f'{gone[0]} has vanished during the run, so step {step} is not saved:'
          ' it would be of no use without. Put it back, or begin again in'
          ' another --config.workdir.'
      )
    meta = {**meta, 'trained': _shapes(trained)}
    with self._saving(f'Step {step}'):
      self._manager.save(
          step,
          args=ocp.args.Composite(
              trained=ocp.args.StandardSave(trained),
              optimizer=ocp.args.StandardSave(optimizer),
              meta=ocp.args.JsonSave(meta),
          ),
          force=True,
      )

  def _saving(self, what: str):
    return _explained(f'{what} cannot be saved in {self._dir}', _NO_ROOM)

  def restore(self, step: int, trained: Any, optimizer: Any):
    """Returns (trained, optimizer) like the abstract trees given.

    Raises:
      CheckpointError: the step cannot be read.
    """
    # Not by the manager, which would hold nearly a second copy in host memory.
    self.wait()  # It may be the step that is being saved.
    folder = self._dir / str(step)
    with _readable(self._dir, step):
      return (
          _read(folder / 'trained', trained),
          _read(folder / 'optimizer', optimizer),
      )

  def save_frozen(self, frozen: Any) -> str:
    """Writes what the stage does not train, once; returns its hash."""
    if not trees.flatten(frozen):
      return ''
    name = fingerprint(frozen)
    path = self._run / 'frozen' / name
    # One process looks, as all have to do the same.
    there = _is_complete(path / 'params')
    if not multihost_utils.broadcast_one_to_all(np.int32(there)):
      with self._saving('What the stage does not train'):
        if _is_first():
          path.mkdir(parents=True, exist_ok=True)
          run_folder.write_json(path / 'shapes.json', _shapes(frozen))
        _save(path / 'params', frozen)
    return name

  def save_final(self, params: Any, cfg: config.TrainConfig, meta, tokenizer):
    """Writes `final/`; `tokenizer(directory)` saves the tokenizer."""
    self.wait()
    path = self._dir / 'final'
    with self._saving('The final model'):
      write_final(path, params, cfg, self.name, meta, tokenizer)

  def check(self) -> None:
    """Raises CheckpointError if a save in the background has failed."""
    if self._failed.is_set() or not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for the save in the background; raises CheckpointError."""
    with self._saving('The newest step'):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def write_final(
    path: epath.Path,
    params: Any,
    cfg: config.TrainConfig,
    stage: str,
    meta: dict[str, Any],
    tokenizer: Callable[[str], None],
) -> None:
  """Writes a complete model; the parameters last, so that they mean done.

  Args:
    path: the directory, a `final/`.
    params: parameters, in the dtype in which they are kept.
    cfg: the config of the run.
    stage: the stage that the parameters come from.
    meta: more about the stage.
    tokenizer: saves the tokenizer in the directory it is given.
  """
  if _is_first():
    path.mkdir(parents=True, exist_ok=True)
    (path / 'config.json').write_text(config.to_json(cfg) + '\n')
    tokenizer(str(path / 'tokenizer'))
    run_folder.write_json(
        path / 'stage.json', {**meta, 'stage': stage, 'params': _shapes(params)}
    )
  _save(path / 'params', params)


class Model(NamedTuple):
  """What a checkpoint directory holds."""

  params: Any
  config: config.TrainConfig
  stage: str
  tokenizer_dir: str
  path: str


def final_of(run: str, stage: str) -> epath.Path | None:
  """The complete `final/` of a stage, or None."""
  path = epath.Path(run) / stage / 'final'
  return path if _is_complete(path / 'params') else None


def find(path: str) -> epath.Path:
  """The final or step directory meant by a RUN, STAGE, STEP or final path.

  A RUN means its newest finished stage; a STAGE its final, else its newest
  step.
  """
  run_folder.check(path)
  root = epath.Path(path)
  if not root.exists():
    raise CheckpointError(f'Checkpoint {path} does not exist.')
  if _is_complete(root / 'params'):
    return root
  if _is_complete(root) and (root / 'trained').exists():
    return root
  if _is_complete(root / 'final' / 'params'):
    return root / 'final'
  for stage in reversed(config.STAGES):
    if (found := final_of(path, stage)) is not None:
      return found
  if steps := _steps(root):
    return root / str(steps[-1])
  for folder in (root, root / 'final'):
    _refuse_copies(folder)
  raise CheckpointError(
      f'{path} holds no finished checkpoint: expected a run directory with a'
      ' finished stage, a stage directory, one of its steps, or a copied'
      f' final/. It has {sorted(p.name for p in root.iterdir())[:8]}.'
  )


def tokenizer_of(found: epath.Path) -> str:
  """Tokenizer directory of a path that `find` has returned."""
  if (found / 'params').exists():
    return str(found / 'tokenizer')
  return str(found.parent.parent / 'tokenizer')


def describe(path: str) -> tuple[config.TrainConfig, str]:
  """(config, stage) of a checkpoint, for those who ask before they load it.

  Raises:
    CheckpointError: nothing there, or it cannot be read.
  """
  found = find(path)
  with _explained(f'{found} cannot be read', _DAMAGED):
    if (found / 'params').exists():
      about = json.loads((found / 'stage.json').read_text())
      text = (found / 'config.json').read_text()
      return saved_config.read(text), about['stage']
    meta = _read_meta(found)
    return saved_config.build(meta['config']), meta['stage']


def load(
    path: str,
    shardings: dict[str, Any] | None = None,
    default: Any = None,
    each: Each | None = None,
) -> Model:
  """Reads all parameters of a checkpoint (see `find` for what `path` may be).

  Args:
    path: RUN, STAGE, STEP or final directory.
    shardings: parameter path -> sharding.
    default: the sharding of all others; None: the first device.
    each: (parameter path, array) -> what to keep of it, while others are still
      to be read: whoever keeps less never holds all that is stored.

  Raises:
    CheckpointError: nothing there, or a step whose frozen part is missing.
  """
  found = find(path)
  if (found / 'params').exists():
    about = json.loads((found / 'stage.json').read_text())
    params = _restore(
        run_folder.absolute(found) / 'params',
        abstract(about['params'], shardings, default),
        each,
    )
    cfg = saved_config.read((found / 'config.json').read_text())
    return Model(params, cfg, about['stage'], tokenizer_of(found), str(found))
  return _load_step(found, shardings, default, each)


def _load_step(found: epath.Path, shardings, default, each) -> Model:
  with _explained(f'{found} cannot be read', _DAMAGED):
    meta = _read_meta(found)
  trained = _restore(
      run_folder.absolute(found) / 'trained',
      abstract(meta['trained'], shardings, default),
      each,
  )
  run = found.parent.parent
  params = trees.merge(
      trained, load_frozen(str(run), meta['frozen'], shardings, default, each)
  )
  params.pop('probe', None)
  return Model(
      params,
      saved_config.build(meta['config']),
      meta['stage'],
      tokenizer_of(found),
      str(found),
  )


def load_frozen(
    run: str,
    name: str,
    shardings: dict[str, Any] | None,
    default: Any = None,
    each: Each | None = None,
) -> Any:
  """Reads `RUN/frozen/NAME` as `load` does; an empty name is an empty tree."""
  if not name:
    return {}
  path = run_folder.absolute(run) / 'frozen' / name
  if not _is_complete(path / 'params'):
    raise CheckpointError(
        f'{path} is missing: a step holds only the trained parameters. Copy'
        ' the run together with its frozen/ folder, or use a final/.'
    )
  shapes = json.loads((path / 'shapes.json').read_text())
  return _restore(path / 'params', abstract(shapes, shardings, default), each)


def replicate_scalar(value: int, sharding: Any) -> jax.Array:
  """A host integer as a global array, which multi-host saves require."""
  return jax.device_put(np.int32(value), sharding)
