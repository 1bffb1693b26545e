# SPDX-License-Identifier: Apache-2.0
"""Proves that imports inside `moellava_jax/` only point down the layer list.

Only the sources are read, so an import that hides in a function counts too.
"""

import ast
import pathlib

PACKAGE = 'moellava_jax'
ROOT = pathlib.Path(__file__).parents[1] / PACKAGE
FILES = {
    '.'.join(path.relative_to(ROOT).with_suffix('').parts): path
    for path in sorted(ROOT.rglob('*.py'))
}

# In order of dependency. A layer may import itself and the layers beside it.
_FOUNDATION = (
    'trees',
    'config',
    'saved_config',
    'run_folder',
    'devices',
    'sharding',
    'checkpoint',
    'backbones',
)
LAYERS = {
    'trees': (),
    'config': ('trees',),
    'saved_config': ('config',),
    'run_folder': ('config',),
    'devices': ('config',),
    'sharding': ('config', 'devices'),
    'checkpoint': ('config', 'saved_config', 'trees', 'run_folder'),
    'backbones': ('config',),
    'data': ('config', 'run_folder'),
    'model': ('config', 'trees'),
    'interop': ('config', 'trees', 'run_folder', 'checkpoint', 'backbones'),
    'train': (*_FOUNDATION, 'data', 'model', 'interop'),
    'infer': (*_FOUNDATION, 'data', 'model', 'interop'),
    'evals': ('config', 'trees', 'data', 'infer'),
    'analysis': (*_FOUNDATION, 'data', 'infer', 'evals'),
    'serve': ('config', 'data', 'infer'),
    'bench': (
        *_FOUNDATION,
        'data',
        'model',
        'interop',
        'train',
        'infer',
        'evals',
        'analysis',
        'serve',
    ),
}
# The door `import moellava_jax` itself: what the README promises, no more.
DOOR = ('config', 'infer')


def _imports(path: pathlib.Path) -> set[str]:
  """Returns the modules of the package that `path` imports at any depth."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}:{node.lineno}: use absolute imports'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    found.update(_module(name) for name in names if name.startswith(PACKAGE))
  return found - {None}


def _module(name: str) -> str | None:
  """Drops the package, and what follows the module: a symbol in it."""
  parts = name.split('.')[1:]
  while parts:
    for module in ('.'.join(parts), '.'.join((*parts, '__init__'))):
      if module in FILES:
        return module
    parts = parts[:-1]
  return None


def _layer(module: str) -> str:
  return module.split('.')[0]


def _graph() -> dict[str, set[str]]:
  return {module: _imports(path) for module, path in FILES.items()}


def test_there_is_something_to_check():
  assert {'config', 'trees'} <= set(FILES), f'no package at {ROOT}'


def test_layers_only_know_layers_listed_above_them():
  above = set()
  for layer, below in LAYERS.items():
    assert above.issuperset(below), f'{layer}: {set(below) - above} come later'
    above.add(layer)


def test_walls_stand():
  # What the table must keep saying, whoever edits it.
  assert 'model' not in LAYERS['data'] and 'data' not in LAYERS['model']
  assert 'model' not in LAYERS['interop']
  assert [a for a, below in LAYERS.items() if 'train' in below] == ['bench']
  assert not [a for a, below in LAYERS.items() if 'bench' in below]


def test_imports_point_down():
  wrong = []
  for module, targets in _graph().items():
    layer = _layer(module)
    if layer == '__init__':
      allowed = DOOR
    else:
      assert layer in LAYERS, f'{FILES[module]}: {layer!r} is not a layer'
      allowed = (layer, *LAYERS[layer])
    wrong += [
        f'{FILES[module]}: {layer} may not import {target}'
        for target in sorted(targets)
        if _layer(target) not in allowed
    ]
  assert not wrong, '\n'.join(wrong)


def test_no_cycle_inside_a_layer():
  graph, done = _graph(), set()

  def visit(module, trail):
    assert module not in trail, 'cycle: ' + ' -> '.join((*trail, module))
    if module not in done:
      for target in sorted(graph[module]):
        visit(target, (*trail, module))
      done.add(module)

  for module in graph:
    visit(module, ())


def test_no_file_is_called_utils():
  found = [str(path) for path in FILES.values() if path.stem == 'utils']
  assert not found, f'name these after what they do: {found}'


def test_every_folder_is_a_package():
  # Setuptools leaves a folder without this file out of the wheel.
  folders = {path.parent for path in FILES.values()}
  missing = [str(f) for f in folders if not (f / '__init__.py').exists()]
  assert not missing, f'no __init__.py in {missing}'
