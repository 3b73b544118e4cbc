#!/usr/bin/env bash
# Starts a run on a GKE cluster from gke_jobset.yaml or gke_pathways.yaml, as you have edited it:
#
#   launch/gke.sh MANIFEST [--dry-run]
#
# First it looks for what costs nothing to find out: names that nobody has filled in, the config, the
# bucket, the folder of data, the image, and whether the cluster takes the manifest. Only then does
# kubectl create anything. The folder of data is what
#   gcloud storage rsync --recursive data gs://BUCKET/data
# has put there from launch/prepare.sh data. --dry-run prints every command and runs none.
set -euo pipefail

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
  exit 2
}

refuse() {
  echo "gke.sh: $1" >&2
  exit 2
}

act() {
  printf '%q ' "$@"
  printf '\n'
  if [[ -z $dry_run ]]; then "$@"; fi
}

# The manifest without its comments.
lines() { sed 's/#.*//' "$manifest"; }

# What it has after a word, up to a space, a comma or a quote; each once.
found() { lines | sed -n "s/.*$1\([^ ,\"]*\).*/\1/p" | sort -u; }

dry_run="" manifest=""
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=yes ;;
    -*) usage ;;
    *) [[ -z $manifest ]] || usage && manifest=$argument ;;
  esac
done
[[ -n $manifest ]] || usage
[[ -f $manifest ]] || refuse "$manifest: no such file; expected a manifest of kind JobSet"

for config in $(found '--config='); do
  [[ -f $(dirname "${BASH_SOURCE[0]}")/../$config ]] || refuse "--config=$config is not here; expected a file of this commit"
done
# Not a pipe: a grep that leaves at its first line ends what writes into it, which pipefail reports.
for name in REGION PROJECT REPOSITORY BUCKET VERSION; do
  if [[ -z $dry_run ]] && grep -qw "$name" <<<"$(lines)"; then
    refuse "$manifest has $name; expected your own"
  fi
done
for bucket in $(found 'bucketName: '); do
  act gcloud storage buckets describe "gs://$bucket" '--format=value(name)' ||
    refuse "bucket $bucket cannot be read; expected a bucket of yours"
done
for folder in $(found 'rsync, --recursive, '); do
  act gcloud storage ls "$folder" || refuse "$folder cannot be read; expected gs://BUCKET/FOLDER"
done
for image in $(found 'image: ' | grep /ssp_jax); do
  act gcloud artifacts docker images describe "$image" '--format=value(image_summary.digest)' ||
    refuse "image $image cannot be read; expected one that is pushed"
done
act kubectl apply --dry-run=server -f "$manifest" || refuse "the cluster does not take $manifest"
act kubectl apply -f "$manifest"
