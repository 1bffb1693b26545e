# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from the first cell to the last, and stay short."""

import copy
import os
import pathlib
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

from notebooks import install

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = {
    path.stem: nbformat.read(path, nbformat.NO_CONVERT)
    for path in sorted((ROOT / 'notebooks').glob('*.ipynb'))
}
# What a reader would miss: for each notebook a part of its outputs.
SHOWN = {
    '01_quickstart': ('parameters', '8 are right', 'image/png', '<table>'),
    '02_data': ("gpt   | '", 'background:#8fd6a4', "':' -> "),
    '03_routing': ('layer 0: load', 'experts exchanged', 'color-mix'),
    '04_your_data': ('moe 2/2', 'of 12 are right', 'image/png'),
    '05_scale': ('8 x cpu', '2 all-to-alls', 'Stage moe on 64 devices'),
}


def _code(book) -> list[str]:
  return [c.source for c in book.cells if c.cell_type == 'code']


@pytest.fixture(scope='module')
def run(trained, tmp_path_factory):
  """A copy, which the notebooks may write to."""
  path = tmp_path_factory.mktemp('notebooks') / 'shapes'
  shutil.copytree(trained[0], path)
  return path


@pytest.mark.slow
@pytest.mark.parametrize('name', NOTEBOOKS)
def test_runs_from_top_to_bottom(name, run):
  book = copy.deepcopy(NOTEBOOKS[name])
  client = nbclient.NotebookClient(
      book,
      timeout=300,
      kernel_name='python3',
      resources={'metadata': {'path': ROOT / 'notebooks'}},
  )
  client.execute(
      env=os.environ
      | {
          'PYTHONPATH': str(ROOT),
          'MOELLAVA_RUN': str(run),
          'MOELLAVA_SMOKE': '1',
          # Almost all of the time is compiling, and none of it for speed.
          'XLA_FLAGS': '--xla_backend_optimization_level=0',
      }
  )
  outputs = [
      output for cell in book.cells for output in cell.get('outputs', ())
  ]
  warned = [o.text for o in outputs if o.get('name') == 'stderr']
  assert not warned
  shown = str(outputs)
  for part in SHOWN[name]:
    assert part in shown, shown


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_is_committed_without_outputs_and_in_the_format_of_today(name):
  book = NOTEBOOKS[name]
  nbformat.validate(book)
  assert (book.nbformat, book.nbformat_minor) == (4, 5)
  for cell in book.cells:
    if cell.cell_type == 'code':
      assert not cell.outputs and cell.execution_count is None


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_has_at_most_90_lines_of_code(name):
  lines = '\n'.join(_code(NOTEBOOKS[name])).splitlines()
  code = [x for x in lines if x.strip() and not x.strip().startswith('#')]
  assert len(code) <= 90


def test_begin_alike():
  cells = [_code(book) for book in NOTEBOOKS.values()]
  assert len(cells) == 5
  assert len({first for first, *_ in cells}) == 1
  assert cells[0][0].startswith('REPO = ')


def _setup(tmp_path, installer: str) -> subprocess.CompletedProcess[str]:
  """Runs the first cell where there is no package, on a repository of ours."""
  repo = tmp_path / 'repo'
  (repo / 'notebooks').mkdir(parents=True)
  (repo / 'notebooks' / 'install.py').write_text(installer)
  git = ('git', '-c', 'user.name=x', '-c', 'user.email=x', '-C', str(repo))
  for words in (('init', '-q'), ('add', '.'), ('commit', '-qm', 'x')):
    subprocess.run((*git, *words), check=True)
  cell = _code(NOTEBOOKS['01_quickstart'])[0].splitlines()
  cell[0] = f'REPO = {f"file://{repo}"!r}'
  script = tmp_path / 'cell.py'
  script.write_text('\n'.join([*cell, 'print(os.getcwd(), sys.path[0])']))
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  return subprocess.run(
      # -S: without the site-packages that hold this package.
      [sys.executable, '-S', str(script)],
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
  )


def test_first_cell_clones_and_installs_where_there_is_nothing(tmp_path):
  done = _setup(tmp_path, 'print("installed")')
  assert done.returncode == 0, done.stderr
  assert 'installed' in done.stdout.splitlines()
  checkout = tmp_path / 'checkout'
  assert done.stdout.splitlines()[-1] == f'{checkout} {checkout}'


def test_a_command_that_fails_stops_the_notebook(tmp_path):
  done = _setup(tmp_path, 'raise SystemExit("no space left")')
  assert done.returncode != 0
  assert 'no space left' in done.stdout
  assert 'CalledProcessError' in done.stderr
  assert str(tmp_path / 'checkout') not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize('jax', ['0.10.2', '0.12.0.dev20261101'])
def test_install_keeps_a_recent_jax(jax):
  path, *pins = install.requirements(jax, '0.10.3', None, gpu=True)
  assert path == str(ROOT)
  assert pins == [f'jax=={jax}', 'jaxlib==0.10.3']


@pytest.mark.parametrize(
    'libtpu, gpu, extra',
    [(None, False, ''), (None, True, '[cuda12]'), ('0.0.30', False, '[tpu]')],
)
@pytest.mark.parametrize('jax', ['0.7.2', None])
def test_install_replaces_an_old_jax_by_one_for_the_device(
    jax, libtpu, gpu, extra
):
  assert install.requirements(jax, jax, libtpu, gpu) == [f'{ROOT}{extra}']
