# SPDX-License-Identifier: Apache-2.0
"""gke.sh fills in JobSets that start the training that is there."""

import shlex
from typing import Any

import pytest
import yaml

from moellava_jax.train import xla_flags
from tests.launch import shell

CONFIG = 'configs/phi2.py'
COMMON = (CONFIG, '--name=phi2', '--image=registry/m:tag')
TPU = (*COMMON, '--accelerator=tpu-v6e-slice', '--topology=4x4', '--hosts=4')
GPU = (*COMMON, '--gpus', '--accelerator=nvidia-h100-80gb', '--hosts=2')
FLAGS = ('--config.workdir=gs://b/run', '--config.data.json=a "b" \\ ${NAME}')


def _rendered(tmp_path, *args: str) -> dict[str, Any]:
  env = shell.environment(tmp_path)
  done = shell.run('gke.sh', *args, '--dry-run', '--', *FLAGS, env=env)
  assert done.returncode == 0, done.stderr
  command, text = done.stdout.split('\n', 1)
  assert command == '$ kubectl apply -f -'
  return yaml.safe_load(text)


def _job(jobset: dict[str, Any]) -> dict[str, Any]:
  (replicated,) = jobset['spec']['replicatedJobs']
  return replicated['template']['spec']


def _container(jobset: dict[str, Any]) -> dict[str, Any]:
  (container,) = _job(jobset)['template']['spec']['containers']
  return container


@pytest.mark.parametrize('args', [TPU, GPU])
def test_failure_policy(tmp_path, args):
  jobset = _rendered(tmp_path, *args, '--restarts=7')
  assert jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert jobset['kind'] == 'JobSet' and jobset['metadata']['name'] == 'phi2'
  policy = jobset['spec']['failurePolicy']
  assert policy['maxRestarts'] == 7
  assert policy['rules'] == [
      {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  ]
  job = _job(jobset)
  assert job['backoffLimit'] == 0 and job['completionMode'] == 'Indexed'
  assert job['parallelism'] == job['completions']
  assert job['template']['spec']['restartPolicy'] == 'Never'
  disruption, again, fail = job['podFailurePolicy']['rules']
  # Count, with backoffLimit 0, fails the Job for another reason than FailJob.
  assert disruption['action'] == again['action'] == 'Count'
  assert disruption['onPodConditions'] == [
      {'type': 'DisruptionTarget', 'status': 'True'}
  ]
  assert fail['action'] == 'FailJob'
  assert again['onExitCodes']['operator'] == 'In'
  assert fail['onExitCodes']['operator'] == 'NotIn'
  values = again['onExitCodes']['values']
  assert fail['onExitCodes']['values'] == values == sorted(values)
  assert {75, 76} <= set(values) and not {0, 1, 2} & set(values)
  name = _container(jobset)['name']
  assert again['onExitCodes']['containerName'] == name
  assert fail['onExitCodes']['containerName'] == name


@pytest.mark.parametrize('args', [TPU, GPU])
def test_a_bucket_is_mounted_only_where_one_is_named(tmp_path, args):
  jobset = _rendered(tmp_path, *args, '--bucket=my-data')
  template = _job(jobset)['template']
  # Without the annotation GKE puts no driver beside the container.
  assert template['metadata'] == {
      'annotations': {'gke-gcsfuse/volumes': 'true'}
  }
  (volume,) = [v for v in template['spec']['volumes'] if v['name'] == 'data']
  assert volume['csi'] == {
      'driver': 'gcsfuse.csi.storage.gke.io',
      'readOnly': True,
      'volumeAttributes': {
          'bucketName': 'my-data',
          'mountOptions': 'implicit-dirs',
      },
  }
  mount = {'name': 'data', 'mountPath': '/data', 'readOnly': True}
  assert mount in _container(jobset)['volumeMounts']
  without = _job(_rendered(tmp_path, *args))['template']
  assert 'metadata' not in without
  assert 'data' not in [v['name'] for v in without['spec'].get('volumes', [])]
  assert mount not in without['spec']['containers'][0].get('volumeMounts', [])


@pytest.mark.parametrize('args', [TPU, GPU])
def test_it_starts_training_with_the_flags(tmp_path, args):
  container = _container(_rendered(tmp_path, *args))
  assert container['image'] == 'registry/m:tag'
  assert container['command'] == [
      'python',
      'launch/supervise.py',
      '--',
      'python',
      '-m',
      'moellava_jax.train.main',
  ]
  assert container['args'][:3] == [f'--config={CONFIG}', *FLAGS]


def test_a_tpu_slice(tmp_path):
  jobset = _rendered(tmp_path, *TPU, '--slices=2')
  assert jobset['spec']['replicatedJobs'][0]['replicas'] == 2
  assert _job(jobset)['parallelism'] == 4
  assert _job(jobset)['template']['spec']['nodeSelector'] == {
      'cloud.google.com/gke-tpu-accelerator': 'tpu-v6e-slice',
      'cloud.google.com/gke-tpu-topology': '4x4',
  }
  container = _container(jobset)
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  assert len(container['args']) == 3  # GKE tells JAX where it is.
  wanted = xla_flags.environment(xla_flags.choose('v6e', None))
  assert {e['name']: e['value'] for e in container['env']} == wanted


def test_nodes_with_gpus(tmp_path):
  jobset = _rendered(tmp_path, *GPU)
  job, container = _job(jobset), _container(jobset)
  assert job['parallelism'] == 2
  assert job['template']['spec']['nodeSelector'] == {
      'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb'
  }
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  assert container['args'][3:] == [
      '--num_processes=2',
      '--coordinator_address=$(COORDINATOR):8476',
      '--process_id=$(PROCESS_ID)',
  ]
  fields = {
      e['name']: e['valueFrom']['fieldRef']['fieldPath']
      for e in container['env']
      if 'valueFrom' in e
  }
  assert fields == {
      'COORDINATOR': "metadata.annotations['jobset.sigs.k8s.io/coordinator']",
      'PROCESS_ID': (
          "metadata.annotations['batch.kubernetes.io/job-completion-index']"
      ),
  }
  (replicated,) = jobset['spec']['replicatedJobs']
  coordinator = jobset['spec']['coordinator']
  assert coordinator['replicatedJob'] == replicated['name']
  wanted = xla_flags.environment(xla_flags.choose('h100', None))
  env = {e['name']: e['value'] for e in container['env'] if 'value' in e}
  assert env == wanted
  one = _container(_rendered(tmp_path, *GPU, '--hosts=1'))
  assert one['args'][3:] == ['--num_processes=1']  # Else no pod is alone.


@pytest.mark.parametrize('args', [TPU, GPU])
def test_everything_is_filled_in(tmp_path, args):
  text = yaml.safe_dump(_rendered(tmp_path, *args), width=1000)
  assert text.count('${') == 1  # That of the flag.


def test_xpk(tmp_path):
  where = ('--cluster=c', '--project=p', '--zone=z', '--type=v5litepod-16')
  env = shell.environment(tmp_path) | {'LIBTPU_INIT_ARGS': '--mine'}
  args = (*COMMON, '--xpk', *where, '--dry-run', '--', *FLAGS)
  done = shell.run('gke.sh', *args, env=env)
  (words,) = shell.commands(done.stdout, 'xpk')
  assert words[:3] == ['xpk', 'workload', 'create']
  flags = dict(w.split('=', 1) for w in words[3:])
  assert flags['--restart-on-exit-codes'] == '75,76'
  assert flags['--tpu-type'] == 'v5litepod-16'
  assert flags['--docker-image'] == 'registry/m:tag'
  assert shlex.split(flags['--command'])[-3:] == [f'--config={CONFIG}', *FLAGS]
  wanted = xla_flags.environment(xla_flags.choose('v5e', None))
  assert flags['--env'] == f'LIBTPU_INIT_ARGS={wanted["LIBTPU_INIT_ARGS"]}'
  missing = shell.run('gke.sh', *COMMON, '--xpk', *where[1:], env=env)
  assert missing.returncode and 'needs --cluster' in missing.stderr


def test_apply(tmp_path):
  shell.executable(
      tmp_path / 'kubectl',
      f'#!/usr/bin/env bash\necho "$@" >{tmp_path}/args\ncat >{tmp_path}/stdin\n',
  )
  done = shell.run('gke.sh', *TPU, env=shell.environment(tmp_path))
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'args').read_text() == 'apply -f -\n'
  assert yaml.safe_load((tmp_path / 'stdin').read_text())['kind'] == 'JobSet'
  assert 'lost with the pod' in done.stderr  # No gs://.


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ((), 'which CONFIG?'),
        ((CONFIG,), 'needs --name and --image'),
        ((CONFIG, '--name=Phi_2', '--image=i'), 'expected small letters'),
        (COMMON, 'needs --accelerator'),
        ((*TPU, '--bucket=gs://b'), 'without gs:// and folders'),
        ((*COMMON, '--xpk', '--bucket=b'), 'xpk storage attach'),
        ((*COMMON, '--accelerator=a'), 'needs --topology'),
        ((*TPU, '--hosts=x'), '--hosts=x is not a whole number'),
        (('configs/nope.py', '--name=a', '--image=i'), 'no configs/nope.py'),
    ],
)
def test_bad_arguments(tmp_path, args, message):
  env = shell.environment(tmp_path)
  done = shell.run('gke.sh', *args, '--dry-run', env=env)
  assert done.returncode and message in done.stderr
