#!/usr/bin/env bash
#SBATCH --job-name=ssp_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
#SBATCH --signal=B:TERM@300
#
# Runs ssp_jax on one or more GPU nodes of a Slurm cluster:
#
#   launch/slurm_gpu.sh [--dry-run] NODES GPUS_PER_NODE [SBATCH_OPTION ...] --
#                       --config=configs/qwen7b.py --workdir=...
#
# One process per node with all its GPUs; JAX finds the coordinator through Slurm's variables. The
# workdir must be on a file system that all nodes see. Five minutes before the time limit Slurm
# sends SIGTERM: the run saves, and the job is queued again and goes on. VENV (default .venv) has
# requirements.txt and 'jax[cuda12]' or 'jax[cuda13]' installed. --dry-run prints every command and
# runs none.
set -euo pipefail

usage() {
  sed -n '10,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

terminated="" code=0
# To the processes of the run and not to srun, which would kill them at once; without --batch not to
# this script either.
stop() {
  terminated=yes
  # The job would end with this script: whatever goes wrong, it waits.
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}

# What the job runs. SLURM_* come from Slurm; in a dry run from below.
job() {
  local command child
  # Without it JAX gives a Slurm task one GPU only. Not a part of --export, which srun cuts at each
  # comma.
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
  command=(srun --kill-on-bad-exit=1 --export=ALL "$VENV/bin/python" -m ssp_jax.main "$@")
  echo "export JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS"
  printf '%q ' "${command[@]}"
  printf '\n'
  if [[ -n $dry_run ]]; then
    echo "at SIGTERM: scancel --signal=TERM $SLURM_JOB_ID"
    echo "after that: scontrol requeue $SLURM_JOB_ID"
    return
  fi
  trap stop TERM # before the run starts: no signal may end this script
  "${command[@]}" &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
  if [[ -n $terminated ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  exit "$code"
}

dry_run=""
VENV=${VENV:-.venv}
if [[ -n ${SLURM_JOB_ID:-} && -n ${SSP_JAX_SUBMITTED:-} ]]; then
  job "$@"
  exit
fi

[[ ${1:-} != --dry-run ]] || { dry_run=yes && shift; }
[[ ${1:-} =~ ^[0-9]+$ && ${2:-} =~ ^[0-9]+$ ]] || usage
nodes=$1 gpus=$2 options=()
shift 2
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
(($# > 1)) || usage
shift
# Before it waits in a queue; main looks in both folders too.
for argument in "$@"; do
  file=${argument#--config=}
  [[ $file != "$argument" ]] || continue
  file=${file/#\~\//$HOME/}
  [[ -f $file || -f $(dirname "${BASH_SOURCE[0]}")/../$file ]] || {
    echo "slurm_gpu.sh: $argument: no such file; expected one such as configs/qwen7b.py" >&2
    exit 2
  }
done
command=(sbatch "--nodes=$nodes" "--gpus-per-node=$gpus")
command+=("--export=ALL,SSP_JAX_SUBMITTED=yes,VENV=$VENV" "${options[@]}" "${BASH_SOURCE[0]}" "$@")
printf '%q ' "${command[@]}"
printf '\n'
if [[ -n $dry_run ]]; then
  SLURM_JOB_ID=JOB SLURM_GPUS_ON_NODE=$gpus job "$@"
else
  "${command[@]}"
fi
