#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/local.sh CONFIG [OPTIONS] [-- FLAGS OF train.main]

Trains on this machine. JAX drives all local GPUs or TPU chips from one process;
several are for tests and for one process a GPU.

  bash launch/local.sh configs/shapes.py
  bash launch/local.sh configs/phi2.py:moe --restarts=3 -- --config.moe.lr=1e-5
  bash launch/local.sh configs/shapes.py --processes=2 --cpu-devices=4

  --processes=N     processes, with a coordinator on 127.0.0.1 (default: 1);
                    their output is marked [0], [1], ...
  --cpu-devices=M   train on the CPU, with M simulated devices a process
  --restarts=N      start again up to N times when training asks for it
                    (default: 0)
  --grace=SECONDS   from SIGTERM to SIGKILL for the processes that are left when
                    one fails (default: 30)
  --xla-flags=NAME  flags of the compiler: a name that
                    `python -m moellava_jax.train.xla_flags` lists, auto (those
                    of the GPUs here, if there are any) or none (default: auto)
  --dry-run         print what would run

CONFIG is a path from here or in the repository; relative paths among the flags
are from here. SIGTERM and SIGINT are passed on: training saves a checkpoint and
ends.

Exit codes: 0 done; 75 stopped with a checkpoint, 76 ended by the watchdog:
run the same command again; anything else: what the first failing process said.

Environment:
  PYTHON=python3.12      the Python to make .venv with (3.11 or newer)
  VENV_PYTHON=PATH       a Python to use as it is; nothing is installed
  EXTRAS=cuda12          extras of setup.py to install; with GPUs the CUDA that
                         the driver can run is added
  JAX_PLATFORMS=cpu      the device (default: the best one that JAX finds)
TEXT
}

config=
processes=1
cpu_devices=
restarts=0
grace=30
xla_flags=auto
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --processes=?*) processes=${1#*=} ;;
    --cpu-devices=?*) cpu_devices=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --grace=?*) grace=${1#*=} ;;
    --xla-flags=?*) xla_flags=${1#*=} ;;
    --dry-run) DRY_RUN=true ;;
    --)
      shift
      break
      ;;
    -*)
      usage >&2
      die "unknown option '$1'; flags of training come after --"
      ;;
    *)
      [[ -z $config ]] || die "two configs: '$config' and '$1'"
      config=$1
      ;;
  esac
  shift
done
if [[ -z $config ]]; then
  usage >&2
  die 'which CONFIG?'
fi
natural --processes "$processes"
natural --restarts "$restarts"
natural --grace "$grace"
((processes)) || die '--processes=0: expected at least 1'
find_config

command=(-m moellava_jax.train.main --config="$config")
gpu_ids=
if [[ -n $cpu_devices ]]; then
  natural --cpu-devices "$cpu_devices"
  export JAX_PLATFORMS=cpu
  command+=(--config.mesh.cpu_devices="$cpu_devices")
  # A count that is in XLA_FLAGS would win over the config's.
  read -ra words <<<"${XLA_FLAGS:-}"
  kept=()
  for word in ${words[@]+"${words[@]}"}; do
    case $word in
      --xla_force_host_platform_device_count=*) ;;
      *) kept+=("$word") ;;
    esac
  done
  export XLA_FLAGS="${kept[*]-}"
fi
choose_cuda
choose_store "$@"
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
  if ((processes > 1)); then
    gpu_ids=${CUDA_VISIBLE_DEVICES:-$(gpus index | tr '\n' ,)}
    gpu_ids=${gpu_ids%,}
  fi
elif [[ -e /dev/accel0 || -e /dev/vfio/0 || ,${EXTRAS:-}, == *,tpu,* ]] &&
  [[ ${JAX_PLATFORMS:-} != cpu ]]; then
  ((processes == 1)) ||
    die "--processes=$processes: the chips of a TPU belong to one process." \
      "Leave it away, or name --cpu-devices."
else
  # XLA sizes the pool of threads that the simulated devices share by the number
  # of cores. With few of them, steps that nobody waits for deadlock in a
  # collective.
  export NPROC=${NPROC:-32}
  if $DRY_RUN; then
    show export "NPROC=$NPROC"
  fi
  huge_pages
fi

ensure_venv ''
export_xla_flags "$xla_flags"
# For configs/ and, with a Python that the caller names, the package.
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if $DRY_RUN && [[ -n $cpu_devices ]]; then
  show export JAX_PLATFORMS=cpu
fi

supervise=("$ROOT/launch/supervise.py" --processes="$processes"
  --restarts="$restarts" --grace="$grace" --gpus="$gpu_ids")
if $DRY_RUN; then
  "$(any_python)" "${supervise[@]}" --dry-run \
    -- "$VENV_PYTHON" "${command[@]}" "$@"
else
  exec "$VENV_PYTHON" "${supervise[@]}" -- "$VENV_PYTHON" "${command[@]}" "$@"
fi
