#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for a spot slice, waits, installs, runs on all its workers.
#
#   export PROJECT=my-project ZONE=us-east5-b BUCKET=gs://my-bucket
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh install    # what is committed here
#   launch/tpu_vm.sh run --config=configs/mvtec.py
#   launch/tpu_vm.sh logs       # follows a run, which goes on without this terminal
#   launch/tpu_vm.sh stop       # saves and ends it, and returns when that is done
#   launch/tpu_vm.sh delete
#
# The TFRecords are in $BUCKET/tfds. The machine that has the raw images writes them there:
#   python launch/preview.py --config=configs/mvtec.py --config.data.manual_dir=/data/mvtec_ad \
#       --config.data.data_dir=gs://my-bucket/tfds
# After a preemption: `delete`, `create`, `install` and the same `run`, which goes on from the last
# checkpoint.
set -euo pipefail

NAME=${NAME:-prn}
ZONE=${ZONE:-us-east5-b}
PROJECT=${PROJECT:-$(gcloud config get-value project 2>/dev/null || true)}
TYPE=${TYPE:-v6e-8}                    # accelerator type of the slice
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}    # v5litepod-*: v2-alpha-tpuv5-lite
WHERE=(--zone="$ZONE" --project="$PROJECT")
ROOT=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  sed -n '2,17s/^# \{0,1\}//p' "$0"
  exit "${1:-1}"
}

on() {  # WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --command="$2"
}

needs() {
  [[ -n ${!1:-} ]] || { echo "error: set $1 ($2)" >&2; exit 1; }
}

[[ $# -gt 0 ]] || usage
action=$1
shift
case $action in
  create | install | run | logs | stop | delete) needs PROJECT "the Google Cloud project" ;;
  -h | --help | help) usage 0 ;;
  *) usage ;;
esac
case $action in
  create)
    gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" \
      --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot
    until state=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
        --format='value(state.state)') && [[ $state == ACTIVE ]]; do
      [[ $state != FAILED && $state != SUSPENDED ]] || { echo "error: $NAME is $state" >&2; exit 1; }
      echo "$NAME is ${state:-unknown}; asking again in 30 s"
      sleep 30
    done
    ;;
  install)
    git -C "$ROOT" diff --quiet HEAD || echo "what is not committed stays here"
    bundle=$(mktemp -d)/prn-jax.bundle
    trap 'rm -r "$(dirname "$bundle")"' EXIT
    git -C "$ROOT" bundle create --quiet "$bundle" HEAD
    gcloud compute tpus tpu-vm scp "$bundle" "$NAME:" "${WHERE[@]}" --worker=all
    # uv brings a Python of its own, whatever the image has.
    on all "set -e
      git init -q prn-jax && cd prn-jax
      git fetch -q ../prn-jax.bundle HEAD && git checkout -q --force FETCH_HEAD
      [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
      [ -d .venv ] || ~/.local/bin/uv venv -q --python=3.11 .venv
      ~/.local/bin/uv pip install -q --python=.venv -e '.[demo,tpu]'"
    ;;
  run)
    needs BUCKET "gs://..., for the data and the results"
    # Quoted twice: once for this shell, once for the workers'.
    arguments=$(printf ' %q' "$@")
    on all "cd prn-jax && { nohup .venv/bin/python launch/main.py \
      --workdir='$BUCKET/runs/$NAME' --config.data.data_dir='$BUCKET/tfds' \
      --config.data.manual_dir= $arguments >train.log 2>&1 </dev/null & }"
    on all "tail -F prn-jax/train.log"  # process 0, which says most, may be on any of them
    ;;
  logs) on all "tail -n 40 -F prn-jax/train.log" ;;
  stop)
    # In brackets, so that the pattern does not match the shell that looks for it.
    on all "pkill -TERM -f '[l]aunch/main.py'
      while pgrep -f '[l]aunch/main.py' >/dev/null; do sleep 1; done"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
    ;;
esac
