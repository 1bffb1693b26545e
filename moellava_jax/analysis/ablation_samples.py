# SPDX-License-Identifier: Apache-2.0
"""Questions with the answers of several rows: the paper's Table 11, small.

OUT/samples/samples.json and the images it names.
"""

from collections.abc import Mapping, Sequence
import pathlib
import shutil
from typing import Any

from moellava_jax import run_folder
from moellava_jax.analysis import (
    ablation_cell,
    ablation_commands,
    ablation_plan,
)
from moellava_jax.evals import base, shapes

_RIGHT = 1  # Of each category, questions that the first row got right,
_WRONG = 1  # and wrong.

Sample = dict[str, Any]


def collect(
    cells: Sequence[ablation_plan.Cell], source: str, out: str
) -> list[Sample]:
  """Writes samples of one seed; empty if a run folder is not there (any more).

  Of every category the first question that the first cell answered rightly,
  and the first that it did not: chosen by rule, and not by beauty. An image is
  shown once.

  Args:
    cells: of one seed, the first decides which questions.
    source: the OUT of the grid, with runs/.
    out: gets samples/.
  """
  data = pathlib.Path(cells[0].run.data(source))
  folders = [pathlib.Path(ablation_commands.answers(c, source)) for c in cells]
  if not data.is_dir() or not all(folder.is_dir() for folder in folders):
    return []
  found: list[Sample] = []
  shown: set[str] = set()
  for key, questions in shapes.load(str(data), None).items():
    texts = {
        cell.row.key: base.check_complete(
            questions,
            base.read_answers(folder / f'{cell.run.last}.{key}.jsonl'),
        )
        for cell, folder in zip(cells, folders, strict=True)
    }
    for question in _chosen(key, questions, texts[cells[0].row.key], shown):
      found.append(
          {
              'file': key,
              'category': question.category,
              'image': question.image,
              'question': question.text,
              'truth': question.answer,
              'answers': {
                  row: by_id[question.question_id]
                  for row, by_id in texts.items()
              },
          }
      )
  folder = pathlib.Path(out) / 'samples'
  folder.mkdir(parents=True, exist_ok=True)
  for sample in found:
    name = pathlib.Path(sample['image']).name
    shutil.copyfile(data / sample['image'], folder / name)
    sample['image'] = name
  content = {'seed': cells[0].seed, 'samples': found}
  run_folder.write_json(folder / 'samples.json', content)
  return found


def is_right(key: str, truth: str, text: str) -> bool:
  """Whether an answer to a question of file `key` is right."""
  question = base.Question(0, None, '', '', truth, {})
  if key == 'pope':
    return ablation_cell.pope_right(question, text)
  return ablation_cell.exact_right(question, text)


def _chosen(
    key: str,
    questions: Sequence[base.Question],
    texts: Mapping[int | str, str],
    shown: set[str],
) -> list[base.Question]:
  """In the order of the file; adds their images to `shown`."""
  left: dict[tuple[str, bool], int] = {}
  chosen = []
  for question in questions:
    right = is_right(key, question.answer or '', texts[question.question_id])
    group = question.category, right
    most = _RIGHT if right else _WRONG
    image = question.image or ''
    if image in shown or left.setdefault(group, most) == 0:
      continue
    left[group] -= 1
    shown.add(image)
    chosen.append(question)
  return sorted(chosen, key=lambda q: q.category)
