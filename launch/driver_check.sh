#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/driver_check.sh [--dry-run]

Asks nvidia-smi for the driver and the GPUs, and prints the extra of setup.py
whose CUDA they can run: cuda13 (driver 580 or newer, compute capability 7.5 or
newer) or cuda12 (driver 525, compute capability 5.2). Anything older, and a
machine without a driver, is an error.

  pip install -e ".[$(bash launch/driver_check.sh)]"

  --dry-run   print what would be asked
TEXT
}

while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) DRY_RUN=true ;;
    *)
      usage >&2
      die "unknown argument '$1'"
      ;;
  esac
  shift
done

if $DRY_RUN; then
  run nvidia-smi --query-gpu=driver_version --format=csv,noheader
  run nvidia-smi --query-gpu=compute_cap --format=csv,noheader
  exit 0
fi
cuda_extra
printf '%s\n' "$CUDA_EXTRA"
