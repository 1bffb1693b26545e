# SPDX-License-Identifier: Apache-2.0
"""Reads files of weights: safetensors and torch's `.bin`, whole or in shards.

Names, shapes and dtypes are known as soon as a file is open; tensors are read
one at a time. Nothing in a file is ever run: pickles are read with torch's
`weights_only=True`.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import pickle
import struct
from typing import Any, NamedTuple
import zipfile

from etils import epath
import ml_dtypes
import numpy as np

from moellava_jax import config

# Names of the safetensors format; bfloat16 is not a dtype of numpy itself.
DTYPES: dict[str, Any] = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16),
    'I8': np.dtype(np.int8),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
_CHUNK = 1 << 20  # Elements that are looked at together.

# In this order, as transformers does.
_WHOLE = ('model.safetensors', 'pytorch_model.bin')


class WeightsError(config.UserError):
  """Weights that cannot be used; names file and tensor, and what to do."""


class Info(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype
  file: str


class Weights(NamedTuple):
  """The tensors of a checkpoint: what there is, and a way to read one."""

  where: str  # For messages.
  infos: Mapping[str, Info]
  read_raw: Callable[[str], np.ndarray]

  def read(self, name: str) -> np.ndarray:
    """One tensor.

    Raises:
      WeightsError: it has NaN or infinite values.
    """
    array = self.read_raw(name)
    if not _is_finite(array):
      raise WeightsError(
          f'{self.infos[name].file}: tensor {name!r} has NaN or infinite'
          ' values. The file is damaged, or the training that wrote it'
          ' diverged; take another checkpoint.'
      )
    return array


def _is_finite(array: np.ndarray) -> bool:
  flat = array.reshape(-1)
  if array.dtype.kind in 'iub':
    return True
  return all(
      bool(np.isfinite(flat[i : i + _CHUNK]).all())
      for i in range(0, flat.size, _CHUNK)
  )


def dtype(name: str) -> np.dtype:
  """The dtype `float32`, `float16` or `bfloat16`."""
  return np.dtype(ml_dtypes.bfloat16 if name == 'bfloat16' else name)


def open_weights(path: str) -> Weights:
  """Opens a directory of weights, or one file of them.

  In a directory, `model.safetensors` comes first, then its shards, then
  `pytorch_model.bin` and its shards.

  Raises:
    WeightsError: nothing there, a shard that is missing, a truncated file, a
      pickle that holds code, or `.bin` files without torch.
  """
  root = epath.Path(path)
  if root.is_file():
    return _join(str(root), [_open_file(root)])
  if not root.is_dir():
    raise WeightsError(f'{path} does not exist.')
  for name in _WHOLE:
    if (root / name).is_file():
      return _join(str(root), [_open_file(root / name)])
    if (root / f'{name}.index.json').is_file():
      return _open_shards(root / f'{name}.index.json')
  raise WeightsError(
      f'{path} has no weights: expected one of {list(_WHOLE)}, or their shards'
      ' with NAME.index.json. It has'
      f' {sorted(p.name for p in root.iterdir())[:10]}.'
  )


def has_weights(directory: str) -> bool:
  """Whether a directory has weights, or only the files beside them."""
  root = epath.Path(directory)
  ends = ('.safetensors', '.bin', '.index.json')
  return root.is_dir() and any(p.name.endswith(ends) for p in root.iterdir())


def _join(where: str, parts: Iterable[Weights]) -> Weights:
  owner = {}
  for part in parts:
    for name in part.infos:
      if name in owner:
        raise WeightsError(
            f'Tensor {name!r} is both in {owner[name].where} and in'
            f' {part.where}; delete one of these files.'
        )
      owner[name] = part
  infos = {name: part.infos[name] for name, part in owner.items()}
  return Weights(where, infos, lambda name: owner[name].read_raw(name))


def _open_shards(index: epath.Path) -> Weights:
  listed = read_json(index).get('weight_map')
  if not isinstance(listed, dict) or not listed:
    raise WeightsError(f'{index} has no "weight_map"; fetch it again.')
  files = sorted(set(listed.values()))
  if missing := [f for f in files if not (index.parent / f).is_file()]:
    raise WeightsError(
        f'{index.parent} lacks {missing}, which {index.name} lists'
        f' ({len(files)} shards in all); the download is incomplete.'
    )
  weights = _join(
      str(index.parent), [_open_file(index.parent / f) for f in files]
  )
  for name, file in listed.items():
    if name not in weights.infos:
      raise WeightsError(
          f'{index.parent / file} lacks tensor {name!r}, which {index.name}'
          ' promises; fetch both again.'
      )
  return weights


def _open_file(path: epath.Path) -> Weights:
  if path.suffix == '.safetensors':
    return _open_safetensors(path)
  if path.suffix in ('.bin', '.pt', '.pth'):
    return _open_torch(path)
  raise WeightsError(
      f'{path}: expected a file that ends in .safetensors, .bin, .pt or .pth.'
  )


def _open_safetensors(path: epath.Path) -> Weights:
  """The header is checked against the file; tensors are read when asked."""
  with path.open('rb') as file:
    # Not path.stat(), which asks for the owner's name; in a container he may
    # have none.
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else -1
    if not 0 < length <= size - 8:
      raise WeightsError(
          f'{path} is truncated or no safetensors file: it has {size} bytes,'
          f' its header should have {length}. Fetch it again.'
      )
    try:
      header = json.loads(file.read(length))
    except ValueError as error:
      raise WeightsError(f'{path}: its header is damaged: {error}') from error
  header.pop('__metadata__', None)
  infos, places = {}, {}
  for name, about in header.items():
    dtype, shape = about['dtype'], tuple(about['shape'])
    begin, end = about['data_offsets']
    if dtype not in DTYPES:
      raise WeightsError(
          f'{path}: tensor {name!r} is {dtype}; expected one of'
          f' {list(DTYPES)}. Quantised weights cannot be read: take the'
          ' unquantised checkpoint.'
      )
    expected = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
    if end - begin != expected or 8 + length + end > size:
      raise WeightsError(
          f'{path} is truncated: tensor {name!r} ({dtype} {list(shape)}) ends'
          f' at byte {8 + length + end} of {size}. Fetch it again.'
      )
    infos[name] = Info(shape, DTYPES[dtype], str(path))
    places[name] = (8 + length + begin, end - begin)

  def read(name: str) -> np.ndarray:
    offset, count = places[name]
    with path.open('rb') as file:
      file.seek(offset)
      data = file.read(count)
    return np.frombuffer(data, infos[name].dtype).reshape(infos[name].shape)

  return Weights(str(path), infos, read)


def _open_torch(path: epath.Path) -> Weights:
  try:
    import torch
  except ImportError as error:
    raise WeightsError(
        f'{path} is a file of torch, which is not installed: pip install'
        ' -e .[parity], or take the .safetensors of the checkpoint.'
    ) from error
  try:
    # A mapped file is read tensor by tensor; the format before 2020 cannot be.
    tensors = torch.load(
        path,
        map_location='cpu',
        weights_only=True,
        mmap=zipfile.is_zipfile(path),
    )
  except pickle.UnpicklingError as error:
    raise WeightsError(
        f'{path} holds more than tensors, and loading it could run code in it:'
        f' {str(error).splitlines()[0]} Convert it to safetensors where you'
        ' trust it.'
    ) from error
  except (RuntimeError, EOFError, OSError) as error:
    raise WeightsError(
        f'{path} cannot be read, it may be truncated: {error}. Fetch it again.'
    ) from error
  if not isinstance(tensors, Mapping):
    raise WeightsError(
        f'{path} holds a {type(tensors).__name__}; expected a dict of tensors.'
    )
  if odd := [n for n, t in tensors.items() if not isinstance(t, torch.Tensor)]:
    raise WeightsError(
        f'{path}: {odd[:5]} are no tensors; expected a plain state dict, not a'
        ' whole training checkpoint.'
    )
  infos = {}
  for name, tensor in tensors.items():
    dtype = _torch_dtype(torch, tensor.dtype)
    if dtype is None:
      raise WeightsError(
          f'{path}: tensor {name!r} is {tensor.dtype}; expected one of'
          f' {list(DTYPES)}. Take the unquantised checkpoint.'
      )
    infos[name] = Info(tuple(tensor.shape), dtype, str(path))

  def read(name: str) -> np.ndarray:
    tensor = tensors[name].contiguous()
    if tensor.dtype == torch.bfloat16:
      return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return Weights(str(path), infos, read)


def _torch_dtype(torch, dtype) -> np.dtype | None:
  if dtype == torch.bfloat16:
    return DTYPES['BF16']
  known = {getattr(torch, d.name): d for n, d in DTYPES.items() if n != 'BF16'}
  return known.get(dtype)


def read_json(path: epath.Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    WeightsError: the file is missing, or is no JSON object.
  """
  if not path.is_file():
    raise WeightsError(f'{path} does not exist.')
  try:
    value = json.loads(path.read_text())
  except ValueError as error:
    raise WeightsError(f'{path} is not JSON: {error}.') from error
  if not isinstance(value, dict):
    raise WeightsError(f'{path} holds no JSON object.')
  return value
