# SPDX-License-Identifier: Apache-2.0
"""The process that runs torch for `torch_process`, and nothing else.

Requests come in on stdin, a line of JSON each, and answers go out on what was
stdout; what libraries print goes to stderr.
"""

from collections.abc import Callable
import json
import os
import sys
import time
from typing import Any

import torch
import transformers

from moellava_jax.bench import torch_models, torch_process


def _about() -> dict[str, str]:
  cuda = 'none'
  if torch.cuda.is_available():
    cuda = torch.cuda.get_device_name()
  return {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
      'cuda': cuda,
  }


def _answer(
    request: dict[str, Any], programs: dict[str, dict[str, Callable[[], Any]]]
) -> dict[str, Any]:
  if request['do'] == 'about':
    return _about()
  name = request['name']
  if request['do'] == 'build':
    if request['threads'] is not None:
      torch.set_num_threads(request['threads'])
    work = torch_process.Work.from_json(request['work'])
    programs[name] = torch_models.build(work, request['compiled'])
    return {}
  if request['do'] == 'drop':
    del programs[name]
    if torch.cuda.is_available():
      torch.cuda.empty_cache()
    return {}
  run = programs[name][request['part']]
  began = time.perf_counter()
  run()
  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return {'seconds': time.perf_counter() - began}


def main() -> None:
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  programs: dict[str, dict[str, Callable[[], Any]]] = {}
  for line in sys.stdin:
    try:
      answer = _answer(json.loads(line), programs)
    except Exception as error:  # Whatever it is, it is an answer.
      lines = f'{type(error).__name__}: {error}'.strip().splitlines()
      answer = {'error': lines[0]}
    answers.write(json.dumps(answer) + '\n')
    answers.flush()


if __name__ == '__main__':
  main()
