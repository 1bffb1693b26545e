# SPDX-License-Identifier: Apache-2.0
"""Expert choices of all tokens of an evaluation, on disk.

  OUT/NAME.routing/0000000.npz ...   one file a batch, by its first question

The conversations of a file are laid one behind the other, N tokens in all. L
counts sparse layers, k the choices of a token, Q the conversations:

  layers_L         int32, which of the decoder's layers are sparse
  num_experts, digest, control
  question_Q       int32, the line of the question file, from 0
  question_id_Q    str, as JSON
  length_Q         int32, tokens of prompt and answer
  tokens_N         int32, -200 for a patch of an image
  is_image_N, is_answer_N   bool
  choice_LNk       uint8, the expert
  kept_LNk         bool, False where the expert was full

The last token of an answer is not routed, as nothing follows it.
"""

from collections.abc import Iterator, Sequence
import io
import json
import os
import pathlib
from typing import Any, NamedTuple
import zipfile

import numpy as np

from moellava_jax.evals import base


class Traced(NamedTuple):
  """A conversation; the arrays are those of the module without N's others."""

  question: int
  question_id: int | str
  tokens_T: np.ndarray
  is_image_T: np.ndarray
  is_answer_T: np.ndarray
  choice_LTk: np.ndarray
  kept_LTk: np.ndarray


class About(NamedTuple):
  """Whose choices the files of a folder are."""

  layers: tuple[int, ...]
  num_experts: int
  digest: str
  control: str


class Counts(NamedTuple):
  """Sums over tokens; M is the modality, 0 text and 1 image."""

  layers: tuple[int, ...]
  tokens_M: np.ndarray
  assigned_LME: np.ndarray  # Choices (all k) that fell on each expert.
  kept_LME: np.ndarray  # Choices that were kept.


def folder(answers_path: pathlib.Path) -> pathlib.Path:
  return answers_path.with_suffix('.routing')


def write(
    where: pathlib.Path,
    questions: Sequence[int],
    rows: Sequence[base.Answer],
    routings: Sequence[Any],
    num_experts: int,
) -> None:
  """Writes the file of a batch; atomic.

  Args:
    where: the folder.
    questions: lines of the question file, from 0.
    rows: as many; what answers say about themselves.
    routings: as many `infer.tracing.Routing`.
    num_experts: of a layer.
  """
  where.mkdir(parents=True, exist_ok=True)
  about = rows[0].metadata
  path = where / f'{questions[0]:07d}.npz'
  new = path.with_suffix('.tmp')
  with new.open('wb') as file:
    np.savez(
        file,
        layers_L=np.array(routings[0].layers, np.int32),
        num_experts=np.int32(num_experts),
        digest=np.array(about['digest']),
        control=np.array(about['control']),
        question_Q=np.array(questions, np.int32),
        question_id_Q=np.array([json.dumps(r.question_id) for r in rows]),
        length_Q=np.array([len(r.tokens_T) for r in routings], np.int32),
        tokens_N=np.concatenate([r.tokens_T for r in routings]),
        is_image_N=np.concatenate([r.is_image_T for r in routings]),
        is_answer_N=np.concatenate([r.is_answer_T for r in routings]),
        choice_LNk=np.concatenate(
            [r.choice_MTk for r in routings],
            axis=1,
            dtype=np.uint8,
            casting='unsafe',
        ),
        kept_LNk=np.concatenate([r.kept_MTk for r in routings], axis=1),
    )
  os.replace(new, path)


def questions(where: pathlib.Path, digest: str, control: str) -> set[int]:
  """The questions whose choices are recorded.

  Raises:
    EvalError: they are another model's or control's.
  """
  found: set[int] = set()
  for path in sorted(where.glob('*.npz')):
    with _open(path) as file:
      if (str(file['digest']), str(file['control'])) != (digest, control):
        raise base.EvalError(
            f'{path}: recorded with digest {str(file["digest"])!r} and control'
            f' {str(file["control"])!r}, but this run has {digest!r} and'
            f' {control!r}. Remove {where} or write to another directory.'
        )
      found.update(file['question_Q'].tolist())
  return found


def about(where: str | os.PathLike[str]) -> About:
  """Whose choices these are.

  Raises:
    EvalError: there are none, or they are of several models.
  """
  found: dict[About, pathlib.Path] = {}
  for path in _paths(where):
    with _open(path) as file:
      key = About(
          tuple(file['layers_L'].tolist()),
          int(file['num_experts']),
          str(file['digest']),
          str(file['control']),
      )
    found.setdefault(key, path)
  if len(found) > 1:
    listed = '; '.join(f'{p.name}: {a}' for a, p in found.items())
    raise base.EvalError(
        f'{where}: its files are of several models or controls ({listed}).'
        ' Remove those that do not belong there.'
    )
  return next(iter(found))


def read(where: str | os.PathLike[str]) -> Iterator[Traced]:
  """The conversations of a folder, each once.

  Raises:
    EvalError: there is none, or a file that cannot be read.
  """
  seen: set[int] = set()
  for path in _paths(where):
    with _open(path) as file:
      arrays = {name: file[name] for name in file.files}
    ends = np.cumsum(arrays['length_Q'])
    for n, end in enumerate(ends):
      question = int(arrays['question_Q'][n])
      if question in seen:  # Asked again in another batch, after a kill.
        continue
      seen.add(question)
      part = slice(end - arrays['length_Q'][n], end)
      yield Traced(
          question,
          json.loads(str(arrays['question_id_Q'][n])),
          arrays['tokens_N'][part],
          arrays['is_image_N'][part],
          arrays['is_answer_N'][part],
          arrays['choice_LNk'][:, part],
          arrays['kept_LNk'][:, part],
      )


def count(where: str | os.PathLike[str]) -> Counts:
  """What `model.moe.MoeStats` counts, over all conversations of a folder."""
  first = next(iter(sorted(pathlib.Path(where).glob('*.npz'))), None)
  tokens_M = np.zeros(2, np.int64)
  assigned = kept = np.zeros(0, np.int64)
  layers: tuple[int, ...] = ()
  for one in read(where):
    if first is not None and not layers:
      with _open(first) as file:
        layers = tuple(file['layers_L'].tolist())
        shape = (len(layers), 2, int(file['num_experts']))
      assigned, kept = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    modality_T = one.is_image_T.astype(np.int64)
    tokens_M += np.bincount(modality_T, minlength=2)
    for layer in range(len(layers)):
      for choice_T, kept_T in zip(
          one.choice_LTk[layer].T, one.kept_LTk[layer].T, strict=True
      ):
        np.add.at(assigned[layer], (modality_T, choice_T), 1)
        np.add.at(kept[layer], (modality_T, choice_T), kept_T)
  return Counts(layers, tokens_M, assigned, kept)


def _paths(where: str | os.PathLike[str]) -> list[pathlib.Path]:
  """The files of a folder; raises EvalError if there are none."""
  paths = sorted(pathlib.Path(where).glob('*.npz'))
  if not paths:
    raise base.EvalError(
        f'{where}: no expert choices; write them with --routing_trace.'
    )
  return paths


def _open(path: pathlib.Path) -> Any:
  try:
    # Of a file that is damaged, np.load would leave it open.
    data = io.BytesIO(path.read_bytes())
    return np.load(data, allow_pickle=False)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise base.EvalError(
        f'{path}: cannot be read ({e}). Remove it and the answers file, and'
        ' evaluate again.'
    ) from e
