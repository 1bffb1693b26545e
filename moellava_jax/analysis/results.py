# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run, recomputed from its files: what results.json holds."""

from collections.abc import Iterator, Mapping, Sequence
import math
import statistics
from typing import Any, NamedTuple

from moellava_jax.analysis import run_files
from moellava_jax.evals import base, pope, shapes

# The embedded task's warm-up counts as stage 0; the paper's stages follow.
_STAGE_KEYS = {
    'warmup': 'stage0',
    'pretrain': 'stage1',
    'finetune': 'stage2',
    'moe': 'stage3',
}
# Steps at the end of training that stand for the load when nothing else does.
_LAST_STEPS = 50


def scores(run: run_files.Run) -> dict[str, dict[str, Any]]:
  """Scores of every model that answered: name -> what the scorer returns.

  `moe.blank_image` is the model of stage moe under a control. Without answers
  to the exact-match questions only `pope` is scored.

  Raises:
    ValueError: answers and questions do not match; the message says which.
  """
  out: dict[str, dict[str, Any]] = {}
  for name, answers in run.answers.items():
    try:
      if answers.keys() >= set(shapes.FILES):
        out[name] = shapes.score(run.questions, answers)
      elif 'pope' in answers:
        rates = pope.rates(run.questions['pope'], answers['pope'])
        out[name] = {'pope': rates}
    except base.EvalError as error:
      raise ValueError(
          f'{run.path / "answers"}/{name}.*.jsonl: {error} To complete an'
          f' interrupted evaluation run `{run_files.eval_command(run.path, name)}`;'
          ' remove files that belong to other questions first.'
      ) from error
  return out


def pope_categories(score: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """The categories of a POPE score, without the means beside them."""
  groups = score.get('pope', {}).items()
  return {name: rates for name, rates in groups if isinstance(rates, dict)}


def pope_mean(score: Mapping[str, Any], metric: str) -> float | None:
  """Mean over the categories: of F1, the one POPE number of the paper."""
  values = [rates[metric] for rates in pope_categories(score).values()]
  return statistics.fmean(values) if values else None


def collect(run: run_files.Run) -> dict[str, Any]:
  """The content of results.json; what the run does not have is left out.

  `expert_load` comes from routing.json, else from the last steps of training.
  """
  scored = scores(run)
  final = scored.get(run_files.FINAL, {})
  out: dict[str, Any] = {
      'pope': final.get('pope'),
      'exact_match': final.get('exact_match'),
  }
  for stage, key in _STAGE_KEYS.items():
    score = scored.get(stage, {})
    out[key] = {
        'pope_f1_mean': pope_mean(score, 'f1'),
        'exact_match_mean': score.get('exact_match', {}).get('mean'),
    }
  out['controls'] = {
      control: {
          'pope_accuracy': pope_mean(score, 'accuracy'),
          'exact_match_mean': score.get('exact_match', {}).get('mean'),
      }
      for control in run_files.CONTROLS
      if (score := scored.get(f'{run_files.FINAL}.{control}'))
  }
  out['expert_load'] = run.routing.get('expert_load', _last_load(run))
  for key in ('expert_distance', 'loss', 'loss_shuffled_experts'):
    out[_STAGE_KEYS[run_files.FINAL]][key] = run.routing.get(key)
  out['tokens_per_s'] = {s: tokens_per_s(run, s) for s in run.metrics}
  out['seconds'] = {s: row.get('seconds') for s, row in run.stages.items()}
  out['seed'] = run.seed
  out['revision'] = run.environment.get('revision')
  out['scores'] = scored
  return _without_none(out)


def tokens(run: run_files.Run, stage: str) -> int | None:
  """Tokens that a stage was trained on, prompts and patches among them."""
  found = [
      row['tokens'] for row in run.metrics.get(stage, ()) if 'tokens' in row
  ]
  return sum(found) if found else None


def tokens_per_s(run: run_files.Run, stage: str) -> float | None:
  """Median over the steps, so that compilation and checkpoints do not count."""
  rows = run.metrics.get(stage, ())
  found = [row['tokens_per_s'] for row in rows if 'tokens_per_s' in row]
  return statistics.median(found) if found else None


class Spread(NamedTuple):
  """A metric of several runs."""

  values: tuple[float | None, ...]  # By run; None: it does not have it.
  mean: float
  deviation: float  # Sample standard deviation; NaN for a single value.
  count: int


def compare(many: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
  """Headline metrics of several results.json.

  They are named by their path in results.json, such as `exact_match.count`.
  """
  found = [dict(_headline(result)) for result in many]
  names = list(dict.fromkeys(name for one in found for name in one))
  compared = {}
  for name in names:
    values = tuple(one.get(name) for one in found)
    v = [value for value in values if value is not None]
    deviation = statistics.stdev(v) if len(v) > 1 else float('nan')
    compared[name] = Spread(values, statistics.mean(v), deviation, len(v))
  return compared


def unit(name: str) -> str:
  """Unit of a metric of `compare`; '%': its values are parts of 1."""
  if name.startswith(('seconds', 'tokens_per_s')):
    return 's' if name.startswith('seconds') else 'tokens/s'
  losses = ('loss', 'loss_shuffled_experts')
  return 'nats' if name.split('.')[-1] in losses else '%'


def _last_load(run: run_files.Run) -> list[list[float]] | None:
  """Mean expert load per layer of the last steps, or None without MoE rows."""
  rows = [row['moe'] for row in run.moe_rows[-_LAST_STEPS:]]
  if not rows:
    return None
  return [
      [
          sum(loads) / len(rows)
          for loads in zip(*(row[layer]['load'] for row in rows), strict=True)
      ]
      for layer in run.moe_layers
  ]


def _headline(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
  """The numbers of results.json that are compared between runs."""
  for category, score in pope_categories(result).items():
    for metric in ('accuracy', 'f1'):
      yield f'pope.{category}.{metric}', score[metric]
  sections = (
      'exact_match',
      *_STAGE_KEYS.values(),
      'controls',
      'tokens_per_s',
      'seconds',
  )
  for section in sections:
    for path, value in _leaves(result.get(section, {}), section):
      if not isinstance(value, list):
        yield path, value


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _leaves(value, f'{path}.{key}')
  else:
    yield path, tree


def _without_none(tree: Any) -> Any:
  """`tree` without None and NaN leaves, nor dicts that hold nothing else."""
  if not isinstance(tree, dict):
    return tree
  kept = {key: _without_none(value) for key, value in tree.items()}
  return {
      key: value
      for key, value in kept.items()
      if value is not None
      and value != {}
      and not (isinstance(value, float) and math.isnan(value))
  }
