# SPDX-License-Identifier: Apache-2.0
"""The plan of a stage as numbers (`make`) and as a table (`show`)."""

from collections.abc import Sequence
import math
from typing import Any

from moellava_jax import config, sharding
from moellava_jax.train import (
    accelerators,
    advice,
    compiled,
    flops,
    memory,
    placement,
    program,
    topology,
)

_GIB = 2**30


def make(
    cfg: config.TrainConfig,
    stage: str,
    target: topology.Target,
    chosen: Sequence[accelerators.Accelerator],
    *,
    mfu: float,
    compiles: bool,
    measures: bool,
) -> dict[str, Any]:
  """Everything that is printed, as JSON: bytes per device, FLOPs, seconds.

  Args:
    cfg: with `model.compute_dtype` as on the accelerators.
    stage: its name.
    target: the devices.
    chosen: accelerators to compare with.
    mfu: of the expected step time.
    compiles: also ask XLA.
    measures: run a step on the devices and compare; needs `compiles`.

  Raises:
    UserError: no row length, or a batch that the mesh does not divide.
  """
  section = cfg.stage(stage)
  _check(cfg, stage)
  mesh = placement.mesh_for(cfg, stage, target.devices, target.memory)
  sizes = tuple(mesh.shape[axis] for axis in sharding.AXES)
  estimate = memory.of_stage(cfg, stage, sizes)
  runner = program.Program(cfg, stage, memory.abstract_mesh(sizes), 1)
  with topology.use(mesh, target):  # Whose platform decides what 'auto' is.
    operations = flops.of_step(cfg, stage, runner.abstract_params())
  plan: dict[str, Any] = {
      'stage': stage,
      'devices': math.prod(sizes),
      'mesh': dict(zip(sharding.AXES, sizes, strict=True)),
      'rows': section.batch_size,
      'row_length': section.row_length,
      'max_images': section.max_images,
      'accumulate': section.accumulate,
      'remat': cfg.model.remat,
      'scan': cfg.model.scan_layers,
      'compute_dtype': cfg.model.compute_dtype,
      'mfu': mfu,
      'memory': {
          **estimate._asdict(),
          'state': estimate.state,
          'total': estimate.total,
      },
      'flops': {
          'parts': {k: p._asdict() for k, p in operations.parts.items()},
          'model': operations.model,
          'capacity': operations.capacity,
          'dispatch': operations.dispatch,
          'recompute': operations.recompute,
          'total': operations.total,
      },
  }
  if compiles:
    plan['xla'] = _xla(cfg, stage, target, measures)
  compiled_for = accelerators.of_device(target.devices[0])
  plan['accelerators'] = [
      _on(
          device,
          cfg,
          stage,
          sizes,
          operations,
          estimate.total,
          plan.get('xla') if device == compiled_for else None,
          mfu,
      )
      for device in chosen
  ]
  return plan


def _check(cfg: config.TrainConfig, stage: str) -> None:
  section = cfg.stage(stage)
  if section.row_length is None:
    raise config.UserError(
        f'{stage}.row_length is None: rows would be as long as the longest'
        ' conversation, which only the data know. Give the length to plan for:'
        f' --config.{stage}.row_length=N.'
    )


def _xla(cfg, stage, target, measures: bool) -> dict[str, Any]:
  try:
    step = compiled.Step(cfg, stage, target)
  except compiled.DoesNotFit as error:
    return {'target': target.name, 'cpu': False, 'error': str(error)}
  found = step.report()
  cpu = target.devices[0].platform == 'cpu'
  about = {**found._asdict(), 'total': found.total, 'cpu': cpu}
  if measures:
    about['measured'] = step.measure()
  return about


def _on(
    device, cfg, stage, sizes, operations, total, xla, mfu
) -> dict[str, Any]:
  """`xla` is what it says of this kind of device, if it was asked."""
  section = cfg.stage(stage)
  seconds = flops.seconds(operations, math.prod(sizes), device.peak, mfu)
  usable = int(device.memory * accelerators.USABLE)
  fits, room = total <= usable, usable
  if xla is not None:  # It knows what the estimate guesses.
    fits = 'error' not in xla and xla['total'] <= usable
    # What it adds to the estimate it would add to other settings' as well; how
    # much that is it does not say where it gives up.
    more = xla.get('total', max(total, usable) + 1) / total
    room = int(usable / max(more, 1))
  switch = None if fits else advice.find(cfg, stage, sizes, room)
  return {
      'name': device.name,
      'memory': device.memory,
      'usable': usable,
      'fits': fits,
      'seconds': seconds,
      'tokens_per_second': section.batch_size * section.row_length / seconds,
      'advice': None if switch is None else switch._asdict(),
      'advice_text': '' if fits else str(switch or 'none that was tried'),
      'source': device.source,
  }


def show(plan: dict[str, Any]) -> None:
  """Prints a plan as tables."""
  import rich.box
  import rich.console
  import rich.table

  console = rich.console.Console(width=96, highlight=False)

  def table(*columns: str) -> rich.table.Table:
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for n, column in enumerate(columns):
      made.add_column(column, justify='right' if n else 'left')
    return made

  mesh = ' '.join(f'{axis} {size}' for axis, size in plan['mesh'].items())
  console.print(
      f'Stage {plan["stage"]} on {plan["devices"]} devices ({mesh}):'
      f' {plan["rows"]} rows of {plan["row_length"]} positions a step,'
      f' {plan["accumulate"]} micro-batches, remat {plan["remat"]},'
      f' {plan["compute_dtype"]}'
  )
  rows = table('Memory of a device', 'GiB')
  for name, key in _MEMORY_ROWS:
    if plan['memory'][key] or key in ('saved', 'working'):
      rows.add_row(name, f'{plan["memory"][key] / _GIB:.4g}')
  console.print(rows)
  if 'xla' in plan:
    _show_xla(plan['xla'], console, table('XLA says', 'GiB'))
    if plan['xla']['cpu'] and plan['remat'] != 'none' and not plan['scan']:
      console.print(
          'Outside a loop the compiler of the CPU keeps much of what remat'
          ' gives up, and far more than an accelerator;'
          ' --config.model.scan_layers=True comes closer.'
      )
  _show_flops(plan['flops'], console, table('FLOPs of a step', '10^12'))
  names = ('Accelerator', 'usable GiB', 'fits', 's a step', 'tokens/s')
  found = table(f'{names[0]} (MFU {plan["mfu"]})', *names[1:])
  found.add_column('what would make it fit')
  for device in plan['accelerators']:
    found.add_row(
        device['name'],
        f'{device["usable"] / _GIB:.1f}',
        'yes' if device['fits'] else 'no',
        f'{device["seconds"]:.3g}',
        f'{device["tokens_per_second"]:,.0f}',
        device['advice_text'],
    )
  console.print(found)


_MEMORY_ROWS = (
    ('trained parameters (fp32)', 'trained'),
    ('frozen parameters', 'frozen'),
    ('optimizer', 'optimizer'),
    ('gradients', 'gradients'),
    ('sum over micro-batches', 'accumulator'),
    ('activations kept for the backward pass', 'saved'),
    ('activations at work', 'working'),
    ('weights gathered from fsdp', 'gathered'),
    ('total (estimate)', 'total'),
    ('beside it, in host memory', 'host'),
)


def _show_xla(xla: dict[str, Any], console, rows) -> None:
  if 'error' in xla:
    console.print(f'XLA for {xla["target"]}: does not fit. {xla["error"]}')
    return
  rows.add_row(f'compiled for {xla["target"]}, {xla["seconds"]:.0f} s', '')
  rows.add_row('arguments (state, batch)', f'{xla["arguments"] / _GIB:.4g}')
  rows.add_row('temporary', f'{xla["temporary"] / _GIB:.4g}')
  rows.add_row('total', f'{xla["total"] / _GIB:.4g}')
  if 'measured' in xla:
    rows.add_row('measured', f'{xla["measured"] / _GIB:.4g}')
  console.print(rows)
  counted = [f'{n} {kind}' for kind, n in sorted(xla['collectives'].items())]
  console.print(f'Collectives in its text: {", ".join(counted) or "none"}')


def _show_flops(operations: dict[str, Any], console, rows) -> None:
  for name, part in operations['parts'].items():
    rows.add_row(name, f'{(part["forward"] + part["backward"]) / 1e12:,.4g}')
  rows.add_row('model', f'{operations["model"] / 1e12:,.4g}')
  for name, text in (
      ('capacity', 'empty slots of experts'),
      ('dispatch', 'dispatch'),
      ('recompute', 'computed again (remat)'),
      ('total', 'all that runs'),
  ):
    rows.add_row(text, f'{operations[name] / 1e12:,.4g}')
  console.print(rows)
