# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# What the launchers share: `ensure_venv EXTRA` leaves a Python at
# $VENV_PYTHON in which the package (editable), its dependencies and those of
# EXTRA are installed. `cuda_extra` knows which CUDA the driver here can run,
# `export_xla_flags` sets the compiler's flags. Sourced after
# `set -euo pipefail`.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
# A Python that the caller names is used as it is, and nothing is installed:
# for images and clusters that bring their own environment.
GIVEN_PYTHON=${VENV_PYTHON:-}
VENV_PYTHON=${GIVEN_PYTHON:-$VENV/bin/python}
DRY_RUN=false  # Set by --dry-run: `run` and `ensure_venv` then only print.

say() { printf '== %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# show COMMAND...: print a command so that it can be copied.
show() {
  printf '$'
  printf ' %q' "$@"
  printf '\n'
}

# run COMMAND...: show a command, then run it, unless this is a dry run.
run() {
  if $DRY_RUN; then
    show "$@"
    return
  fi
  printf '\n'
  show "$@"
  "$@"
}

# pass_on PROCESS: what `attended` does at a SIGTERM, unless a script says
# otherwise.
pass_on() { kill -TERM "$1" 2>/dev/null; }

# attended COMMAND...: run a command in the background, `pass_on` a SIGTERM, and
# set CODE to what it ends with.
attended() {
  local child='' told=false
  trap 'told=true; [[ -z $child ]] || pass_on "$child" || true' TERM
  "$@" &
  child=$!
  if $told; then
    pass_on "$child" || true
  fi
  told=true
  while $told; do  # A signal ends `wait`; it remembers the code of a child.
    told=false
    CODE=0
    # shellcheck disable=SC2034  # For those who call this.
    wait "$child" || CODE=$?
  done
  trap - TERM
}

# find_config: leave in $config a path that exists: from here, or else from the
# repository. It may have a :stage.
find_config() {
  local file=${config%%:*}
  if [[ ! -f $file && -f $ROOT/$file ]]; then
    config=$ROOT/$config
  elif [[ ! -f $file ]]; then
    die "there is no config '$file', neither here nor in $ROOT"
  fi
}

# natural NAME VALUE: die unless VALUE is a whole number.
natural() {
  [[ $2 =~ ^[0-9]+$ ]] || die "$1=$2 is not a whole number"
}

# minor_of PYTHON: print '3.11'; fail if it does not start or is too old. A
# name on the PATH proves nothing: pyenv has one for every version it holds.
minor_of() {
  "$1" -c 'import sys
assert sys.version_info >= (3, 11)
print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

lock_of() { printf '%s' "$ROOT/requirements-$1.lock"; }

# find_python: set FOUND to the first Python that will do: $PYTHON, or the
# first one with a lock file, or else the first one at all.
find_python() {
  local candidate minor without_venv='' without_lock=''
  local candidates=(python3 python3.13 python3.12 python3.11)
  if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
  fi
  FOUND=''
  for candidate in "${candidates[@]}"; do
    minor=$(minor_of "$candidate") || continue
    if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      without_venv=${without_venv:-$candidate}
    elif [[ -f $(lock_of "$minor") ]]; then
      FOUND=$candidate
      return
    else
      without_lock=${without_lock:-$candidate}
    fi
  done
  FOUND=$without_lock
  if [[ -n $FOUND ]]; then
    return
  fi
  if [[ -n $without_venv ]]; then
    minor=$(minor_of "$without_venv")
    die "$without_venv (Python $minor) cannot make virtual environments." \
      "On Debian and Ubuntu: apt-get install python$minor-venv"
  fi
  die "no Python 3.11 or newer among: ${candidates[*]}." \
    "Install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# make_venv: (re)build .venv unless a usable one is there.
make_venv() {
  if [[ -e $VENV/.incomplete ]]; then
    say "The first installation did not finish: starting .venv afresh"
  elif "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    local have want
    have=$(minor_of "$VENV_PYTHON") ||
      die "$VENV holds a Python older than 3.11. Remove it and run this again."
    if [[ -n ${PYTHON:-} ]]; then
      want=$(minor_of "$PYTHON") ||
        die "PYTHON=$PYTHON does not start or is older than 3.11."
      [[ $have == "$want" ]] || die "$VENV holds Python $have but" \
        "PYTHON=$PYTHON is $want. Remove $VENV or unset PYTHON."
    fi
    return
  fi
  if [[ -d $VENV && ! -e $VENV/pyvenv.cfg && -n $(ls -A "$VENV") ]]; then
    die "$VENV exists but is not a virtual environment. Move it away."
  fi
  find_python
  say "Creating $VENV with $FOUND (Python $(minor_of "$FOUND"))"
  "$FOUND" -m venv --clear "$VENV" ||
    die "$FOUND -m venv failed. On Debian and Ubuntu:" \
      "apt-get install python$(minor_of "$FOUND")-venv"
  # Cut short, pip can leave half a package that it later takes for a whole
  # one. This file goes when the first installation is complete.
  touch "$VENV/.incomplete"
}

# ensure_venv EXTRA: one of setup.py's, or ''; $EXTRAS ('cuda13,tensorboard')
# adds to it. One launcher at a time: others wait until .venv is complete.
ensure_venv() {
  local extras=$1 locked=0
  extras=${extras}${extras:+${EXTRAS:+,}}${EXTRAS:-}
  if [[ -n $GIVEN_PYTHON ]]; then
    return
  fi
  if $DRY_RUN; then
    say "Would install ${ROOT}${extras:+[$extras]} into $VENV, if it is not there"
    return
  fi
  # macOS has no flock. Where others own the file, a complete .venv will do.
  if command -v flock >/dev/null && { exec 9>"$VENV.lock"; } 2>/dev/null; then
    # Codes above 1: the file system has no locks (Lustre without -o flock).
    flock -n 9 2>/dev/null || locked=$?
    if ((locked == 1)); then
      say "Another launcher is installing into $VENV: waiting for it"
      flock 9
    fi
  fi
  install_venv "$extras"
  exec 9>&-
}

# install_venv EXTRAS: what ensure_venv does, alone.
install_venv() {
  local extras=$1 started=$SECONDS minor lock wanted stamp
  make_venv
  minor=$(minor_of "$VENV_PYTHON")
  lock=$(lock_of "$minor")
  if [[ ! -f $lock ]]; then
    lock=/dev/null
  fi
  stamp=$VENV/.installed${extras:+-$extras}
  wanted="$(cat "$lock" "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum) $ROOT"
  if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    return
  fi
  if [[ $lock == /dev/null ]]; then
    say "No lock file for Python $minor: taking the newest allowed versions"
  fi
  say "Installing into $VENV (the first time about 1.3 GB and a few minutes)"
  "$VENV_PYTHON" -m pip install -qq --disable-pip-version-check \
    -c "$lock" -e "$ROOT${extras:+[$extras]}" ||
    die "pip failed (see above). Run this again when the cause is mended."
  rm -f "$VENV/.incomplete"
  printf '%s\n' "$wanted" >"$stamp"
  say "Installed in $((SECONDS - started)) s"
}

# any_python: print a Python for scripts that need only its standard library.
any_python() {
  if [[ -x $VENV_PYTHON ]]; then
    printf '%s' "$VENV_PYTHON"
  else
    command -v "${PYTHON:-python3}" || die 'no python3 on the PATH'
  fi
}

# gpus FIELD: print a field of `nvidia-smi` for every GPU, a line each.
gpus() {
  local answer
  answer=$(nvidia-smi --query-gpu="$1" --format=csv,noheader 2>&1) ||
    die "nvidia-smi failed: '$answer'. Is the NVIDIA driver loaded?" \
      "JAX_PLATFORMS=cpu trains on the CPU."
  printf '%s\n' "$answer"
}

# below A B: whether the version A is older than B (both X or X.Y).
below() {
  local a=$1 b=$2
  ((${a%%.*} < ${b%%.*})) && return
  ((${a%%.*} == ${b%%.*})) || return 1
  [[ $a == *.* && $b == *.* ]] || return 1
  a=${a#*.} b=${b#*.}
  ((10#${a%%.*} < 10#${b%%.*}))
}

# cuda_extra: set CUDA_EXTRA to the extra of setup.py whose CUDA the driver and
# the GPUs here can run. The minima are those of
# https://docs.jax.dev/en/latest/installation.html#nvidia-gpu: driver 525 for
# CUDA 12 and 580 for CUDA 13; compute capability 5.2 and 7.5.
cuda_extra() {
  local driver capabilities capability each
  command -v nvidia-smi >/dev/null ||
    die 'there is no nvidia-smi on the PATH: no NVIDIA driver is installed'
  driver=$(gpus driver_version)
  driver=${driver%%$'\n'*}
  [[ $driver =~ ^[0-9]+(\.[0-9]+)*$ ]] ||
    die "nvidia-smi names no driver version but '$driver'"
  if below "$driver" 525; then
    die "the NVIDIA driver is $driver; JAX needs 525 or newer for CUDA 12 and" \
      "580 or newer for CUDA 13. Install a newer driver."
  fi
  capabilities=$(gpus compute_cap)
  capability=''
  while IFS= read -r each; do  # The lowest: all of them run the same program.
    [[ $each =~ ^[0-9]+\.[0-9]+$ ]] ||
      die "nvidia-smi names no compute capability but '$each'"
    if [[ -z $capability ]] || below "$each" "$capability"; then
      capability=$each
    fi
  done <<<"$capabilities"
  if below "$capability" 5.2; then
    die "a GPU here has compute capability $capability; JAX needs 5.2 or newer"
  fi
  CUDA_EXTRA=cuda13
  if below "$driver" 580 || below "$capability" 7.5; then
    CUDA_EXTRA=cuda12
  fi
  say "NVIDIA driver $driver, compute capability $capability:" \
    "pip install -e '.[$CUDA_EXTRA]'" >&2
}

# choose_cuda: add to EXTRAS what `cuda_extra` says, or check what is there.
choose_cuda() {
  if [[ ${JAX_PLATFORMS:-} == cpu ]] || ! command -v nvidia-smi >/dev/null; then
    return
  fi
  cuda_extra
  case ,${EXTRAS:-}, in
    *,cuda13,*)
      [[ $CUDA_EXTRA == cuda13 ]] ||
        die "EXTRAS=$EXTRAS, but this machine runs CUDA 12 only:" \
          "pip install -e '.[cuda12]', or EXTRAS=cuda12"
      ;;
    *,cuda12,*) ;;  # Newer drivers run it too.
    *) EXTRAS=${EXTRAS:-}${EXTRAS:+,}$CUDA_EXTRA ;;
  esac
}

# huge_pages: for training on the CPU. XLA takes its memory anew at every call;
# in pages of 4 kB that is a sixth of the processor time of a step, in those of
# 2 MB next to nothing. glibc before 2.35 and other C libraries ignore it:
# https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
huge_pages() {
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
  if $DRY_RUN; then
    show export "GLIBC_TUNABLES=$GLIBC_TUNABLES"
  fi
}

# choose_store FLAGS: add to EXTRAS what a run folder in gs:// needs.
choose_store() {
  if [[ " $* " == *" --config.workdir=gs://"* && ,${EXTRAS:-}, != *,gcs,* &&
    ,${EXTRAS:-}, != *,tpu,* ]]; then
    EXTRAS=${EXTRAS:-}${EXTRAS:+,}gcs
  fi
}

# flag_set: print the name of the XLA flags for the GPUs here; none: nothing.
flag_set() {
  if [[ ${JAX_PLATFORMS:-} == cpu ]] || ! command -v nvidia-smi >/dev/null; then
    return
  fi
  local names
  names=$(gpus name)
  case $names in
    *A100*) printf a100 ;;
    *H100* | *H200*) printf h100 ;;  # One chip with two memories.
  esac
}

# export_xla_flags NAME: set the variables of a set of moellava_jax.train.
# xla_flags. 'auto' takes that of the GPUs here, 'none' sets nothing. Flags that
# the caller has set come last, and so win.
export_xla_flags() {
  local name=$1 lines line variable
  if [[ $name == auto ]]; then
    name=$(flag_set)
  fi
  if [[ -z $name || $name == none ]]; then
    return
  fi
  lines=$(PYTHONPATH=$ROOT "$(any_python)" -m moellava_jax.train.xla_flags \
    --device="$name") || exit
  while IFS= read -r line; do
    variable=${line%%=*}
    case $variable in
      XLA_FLAGS | LIBTPU_INIT_ARGS)
        export "$variable=${line#*=}${!variable:+ ${!variable}}"
        ;;
      *) export "$variable=${!variable:-${line#*=}}" ;;
    esac
    if $DRY_RUN; then
      show export "$variable=${!variable}"
    fi
  done <<<"$lines"
}
