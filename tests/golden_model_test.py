# SPDX-License-Identifier: Apache-2.0
"""Whole models against recordings of the original."""

import pathlib
import shutil

import numpy as np
import pytest

from tests import golden_check
from tests.golden import model, report

GOLDENS = pathlib.Path(__file__).parent / 'goldens'
# The recording itself lies 1.2e-4 from what exact arithmetic gives for these
# values of up to 36: its tower and projector are off by 5e-6, and that grows
# through the layers. Ours lie 8e-5 from exact, on the other side. The compiler
# decides whether both are beyond the limit, or one.
BEYOND_FP32 = [
    'stablelm_dense/forward.npz:hidden_states',
    'stablelm_dense/forward.npz:last_layer_out_prenorm',
]


def _check(folder):
  found = report.Report(None)
  golden_check.check(folder, found)
  return found


@pytest.mark.parametrize(
    'name, count, beyond',
    [
        ('phi_dense', 21, []),
        ('stablelm_dense', 20, BEYOND_FP32),
        ('phi_moe_sparse', 262, []),
        ('phi_moe_first_half', 27, []),
    ],
)
def test_recordings_agree(name, count, beyond):
  found = _check(GOLDENS / name)
  assert set(found.failed) <= set(beyond)
  assert found.passed + len(found.failed) == count


def test_what_differs_or_is_not_understood_fails_by_name(tmp_path):
  for name in ('clip_tiny', 'phi_dense'):
    shutil.copytree(GOLDENS / name, tmp_path / name)
  for path in GOLDENS.glob('inputs_*.npz'):
    shutil.copy(path, tmp_path)
  case = tmp_path / 'phi_dense'
  (case / 'forward.npz').unlink()
  golden = dict(np.load(case / 'generate.npz'))
  golden['new_tokens'][0, 3] += 1
  np.savez(case / 'generate.npz', **golden, secret=np.zeros(3))
  np.savez(case / 'eval_top2_odd.npz', x=np.zeros(3))
  (case / 'more.json').write_text('{}')
  found = _check(case)
  assert sorted(found.failed) == [
      'phi_dense/eval_top2_odd.npz',
      'phi_dense/generate.npz:new_tokens',
      'phi_dense/generate.npz:secret',
      'phi_dense/more.json',
  ]
  assert found.passed == 2


def test_options_are_read_from_the_name_of_a_file():
  assert model.options('train_top1_cf0.5_noise') == model.Options(
      'train', 1, 0.5, None, None
  )
  assert model.options('generate_top2_ecf1.0_mincap4') == model.Options(
      'generate', 2, None, 1.0, 4
  )
  for name in ('test_top1', 'eval_top2_abc', 'eval_capacity2'):
    with pytest.raises(ValueError):
      model.options(name)
