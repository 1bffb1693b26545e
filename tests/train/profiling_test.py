# SPDX-License-Identifier: Apache-2.0
"""Which steps --profile_steps names; loop_test looks at the traces."""

import jax
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


def test_a_trace_that_cannot_be_written_is_reported_and_no_more(
    tmp_path, capsys
):
  (tmp_path / 'profile').write_text('')
  profile = profiling.Profile(str(tmp_path), 'moe', profiling.Steps(1, 1))
  with profile.around():
    profile.before(1)
    profile.after(1, ())
  assert f'moe: no complete trace in {tmp_path}/prof' in capsys.readouterr().out
  # JAX believes that it still records: the next stage is trained without.
  profile = profiling.Profile(str(tmp_path), 'late', profiling.Steps(1, 1))
  with profile.around():
    profile.before(1)
    profile.after(1, ())
  assert 'late: no complete trace' in capsys.readouterr().out
  (tmp_path / 'profile').unlink()
  jax.profiler.stop_trace()


def test_processes_of_one_host_keep_out_of_each_others_traces(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(profiling.cluster, 'alone', lambda: False)
  for process in range(2):
    monkeypatch.setattr(profiling.cluster, 'process', lambda n=process: n)
    profile = profiling.Profile(str(tmp_path), 'moe', profiling.Steps(1, 1))
    with profile.around():
      profile.before(1)
      profile.after(1, ())
  for kind in ('*.xplane.pb', 'perfetto_trace.json.gz'):
    assert {
        path.relative_to(tmp_path).parts[2] for path in tmp_path.rglob(kind)
    } == {'process-0', 'process-1'}


def test_in_a_store_there_is_no_trace_for_perfetto(monkeypatch):
  # JAX reads what it has written to make one, and only from a disk.
  asked = []
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: None)
  monkeypatch.setattr(
      jax.profiler,
      'start_trace',
      lambda folder, *, create_perfetto_trace: asked.append(
          (folder, create_perfetto_trace)
      ),
  )
  profile = profiling.Profile('gs://bucket/run', 'moe', profiling.Steps(1, 1))
  with profile.around():
    profile.before(1)
  assert asked == [('gs://bucket/run/profile/moe', False)]
