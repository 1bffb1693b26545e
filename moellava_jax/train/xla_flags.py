# SPDX-License-Identifier: Apache-2.0
"""Published compiler flags of each accelerator, for scripts that start training.

python -m moellava_jax.train.xla_flags                  # the names
python -m moellava_jax.train.xla_flags --device=h100    # NAME=VALUE, a line each
python -m moellava_jax.train.xla_flags --device=h100 --sources

XLA and libtpu read them once, when JAX starts, and end a process that names one
they do not know: training never imports this, and a set says with which JAX it
was accepted. Needs nothing but the standard library.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
import importlib.metadata
import sys

_JAX = 'https://docs.jax.dev/en/latest/gpu_performance_tips.html'
_TOOLBOX = (
    'https://github.com/NVIDIA/JAX-Toolbox/blob/main/docs/GPU_performance.md'
)
_MAXTEXT = 'https://github.com/AI-Hypercomputer/maxtext/blob/main'
_A3 = f'{_MAXTEXT}/src/maxtext/configs/gpu/a3/llama_2_7b/16vm.sh'
_V5E = f'{_MAXTEXT}/benchmarks/maxtext_v5e_model_configs.py'
_LIBRARY = f'{_MAXTEXT}/benchmarks/xla_flags_library.py'
_RECIPES = 'https://github.com/AI-Hypercomputer/tpu-recipes/blob/main/training'
_V5P = f'{_RECIPES}/v5p/Mixtral-8X7B-Maxtext/cluster_toolkit/run_recipe.sh'
_V6E = f'{_RECIPES}/trillium/Mixtral-8x7B-MaxText/README.md'
_XLA = 'https://github.com/openxla/xla/blob/main/xla/pjrt/utils.cc'


@dataclasses.dataclass(frozen=True)
class Flag:
  """One setting: a variable of the environment, or a word in one."""

  variable: str  # XLA_FLAGS and LIBTPU_INIT_ARGS collect the words of a set.
  value: str
  source: str  # Where it is recommended.


@dataclasses.dataclass(frozen=True)
class FlagSet:
  """The flags of a kind of accelerator."""

  jax: str  # The minor version of JAX by which they were accepted.
  published: str  # What the sources say they are for.
  flags: tuple[Flag, ...]


def _words(variable: str, source: str, *values: str) -> tuple[Flag, ...]:
  return tuple(Flag(variable, value, source) for value in values)


# Fewer and larger collectives, beside the computation and not between.
_OVERLAP_GPU = (
    *_words(
        'XLA_FLAGS', _JAX, '--xla_gpu_enable_latency_hiding_scheduler=true'
    ),
    *_words(
        'XLA_FLAGS',
        _TOOLBOX,
        '--xla_gpu_enable_pipelined_all_gather=true',
        '--xla_gpu_enable_pipelined_all_reduce=true',
        '--xla_gpu_enable_pipelined_reduce_scatter=true',
    ),
    # The rest is for NCCL and cuBLAS. JAX's own default is 0.75.
    Flag('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9', _TOOLBOX),
)
_OVERLAP_TPU = (
    '--xla_tpu_enable_async_collective_fusion=true',
    '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
    '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
    '--xla_tpu_overlap_compute_collective_tc=true',
    '--xla_enable_async_all_gather=true',
)
_DATA_PARALLEL_TPU = (
    '--xla_tpu_enable_data_parallel_all_reduce_opt=true',
    '--xla_tpu_data_parallel_opt_different_sized_ops=true',
)
_VMEM_MOE = '--xla_tpu_scoped_vmem_limit_kib=81920'

# Device -> sets, oldest JAX first. Add one when a newer JAX refuses a flag.
SETS: Mapping[str, tuple[FlagSet, ...]] = {
    'cpu': (
        FlagSet(
            jax='0.10',
            published='simulated devices: threads for all of them to wait in',
            flags=_words('NPROC', _XLA, '32'),
        ),
    ),
    'a100': (
        FlagSet(
            jax='0.10',
            published='LLMs on several GPUs; jaxlib 0.4.18 and newer',
            flags=_OVERLAP_GPU,
        ),
    ),
    'h100': (
        FlagSet(
            jax='0.10',
            published='LLMs on nodes with 8 GPUs; thresholds: LLaMA 2 7B',
            flags=(
                *_OVERLAP_GPU,
                *_words(
                    'XLA_FLAGS',
                    _A3,
                    '--xla_gpu_all_gather_combine_threshold_bytes=134217728',
                    '--xla_gpu_all_reduce_combine_threshold_bytes=1073741824',
                    '--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728',
                ),
                # Not on Blackwell, which it slows down.
                Flag('CUDA_DEVICE_MAX_CONNECTIONS', '1', _TOOLBOX),
            ),
        ),
    ),
    'v5e': (
        FlagSet(
            jax='0.10',
            published='MaxText, dense models of 7B to 175B on v5e-256',
            flags=(
                *_words('LIBTPU_INIT_ARGS', _V5E, *_DATA_PARALLEL_TPU),
                *_words('LIBTPU_INIT_ARGS', _LIBRARY, *_OVERLAP_TPU),
            ),
        ),
    ),
    'v5p': (
        FlagSet(
            jax='0.10',
            # The recipe leaves asynchronous collective fusion away: "current
            # libtpu rejects [it] on TPU v5p at backend initialization".
            published='MaxText, Mixtral 8x7B on v5p-128',
            flags=_words(
                'LIBTPU_INIT_ARGS',
                _V5P,
                '--xla_tpu_megacore_fusion_allow_ags=false',
                '--xla_enable_async_collective_permute=true',
                '--xla_tpu_enable_ag_backward_pipelining=true',
                *_DATA_PARALLEL_TPU,
                '--xla_tpu_overlap_compute_collective_tc=true',
                '--xla_enable_async_all_gather=true',
                _VMEM_MOE,
            ),
        ),
    ),
    'v6e': (
        FlagSet(
            jax='0.10',
            published='MaxText, Mixtral 8x7B with drops on v6e-256; JAX 0.5.2',
            flags=(
                *_words('LIBTPU_INIT_ARGS', _V6E, _VMEM_MOE),
                *_words('LIBTPU_INIT_ARGS', _LIBRARY, *_OVERLAP_TPU),
                *_words('LIBTPU_INIT_ARGS', _V6E, *_DATA_PARALLEL_TPU),
            ),
        ),
    ),
}


class UnknownDeviceError(ValueError):
  """There are no flags by this name; the message lists those there are."""


def choose(device: str, jax: str | None) -> FlagSet:
  """The newest set of `device` that is not newer than `jax`, or the oldest.

  Args:
    device: a key of `SETS`.
    jax: a version of JAX; None: the newest set.

  Raises:
    UnknownDeviceError: no such device.
  """
  if device not in SETS:
    raise UnknownDeviceError(
        f'no flags for --device={device}; there are {", ".join(SETS)}'
    )
  sets = SETS[device]
  if jax is None:
    return sets[-1]
  fitting = [s for s in sets if _minor(s.jax) <= _minor(jax)]
  return fitting[-1] if fitting else sets[0]


def environment(flags: FlagSet) -> dict[str, str]:
  """Variables and values; words of one variable joined by blanks."""
  found: dict[str, str] = {}
  for flag in flags.flags:
    found[flag.variable] = (
        f'{found.get(flag.variable, "")} {flag.value}'.strip()
    )
  return found


def _minor(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split('.')[:2])


def installed() -> str | None:
  """The version of JAX that is here, without importing it."""
  try:
    return importlib.metadata.version('jax')
  except importlib.metadata.PackageNotFoundError:
    return None


def main(argv: Sequence[str]) -> int:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--device', help='one of the names')
  parser.add_argument('--jax', help='a version (default: the installed one)')
  parser.add_argument(
      '--sources', action='store_true', help='where each flag comes from'
  )
  args = parser.parse_args(argv)
  if args.device is None:
    for name, sets in SETS.items():
      for flags in sets:
        print(f'{name}  JAX {flags.jax}  {flags.published}')
    return 0
  jax = args.jax or installed()
  try:
    chosen = choose(args.device, jax)
  except UnknownDeviceError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  if jax is not None and _minor(jax) != _minor(chosen.jax):
    print(
        f'The flags of {args.device} were accepted by JAX {chosen.jax}; this is'
        f' {jax}. If it names an unknown flag, leave them away.',
        file=sys.stderr,
    )
  if args.sources:
    for flag in chosen.flags:
      print(f'{flag.variable} {flag.value}\n    {flag.source}')
  else:
    for name, value in environment(chosen).items():
      print(f'{name}={value}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
