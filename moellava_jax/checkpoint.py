# SPDX-License-Identifier: Apache-2.0
"""Parameters on disk, through Orbax. The only module that knows the layout.

  RUN/config.json, metrics.jsonl, stages.json, tokenizer/
  RUN/frozen/HASH/        what a stage does not train, written once
  RUN/STAGE/STEP/         trained parameters, optimizer, data state, config
  RUN/STAGE/final/        everything: parameters, config, tokenizer

`final/` can be copied elsewhere alone; a STEP needs `RUN/frozen/`. A directory
counts as soon as its parameters do: Orbax renames them into place when they
are complete, so a kill at any moment leaves the previous state.
"""

from collections.abc import Callable
import hashlib
import json
import math
from typing import Any, NamedTuple

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moellava_jax import config, trees


class CheckpointError(config.UserError):
  """A checkpoint that cannot be used; the message says what to do."""


def fingerprint(tree: Any) -> str:
  """Twelve hex digits of the content of a tree of arrays.

  The bits are summed up on the device with a different odd factor each, so
  that sharded arrays need not be gathered.
  """

  @jax.jit
  def checksum(x):
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32)
    factor = jax.lax.iota(jnp.uint32, bits.size) * 2 + 1
    return jnp.sum(bits.reshape(-1) * factor, dtype=jnp.uint32)

  entries = [
      (path, x.shape, str(x.dtype), int(checksum(x)))
      for path, x in sorted(trees.flatten(tree).items())
  ]
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


def _checkpointer(tree: Any) -> ocp.Checkpointer:
  """Orbax, holding no more copies of arrays than the largest of `tree` needs.

  It would hold a second model otherwise. It takes fractions of a gigabyte,
  whatever the annotation says.
  """
  sizes = [
      math.prod(x.shape) * x.dtype.itemsize
      for x in trees.flatten(tree).values()
  ]
  limit: Any = (max(sizes, default=0) + (1 << 20)) / 1e9
  return ocp.Checkpointer(
      ocp.StandardCheckpointHandler(
          save_concurrent_gb=limit, restore_concurrent_gb=limit
      )
  )


def _save(path: epath.Path, tree: Any) -> None:
  with _checkpointer(tree) as checkpointer:
    checkpointer.save(path, args=ocp.args.StandardSave(tree), force=True)


def _restore(path: epath.Path, abstract: Any) -> Any:
  with _checkpointer(abstract) as checkpointer:
    return checkpointer.restore(path, args=ocp.args.StandardRestore(abstract))


def _is_first() -> bool:
  """Whether this process writes what Orbax does not; readers come later.

  Orbax makes all processes wait for each other before parameters count.
  """
  return jax.process_index() == 0


def write_json(path: Any, value: Any) -> None:
  """Writes a small JSON file so that it is either old or new, never half."""
  path = epath.Path(path)
  temporary = path.parent / f'.{path.name}.tmp'
  temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + '\n')
  temporary.replace(path)


def latest_meta(run: str, stage: str) -> tuple[str, dict[str, Any]] | None:
  """(path, description) of the newest step of a stage, if there is one."""
  folder = epath.Path(run) / stage
  if not folder.exists():
    return None
  steps = [int(p.name) for p in folder.iterdir() if p.name.isdecimal()]
  if not steps:
    return None
  path = folder / str(max(steps))
  return str(path), _read_meta(path)


def _read_meta(step: epath.Path) -> dict[str, Any]:
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    return reader.restore(step.absolute() / 'meta')


class Stage:
  """The checkpoints of one stage of a run."""

  def __init__(self, run: str, stage: str, cfg: config.CheckpointConfig):
    self.name = stage
    self._run = epath.Path(run).absolute()
    self._dir = self._run / stage
    self._manager = ocp.CheckpointManager(
        self._dir,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=cfg.keep, create=True, enable_async_checkpointing=True
        ),
        item_names=('trained', 'optimizer', 'meta'),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def read_meta(self, step: int) -> dict[str, Any]:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)['meta']

  def save(
      self, step: int, trained: Any, optimizer: Any, meta: dict[str, Any]
  ) -> None:
    """Starts an asynchronous save; the previous one is waited for."""
    meta = {**meta, 'trained': _shapes(trained)}
    self._manager.save(
        step,
        args=ocp.args.Composite(
            trained=ocp.args.StandardSave(trained),
            optimizer=ocp.args.StandardSave(optimizer),
            meta=ocp.args.JsonSave(meta),
        ),
    )

  def restore(self, step: int, trained: Any, optimizer: Any):
    """Returns (trained, optimizer) like the abstract trees given."""
    restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
            trained=ocp.args.StandardRestore(trained),
            optimizer=ocp.args.StandardRestore(optimizer),
        ),
    )
    return restored['trained'], restored['optimizer']

  def save_frozen(self, frozen: Any) -> str:
    """Writes what the stage does not train, once; returns its hash."""
    if not trees.flatten(frozen):
      return ''
    name = fingerprint(frozen)
    path = self._run / 'frozen' / name
    # One process looks, as all have to do the same.
    there = (path / 'params').exists()
    if not multihost_utils.broadcast_one_to_all(np.int32(there)):
      if _is_first():
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / 'shapes.json', _shapes(frozen))
      _save(path / 'params', frozen)
    return name

  def save_final(self, params: Any, cfg: config.TrainConfig, meta, tokenizer):
    """Writes `final/`; `tokenizer(directory)` saves the tokenizer."""
    self.wait()
    path = self._dir / 'final'
    write_final(path, params, cfg, self.name, meta, tokenizer)

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
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
    write_json(
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
  return path if (path / 'params').exists() else None


def find(path: str) -> epath.Path:
  """The final or step directory meant by a RUN, STAGE, STEP or final path.

  A RUN means its newest finished stage; a STAGE its final, else its newest
  step.
  """
  root = epath.Path(path)
  if not root.exists():
    raise CheckpointError(f'Checkpoint {path} does not exist.')
  if (root / 'params').exists() or (root / 'trained').exists():
    return root
  if (root / 'final' / 'params').exists():
    return root / 'final'
  for stage in reversed(config.STAGES):
    if (found := final_of(path, stage)) is not None:
      return found
  steps = [int(p.name) for p in root.iterdir() if p.name.isdecimal()]
  if steps:
    return root / str(max(steps))
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


def load(
    path: str, shardings: dict[str, Any] | None = None, default: Any = None
) -> Model:
  """Reads all parameters of a checkpoint (see `find` for what `path` may be).

  Args:
    path: RUN, STAGE, STEP or final directory.
    shardings: parameter path -> sharding.
    default: the sharding of all others; None: the first device.

  Raises:
    CheckpointError: nothing there, or a step whose frozen part is missing.
  """
  found = find(path)
  if (found / 'params').exists():
    about = json.loads((found / 'stage.json').read_text())
    params = _restore(
        found.absolute() / 'params',
        abstract(about['params'], shardings, default),
    )
    cfg = config.from_json((found / 'config.json').read_text())
    return Model(params, cfg, about['stage'], tokenizer_of(found), str(found))
  return _load_step(found, shardings, default)


def _load_step(found: epath.Path, shardings, default) -> Model:
  meta = _read_meta(found)
  trained = _restore(
      found.absolute() / 'trained',
      abstract(meta['trained'], shardings, default),
  )
  run = found.parent.parent
  params = trees.merge(
      trained, load_frozen(str(run), meta['frozen'], shardings, default)
  )
  params.pop('probe', None)
  return Model(
      params,
      config.from_dict(meta['config']),
      meta['stage'],
      tokenizer_of(found),
      str(found),
  )


def load_frozen(
    run: str,
    name: str,
    shardings: dict[str, Any] | None,
    default: Any = None,
) -> Any:
  """Reads `RUN/frozen/NAME`; an empty name is an empty tree."""
  if not name:
    return {}
  path = epath.Path(run).absolute() / 'frozen' / name
  if not (path / 'params').exists():
    raise CheckpointError(
        f'{path} is missing: a step holds only the trained parameters. Copy'
        ' the run together with its frozen/ folder, or use a final/.'
    )
  shapes = json.loads((path / 'shapes.json').read_text())
  return _restore(path / 'params', abstract(shapes, shardings, default))


def replicate_scalar(value: int, sharding: Any) -> jax.Array:
  """A host integer as a global array, which multi-host saves require."""
  return jax.device_put(np.int32(value), sharding)
