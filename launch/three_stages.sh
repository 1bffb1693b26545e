#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/three_stages.sh CONFIG [OPTIONS] [-- FLAGS OF train.main]

The stages of the paper one after the other, each a process of its own:
pretrain, finetune, moe. `local.sh CONFIG` does the same in one; here every stage
can have its own settings, such as another mesh.

  bash launch/three_stages.sh configs/phi2.py --restarts=3 \
      --moe=--config.mesh.expert=4 -- \
      --config.init.lm=hf:microsoft/phi-2 \
      --config.init.tower=hf:openai/clip-vit-large-patch14-336

  --pretrain=FLAG, --finetune=FLAG, --moe=FLAG
                  a flag of training for that stage alone; can be repeated
  --stages=A,B    only these (default: pretrain,finetune,moe)
  --dry-run       print what would run
  and those of local.sh: --processes, --cpu-devices, --restarts, --grace,
  --xla-flags

Run it again after an interruption: finished stages are skipped, the one that was
interrupted goes on. It ends with the exit code of the first stage that does not
end with 0.
TEXT
}

config=
stages=pretrain,finetune,moe
options=()
pretrain=()
finetune=()
moe=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --pretrain=?*) pretrain+=("${1#*=}") ;;
    --finetune=?*) finetune+=("${1#*=}") ;;
    --moe=?*) moe+=("${1#*=}") ;;
    --stages=?*) stages=${1#*=} ;;
    --processes=?* | --cpu-devices=?* | --restarts=?* | --grace=?* | \
      --xla-flags=?*)
      options+=("$1")
      ;;
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
[[ $config != *:* ]] || die "'$config' names a stage already; use local.sh"
if $DRY_RUN; then
  options+=(--dry-run)
fi

IFS=, read -ra names <<<"$stages"
for stage in "${names[@]}"; do
  case $stage in
    pretrain) own=(${pretrain[@]+"${pretrain[@]}"}) ;;
    finetune) own=(${finetune[@]+"${finetune[@]}"}) ;;
    moe) own=(${moe[@]+"${moe[@]}"}) ;;
    *) die "--stages=$stages: '$stage' is not pretrain, finetune or moe" ;;
  esac
  command=(bash "$ROOT/launch/local.sh" "$config:$stage"
    ${options[@]+"${options[@]}"} -- "$@" ${own[@]+"${own[@]}"})
  if $DRY_RUN; then  # local.sh shows what it would run.
    show "${command[@]}"
    "${command[@]}"
  else
    say "Stage $stage"
    attended "${command[@]}"
    if ((CODE)); then
      say "stage $stage ended with $CODE" >&2
      exit "$CODE"
    fi
  fi
done
