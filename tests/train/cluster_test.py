# SPDX-License-Identifier: Apache-2.0
"""Real processes that find each other, agree or not, and fail together."""

import dataclasses
import http.server
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import moellava_jax
from moellava_jax import checkpoint, config, sharding
from moellava_jax.train import cluster, ending, preflight
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_JOIN = """
import os, sys
from moellava_jax import config
from moellava_jax.train import cluster, ending

def join(heartbeat=60):
  address, process = sys.argv[1:]
  cluster.start(
      address, 2, int(process), start_timeout_s=60, heartbeat_timeout_s=heartbeat
  )
  ending.watch()
"""


def _address() -> str:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{probe.getsockname()[1]}'


def _run(*scripts: str, env=({}, {}, {})) -> list[tuple[int, str]]:
  """Runs a script a process, each in its environment, all at once.

  Returns:
    (exit code, output) of each.
  """
  address = _address()
  processes = [
      subprocess.Popen(
          [
              sys.executable,
              '-c',
              _JOIN + textwrap.dedent(script),
              address,
              str(n),
          ],
          cwd=_ROOT,
          env={**os.environ, **env[n]},
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
      )
      for n, script in enumerate(scripts)
  ]
  try:
    outputs = [p.communicate(timeout=300)[0] for p in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return [
      (p.returncode, out) for p, out in zip(processes, outputs, strict=True)
  ]


def test_processes_do_things_together_and_agree():
  script = """
      join()
      me = cluster.process()
      assert cluster.gather('names', f'p{me}') == ['p0', 'p1']
      assert cluster.together('counting', lambda: me + 1) == me + 1
      cluster.first('once', lambda: print('ran'))
      cluster.agree('settings', {'seed': '0'})
      try:
        cluster.agree('settings', {'seed': str(me), 'lr': '1'})
      except cluster.ClusterError as error:
        print(error)
      def read():
        if me == 1:
          raise config.UserError('bad row 7')
      try:
        cluster.together('reading', read)
      except cluster.ClusterError as error:
        print(error)
      try:  # As with other files or other code.
        cluster.together('reading' if me else 'writing', lambda: None)
      except cluster.ClusterError as error:
        ending.fail(error)
  """
  host = socket.gethostname()
  (code0, zero), (code1, one) = _run(script, script)
  assert 'ran' in zero and 'ran' not in one
  for code, output in (code0, zero), (code1, one):
    assert (
        f'settings: seed: 0 on process 0 ({host}), 1 on process 1 ({host}).'
        in output
    )
    assert f'process 1 ({host}): bad row 7' in output
    assert (
        f'error: The processes do different things: process 0 ({host}):'
        f" 'writing'; process 1 ({host}): 'reading'."
    ) in output
    assert code == 1, output


def test_one_process_may_look_at_checkpoints_while_others_wait(tmp_path):
  cfg = tiny.train_config(tmp_path / 'run')
  stage = checkpoint.Stage(cfg.workdir, 'warmup', cfg.checkpoint)
  arrays = {'w': np.ones(4, np.float32)}
  stage.save(2, arrays, arrays, {'stage': 'warmup', 'frozen': ''})
  stage.close()
  # Of other settings, as when the data of a later stage were changed.
  (tmp_path / 'run' / 'tokenizer').mkdir()
  (tmp_path / 'run' / 'tokenizer' / 'origin.json').write_text('{}')
  script = f"""
      join()
      from moellava_jax import checkpoint
      from moellava_jax.train import inputs
      from tests import tiny

      cluster._PATIENCE_S = 60
      cfg = tiny.train_config({str(tmp_path / 'run')!r})
      def look():
        # As if the other did not see the folder.
        run = f'{{cfg.workdir}}{{cluster.process() or ""}}'
        return checkpoint.latest_meta(run, 'warmup')
      try:
        cluster.first('the tokenizer', lambda: inputs._make_tokenizer(cfg))
        print('found', cluster.together('checkpoints', look))
      except cluster.ClusterError as error:
        ending.fail(error)
  """
  (code0, zero), (code1, one) = _run(script, script)
  assert (code0, code1) == (0, 0), zero + one
  assert f"found ('{tmp_path}/run/warmup/2', " in zero
  assert 'found None' in one
  assert os.listdir(tmp_path / 'run' / 'tokenizer') == ['origin.json']


@pytest.mark.slow
def test_bad_input_is_an_error_in_every_process(tmp_path):
  """After each of them both are at the same point: the next one is compared."""
  run, other = tmp_path / 'run', tmp_path / 'other'
  cfg = tiny.train_config(other)
  stage = checkpoint.Stage(cfg.workdir, 'warmup', cfg.checkpoint)
  arrays = {'w': np.ones(4, np.float32)}
  stage.save(
      2,
      arrays,
      arrays,
      {'stage': 'warmup', 'frozen': '', 'config': dataclasses.asdict(cfg)},
  )
  stage.close()
  (tmp_path / 'file').write_text('')
  # As on a host that was not updated.
  old = tmp_path / 'old'
  shutil.copytree(pathlib.Path(moellava_jax.__file__).parent, old)
  with open(old / 'train' / 'step.py', 'a') as file:
    file.write('# An edit.\n')
  script = f"""
      join()
      import moellava_jax
      from moellava_jax.train import loop
      from tests import tiny

      def refused(run={str(run)!r}, **changes):
        cfg = tiny.train_config(run, mesh__cpu_devices=1, **changes)
        try:
          loop.run(cfg)
        except config.UserError as error:
          print(error, flush=True)
          return error

      loop.inputs.read = lambda *_: sys.exit('accepted')
      new = moellava_jax.__file__
      if cluster.process() == 1:
        moellava_jax.__file__ = {str(old / '__init__.py')!r}
      refused()
      moellava_jax.__file__ = new
      refused(mesh__data=3)
      refused(warmup__batch_size=15)
      refused(mesh__expert=2, model__moe__num_experts=3)
      refused(run={str(tmp_path / 'file' / 'run')!r})
      error = refused(run={str(other)!r}, model__llm__width=48)
      ending.fail(error)
  """
  for code, output in _run(script, script, env=({'XLA_FLAGS': ''},) * 2):
    assert code == 1, output
    lines = iter(output.splitlines())
    for reason in (
        'do not agree on config and code: source files: ',
        'needs 3 devices, but there are 2',
        'batch_size=15 is not a multiple of 2',
        "num_experts=3 is not a multiple of the mesh axis 'expert'",
        'run cannot be written: NotADirectoryError',
        f'{other}/warmup/2 was written by another config: model.llm.width',
    ):
      assert any(reason in line for line in lines), (reason, output)
    assert 'Traceback' not in output, output
  assert not run.exists()


def test_a_save_that_fails_in_one_process_ends_the_others(tmp_path):
  """In the background, where Orbax makes the others wait for it."""
  script = f"""
      join()
      import resource
      from absl import logging
      import jax
      import numpy as np
      from moellava_jax import checkpoint
      from moellava_jax.train import agree
      from tests import tiny

      logging.set_verbosity(logging.FATAL)  # Orbax tells every failure.
      cfg = tiny.train_config({str(tmp_path / 'run')!r})
      mesh = jax.sharding.Mesh(jax.devices(), ('data',))
      numbers = np.random.default_rng(0).random(1 << 16).astype(np.float32)
      array = jax.make_array_from_callback(
          numbers.shape,
          jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data')),
          numbers.__getitem__,
      )
      poll = agree.Poll(mesh)
      stage = checkpoint.Stage(cfg.workdir, 'warmup', cfg.checkpoint)
      if cluster.process() == 1:  # The disk is full, and the log is there too.
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        os.dup2(os.open('/dev/full', os.O_WRONLY), 2)
      meta = dict(stage='warmup', frozen='')
      try:
        stage.save(2, dict(w=array), dict(m=array), meta)
        print('training goes on', flush=True)
        while True:
          poll.now(agree.CONTINUE)
          stage.check()
      except Exception as error:
        ending.fail(error)
  """
  found = _run(script, script, env=({'XLA_FLAGS': ''},) * 2)
  assert [code for code, _ in found] == [1, 1], found
  assert all('training goes on' in output for _, output in found), found
  assert 'error: process 1 (' in found[0][1], found
  assert 'The newest step cannot be saved in' in found[0][1], found
  assert 'too large' in found[0][1], found


def test_a_full_log_disk_does_not_change_how_a_process_ends(monkeypatch):
  class Full:

    def write(self, _):
      raise OSError('No space left on device')

    flush = write

  monkeypatch.setattr(sys, 'stdout', Full())
  monkeypatch.setattr(sys, 'stderr', Full())
  cluster.say('a line')
  with pytest.raises(SystemExit) as ended:
    ending.fail(config.UserError('the reason'))
  assert ended.value.code == 1


def test_the_failure_of_one_process_ends_the_others():
  # Process 0 waits, as it would in a step.
  (code0, zero), (code1, one) = _run(
      """
      join()
      try:
        cluster.gather('a step', '')
      except Exception as error:
        ending.fail(error)
      """,
      """
      join()
      ending.fail(config.UserError('image 12 cannot be read'), code=3)
      """,
  )
  assert (code0, code1) == (3, 3), zero + one
  assert 'error: process 1 (' in zero and 'image 12 cannot be read' in zero
  assert 'error: image 12 cannot be read' in one
  assert 'Traceback' not in zero + one


def test_the_death_of_one_process_ends_the_others():
  began = time.monotonic()
  (code0, zero), (code1, _) = _run(
      """
      join(heartbeat=5)
      try:
        cluster.gather('a step', '')
      except cluster.ClusterError as error:
        ending.fail(error)
      """,
      """
      join(heartbeat=5)
      os._exit(9)
      """,
  )
  assert code1 == 9
  assert code0 == -6, zero  # As JAX ends a process that waits for devices.
  assert 'unhealthy' in zero or 'process 1 (' in zero
  assert time.monotonic() - began < 60


def test_a_process_whose_peers_do_not_start_says_so():
  ((code, output),) = _run("""
      cluster.start(
          sys.argv[1], 2, 0, start_timeout_s=2, heartbeat_timeout_s=60
      )
      """)
  assert code == 1, output
  assert 'has waited 2 s for the other processes of 2 as process 0' in output


_FIND = """
    cluster.start(None, None, None, start_timeout_s=60, heartbeat_timeout_s=60)
    print('alone' if cluster.alone() else cluster.gather('x', 'here'))
"""


def _slurm(task: int, tasks: int) -> dict[str, str]:
  return {
      'SLURM_JOB_ID': '7',
      'SLURM_STEP_NODELIST': '127.0.0.1',
      'SLURM_NTASKS': str(tasks),
      'SLURM_PROCID': str(task),
      'SLURM_LOCALID': '0',
  }


def _open_mpi(task: int, tasks: int) -> dict[str, str]:
  return {
      'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://127.0.0.1:34911',
      'OMPI_COMM_WORLD_SIZE': str(tasks),
      'OMPI_COMM_WORLD_RANK': str(task),
      'OMPI_COMM_WORLD_LOCAL_RANK': '0',
  }


def _gke(task: int, slices: int) -> dict[str, str]:
  """Of a JobSet with slices of one host, as GKE tells its pods."""
  return {
      'JAX_FORCE_TPU_INIT': '1',  # There is no chip.
      'KUBERNETES_SERVICE_HOST': '127.0.0.1',
      'JOB_COMPLETION_INDEX': '0',
      'TPU_WORKER_HOSTNAMES': '127.0.0.1',
      'TPU_WORKER_ID': '0',
      'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1',
      'MEGASCALE_NUM_SLICES': str(slices),
      'MEGASCALE_SLICE_ID': str(task),
  }


@pytest.mark.parametrize('launcher', [_slurm, _open_mpi, _gke])
def test_the_tasks_of_a_launcher_find_each_other(launcher):
  port = {'JAX_COORDINATOR_PORT': _address().split(':')[1]}
  env = [launcher(task, 2) | port for task in range(2)]
  for code, output in _run(_FIND, _FIND, env=env):
    assert code == 0 and "['here', 'here']" in output, output


class _Metadata(http.server.BaseHTTPRequestHandler):
  """What Compute Engine tells the workers of a slice, under /WORKER/."""

  def do_GET(self):
    _, worker, *_, key = self.path.split('/')
    text = {
        'agent-worker-number': worker,
        'worker-network-endpoints': 'a:0:127.0.0.1,b:1:127.0.0.1',
        'tpu-env': "ACCELERATOR_TYPE: 'v5litepod-8'\n",
    }[key]
    self.send_response(200)
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *_):
    pass


def test_the_workers_of_a_tpu_slice_find_each_other():
  port = _address().split(':')[1]
  # JAX sets it where there is no chip.
  script = "    os.environ.pop('TPU_SKIP_MDS_QUERY', None)" + _FIND
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = [
        {
            'JAX_FORCE_TPU_INIT': '1',
            'JAX_COORDINATOR_PORT': port,
            'GCE_METADATA_IP': f'127.0.0.1:{server.server_port}/{worker}',
            'NO_PROXY': '127.0.0.1',
        }
        for worker in range(2)
    ]
    found = _run(script, script, env=env)
    server.shutdown()
  for code, output in found:
    assert code == 0 and "['here', 'here']" in output, output


def test_a_process_without_others_stays_alone():
  found = _run(
      *[_FIND] * 3,
      # In a cluster of one, JAX would leave all but one GPU alone.
      env=[
          {},
          _slurm(0, 1),
          # Without the package kubernetes nothing tells how many there are.
          {'JOB_COMPLETION_INDEX': '0', 'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
      ],
  )
  for code, output in found[:2]:
    assert code == 0 and 'alone' in output, output
  code, output = found[2]
  assert code == 1 and 'pod 0 of a Kubernetes job' in output, output
  assert 'pip install kubernetes' in output and '--num_processes=1' in output
  cluster.start(None, 1, None, start_timeout_s=1, heartbeat_timeout_s=1)
  assert cluster.alone()


def test_a_place_that_is_given_in_part_is_an_error():
  with pytest.raises(config.UserError, match='--process_id must be given too'):
    cluster.start('host:1', 2, None, start_timeout_s=1, heartbeat_timeout_s=1)


def test_preflight_of_a_process_alone(tmp_path, capsys):
  run = tmp_path / 'run'
  meshes = preflight.check(tiny.train_config(run))
  assert {mesh.size for mesh in meshes.values()} == {8}
  assert list(meshes)[-1] == 'moe' and not list(run.iterdir())
  said = capsys.readouterr().out
  assert '8 x cpu in 1 process' in said and 'GB free' in said


def test_a_requeued_job_whose_run_folder_has_gone_says_so(
    tmp_path, monkeypatch, capsys
):
  run = tmp_path / 'unmounted' / 'run'
  preflight.check(tiny.train_config(tmp_path / 'other'))
  assert 'is not there' not in capsys.readouterr().out
  monkeypatch.setenv('SLURM_RESTART_COUNT', '2')
  preflight.check(tiny.train_config(run))
  assert f'{run} is not there' in capsys.readouterr().out
  preflight.check(tiny.train_config(run))
  assert 'is not there' not in capsys.readouterr().out


def test_preflight_refuses_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  cfg = tiny.train_config(tmp_path / 'file' / 'run')
  with pytest.raises(config.UserError, match='cannot be written: .*Not a dir'):
    preflight.check(cfg)
  # As on a full disk: the first bytes can be written.
  cfg = tiny.train_config(tmp_path / 'run')
  _, hard = soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
  try:
    with pytest.raises(
        config.UserError, match='cannot be written: .*too large'
    ):
      preflight.check(cfg)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
  assert not list((tmp_path / 'run').iterdir())


def test_preflight_does_not_wait_for_a_folder_that_does_not_answer(
    tmp_path, monkeypatch
):
  """As of a network file system whose server is gone."""
  monkeypatch.setattr(preflight, '_FILES_S', 0.1)
  monkeypatch.setattr(preflight, '_SEE_S', 0.1)
  back = threading.Event()
  path = type(preflight.epath.Path(tmp_path))
  for call in ('mkdir', 'unlink'):
    monkeypatch.setattr(path, call, lambda *_, **__: back.wait())
  try:
    with pytest.raises(
        config.UserError, match=f'folder {tmp_path} does not answer: no result'
    ):
      preflight._files(str(tmp_path))
  finally:
    back.set()


def test_preflight_refuses_a_sum_that_is_wrong_fails_or_hangs(monkeypatch):
  mesh = sharding.data_mesh()
  assert preflight._sum(mesh) > 0
  back = threading.Event()

  def fail(_):
    raise RuntimeError('no route to host')

  def hang(_):
    back.wait()
    raise RuntimeError('nobody waits any more')

  try:
    for wrong, reason in (
        (lambda x: x.max(), 'gave 8 for 36'),
        (fail, 'failed: no route to host'),
        (hang, 'failed: no result after 1 s'),
    ):
      if wrong is hang:
        monkeypatch.setattr(preflight, '_SUM_S', 1)
      monkeypatch.setattr(preflight.jnp, 'sum', wrong)
      with pytest.raises(
          config.UserError, match=f'sum over all 8 devices {reason}.*firewall'
      ):
        preflight._sum(mesh)
  finally:
    back.set()
