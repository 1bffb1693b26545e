# SPDX-License-Identifier: Apache-2.0
"""How fast the parts are, as ratios that anyone can measure.

  python -m moellava_jax.bench.main --suite=cpu --out=DIR
  python -m moellava_jax.bench.main --suite=gpu_layer --out=DIR
  python -m moellava_jax.bench.main --suite=gpu_train --out=DIR
  python -m moellava_jax.bench.main --suite=gpu_decode --out=DIR
  python -m moellava_jax.bench.main --suite=peers --repeats=5 --out=DIR
  python -m moellava_jax.bench.main --suite=gpu_peers --repeats=5 --out=DIR

The last two need torch and transformers beside JAX (pip install -e .[parity]).
A finished case is in DIR/SUITE.json and is not measured again. Leave the
machine alone meanwhile: cases run in turns, but what disturbs one run disturbs
its ratio. `--smoke` runs the smallest sizes, to see that everything works.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import sys
from typing import Any, NamedTuple

from absl import app, flags

from moellava_jax import backbones, config
from moellava_jax.bench import (
    decode,
    measure,
    moe_layer,
    peer_cases,
    peers,
    sizes,
    train_step,
)

# The device of the peers, by suite.
_PEERS = {'peers': 'cpu', 'gpu_peers': 'cuda'}
SUITES = ('cpu', 'gpu_layer', 'gpu_train', 'gpu_decode', *_PEERS)
# Goals of stage III: at least so much of the ceiling.
_SHARES = {'cpu': 0.85, 'gpu_train': 0.92}
# On a CPU of which others have a share, the quartiles of three runs of one program
# can be a third apart: what has a goal there runs so many times as often.
_OFTEN = 3


class Case(NamedTuple):
  """Something to measure, and how it is shown."""

  name: str
  run: Callable[[], dict[str, Any]]
  rows: Callable[[str, dict[str, Any]], list[tuple[str, ...]]]
  header: tuple[str, ...]
  # Another table of it, shown below: rows and header.
  more: tuple[Any, tuple[str, ...]] | None = None
  legend: str = ''  # Of its table.


def cases(
    suite: str,
    repeats: int,
    smoke: bool,
) -> list[Case]:
  """The cases of a suite.

  Args:
    suite: one of `SUITES` without peers.
    repeats: runs of each, three times as many on the CPU where there is a goal.
    smoke: only the smallest.
  """
  kinds = ('layer', 'decode', 'train') if smoke or suite == 'cpu' else ()
  found = []
  if 'layer' in kinds or suite == 'gpu_layer':
    found += _layers(suite, repeats, smoke)
  if 'decode' in kinds or suite == 'gpu_decode':
    found += _decoders(suite, repeats, smoke)
  if 'train' in kinds or suite == 'gpu_train':
    found += _steps(suite, repeats, smoke)
  if suite == 'cpu' and not smoke:
    found += _input()
  return found


def _layers(suite: str, repeats: int, smoke: bool) -> list[Case]:
  if smoke:
    layers = [moe_layer.Case(16, 32, 'gelu_tanh', 4, 64, 'float32')]
  elif suite == 'cpu':
    layers = [
        moe_layer.Case(256, 1024, 'gelu_tanh', experts, tokens, 'float32')
        for tokens in (1024, 4096)  # More: in the growth.
        for experts in (4, 8)
    ]
  else:
    layers = [
        moe_layer.Case(s.width, s.mlp_width, s.mlp, experts, tokens, 'bfloat16')
        for name in sizes.FULL
        # Of one model, to keep the suite short.
        for experts in ((4, 8) if name == sizes.FULL[0] else (4,))
        for tokens in (4096, 16384)
        for s in (backbones.LMS[name],)
    ]
  found = [
      Case(
          case.name,
          functools.partial(
              moe_layer.run,
              case,
              _often(suite, repeats, moe_layer.has_goals(case)),
          ),
          moe_layer.table,
          moe_layer.HEADER,
          legend=moe_layer.LEGEND,
      )
      for case in layers
  ]
  if suite == 'cpu' and not smoke:
    case = layers[0]
    found.append(
        Case(
            f'growth D={case.width} F={case.mlp_width} E={case.experts}',
            functools.partial(
                moe_layer.growth,
                case,
                (1024, 16384),
                _often(suite, repeats, True),
            ),
            moe_layer.growth_table,
            moe_layer.GROWTH_HEADER,
            legend=moe_layer.GROWTH_LEGEND,
        )
    )
  return found


def _decoders(suite: str, repeats: int, smoke: bool) -> list[Case]:
  batches: tuple[int, ...] = (1, 2, 8, 16, 32)
  if smoke:
    models = {'width=16 E=4': sizes.small(16, 2, 3, 'float32')}
    batches = (1, 2)
  elif suite == 'cpu':
    models = {}
    for width in (64, 512):
      sparse = sizes.small(width, 4, 3, 'float32')
      plain = dataclasses.replace(sparse, moe=None)
      models |= {f'width={width} dense': plain, f'width={width} E=4': sparse}
  else:
    models = {f'{name} E=4': sizes.full(name) for name in sizes.FULL}
  return [
      Case(
          f'decode {name}',
          functools.partial(
              decode.run, decode.Case(name, model), batches, repeats
          ),
          decode.table,
          decode.HEADER,
      )
      for name, model in models.items()
  ]


def _steps(suite: str, repeats: int, smoke: bool) -> list[Case]:
  stages = ('pretrain', 'finetune', 'moe')
  if smoke:
    model = sizes.small(16, 2, 3, 'float32')
    steps = [train_step.Case('width=16', model, 'moe', 2, 32, ('index',))]
  elif suite == 'cpu':
    model = sizes.small(256, 4, 24, 'float32')
    steps = [
        train_step.Case('width=256', model, stage, 4, 1024) for stage in stages
    ]
  else:
    steps = [
        train_step.Case(name, _looped(name), stage, 4, 2048)
        for name in sizes.FULL
        for stage in stages
    ]
  return [
      Case(
          f'train {case.name} {case.stage}',
          functools.partial(
              _train,
              case,
              _often(suite, repeats, case.stage == 'moe' and not smoke),
          ),
          functools.partial(_step_rows, None if smoke else _SHARES[suite]),
          train_step.HEADER,
          (train_step.memory_table, train_step.MEMORY_HEADER),
          train_step.LEGEND,
      )
      for case in steps
  ]


def _often(suite: str, repeats: int, has_goal: bool) -> int:
  """How often a program of `suite` runs."""
  return repeats * (_OFTEN if suite == 'cpu' and has_goal else 1)


def _step_rows(
    goal: float | None, case: str, found: dict[str, Any]
) -> list[tuple[str, ...]]:
  """Rows of `train_step.HEADER`, with the goal beside the share."""
  share, rows = train_step.HEADER.index('share'), []
  for row in train_step.table(case, found):
    entry = found[row[1]]
    if 'speed' in entry:
      value = entry['speed'] / entry['ceiling']
      cell = measure.beside_goal(value, goal, at_least=True)
      row = (*row[:share], cell, *row[share + 1 :])
    rows.append(row)
  return rows


def _input() -> list[Case]:
  """The input pipeline, where its packages are."""
  try:
    from moellava_jax.bench import input as input_lib

    input_lib.check_installed()
  except (ImportError, config.UserError) as error:
    print(f'input pipeline: not measured: {error}')
    return []
  return [
      Case(
          'input',
          functools.partial(input_lib.run, input_lib.ROWS, input_lib.REPEATS),
          input_lib.table,
          input_lib.HEADER,
      )
  ]


def _comparisons(
    suite: str, repeats: int, smoke: bool, torch: Any
) -> list[Case]:
  """Those of the suites that compare with others; `torch` is running."""
  return [
      Case(
          case.name,
          functools.partial(peers.run, case, repeats, torch),
          lambda _, found, case=case: peers.table(case, found),
          peers.HEADER,
          (
              lambda _, found, case=case: peers.settings_table(case, found),
              peers.SETTINGS_HEADER,
          ),
      )
      for case in peer_cases.cases(_PEERS[suite], smoke)
  ]


def _looped(name: str) -> config.ModelConfig:
  """As it fits one GPU, and compiles in less than a minute."""
  remat = 'full' if name == 'phi2' else 'expert_io'
  return dataclasses.replace(sizes.full(name), scan_layers=True, remat=remat)


def _train(case: train_step.Case, repeats: int) -> dict[str, Any]:
  peak = _peak(
      'bfloat16' if case.model.compute_dtype != 'float32' else 'float32'
  )
  return train_step.run(case, repeats, peak)


@functools.cache
def _peak(dtype: str) -> float:
  return measure.matmul_peak(dtype, 5)


def show(done: Sequence[tuple[Case, dict[str, Any]]]) -> None:
  """Prints a table for each kind of case."""
  from rich import console
  from rich import table as rich_table

  legends = {case.header: case.legend for case, _ in done}
  tables = [(case.name, case.rows, case.header, found) for case, found in done]
  tables += [
      (case.name, *case.more, found) for case, found in done if case.more
  ]
  for header in dict.fromkeys(table[2] for table in tables):
    grid = rich_table.Table(box=None, padding=(0, 2, 0, 0))
    for n, column in enumerate(header):
      grid.add_column(column, justify='right' if n > 1 else 'left')
    for name, rows, its_header, found in tables:
      if its_header == header:
        for row in rows(name, found):
          grid.add_row(*row)
    console.Console(highlight=False, markup=False, width=190).print(grid)
    if legends.get(header):
      print(legends[header])


def run(suite: str, out: str, repeats: int, smoke: bool) -> None:
  """Measures what is not there yet, and prints all of it.

  Raises:
    UserError: `out` has results of other code or of another machine.
  """
  settings: dict[str, Any] = {'repeats': repeats, 'smoke': smoke}
  torch = None
  with contextlib.ExitStack() as stack:
    if suite in _PEERS:
      device = 'cpu' if smoke else _PEERS[suite]
      torch = stack.enter_context(peers.start(device))
      settings['peers'] = torch.about
    results = measure.Results(out, suite, settings)
    if torch is None:
      listed = cases(suite, repeats, smoke)
    else:
      listed = _comparisons(suite, repeats, smoke, torch)
    for n, case in enumerate(listed, 1):
      if case.name in results.cases:
        continue
      print(f'{n}/{len(listed)} {case.name}', flush=True)
      results.add(case.name, case.run())
  show([(case, results.cases[case.name]) for case in listed])
  print(f'Written: {results.path}')


def define_flags() -> None:
  flags.DEFINE_enum('suite', None, SUITES, 'What to measure.', required=True)
  flags.DEFINE_string('out', None, 'Folder of SUITE.json.', required=True)
  flags.DEFINE_integer(
      'repeats',
      None,
      'Runs of each (cpu: 3, 9 where there is a goal; others: 11).',
      lower_bound=2,
  )
  flags.DEFINE_bool('smoke', False, 'The smallest sizes.')


def main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  values = flags.FLAGS
  try:
    repeats = values.repeats or (3 if values.suite == 'cpu' else 11)
    run(values.suite, values.out, repeats, values.smoke)
  except config.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  define_flags()
  app.run(main)
