#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/gke.sh CONFIG --name=N --image=IMAGE [OPTIONS] [-- FLAGS OF train.main]

Trains on Google Kubernetes Engine, in a cluster that has JobSet (0.6 or newer):
fills gke_jobset.yaml or gke_jobset_gpu.yaml in and applies it with kubectl, or
calls xpk. IMAGE is built with Dockerfile.tpu or Dockerfile.gpu.

  bash launch/gke.sh configs/phi2.py --name=phi2 --image=REGISTRY/moellava:tpu \
      --accelerator=tpu-v6e-slice --topology=4x4 --hosts=4 -- \
      --config.workdir=gs://my-bucket/phi2
  bash launch/gke.sh configs/phi2.py --name=phi2 --image=REGISTRY/moellava:gpu \
      --gpus --accelerator=nvidia-h100-80gb --hosts=2 -- \
      --config.workdir=gs://my-bucket/phi2
  bash launch/gke.sh configs/phi2.py --name=phi2 --image=REGISTRY/moellava:tpu \
      --xpk --cluster=C --project=P --zone=Z --type=v6e-16 -- ...

  --accelerator=A   node label gke-tpu-accelerator (tpu-v5-lite-podslice,
                    tpu-v5p-slice, tpu-v6e-slice), or gke-accelerator with --gpus
  --topology=T      node label gke-tpu-topology, such as 4x4
  --hosts=N         hosts of a slice, or nodes with GPUs (default: 1)
  --chips=N         chips of a host, GPUs of a node (default: 4, with --gpus 8)
  --slices=N        slices (default: 1)
  --bucket=NAME     mount this bucket of Cloud Storage at /data, read-only: for
                    --config.data.json=/data/... --config.data.images=/data/...
  --restarts=N      (default: 50)
  --xla-flags=NAME  as in local.sh (default: by accelerator)
  --gpus            nodes with GPUs
  --xpk             through xpk; needs --cluster, --project, --zone, --type
  --dry-run         print what would be applied or run

It is started again on exit codes 75 and 76, when a node is lost and when a peer
of a lost node aborts, and fails on all others. The run folder has to be seen by
all hosts: gs://. The data are read from files: --bucket needs the Cloud Storage
FUSE driver in the cluster, and a service account that may read the bucket.
TEXT
}

config='' name='' image='' accelerator='' topology='' chips='' xla_flags=''
bucket=''
hosts=1
slices=1
restarts=50
gpus=false
xpk=false
cluster='' project='' zone='' type=''
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --name=?*) name=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --accelerator=?*) accelerator=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --hosts=?*) hosts=${1#*=} ;;
    --chips=?*) chips=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --bucket=?*) bucket=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --xla-flags=?*) xla_flags=${1#*=} ;;
    --cluster=?*) cluster=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --gpus) gpus=true ;;
    --xpk) xpk=true ;;
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
[[ -f $ROOT/${config%%:*} ]] ||
  die "there is no ${config%%:*} in $ROOT, of which the image is made"
[[ -n $name && -n $image ]] || die 'needs --name and --image'
# It becomes part of the host names.
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  die "--name=$name: expected small letters, digits and dashes"
if [[ " $* " != *" --config.workdir=gs://"* ]]; then
  say 'No --config.workdir=gs://...: what is written is lost with the pod' >&2
fi
for option in "hosts=$hosts" "slices=$slices" "restarts=$restarts" \
  "chips=${chips:-1}"; do
  natural "--${option%%=*}" "${option#*=}"
done

# set_of NAME: the flags of an accelerator, from its GKE or TPU VM name.
set_of() {
  case $1 in
    tpu-v5-lite* | v5litepod*) printf v5e ;;
    tpu-v5p* | v5p*) printf v5p ;;
    tpu-v6e* | v6e*) printf v6e ;;
    *a100*) printf a100 ;;
    *h100* | *h200*) printf h100 ;;
    *) printf none ;;
  esac
}

# json STRING: as a string of JSON, and so of YAML.
json() {
  local text=$1
  [[ $text != *[[:cntrl:]]* ]] || die "a control character in '$text'"
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "$text"
}

# The environment of the image is its own: nothing of the caller's goes along.
unset XLA_FLAGS LIBTPU_INIT_ARGS XLA_PYTHON_CLIENT_MEM_FRACTION
unset CUDA_DEVICE_MAX_CONNECTIONS
flags_of() {
  local dry=$DRY_RUN
  DRY_RUN=false  # Which would print them here.
  export_xla_flags "${xla_flags:-$(set_of "$1")}"
  DRY_RUN=$dry
}
args=(--config="$config" "$@")

[[ -z $bucket || $bucket =~ ^[a-z0-9][-a-z0-9._]*$ ]] ||
  die "--bucket=$bucket: expected the name alone, without gs:// and folders"

if $xpk; then
  [[ -z $bucket ]] ||
    die '--bucket is for kubectl; xpk has its own way: xpk storage attach'
  [[ -n $cluster && -n $project && -n $zone && -n $type ]] ||
    die '--xpk needs --cluster, --project, --zone and --type'
  ! $gpus || die '--xpk is for TPUs here; without it --gpus uses kubectl'
  flags_of "$type"
  training=$(printf ' %q' python launch/supervise.py -- \
    python -m moellava_jax.train.main "${args[@]}")
  command=(xpk workload create --cluster="$cluster" --project="$project"
    --zone="$zone" --workload="$name" --tpu-type="$type"
    --num-slices="$slices" --docker-image="$image"
    --max-restarts="$restarts" "--restart-on-exit-codes=75,76"
    --termination-grace-period-seconds=120)
  if [[ -n ${LIBTPU_INIT_ARGS:-} ]]; then
    command+=("--env=LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS")
  fi
  run "${command[@]}" --command="${training# }"
  exit
fi

[[ -n $accelerator ]] || die 'needs --accelerator'
file=$ROOT/launch/gke_jobset.yaml
if $gpus; then
  file=$ROOT/launch/gke_jobset_gpu.yaml
  chips=${chips:-8}
  args+=(--num_processes="$hosts")
  # shellcheck disable=SC2016  # Kubernetes' own $(NAME).
  if ((hosts > 1)); then
    args+=('--coordinator_address=$(COORDINATOR):8476'
      '--process_id=$(PROCESS_ID)')
  fi
else
  [[ -n $topology ]] || die 'needs --topology, such as 4x4'
  chips=${chips:-4}
fi
flags_of "$accelerator"

list=''
for word in "${args[@]}"; do
  list+=${list:+, }$(json "$word")
done
yaml=$(grep -v '^#' "$file")
if [[ -n $bucket ]]; then
  yaml=${yaml//  # with --bucket/}
else
  yaml=$(grep -v '# with --bucket$' <<<"$yaml")
fi
fill() { yaml=${yaml//"\${$1}"/"$2"}; }
fill NAME "$name"
fill RESTARTS "$restarts"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill ACCELERATOR "$(json "$accelerator")"
fill TOPOLOGY "$(json "$topology")"
fill IMAGE "$(json "$image")"
fill CHIPS "$chips"
fill BUCKET "$(json "$bucket")"
fill LIBTPU_INIT_ARGS "$(json "${LIBTPU_INIT_ARGS:-}")"
fill XLA_FLAGS "$(json "${XLA_FLAGS:-}")"
fill XLA_PYTHON_CLIENT_MEM_FRACTION \
  "$(json "${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.75}")"  # JAX's default.
# CUDA's default is 8.
fill CUDA_DEVICE_MAX_CONNECTIONS "$(json "${CUDA_DEVICE_MAX_CONNECTIONS:-8}")"
fill ARGS "[$list]"  # The last: a flag may hold anything.

if $DRY_RUN; then
  run kubectl apply -f -
  printf '%s\n' "$yaml"
else
  show kubectl apply -f -
  kubectl apply -f - <<<"$yaml"
fi
