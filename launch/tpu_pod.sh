#!/usr/bin/env bash
# Runs ssp_jax on a Cloud TPU slice, from getting the slice to giving it back:
#
#   launch/tpu_pod.sh run    NAME ZONE TYPE [--spot] [--bucket=BUCKET] [--data=gs://BUCKET/FOLDER]
#                            [--dry-run] --
#                            --config=configs/qwen7b.py --workdir=../bucket/ssp-qwen7b
#   launch/tpu_pod.sh logs   NAME ZONE [--dry-run]
#   launch/tpu_pod.sh delete NAME ZONE [--dry-run]
#
# NAME of the slice and of its queued resource; TYPE as Cloud TPU calls it: v5p-16 is plan's
# v5p:2x2x2 (v4 and v5p count two cores a chip), v5litepod-16 is v5e:4x4, v6e-16 is v6e:4x4. TPU7x
# slices come through GKE only: gke_jobset.yaml.
#
# run: creates the slice or takes the one that is there, installs this commit on all workers, starts
# the same command on all, and shows worker 0's log until the run ends. A lost connection is taken
# up again, and what fails on the way is tried again; after a preemption the slice is made anew and
# the run goes on from its last checkpoint. So the workdir must be where all workers see it and
# where it outlives them: --bucket mounts a Cloud Storage bucket at ~/bucket with gcsfuse (best one
# with a hierarchical namespace, where a checkpoint's folder is renamed at once). --data is copied to
# the disk of each worker, as the folder data that configs name. The bucket, the data and the config
# are looked for before anything is created. It does not delete the slice: `delete` does, and costs
# go on until then. --dry-run prints every command and runs none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Seconds between looks at a slice that is not ready yet, and before a failed step is tried again.
POLL=${POLL:-30}
UNUSABLE=64 # how a step on the workers ends that will not do better later

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

show() {
  printf '%q ' "$@"
  printf '\n'
}

# Runs a command, or only prints it.
act() {
  show "$@"
  if [[ -z $dry_run ]]; then "$@"; fi
}

queue() { act gcloud compute tpus queued-resources "$@" "--zone=$zone"; }

on_workers() { # WORKERS COMMAND
  act gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" "--worker=$1" "--command=$2"
}

# State of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; nothing when there is
# none.
state() {
  gcloud compute tpus queued-resources describe "$name" "--zone=$zone" \
    '--format=value(state.state)' 2>/dev/null || true
}

runtime() {
  case $type in
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo "tpu_pod.sh: TYPE is $type; expected v5p-N, v5litepod-N or v6e-N" >&2 && exit 2 ;;
  esac
}

create() {
  queue create "$name" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$runtime_version" ${spot:+"$spot"}
}

delete() { queue delete "$name" --force --quiet; }

# After a step that failed. Nothing does better later where no slice ever was: NAME, ZONE or TYPE
# may be wrong.
later() {
  [[ -n $seen ]] || exit 1
  echo "tpu_pod.sh: the command above failed; again in $POLL seconds" >&2
  sleep "$POLL"
}

# Until the slice is there. A preempted or failed request is deleted and made again.
ensure() {
  if [[ -n $dry_run ]]; then
    show gcloud compute tpus queued-resources describe "$name" "--zone=$zone" \
      '--format=value(state.state)'
    create
    return
  fi
  local now before=""
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now == "$before" ]] || echo "slice $name: ${now:-does not exist}"
    before=$now
    case $now in
      "") create || later ;;
      SUSPENDED | FAILED) delete || later ;;
      *) sleep "$POLL" ;;
    esac
  done
  seen=yes
}

# This commit, in a Python of its own: the image's is older than 3.11. Nothing is done twice for the
# same commit, and nothing under a run that is going on.
install() {
  local archive="${TMPDIR:-/tmp}/ssp_jax-$commit.tar.gz"
  act git archive --format=tar.gz "--output=$archive" "$commit" &&
    act gcloud compute tpus tpu-vm scp "$archive" "$name:ssp_jax.tar.gz" "--zone=$zone" \
      --worker=all &&
    on_workers all "set -e
    test \"\$(cat ssp_jax/COMMIT 2>/dev/null)\" != $commit || exit 0
    ! kill -0 \"\$(cat ssp_jax/run.pid 2>/dev/null)\" 2>/dev/null || exit 0
    rm -rf ssp_jax && mkdir ssp_jax && tar -xzf ssp_jax.tar.gz -C ssp_jax && cd ssp_jax
    python3 -m pip install --quiet --user uv
    ~/.local/bin/uv venv --quiet --python 3.12 .venv
    ~/.local/bin/uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'
    echo $commit > COMMIT"
}

# At ~/bucket of all workers, whose image has no gcsfuse: as its documentation installs it. Folders
# are renamed object by object where the bucket has no hierarchical namespace.
mount_bucket() {
  local source
  source=$(printf %q "$bucket")
  on_workers all "set -eo pipefail
    if ! command -v gcsfuse > /dev/null; then
      packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
      curl -fsS \$packages/doc/apt-key.gpg | sudo tee \$key > /dev/null
      echo \"deb [signed-by=\$key] \$packages gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
      sudo apt-get -qq update
      sudo apt-get -qq install gcsfuse
    fi
    mkdir -p bucket
    mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=100000 $source bucket ||
      exit $UNUSABLE"
}

# To the disk of each worker: a search index is mapped, and read all over. What is there stays.
copy_data() {
  local source
  source=$(printf %q "$data")
  on_workers all "set -e
    mkdir -p data
    gcloud storage rsync --recursive --quiet $source data
    ln -sfn ../data ssp_jax/data"
}

# What costs nothing to find out, before a slice costs something.
check_paths() {
  local argument
  for argument in "$@"; do
    [[ $argument != --config=* ]] || git cat-file -e "$commit:${argument#*=}" 2>/dev/null || {
      echo "tpu_pod.sh: $argument is not in commit $commit; expected a file that is committed" >&2
      exit 2
    }
  done
  [[ -z $bucket ]] || act gcloud storage buckets describe "gs://$bucket" '--format=value(name)' || {
    echo "tpu_pod.sh: --bucket=$bucket cannot be read; expected a bucket of yours" >&2
    exit 2
  }
  [[ -z $data ]] || act gcloud storage ls "$data" || {
    echo "tpu_pod.sh: --data=$data cannot be read; expected gs://BUCKET/FOLDER" >&2
    exit 2
  }
}

# The run outlives this connection. Where it is running already (a lost connection) nothing happens.
start() {
  local arguments
  arguments=$(printf '%q ' "$@")
  # shellcheck disable=SC2016  # expanded on the worker
  local program='.venv/bin/python -m ssp_jax.main "$@"; echo $? > run.exit'
  on_workers all "cd ssp_jax
    if kill -0 \"\$(cat run.pid 2>/dev/null)\" 2>/dev/null; then exit 0; fi
    rm -f run.exit
    nohup setsid bash -c '$program' - $arguments \\
      >> run.log 2>&1 < /dev/null &
    echo \$! > run.pid"
}

# Worker 0's log until its run or the connection ends.
logs() {
  # shellcheck disable=SC2016  # expanded on the worker
  on_workers 0 'cd ssp_jax && tail -n +1 -F run.log --pid="$(cat run.pid)"' || true
}

# The run's exit code; nothing while it runs, or when nobody answers.
exit_code() {
  gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=0 \
    '--command=cat ssp_jax/run.exit' 2>/dev/null || true
}

# Joined by && for `set -e` is off in here: run asks whether it failed.
prepare_and_start() {
  install && { [[ -z $bucket ]] || mount_bucket; } && { [[ -z $data ]] || copy_data; } && start "$@"
}

run() {
  local code commit seen=""
  commit=$(git rev-parse HEAD)
  check_paths "$@"
  while true; do
    ensure
    code=0
    prepare_and_start "$@" || code=$?
    if ((code == UNUSABLE)); then exit 2; fi
    if ((code)); then
      later
      continue
    fi
    logs
    if [[ -n $dry_run ]]; then
      show gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=0 \
        '--command=cat ssp_jax/run.exit'
      return
    fi
    code=$(exit_code)
    # A preempted run saves and ends with 0 as well; then the slice is on its way out.
    if [[ $code =~ ^[0-9]+$ && $(state) == ACTIVE ]]; then
      echo "tpu_pod.sh: the run ended with code $code; the slice is still there" >&2
      exit "$code"
    fi
    echo "tpu_pod.sh: connection lost; going on" >&2
    sleep "$POLL"
  done
}

dry_run="" spot="" bucket="" data="" positional=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --spot) spot=--spot ;;
    --bucket=?*) bucket=${1#--bucket=} ;;
    --data=gs://?*) data=${1#--data=} ;;
    --) shift && break ;;
    -*) usage ;;
    *) positional+=("$1") ;;
  esac
  shift
done
((${#positional[@]} >= 3)) || usage
command=${positional[0]} name=${positional[1]} zone=${positional[2]} type=${positional[3]:-}
case $command in
  run)
    [[ -n $type && $# -gt 0 ]] || usage
    runtime_version=$(runtime)
    run "$@"
    ;;
  logs | delete) "$command" ;;
  *) usage ;;
esac
