#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/skypilot.sh CONFIG [OPTIONS] -- --config.workdir=gs://... [FLAGS]

Launches skypilot.yaml as a managed job: spot machines by default, brought back
when they are taken away and on exit codes 75 and 76.

  bash launch/skypilot.sh configs/phi2.py --gpus=H100:8 --nodes=2 -- \
      --config.workdir=gs://my-bucket/phi2
  sky jobs queue; sky jobs logs JOB; sky jobs cancel JOB

  --name=NAME       of the job (default: moellava)
  --gpus=TYPE:N     of a node (default: H100:8)
  --nodes=N         (default: 1)
  --infra=INFRA     where, such as gcp/us-central1 (default: anywhere)
  --on-demand       machines that are not taken away
  --env=NAME=VALUE  for the job, such as EXTRAS=wandb; can be repeated
  --setup=COMMAND   what every node runs first, in the repository:
                    'gcloud storage cp -r gs://my-bucket/moe_llava_data .'
  --dry-run         print what would run

The disk of a machine goes with it, so the run folder has to be elsewhere: a
bucket (gs://), or a folder that is mounted. Data are read from files: SETUP
fetches or mounts them. What git ignores is not copied.
TEXT
}

config=''
name=moellava
gpus=H100:8
nodes=1
setup=''
options=(--use-spot)
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --name=?*) name=${1#*=} ;;
    --gpus=?*) gpus=${1#*=} ;;
    --nodes=?*) nodes=${1#*=} ;;
    --infra=?*) options+=(--infra "${1#*=}") ;;
    --on-demand) options[0]=--no-use-spot ;;
    --setup=?*) setup=${1#*=} ;;
    --env=?*=*) options+=(--env "${1#*=}") ;;
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
natural --nodes "$nodes"
[[ -f $ROOT/${config%%:*} ]] ||
  die "there is no ${config%%:*} in $ROOT, which is what is copied"
[[ " $* " == *" --config.workdir="?* ]] ||
  die 'needs -- --config.workdir=...: the disk of a machine goes with it'
[[ " $* " != *" --config.workdir="+([a-z0-9])://* ||
  " $* " == *" --config.workdir=gs://"* ]] ||
  die 'of stores the run folder may be in gs:// only'

flags=$(printf '%q ' "$@")
cd -- "$ROOT"  # `workdir: .`
run sky jobs launch launch/skypilot.yaml --yes --name "$name" \
  --gpus "$gpus" --num-nodes "$nodes" "${options[@]}" \
  --env CONFIG="$config" --env FLAGS="${flags% }" --env SETUP="$setup"
