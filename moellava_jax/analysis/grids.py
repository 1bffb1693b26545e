# SPDX-License-Identifier: Apache-2.0
"""The ablations: rows of config overrides, and the grids made of them.

A row says which stages follow stage I and what differs from the config. The
same row may stand in several grids; it is trained once, because its cells are
kept by its key.

Budgets. The paper's (a) and (c) of Table 5 see the data of stages II and III
in one stage, an epoch of each file: as many examples as the three stages of
(b). So `all_data` joins the files and adds the lengths of both stages: their
epochs, or their steps, and then the files are mixed in the shares that they
have in the two stages. A stage that takes the place of both has the learning
rate of stage II, from which it learns to answer (in the paper both rates are
equal). All other rows change stage III alone and have its steps.

Table 6b: the paper's row of 1 expert is (c) of Table 5, a dense model; so it is
here. Table 7 compares the dense and the sparse model of each size: the
backbones of the paper, or the tiny LM of Shapes at three widths.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from moellava_jax import config


@dataclasses.dataclass(frozen=True)
class Row:
  """What is trained, up to the seed.

  Attributes:
    key: names its cells; one key is one row in all grids.
    label: for tables.
    stages: what follows stage I.
    overrides: of the config.
    all_data: the last stage has the data and the length of II and III.
    config: another config file than the one of the command.
  """

  key: str
  label: str
  stages: tuple[str, ...] = ('finetune', 'moe')
  overrides: tuple[tuple[str, Any], ...] = ()
  all_data: bool = False
  config: str | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
  """Rows of a table.

  Attributes:
    name: of the flag.
    title: for people.
    rows: in the order of the table.
    against: key of a row -> key of the row that it is compared with.
    seeds: how many it is run with, unless a command says otherwise.
  """

  name: str
  title: str
  rows: tuple[Row, ...]
  against: Mapping[str, str]
  seeds: int = 5


def _sparse(key: str, label: str, **moe: Any) -> Row:
  """Three stages with other settings of the MoE layers."""
  overrides = tuple((f'model.moe.{name}', value) for name, value in moe.items())
  return Row(key, label, overrides=overrides)


# The config as it is: 4 experts, top-2, every other layer, three stages.
MOE = Row('moe', 'MoE, three stages')
NO_STAGE_2 = Row(
    'no_stage_2', 'MoE without stage II', stages=('moe',), all_data=True
)
DENSE = Row('dense', 'dense', stages=('finetune',), all_data=True)

_ALL = Row('all_trained', 'whole LM', overrides=(('moe.whole_lm', True),))
_EXPERTS = {
    n: _sparse(f'experts_{n}', f'{n} experts', num_experts=n) for n in (2, 8)
}
_TOP_1 = _sparse('top_1', 'top-1', top_k=1)
_PLACES = {
    name: _sparse(name, name.replace('_', ' '), layers=name)
    for name in ('first_half', 'second_half')
}
_EVERYWHERE = _sparse('all_layers', 'all', layers='all')
_CAPACITY = {
    f: _sparse(f'capacity_{f}', f'{f}', capacity_factor=f)
    for f in (1.0, 1.25, 2.0)
}
_AUX = {
    w: _sparse(f'aux_loss_{w:g}', f'{w:g}', aux_loss_weight=w)
    for w in (0.0, 0.001, 0.1)
}
_ARGMAX = _sparse('argmax', 'argmax', second_choice='argmax')
_RANDOM = _sparse('random_experts', 'random experts', upcycle='random')

# Widths of the tiny LM; its heads stay 16 wide, its FFN twice the width.
_WIDTHS = (32, 64, 96)
# The paper's Table 7, as config files.
_BACKBONES = ('stablelm_1_6b', 'qwen_1_8b', 'phi2')


def _called(row: Row, label: str) -> Row:
  """The same cells under another name."""
  return dataclasses.replace(row, label=label)


def _table7_shapes() -> list[tuple[Row, Row]]:
  """Pairs (dense, sparse) of the tiny LM, one for each width."""
  pairs = []
  for width in _WIDTHS:
    sizes = {
        'width': width,
        'num_heads': width // 16,
        'num_kv_heads': width // 16,
        'mlp_width': 2 * width,
    }
    own = width == 64  # The config's own size: cells of other tables.
    changes = (
        () if own else tuple((f'model.llm.{k}', v) for k, v in sizes.items())
    )

    def at(row: Row, kind: str, width=width, own=own, changes=changes) -> Row:
      return dataclasses.replace(
          row,
          key=row.key if own else f'width_{width}_{row.key}',
          label=f'width {width}, {kind}',
          overrides=changes,
      )

    pairs.append((at(DENSE, 'dense'), at(MOE, 'MoE')))
  return pairs


def _table7_backbones() -> list[tuple[Row, Row]]:
  """Pairs (dense, sparse) of the paper's backbones."""

  def at(row: Row, name: str, kind: str) -> Row:
    return dataclasses.replace(
        row,
        key=f'{name}_{row.key}',
        label=f'{name}, {kind}',
        config=f'configs/{name}.py',
    )

  return [
      (at(DENSE, name, 'dense'), at(MOE, name, 'MoE')) for name in _BACKBONES
  ]


def _pairs(embedded: bool) -> Grid:
  pairs = _table7_shapes() if embedded else _table7_backbones()
  return Grid(
      'table7',
      'Table 7: dense against MoE by model size',
      tuple(row for pair in pairs for row in pair),
      {sparse.key: dense.key for dense, sparse in pairs},
      seeds=3,
  )


def _grid(name: str, title: str, baseline: Row, *rows: Row) -> Grid:
  """A grid with one baseline, which must be among its rows."""
  against = {row.key: baseline.key for row in rows if row.key != baseline.key}
  seeds = 5 if name.startswith(('table5', 'table6')) else 3
  return Grid(name, title, rows, against, seeds)


def _single() -> tuple[Grid, ...]:
  """The grids that are the same for every config."""
  four = _called(MOE, '4 experts')
  return (
      _grid(
          'table5',
          'Table 5: training strategy',
          MOE,
          _called(NO_STAGE_2, '(a) MoE, I and III with all data'),
          _called(MOE, '(b) MoE, I, II and III'),
          _called(DENSE, '(c) dense, I and II with all data'),
      ),
      _grid(
          'table6a',
          'Table 6a: what stage III trains',
          MOE,
          _called(MOE, 'FFN'),
          _called(_ALL, 'All'),
      ),
      _grid(
          'table6b',
          'Table 6b: number of experts',
          four,
          _called(DENSE, '1 (dense)'),
          _EXPERTS[2],
          four,
          _EXPERTS[8],
      ),
      _grid(
          'table6c',
          'Table 6c: experts per token',
          MOE,
          _TOP_1,
          _called(MOE, 'top-2'),
      ),
      _grid(
          'table6d',
          'Table 6d: place of the MoE layers',
          MOE,
          _PLACES['first_half'],
          _PLACES['second_half'],
          _called(MOE, 'interval'),
          _EVERYWHERE,
      ),
      _grid(
          'capacity',
          'Capacity factor in training',
          MOE,
          _CAPACITY[1.0],
          _CAPACITY[1.25],
          _called(MOE, '1.5'),
          _CAPACITY[2.0],
      ),
      _grid(
          'aux_loss',
          'Weight of the load-balancing loss',
          MOE,
          _AUX[0.0],
          _AUX[0.001],
          _called(MOE, '0.01'),
          _AUX[0.1],
      ),
      _grid(
          'second_choice',
          'How training draws the second expert',
          MOE,
          _ARGMAX,
          _called(MOE, 'sampled'),
      ),
      _grid(
          'upcycling',
          'How the experts begin',
          MOE,
          _called(MOE, 'copies of the FFN'),
          _RANDOM,
      ),
  )


def grids(embedded: bool) -> dict[str, Grid]:
  """All grids by name.

  Args:
    embedded: whether the config trains on Shapes, whose sizes are free.
  """
  listed = list(_single())
  listed.insert(5, _pairs(embedded))  # After Table 6.
  return {grid.name: grid for grid in listed}


def names() -> tuple[str, ...]:
  return tuple(grids(True))


def get(name: str, embedded: bool) -> Grid:
  """Raises UserError, with the list, for a name that is not there."""
  known = grids(embedded)
  if name not in known:
    raise config.UserError(
        f'--grid={name}: no such grid; there are {", ".join(known)}.'
    )
  return known[name]
