#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/chaos.sh [OPTIONS]

Proves that a run survives being killed: trains Shapes (a few steps of two
stages) once undisturbed and once with kill -9 of one of its processes at random
moments, in a save, in a step and while it starts in turn. Before the first kill
and every fourth after it one process gets SIGTERM in a step: within 30 s all
have to end with 75, and the last step that was done has to be a checkpoint. After
every round each step must be in the history once, with the loss and the samples
of the undisturbed run, and every checkpoint must be readable; at the end the
weights must be the same bit for bit. What comes too late, when a run is over,
does not count, and is done again with a new run.

  --rounds=N        kills, beside the SIGTERMs (default: 20)
  --processes=N     of the run (default: 2)
  --cpu-devices=M   simulated devices of each (default: 2)
  --seed=N          of the moments (default: 0)
  --dir=DIR         an empty folder for the runs and their logs (default: a
                    temporary one, which is kept if something is wrong)
  --dry-run         print what would run

Exit codes: 0 all is well; 1 something is not, and it says what. Linux only.

Environment:
  PYTHON=python3.12   the Python to make .venv with (3.11 or newer)
  VENV_PYTHON=PATH    a Python to use as it is; nothing is installed
TEXT
}

arguments=()
dir=
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dir=?*) dir=${1#*=} ;;
    --rounds=?* | --processes=?* | --cpu-devices=?* | --seed=?*)
      natural "${1%%=*}" "${1#*=}"
      arguments+=("$1")
      ;;
    --dry-run) DRY_RUN=true ;;
    *)
      usage >&2
      die "unknown argument '$1'"
      ;;
  esac
  shift
done
if [[ -n $dir ]]; then
  [[ $dir == /* ]] || dir=$PWD/$dir  # Before leaving this folder.
  arguments+=("--dir=$dir")
fi
if $DRY_RUN; then
  arguments+=(--dry-run)
fi

ensure_venv ''
cd -- "$ROOT"  # `python -m` finds tests/ here.
export VENV_PYTHON
# A restart compiles nothing anew.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ ${XLA_FLAGS:-} != *--xla_backend_optimization_level=* ]]; then
  # So few steps that almost all of the time is compiling.
  export XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}"
fi
run_python=$(any_python)
if ! $DRY_RUN; then
  run_python=$VENV_PYTHON
fi
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$run_python" \
  -m tests.chaos ${arguments[@]+"${arguments[@]}"}
