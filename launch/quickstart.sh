#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/quickstart.sh [--smoke] [--run=DIR] [--seed=N] [-- OVERRIDES]

From nothing to a trained sparse vision-language model, on the embedded task
Shapes: makes .venv, trains every stage, evaluates each of them and two
controls, records where the tokens go, and writes RUN/report.html and
RUN/results.json. Downloads nothing but Python packages. Run it again after an
interruption: finished work is not repeated.

  --smoke       a few steps of everything: proves that it works, learns little
  --run=DIR     where everything is written (default: runs/shapes, or
                runs/shapes_smoke, in the repository)
  --seed=N      of data, initialisation and training (default: 0)
  --dry-run     print what would run
  -- OVERRIDES  passed on to training, such as --config.moe.lr=1e-4

Environment:
  PYTHON=python3.12   the Python to make .venv with (3.11 or newer)
  EXTRAS=cuda13       further extras of setup.py to install: cuda12, cuda13, tpu
  JAX_PLATFORMS=cpu   the device (default: the best one that JAX finds)
TEXT
}

config=configs/shapes.py
smoke=false
run_dir=
seed=0
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --smoke)
      config=configs/shapes.py:smoke
      smoke=true
      ;;
    --run=?*) run_dir=${1#*=} ;;
    --seed=?*) seed=${1#*=} ;;
    --dry-run) DRY_RUN=true ;;
    --)
      shift
      break
      ;;
    *)
      usage >&2
      die "unknown argument '$1'; overrides of the config come after --"
      ;;
  esac
  shift
done
[[ $seed =~ ^[0-9]+$ ]] || die "--seed=$seed is not a whole number"

if [[ -z $run_dir ]]; then
  run_dir=$ROOT/runs/shapes
  if $smoke; then
    run_dir+=_smoke
  fi
fi
[[ $run_dir == /* ]] || run_dir=$PWD/$run_dir  # Before leaving this folder.

choose_cuda
ensure_venv ''
cd -- "$ROOT"  # `python -m` finds configs/ here.

# Compiled steps are kept: resuming and evaluating start in seconds.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
settings=(--config="$config" --config.workdir="$run_dir" --config.seed="$seed")
if $smoke; then  # So few steps that almost all of the time is compiling.
  export XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}"
  settings+=(--config.model.llm.depth=2 --config.model.vision.depth=2)
fi
huge_pages
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

# As in training: one simulated device for each of two cores.
data=("--questions=$run_dir/data" "--images=$run_dir/data" --cpu_devices=2)

run "$VENV_PYTHON" -m moellava_jax.train.main "${settings[@]}" "$@"

run "$VENV_PYTHON" -m moellava_jax.evals.main \
  --model="$run_dir/warmup" --model="$run_dir/pretrain" \
  --model="$run_dir/finetune" --model="$run_dir/moe" \
  --benchmark=shapes "${data[@]}" --out="$run_dir/answers"

# Does it look at the image? Its score must fall without the right one.
run "$VENV_PYTHON" -m moellava_jax.evals.main --model="$run_dir/moe" \
  --benchmark=shapes "${data[@]}" --control=blank_image --control=shuffled_image \
  --out="$run_dir/answers"

run "$VENV_PYTHON" -m moellava_jax.analysis.main --model="$run_dir/moe" \
  "${data[@]}" --out="$run_dir/routing"

run "$VENV_PYTHON" -m moellava_jax.analysis.report --runs "$run_dir"

say "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $run_dir"
