#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

usage() {
  cat <<'TEXT'
bash launch/slurm_task.sh [--dry-run] NOTE COMMAND...

One task of slurm.sbatch: runs COMMAND and exits with its code; if that is 75 or
76, it is also written to NOTE. For srun returns the highest code of all tasks,
and the SIGABRT that the loss of a task brings to its peers (134) would hide the
76 of the watchdog.
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
if [[ ${1:-} == --dry-run ]]; then
  shift 2
  printf '%q ' "$@"
  printf '\n'
  exit 0
fi
if (($# < 2)); then
  usage >&2
  exit 2
fi
note=$1
shift

# SLURM signals every process of a task, and so the training as well: this one
# only has to be there when it ends. Ignored, the signal would be ignored there.
trap ':' TERM
code=0
"$@" || code=$?
if ((code == 75 || code == 76)); then
  printf '%s\n' "$code" >"$note"
fi
exit "$code"
