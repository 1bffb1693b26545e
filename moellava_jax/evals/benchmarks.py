# SPDX-License-Identifier: Apache-2.0
"""The benchmarks by name."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from moellava_jax.evals import (
    ai2d,
    base,
    chartqa,
    gqa,
    judge,
    llava_bench,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    prompts,
    scienceqa,
    seed,
    shapes,
    textvqa,
    vizwiz,
    vqav2,
)

Questions = Mapping[str, Sequence[base.Question]]  # Of each file.
Answers = Mapping[str, Sequence[base.Answer]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What a benchmark's file has."""

  load: Callable[[str, str | None], Mapping[str, Sequence[base.Question]]]
  score: Callable[[Questions, Answers], dict[str, Any]]
  max_new_tokens: int
  prompts: prompts.Prompts  # Of protocols other than LLaVA's.
  # Writes the file that a server or an official script takes.
  submission: Callable[[pathlib.Path, Questions, Answers], None] | None = None
  # For those that a language model grades, or may: what it is asked at first,
  # and the scores with it.
  requests: Callable[[Questions, Answers], list[judge.Request]] | None = None
  grade: Callable[[Questions, Answers, judge.Judge], dict[str, Any]] | None = (
      None
  )


BENCHMARKS = {
    'ai2d': Benchmark(ai2d.load, ai2d.score, ai2d.MAX_NEW_TOKENS, ai2d.PROMPTS),
    'chartqa': Benchmark(
        chartqa.load, chartqa.score, chartqa.MAX_NEW_TOKENS, chartqa.PROMPTS
    ),
    'gqa': Benchmark(
        gqa.load, gqa.score, gqa.MAX_NEW_TOKENS, gqa.PROMPTS, gqa.submission
    ),
    'llava_bench': Benchmark(
        llava_bench.load,
        llava_bench.score,
        llava_bench.MAX_NEW_TOKENS,
        llava_bench.PROMPTS,
        requests=llava_bench.requests,
        grade=llava_bench.grade,
    ),
    'mmbench': Benchmark(
        mmbench.load,
        mmbench.score,
        mmbench.MAX_NEW_TOKENS,
        mmbench.PROMPTS,
        mmbench.submission,
        mmbench.requests,
        mmbench.grade,
    ),
    'mmbench_cn': Benchmark(
        mmbench.load_cn,
        mmbench.score,
        mmbench.MAX_NEW_TOKENS,
        mmbench.PROMPTS_CN,
        mmbench.submission,
        mmbench.requests,
        mmbench.grade,
    ),
    'mme': Benchmark(
        mme.load, mme.score, mme.MAX_NEW_TOKENS, mme.PROMPTS, mme.submission
    ),
    'mmmu': Benchmark(
        mmmu.load,
        mmmu.score,
        mmmu.MAX_NEW_TOKENS,
        mmmu.PROMPTS,
        mmmu.submission,
    ),
    'mmvet': Benchmark(
        mmvet.load,
        mmvet.score,
        mmvet.MAX_NEW_TOKENS,
        mmvet.PROMPTS,
        mmvet.submission,
        mmvet.requests,
        mmvet.grade,
    ),
    'pope': Benchmark(pope.load, pope.score, pope.MAX_NEW_TOKENS, pope.PROMPTS),
    'scienceqa': Benchmark(
        scienceqa.load,
        scienceqa.score,
        scienceqa.MAX_NEW_TOKENS,
        scienceqa.PROMPTS,
    ),
    'seed': Benchmark(
        seed.load,
        seed.score,
        seed.MAX_NEW_TOKENS,
        seed.PROMPTS,
        seed.submission,
    ),
    'shapes': Benchmark(
        shapes.load, shapes.score, shapes.MAX_NEW_TOKENS, shapes.PROMPTS
    ),
    'textvqa': Benchmark(
        textvqa.load, textvqa.score, textvqa.MAX_NEW_TOKENS, textvqa.PROMPTS
    ),
    'vizwiz': Benchmark(
        vizwiz.load,
        vizwiz.score,
        vizwiz.MAX_NEW_TOKENS,
        vizwiz.PROMPTS,
        vizwiz.write_submission,
    ),
    'vqav2': Benchmark(
        vqav2.load,
        vqav2.score,
        vqav2.MAX_NEW_TOKENS,
        vqav2.PROMPTS,
        vqav2.write_submission,
    ),
}
PAPER = 'paper'  # No benchmark: the table of all of them.


def get(name: str) -> Benchmark:
  """Raises EvalError, with the list, for a name that is not there."""
  if name not in BENCHMARKS:
    raise base.EvalError(
        f'No benchmark {name!r}; there are {", ".join(sorted(BENCHMARKS))}, and'
        f' {PAPER} for the table of the paper.'
    )
  return BENCHMARKS[name]


def put(
    name: str, questions: Questions, protocol: str
) -> Mapping[str, Sequence[base.Question]]:
  """The questions as a protocol puts them.

  Raises:
    EvalError: no such protocol, or not of this benchmark.
  """
  if protocol == prompts.PROTOCOLS[0]:
    return questions
  ways = get(name).prompts
  if protocol not in ways:
    known = [p for p in prompts.PROTOCOLS if p in ways]
    raise base.EvalError(
        f'{name} has no protocol {protocol!r}; there are'
        f' {", ".join([prompts.PROTOCOLS[0], *known])}.'
    )
  return {
      key: [dataclasses.replace(q, text=ways[protocol](q)) for q in group]
      for key, group in questions.items()
  }
