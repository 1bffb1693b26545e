# SPDX-License-Identifier: Apache-2.0
"""The published flags are accepted by the JAX that is here."""

import os
import subprocess
import sys

import pytest

from moellava_jax.train import xla_flags


def _start(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
  env = os.environ | variables | {'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
      [sys.executable, '-c', 'import jax; print(jax.device_count())'],
      env=env,
      capture_output=True,
      text=True,
      check=False,
  )


def test_xla_knows_every_flag():
  words = {
      flag.value
      for sets in xla_flags.SETS.values()
      for flag in sets[-1].flags
      if flag.variable == 'XLA_FLAGS'
  }
  assert len(words) > 5
  done = _start({'XLA_FLAGS': ' '.join(sorted(words))})
  assert done.stdout == '1\n', done.stderr
  unknown = _start({'XLA_FLAGS': '--xla_gpu_no_such_flag=true'})
  assert unknown.returncode and 'no_such_flag' in unknown.stderr


def test_every_flag_has_a_source_and_is_set_once():
  for device, sets in xla_flags.SETS.items():
    for flags in sets:
      names = [(f.variable, f.value.split('=')[0]) for f in flags.flags]
      assert len(set(names)) == len(names), device
      for flag in flags.flags:
        assert flag.source.startswith('https://'), flag


def test_a_set_is_printed_as_variables(capsys):
  assert xla_flags.main(['--device=h100', '--jax=0.10.2']) == 0
  lines = capsys.readouterr().out.splitlines()
  variables = dict(line.split('=', 1) for line in lines)
  assert variables['CUDA_DEVICE_MAX_CONNECTIONS'] == '1'
  words = variables['XLA_FLAGS'].split()
  assert '--xla_gpu_enable_latency_hiding_scheduler=true' in words
  assert len(words) == 7


def test_flags_of_tpus_are_for_libtpu():
  # XLA on the host would end the process: it does not know them.
  for device in ('v5e', 'v5p', 'v6e'):
    variables = xla_flags.environment(xla_flags.choose(device, None))
    assert list(variables) == ['LIBTPU_INIT_ARGS'], device


def test_v5p_is_without_what_libtpu_rejects_there():
  args = xla_flags.environment(xla_flags.choose('v5p', None))
  assert 'async_collective_fusion' not in args['LIBTPU_INIT_ARGS']


def test_an_unknown_name_lists_the_known(capsys):
  assert xla_flags.main(['--device=h900']) == 1
  assert 'cpu, a100, h100, v5e, v5p, v6e' in capsys.readouterr().err
  with pytest.raises(xla_flags.UnknownDeviceError, match='h900'):
    xla_flags.choose('h900', None)


def test_another_jax_is_a_remark(capsys):
  assert xla_flags.main(['--device=v6e', '--jax=0.12.1']) == 0
  printed = capsys.readouterr()
  assert printed.out.startswith('LIBTPU_INIT_ARGS=')
  assert 'accepted by JAX 0.10; this is 0.12.1' in printed.err


def test_the_set_of_a_version_is_the_newest_that_is_not_newer(monkeypatch):
  old, new = (xla_flags.FlagSet(jax, '', ()) for jax in ('0.9', '0.11'))
  monkeypatch.setattr(xla_flags, 'SETS', {'x': (old, new)})
  assert xla_flags.choose('x', '0.9.1') is old
  assert xla_flags.choose('x', '0.10.2') is old
  assert xla_flags.choose('x', '0.11.0') is new
  assert xla_flags.choose('x', '0.12.0') is new
  assert xla_flags.choose('x', '0.8.0') is old
  assert xla_flags.choose('x', None) is new


def test_it_starts_without_jax():
  done = subprocess.run(
      [
          sys.executable,
          '-X',
          'importtime',
          '-m',
          'moellava_jax.train.xla_flags',
      ],
      capture_output=True,
      text=True,
      check=True,
  )
  imported = {x.split('|')[-1].strip() for x in done.stderr.splitlines()}
  assert 'argparse' in imported and not imported & {'jax', 'numpy', 'absl'}
