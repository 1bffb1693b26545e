# SPDX-License-Identifier: Apache-2.0
"""What a report shows: tables, figures with how to read them, samples."""

from collections.abc import Mapping
import json
from typing import Any

from moellava_jax import config
from moellava_jax.analysis import (
    exhibits,
    html,
    look,
    plots,
    routing_exhibits,
    routing_page,
    run_files,
    samples,
)
from moellava_jax.analysis import results as results_lib
from moellava_jax.evals import shapes

_SAMPLES, _WRONG_SAMPLES = 12, 4


def build(run: run_files.Run, results: Mapping[str, Any]) -> html.Page:
  """The page of a run; parts without data are empty."""
  facts = [
      f'{name} {value}'
      for name, value in (
          ('seed', run.seed),
          ('revision', run.environment.get('revision')),
          ('on', run.environment.get('device')),
      )
      if value is not None
  ]
  experts, absent = _expert_figures(run, results)
  tables = (score_table(results), _pope_table(results))
  return html.Page(
      title=f'Training report: {run.path.resolve().name}',
      subtitle=', '.join(facts),
      absent=(*run.absent, *absent),
      results=tuple(t for t in tables if t.rows),
      scores=(),
      training=tuple(t for t in (_stage_table(run),) if t.rows),
      losses=_loss_figures(run),
      routing=()
      if run.counts is None
      else (routing_page.table(run.counts, run.routing),),
      experts=experts,
      samples=samples.choose(samples.collect(run), _SAMPLES, _WRONG_SAMPLES),
      images=run.path / 'data',
      commands=run_files.commands(run),
      details=tuple(
          (name, json.dumps(content, indent=1, sort_keys=True))
          for name, content in (
              ('Environment', run.environment),
              ('Config', run.config),
          )
          if content
      ),
  )


def score_table(results: Mapping[str, Any]) -> html.Table:
  """Stage by headline score, then the controls."""
  rows = []
  for name, score in results.get('scores', {}).items():
    exact = score.get('exact_match', {})
    values = [
        results_lib.pope_mean(score, 'f1'),
        *(exact.get(key) for key in (*shapes.CATEGORIES, 'mean')),
    ]
    label = name.replace('.', ', ').replace('_', ' ')
    rows.append((label, *(percent(v) for v in values)))
  return html.Table(
      'All values in %. POPE F1 is the mean over random, popular and'
      ' adversarial questions. The last rows are controls: the same model'
      ' shown a grey image, or the image of another question.',
      ('model after stage', 'POPE F1', *shapes.CATEGORIES, 'mean exact match'),
      tuple(rows),
  )


def _pope_table(results: Mapping[str, Any]) -> html.Table:
  metrics = ('accuracy', 'precision', 'recall', 'f1', 'yes_ratio')
  return html.Table(
      'POPE of the model after stage moe, in %. Yes is the positive class; a'
      ' yes ratio far from the share of questions whose truth is yes (half of'
      ' them in POPE) is a bias.',
      ('POPE negatives', *(m.replace('_', ' ') for m in metrics)),
      tuple(
          (category, *(percent(score.get(m)) for m in metrics))
          for category, score in results_lib.pope_categories(results).items()
      ),
  )


def _stage_table(run: run_files.Run) -> html.Table:
  rows = []
  for stage in sorted(run.stages, key=config.STAGES.index):
    row = run.stages[stage]
    # Every row has the count so far.
    counts = [r.get('skipped', 0) for r in run.metrics.get(stage, ())]
    rows.append(
        (
            stage,
            f'{row["trained_parameters"]:,}',
            f'{row["total_parameters"]:,}',
            f'{row["activated_parameters"]:,}',
            f'{row["steps"]:,}',
            f'{max(counts, default=0):,}',
            f'{row["seconds"]:,.1f}',
            _count(results_lib.tokens(run, stage)),
            _count(results_lib.tokens_per_s(run, stage)),
        )
    )
  return html.Table(
      'Activated parameters are those that one token passes through. Skipped'
      ' steps had a loss or gradient that was not finite. Tokens per second are'
      ' the median over the steps, without compilation; seconds have everything'
      ' that a stage does.',
      (
          'stage',
          'trained parameters',
          'total',
          'activated',
          'steps',
          'skipped',
          'seconds',
          'tokens',
          'tokens/s',
      ),
      tuple(rows),
  )


def _loss_figures(run: run_files.Run) -> tuple[html.Figure, ...]:
  if not run.metrics:
    return ()
  figure = plots.loss_curves(run.metrics)
  return (
      html.Figure(
          'Loss of every stage',
          'Lower is better. The faint line is the loss of each step, the bold'
          ' one its running mean, the dots the loss on held-out data; dots that'
          ' rise while the line falls are overfitting. Stages differ in data'
          ' and template, so compare within a panel only.',
          look.png(figure),
      ),
  )


def _expert_figures(
    run: run_files.Run, results: Mapping[str, Any]
) -> tuple[tuple[html.Figure, ...], tuple[str, ...]]:
  """Figures of routing, and why some are absent."""
  shown = exhibits.of_training(run.moe_rows)
  figures = [exhibits.on_page(exhibit) for exhibit in shown]
  absent: list[str] = []
  if run.counts is not None:
    shown, absent = routing_exhibits.of_counts(run.counts)
    figures += [exhibits.on_page(exhibit) for exhibit in shown]
  elif load_LE := results.get('expert_load'):
    layers = run.routing.get('layers', run.moe_layers)
    source = 'the evaluation questions' if run.routing else 'the last steps'
    figures.append(
        html.Figure(
            'Expert load per layer',
            f'Measured on {source}. Bars at the dashed line are even use; an'
            ' expert below the dotted line is hardly used.',
            look.png(plots.expert_load(layers, load_LE)),
        )
    )
  return tuple(figures), tuple(absent)


def _count(value: float | None) -> str:
  return '–' if value is None else f'{value:,.0f}'


def percent(value: float | None) -> str:
  """A share as a percentage without its sign; a dash where there is none."""
  return '–' if value is None else f'{100 * value:.1f}'
