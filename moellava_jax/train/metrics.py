# SPDX-License-Identifier: Apache-2.0
"""What a run says: `metrics.jsonl`, a display, TensorBoard, W&B."""

import importlib.util
import json
import os
import sys
from typing import Any
import zlib

from etils import epath
import numpy as np

from moellava_jax import run_folder
from moellava_jax.train import cluster


def layer_metrics(stats: Any, balance: Any, count: int) -> dict[str, Any]:
  """Readable figures of one sparse layer.

  Args:
    stats: `MoeStats` summed over the micro-batches.
    balance: balance loss summed over the micro-batches.
    count: number of micro-batches.

  Returns:
    `load` (share of all k assignments per expert), `drop_rate` (share of
    assignments beyond the capacity), `entropy` (of the router, nats, mean over
    tokens), each for all tokens and for image and text tokens, and `aux_loss`.
    A modality without tokens has zeros.
  """
  masks = {'': slice(None), '_text': slice(0, 1), '_image': slice(1, 2)}
  record: dict[str, Any] = {'aux_loss': float(balance) / count}
  for suffix, rows in masks.items():
    assigned_E = np.sum(stats.assigned_ME[rows], axis=0)
    kept_E = np.sum(stats.kept_ME[rows], axis=0)
    total = max(float(np.sum(assigned_E)), 1.0)
    tokens = max(float(np.sum(stats.tokens_M[rows])), 1.0)
    record[f'load{suffix}'] = [round(float(x) / total, 6) for x in assigned_E]
    dropped = float(np.sum(assigned_E) - np.sum(kept_E))
    record[f'drop_rate{suffix}'] = dropped / total
    record[f'entropy{suffix}'] = float(np.sum(stats.entropy_M[rows])) / tokens
  return record


def step_record(
    stage: str,
    step: int,
    metrics: dict[str, Any],
    *,
    seconds: float,
    count: int,
    layers: tuple[int, ...],
) -> dict[str, Any]:
  """One line of `metrics.jsonl`; `metrics` are on the host already.

  `loss` is the exact fp32 value of the optimised objective; `ce_loss` its
  language part, a mean over targets; `samples` identifies the rows.
  """
  sums = metrics['sums']
  record = {
      'stage': stage,
      'step': step,
      'loss': float(metrics['loss']),
      'ce_loss': float(sums.ce_loss) / max(float(sums.weight), 1.0),
      'aux_loss': float(sums.balance_loss) / count,
      'grad_norm': float(metrics['grad_norm']),
      'lr': float(metrics['lr']),
      'tokens': int(sums.tokens),
      'targets': int(sums.weight),
      'tokens_per_s': float(sums.tokens) / max(seconds, 1e-9),
      'seconds': seconds,
      'skipped': int(metrics['skipped']),
      'samples': _identity(metrics['ids_B']),
  }
  if stage == 'warmup':
    record['probe_loss'] = float(sums.probe_loss) / count
  if layers:
    record['z_loss'] = float(sums.z_loss) / count
    record['moe'] = {
        str(layer): layer_metrics(stats, balance, count)
        for layer, stats, balance in zip(
            layers, sums.stats, sums.layer_balance, strict=True
        )
    }
  return record


def _identity(ids_B: np.ndarray) -> str:
  """The same for the same rows, in whatever order."""
  return f'{zlib.crc32(np.sort(ids_B).tobytes()):08x}'


class Writer:
  """Appends records to `metrics.jsonl`, and to TensorBoard if installed.

  And to Weights & Biases, if that is installed and WANDB_PROJECT names a
  project; WANDB_MODE=offline keeps them in RUN/wandb.

  What comes after `step` of `stage` in an earlier history is forgotten, as it
  will be done again; other stages keep theirs. Only process 0 writes. In gs://
  the file has the records up to the last `publish`.
  """

  def __init__(self, workdir: str, stage: str, step: int):
    self._lines = self._board = self._wandb = None
    if not cluster.is_first():
      return
    path = os.path.join(workdir, 'metrics.jsonl')
    self._lines = run_folder.Lines(path, _history(path, stage, step))
    if importlib.util.find_spec('tensorboardX') is not None:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
          os.path.join(workdir, 'tensorboard', stage), purge_step=step + 1
      )
    self._wandb = _wandb(workdir, stage)

  def write(self, record: dict[str, Any]) -> None:
    if self._lines is not None:
      self._lines.write(json.dumps(record) + '\n')
    if self._board is not None:
      for name, value in _scalars(record):
        self._board.add_scalar(name, value, record['step'])
    if self._wandb is not None:
      self._wandb.log(dict(_scalars(record)), step=record['step'])

  def publish(self) -> None:
    """Returns when the history is safe: the last thing before a checkpoint."""
    if self._lines is not None:
      self._lines.publish()

  def close(self) -> None:
    if self._lines is not None:
      self._lines.close()
    if self._board is not None:
      self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


def _wandb(workdir: str, stage: str) -> Any:
  """The stage as a run of Weights & Biases, or None; goes on with its own."""
  project = os.environ.get('WANDB_PROJECT')
  if not project or importlib.util.find_spec('wandb') is None:
    return None
  import wandb

  path = os.path.abspath(workdir) if '://' not in workdir else workdir
  settings = epath.Path(workdir) / 'config.json'
  try:
    return wandb.init(
        project=project,
        id=f'{zlib.crc32(path.encode()):08x}-{stage}',
        name=f'{os.path.basename(path.rstrip("/"))}/{stage}',
        group=os.path.basename(path.rstrip('/')),
        config=json.loads(settings.read_text()) if settings.exists() else None,
        dir=None if '://' in workdir else path,
        resume='allow',
    )
  except Exception as error:  # No key, no network: no reason not to train.
    cluster.say(f'{stage}: not logged to Weights & Biases: {error}')
    return None


def _history(path: str, stage: str, step: int) -> str:
  """The lines of a history that stay when `stage` goes on after `step`."""
  file = epath.Path(path)
  if not file.exists():
    return ''
  kept = []
  for line in file.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:  # Torn by a kill.
      continue
    if record['stage'] != stage or record['step'] <= step:
      kept.append(line + '\n')
  return ''.join(kept)


def _scalars(record: dict[str, Any], prefix: str = ''):
  for key, value in record.items():
    if isinstance(value, dict):
      yield from _scalars(value, f'{prefix}{key}/')
    elif isinstance(value, list):
      yield from ((f'{prefix}{key}/{n}', x) for n, x in enumerate(value))
    elif isinstance(value, (int, float)) and key != 'step':
      yield prefix + key, value


class Display:
  """A live bar on a terminal, a plain line every `every` steps elsewhere.

  Only process 0 shows anything.
  """

  def __init__(self, stage: str, first: int, steps: int, every: int):
    from rich import console, progress

    self._stage, self._steps, self._every = stage, steps, every
    self._bar = None
    if cluster.is_first() and console.Console(file=sys.stderr).is_terminal:
      self._bar = progress.Progress(
          progress.TextColumn('[bold]{task.description:9}'),
          progress.BarColumn(),
          progress.TextColumn('{task.completed}/{task.total}'),
          progress.TextColumn('{task.fields[text]}'),
          progress.TextColumn('left'),
          progress.TimeRemainingColumn(),
          console=console.Console(file=sys.stderr),
      )
      self._bar.start()
      self._task = self._bar.add_task(
          stage, total=steps, completed=first, text=''
      )

  def update(self, record: dict[str, Any]) -> None:
    step = record['step']
    text = f'loss {record["loss"]:.4f}'
    if 'moe' in record:
      text += f'  aux {record["aux_loss"]:.3f}'
    if 'eval_loss' in record:
      text += f'  held-out {record["eval_loss"]:.4f}'
    text += f'  {record["tokens_per_s"]:,.0f} tokens/s'
    if self._bar is not None:
      self._bar.update(self._task, completed=step, text=text)
    elif step % self._every == 0 or step in (1, self._steps):
      cluster.say(f'{self._stage} {step}/{self._steps}  {text}')

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()
