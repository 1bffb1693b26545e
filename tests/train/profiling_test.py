# SPDX-License-Identifier: Apache-2.0
"""Which steps --profile_steps names; loop_test looks at the traces."""

import pytest

from moellava_jax import config
from moellava_jax.train import profiling


def test_one_step_or_a_range():
  assert profiling.parse('10-14') == (10, 14)
  assert profiling.parse('3') == (3, 3)


@pytest.mark.parametrize('text', ['', '0', '5-3', '1,2', 'all', '-4', '1-2-3'])
def test_other_texts_are_refused(text):
  with pytest.raises(config.UserError, match='such as 10-14'):
    profiling.parse(text)


def test_a_trace_ends_with_an_error(tmp_path):
  profile = profiling.Profile(str(tmp_path), 'moe', profiling.Steps(1, 9))
  with pytest.raises(ZeroDivisionError), profile.around():
    profile.before(1)
    raise ZeroDivisionError
  assert list(tmp_path.rglob('*.xplane.pb'))
  profile.before(1)  # It could not begin if the other were not over.
  with profile.around():
    pass
