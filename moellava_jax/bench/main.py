# SPDX-License-Identifier: Apache-2.0
"""How fast the parts are, as ratios that anyone can measure.

  python -m moellava_jax.bench.main --suite=cpu --out=DIR
  python -m moellava_jax.bench.main --suite=gpu_layer --out=DIR
  python -m moellava_jax.bench.main --suite=gpu_decode --out=DIR

A finished case is in DIR/SUITE.json and is not measured again. Leave the
machine alone meanwhile: cases run in turns, but what disturbs one run disturbs
its ratio. `--smoke` runs the smallest sizes, to see that everything works.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import sys
from typing import Any, NamedTuple

from absl import app, flags

from moellava_jax import backbones, config
from moellava_jax.bench import decode, measure, moe_layer

SUITES = ('cpu', 'gpu_layer', 'gpu_decode')
_GPU_MODELS = ('stablelm_1_6b', 'qwen_1_8b', 'phi2')
_LAYER_HEADER = (
    *('case', 'way', 'forward', 'x dense', 'floor'),
    *('with backward', 'x dense', 'floor'),
)
_DECODE_HEADER = (
    *('case', 'batch', 'ms a step', 'tokens/s', 'x batch 1', 'steps x'),
)


class Case(NamedTuple):
  """Something to measure, and how it is shown."""

  name: str
  run: Callable[[], dict[str, Any]]
  rows: Callable[[str, dict[str, Any]], list[tuple[str, ...]]]
  header: tuple[str, ...]


def cases(suite: str, repeats: int, smoke: bool) -> list[Case]:
  """The cases of a suite."""
  layers: list[moe_layer.Case] = []
  models: list[decode.Case] = []
  batches: tuple[int, ...] = (1, 2, 8, 16, 32)
  if smoke:
    layers = [moe_layer.Case(16, 32, 'gelu_tanh', 4, 64, 'float32')]
    models, batches = _models(16, 2, 'float32')[1:], (1, 2)
  elif suite == 'cpu':
    layers = [
        moe_layer.Case(256, 1024, 'gelu_tanh', experts, tokens, 'float32')
        for tokens in (1024, 4096, 16384)
        for experts in (4, 8)
    ]
    models = _models(64, 4, 'float32') + _models(512, 4, 'float32')
  else:
    sizes = [backbones.LMS[name] for name in _GPU_MODELS]
    layers = [
        moe_layer.Case(s.width, s.mlp_width, s.mlp, 4, tokens, 'bfloat16')
        for s in sizes
        for tokens in (4096, 16384)
    ]
    models = [_full(name) for name in _GPU_MODELS]
  found = []
  if smoke or suite != 'gpu_decode':
    found += [
        Case(
            case.name,
            functools.partial(moe_layer.run, case, repeats),
            moe_layer.table,
            _LAYER_HEADER,
        )
        for case in layers
    ]
  if smoke or suite != 'gpu_layer':
    found += [
        Case(
            f'decode {case.name}',
            functools.partial(decode.run, case, batches, repeats),
            decode.table,
            _DECODE_HEADER,
        )
        for case in models
    ]
  return found


def _moe() -> config.MoeConfig:
  return config.MoeConfig(
      layers='interval',
      num_experts=4,
      top_k=moe_layer.TOP_K,
      capacity_factor=moe_layer.CAPACITY_FACTOR,
      eval_capacity_factor=None,
      min_capacity=0,
      group='row',
      max_group_size=2048,
      route_padding=False,
      second_choice='argmax',
      eval_second_choice='argmax',
      aux_loss_weight=0.01,
      z_loss_weight=0.0,
      dispatch='einsum',
      upcycle='copy',
      random_token_selection=False,
      use_residual=False,
  )


def _model(llm: config.DecoderConfig, dtype: str) -> config.ModelConfig:
  return config.ModelConfig(
      vision=backbones.TOWERS['shapes'],
      llm=llm,
      projector='mlp2x_gelu',
      moe=_moe(),
      compute_dtype=dtype,  # pyright: ignore[reportArgumentType]
      remat='none',
      scan_layers=False,
      loss_chunk=16384,
  )


def _models(width: int, depth: int, dtype: str) -> list[decode.Case]:
  """A dense and a sparse decoder of some width."""
  llm = dataclasses.replace(
      backbones.LMS['shapes'],
      width=width,
      depth=depth,
      num_heads=width // 16,
      num_kv_heads=width // 16,
      mlp_width=4 * width,
  )
  sparse = _model(llm, dtype)
  dense = dataclasses.replace(sparse, moe=None)
  name = f'width={width} depth={depth} {dtype}'
  return [
      decode.Case(f'{name} dense', dense),
      decode.Case(f'{name} E=4', sparse),
  ]


def _full(name: str) -> decode.Case:
  return decode.Case(
      f'{name} E=4 bfloat16', _model(backbones.LMS[name], 'bfloat16')
  )


def show(done: Sequence[tuple[Case, dict[str, Any]]]) -> None:
  """Prints a table for each kind of case."""
  from rich import console
  from rich import table as rich_table

  for header in dict.fromkeys(case.header for case, _ in done):
    grid = rich_table.Table(box=None, padding=(0, 2, 0, 0))
    for n, column in enumerate(header):
      grid.add_column(column, justify='right' if n > 1 else 'left')
    for case, found in done:
      if case.header == header:
        for row in case.rows(case.name, found):
          grid.add_row(*row)
    console.Console(highlight=False, markup=False, width=140).print(grid)


def run(suite: str, out: str, repeats: int, smoke: bool) -> None:
  """Measures what is not there yet, and prints all of it.

  Raises:
    UserError: `out` has results of other code or of another machine.
  """
  settings = {'repeats': repeats, 'smoke': smoke}
  results = measure.Results(out, suite, settings)
  listed = cases(suite, repeats, smoke)
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
  flags.DEFINE_integer('repeats', 11, 'Runs of each.', lower_bound=2)
  flags.DEFINE_bool('smoke', False, 'The smallest sizes.')


def main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments {argv[1:]}.')
  values = flags.FLAGS
  try:
    run(values.suite, values.out, values.repeats, values.smoke)
  except config.UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  define_flags()
  app.run(main)
