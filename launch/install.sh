#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/install.sh [--dry-run] [EXTRAS]

Makes .venv in the repository with the package and EXTRAS of setup.py, such as
serve,tensorboard; on a machine with an NVIDIA driver also with the JAX for it.
The other launchers do this by themselves: it is for use by hand, and for
clusters whose nodes have no network:

  bash launch/install.sh cuda13    # on a login node, which has no driver

Environment:
  PYTHON=python3.12   the Python to make .venv with (3.11 or newer)
TEXT
}

extras=''
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) DRY_RUN=true ;;
    -*)
      usage >&2
      die "unknown option '$1'"
      ;;
    *)
      [[ -z $extras ]] || die "extras are joined by commas: '$extras,$1'"
      extras=$1
      ;;
  esac
  shift
done
EXTRAS=$extras${extras:+${EXTRAS:+,}}${EXTRAS:-}
choose_cuda
ensure_venv ''
say "source ${VENV}/bin/activate"
