#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/test.sh [--dry-run] [PYTEST ARGUMENTS]

Runs the tests on the CPU, with 8 simulated devices. Makes .venv in the
repository on first use, with the versions of requirements-3.X.lock.

  bash launch/test.sh                       everything but the large tests
  bash launch/test.sh -m large              these: minutes or gigabytes each
  bash launch/test.sh -m 'not slow'         the quick ones
  bash launch/test.sh tests/model -k router paths are those in the repository

Environment:
  PYTHON=python3.12   the Python to make .venv with (3.11 or newer)
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=true
  shift
fi

ensure_venv test
cd -- "$ROOT"
if $DRY_RUN; then
  run "$VENV_PYTHON" -m pytest "$@"
  exit
fi
exec "$VENV_PYTHON" -m pytest "$@"
