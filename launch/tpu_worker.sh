#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/tpu_worker.sh [--dry-run] COMMAND

What tpu_pod.sh runs on every host of a TPU slice.

  install --python=3.11      Python by uv (the images of TPU VMs have 3.10), and
                             .venv with the extra `tpu`
  start CONFIG [ARGUMENTS]   local.sh in the background, beyond this connection
  status                     prints 'tpu_worker HOST running', '... exit CODE',
                             '... lost' (it ended without a code: the host was
                             started again) or '... none'
  stop [--grace=SECONDS]     SIGTERM, so that a checkpoint is saved; a second one
                             after SECONDS (default: 120) kills

The state is in ~/.moellava (MOELLAVA_STATE): log, pid, exit.
TEXT
}

state=${MOELLAVA_STATE:-$HOME/.moellava}

status() {
  local now=none
  if [[ -f $state/pid ]]; then
    now=lost
    if kill -0 "$(<"$state/pid")" 2>/dev/null; then
      now=running
    fi
  fi
  # Last: a process that has ended by now has written its code before.
  if [[ -f $state/exit ]]; then
    now="exit $(<"$state/exit")"
  fi
  printf 'tpu_worker %s %s\n' "$(hostname)" "$now"
}

# The images have 3.10 or older; uv brings builds that need no root.
find_uv() {
  UV=$(command -v uv || true)
  if [[ -z $UV && -x $HOME/.local/bin/uv ]]; then
    UV=$HOME/.local/bin/uv
  fi
}

install() {
  local python=3.11
  while (($#)); do
    case $1 in
      --python=3.*) python=${1#*=} ;;
      *) die "install: unknown argument '$1'" ;;
    esac
    shift
  done
  find_uv
  if [[ -z $UV ]]; then
    run python3 -m pip install --quiet --user uv
    find_uv
    UV=${UV:-$HOME/.local/bin/uv}
  fi
  run "$UV" python install "$python"
  if $DRY_RUN; then
    PYTHON="python$python"
  else
    PYTHON=$("$UV" python find --no-project "$python")
  fi
  EXTRAS=tpu
  ensure_venv ''
}

start() {
  if $DRY_RUN; then
    run setsid bash "$ROOT/launch/tpu_worker.sh" attend "$@"
    return
  fi
  [[ $(status) != *running ]] || die "training runs already on $(hostname)"
  mkdir -p -- "$state"
  rm -f -- "$state/exit" "$state/pid"
  # Its session is its own, so that it outlives the connection. The pid is
  # written here: whoever asks for the status next must find it.
  setsid bash "$ROOT/launch/tpu_worker.sh" attend "$@" \
    >>"$state/log" 2>&1 </dev/null &
  printf '%s\n' "$!" >"$state/pid"
  status
}

attend() {
  cd -- "$ROOT"  # Relative paths are the same for all hosts.
  EXTRAS=tpu attended bash "$ROOT/launch/local.sh" "$@"
  printf '%s\n' "$CODE" >"$state/exit.new"
  mv -- "$state/exit.new" "$state/exit"  # Never half a file.
}

stop() {
  local grace=120 waited=0
  while (($#)); do
    case $1 in
      --grace=?*) grace=${1#*=} ;;
      *) die "stop: unknown argument '$1'" ;;
    esac
    shift
  done
  natural --grace "$grace"
  if $DRY_RUN; then
    say "Would send SIGTERM to the process in $state/pid"
    return
  fi
  if [[ $(status) == *running ]]; then
    kill -TERM "$(<"$state/pid")"
    while [[ $(status) == *running ]] && ((waited < grace)); do
      sleep 1
      waited=$((waited + 1))
    done
    if [[ $(status) == *running ]]; then
      kill -TERM "$(<"$state/pid")"  # supervise.py kills at the second one.
      while [[ $(status) == *running ]]; do
        sleep 1
      done
    fi
  fi
  status
}

if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=true
  shift
fi
case ${1:-} in
  install | start | status | stop | attend)
    "$@"
    ;;
  -h | --help) usage ;;
  *)
    usage >&2
    die "unknown command '${1:-}'"
    ;;
esac
