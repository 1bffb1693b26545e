#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
bash launch/tpu_pod.sh COMMAND --project=P --zone=Z --name=N [OPTIONS] [CONFIG] [-- FLAGS]

Trains on a TPU slice (TPU VMs of Google Cloud), through gcloud.

  create    ask for the slice and wait for it          needs --type
  install   copy this tree to all hosts; Python by uv, .venv with the extra `tpu`
  start     start training on all hosts                needs CONFIG
  wait      follow it; start again what asks for it    needs CONFIG
  status    what every host says
  logs      fetch the log of every host into --logs
  stop      SIGTERM: training saves a checkpoint and ends
  delete    give the slice back
  all       create, install, start, wait, logs, delete; a slice that was taken
            away is asked for again, up to --restarts. However it ends, the slice
            is given back: interrupted (Ctrl-C, a closed terminal), after a
            checkpoint

  bash launch/tpu_pod.sh all --project=my-project --zone=us-east5-b --name=phi2 \
      --type=v6e-16 --spot --restarts=50 configs/phi2.py -- \
      --config.workdir=gs://my-bucket/phi2

  --type=TYPE       v5litepod-16, v5p-16, v6e-16, ...
  --runtime=IMAGE   of the VMs (default: that of v5e, v5p and v6e, by --type)
  --request=queued  a queued resource, or `vm`: at once or not at all
                    (default: queued)
  --spot            cheaper, and can be taken away at any time
  --create-flag=F   a further flag of gcloud's create; can be repeated
  --python=3.11     the Python to install (3.11: the one of JAX 0.10, with which
                    the compiler's flags were tried)
  --setup=COMMAND   what every host runs at the end of `install`, in the copied
                    tree: 'gcloud storage cp -r gs://my-bucket/moe_llava_data .'
  --xla-flags=NAME  as in local.sh (default: v5e, v5p or v6e, by --type)
  --restarts=N      how often `wait` and `all` start again (default: 10)
  --poll=SECONDS    between two looks (default: 60)
  --logs=DIR        where `logs` puts them (default: runs/tpu_logs/NAME)
  --keep            `all` leaves the slice, and training if it is interrupted
  --dry-run         print what would run

A slice of several hosts needs a run folder that all of them see: gs://. Data are
read from a disk of each host, which --setup can fill or mount. Relative paths are
in the copied tree.
`wait` and `all` exit with 0, or with the code of the host that failed; with 75 or
76 when training asks to be started again, but --restarts are used up.
TEXT
}

command=${1:-}
case $command in
  create | install | start | wait | status | logs | stop | delete | all) shift ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    die "unknown command '$command'"
    ;;
esac
project='' zone='' name='' type='' runtime='' config='' logs='' xla_flags=''
setup=''
request=queued
python=3.11
restarts=10
poll=60
keep=false
create_flags=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --project=?*) project=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --request=queued | --request=vm) request=${1#*=} ;;
    --spot) create_flags+=(--spot) ;;
    --create-flag=?*) create_flags+=("${1#*=}") ;;
    --python=3.*) python=${1#*=} ;;
    --setup=?*) setup=${1#*=} ;;
    --xla-flags=?*) xla_flags=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --poll=?*) poll=${1#*=} ;;
    --logs=?*) logs=${1#*=} ;;
    --keep) keep=true ;;
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
flags=("$@")
[[ -n $project && -n $zone && -n $name ]] ||
  die "$command needs --project, --zone and --name"
natural --restarts "$restarts"
natural --poll "$poll"
case $command in
  start | wait | all)
    [[ -n $config ]] || die "$command needs a CONFIG, such as configs/phi2.py"
    [[ -f $ROOT/${config%%:*} ]] ||
      die "there is no ${config%%:*} in $ROOT, which is what is copied"
    if [[ " ${flags[*]-}" != *" --config.workdir=gs://"* ]]; then
      say 'No --config.workdir=gs://...: right for a slice of one host only' >&2
    fi
    ;;
esac
case $type in
  v5litepod-*) default_runtime=v2-alpha-tpuv5-lite default_flags=v5e ;;
  v5p-*) default_runtime=v2-alpha-tpuv5 default_flags=v5p ;;
  v6e-*) default_runtime=v2-alpha-tpuv6e default_flags=v6e ;;
  *) default_runtime='' default_flags=none ;;
esac
# https://cloud.google.com/tpu/docs/runtimes
runtime=${runtime:-$default_runtime}
xla_flags=${xla_flags:-$default_flags}
logs=${logs:-runs/tpu_logs/$name}

tpus=(gcloud compute tpus)
where=(--project="$project" --zone="$zone")

tree=  # A temporary folder.
stage=  # Of `all`: asking (for a slice), asked, training, ended.

# leave: whatever ends this script, remove the folder and finish `all`.
leave() {
  local code=$?
  # Another Ctrl-C ends one command of what follows; PIPE: `| tee` is gone.
  trap : INT TERM HUP PIPE
  trap - EXIT
  set +e
  [[ -z $tree ]] || rm -rf -- "$tree"
  if [[ $command == all && $stage == asking ]]; then
    say "Is $name there? It may be that of another call: not deleted" >&2
  elif [[ $command == all && -n $stage ]]; then
    if [[ $stage == training ]] && ! $keep; then
      on_all stop || say 'Training could not be stopped' >&2
    fi
    if [[ $stage != asked ]]; then
      fetch_logs || say 'The logs could not be fetched' >&2
    fi
    if ! $keep && ! delete; then
      say "$name could not be given back and may cost: delete it" >&2
      ((code)) || code=1
    fi
  fi
  exit "$code"
}
trap leave EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# on_all COMMAND...: run a command of tpu_worker.sh on every host.
on_all() {
  local remote
  remote=$(printf ' %q' bash moellava_jax/launch/tpu_worker.sh "$@")
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command="${remote# }"
}

create() {
  [[ -n $type ]] || die 'create needs --type, such as v6e-16'
  [[ -n $runtime ]] || die "--type=$type: give its --runtime, too"
  stage=${stage:-asking}
  if [[ $request == vm ]]; then
    run "${tpus[@]}" tpu-vm create "$name" "${where[@]}" \
      --accelerator-type="$type" --version="$runtime" \
      ${create_flags[@]+"${create_flags[@]}"}
    stage=asked
    return
  fi
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" \
    --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
    ${create_flags[@]+"${create_flags[@]}"}
  stage=asked
  local describe=("${tpus[@]}" queued-resources describe "$name" "${where[@]}"
    '--format=value(state.state)')
  if $DRY_RUN; then
    run "${describe[@]}"
    return
  fi
  local answer
  while answer=$("${describe[@]}") && [[ $answer != ACTIVE ]]; do
    case $answer in
      FAILED | SUSPENDED | SUSPENDING)
        die "the request for $name is $answer; delete it and try again"
        ;;
    esac
    say "$name: $answer"
    sleep "$poll"
  done
  [[ $answer == ACTIVE ]] || die "gcloud cannot say what became of $name"
}

install_all() {
  tree=$(mktemp -d)
  run tar -C "$ROOT" -czf "$tree/moellava_jax.tgz" --exclude=__pycache__ \
    moellava_jax configs launch setup.py pyproject.toml README.md LICENSE \
    requirements-3.11.lock requirements-3.12.lock requirements-3.13.lock
  run "${tpus[@]}" tpu-vm scp "$tree/moellava_jax.tgz" "$name:" \
    "${where[@]}" --worker=all
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command='mkdir -p moellava_jax && tar -xzf moellava_jax.tgz -C moellava_jax'
  rm -rf -- "$tree"
  on_all install --python="$python"
  if [[ -n $setup ]]; then
    run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all \
      --command="cd moellava_jax && $setup"
  fi
}

start_all() {
  stage=training
  on_all start "$config" --xla-flags="$xla_flags" \
    -- ${flags[@]+"${flags[@]}"}
}

# verdict STATES: of lines 'HOST running', 'HOST exit CODE', ... print running,
# ending (some failed, some still run), done, 'resume CODE' or 'failed CODE'.
verdict() {
  local now code running=0 resume='' failed='' lost=''
  while read -r _ now code; do
    case $now in
      running) running=$((running + 1)) ;;
      exit)
        case $code in
          0) ;;
          75 | 76) resume=${resume:-$code} ;;
          # What the loss of a host does to the others.
          1[3-9][0-9] | 129) lost=${lost:-$code} ;;
          *) failed=${failed:-$code} ;;
        esac
        ;;
      lost) resume=${resume:-1} ;;  # The host was started again.
      *) failed=${failed:-1} ;;
    esac
  done <<<"$1"
  if ((running)); then
    if [[ -n $failed$lost$resume ]]; then
      printf ending
    else
      printf running
    fi
  elif [[ -n $failed ]]; then
    printf 'failed %s' "$failed"
  elif [[ -n $resume ]]; then
    printf 'resume %s' "$resume"
  elif [[ -n $lost ]]; then
    printf 'failed %s' "$lost"
  else
    printf 'done'
  fi
}

# follow: set VERDICT to done, 'resume CODE', 'failed CODE' or gone (no slice any
# more).
follow() {
  local answer states misses=0
  while :; do
    if answer=$(on_all status) &&
      states=$(sed -n 's/^.*tpu_worker \([^ ]* .*\)$/\1/p' <<<"$answer") &&
      [[ -n $states ]]; then
      misses=0
      VERDICT=$(verdict "$states")
      case $VERDICT in
        running) ;;
        # A failure ends the others, too: give them time, then end them.
        ending) on_all stop --grace=120 || true ;;
        *) return ;;
      esac
    else
      misses=$((misses + 1))
      answer=$("${tpus[@]}" tpu-vm describe "$name" "${where[@]}" \
        '--format=value(state)') || answer=unknown
      if [[ $answer != READY ]] || ((misses > 5)); then
        VERDICT=gone
        return
      fi
    fi
    if [[ $VERDICT != ending ]]; then
      sleep "$poll"
    fi
  done
}

# wait_all RENEW: follow, start again while that is asked for, and set CODE.
# RENEW: bring a slice back that was taken away, too.
wait_all() {
  local renew=$1 left=$restarts
  CODE=0
  if $DRY_RUN; then
    on_all status
    return
  fi
  while :; do
    VERDICT=''
    follow
    say "$name: $VERDICT"
    case $VERDICT in
      'done') return ;;
      failed*)
        CODE=${VERDICT#* }
        return
        ;;
    esac
    if ((left == 0)); then
      say "$name: --restarts=$restarts are used up" >&2
      CODE=1
      [[ $VERDICT == gone ]] || CODE=${VERDICT#* }
      return
    fi
    left=$((left - 1))
    if [[ $VERDICT == gone ]]; then
      $renew || die "$name is not READY any more; 'all' asks for a new one"
      delete || true
      create
      install_all
    fi
    start_all
  done
}

fetch_logs() {
  local workers index
  run mkdir -p -- "$logs"
  if $DRY_RUN; then
    workers=0
  else
    workers=$("${tpus[@]}" tpu-vm describe "$name" "${where[@]}" \
      '--format=value(networkEndpoints.ipAddress)')
    workers=${workers//[^;]/}
    workers=${#workers}  # Of the last one, counted from 0.
  fi
  for ((index = 0; index <= workers; index++)); do
    run "${tpus[@]}" tpu-vm scp "$name:.moellava/log" \
      "$logs/worker_$index.log" "${where[@]}" --worker="$index"
  done
}

delete() {
  if [[ $request == vm ]]; then
    run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
  else
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

case $command in
  create) create ;;
  install) install_all ;;
  start) start_all ;;
  wait)
    wait_all false
    exit "$CODE"
    ;;
  status) on_all status ;;
  logs) fetch_logs ;;
  stop) on_all stop ;;
  delete) delete ;;
  all)
    create
    install_all
    start_all
    wait_all true
    stage=ended
    exit "$CODE"
    ;;
esac
