#!/usr/bin/env bash
# Trains on a Cloud TPU slice: asks for a spot slice, waits, installs, runs on all its workers.
#
#   PROJECT=my-project ZONE=us-east5-b launch/tpu_vm.sh create
#   launch/tpu_vm.sh install
#   BUCKET=gs://my-bucket launch/tpu_vm.sh run --config=configs/mvtec.py
#   launch/tpu_vm.sh logs      # follows a run, which goes on without this terminal
#   launch/tpu_vm.sh stop      # saves and ends it
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
REPOSITORY=${REPOSITORY:-$(git -C "$(dirname "$0")" remote get-url origin 2>/dev/null || true)}
WHERE=(--zone="$ZONE" --project="$PROJECT")

usage() {
  sed -n '2,15s/^# \{0,1\}//p' "$0"
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
  create)
    needs PROJECT "the Google Cloud project"
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
    needs REPOSITORY "the URL to clone the project from"
    on all "set -e
      sudo apt-get install -y -q python3.11-venv
      [ -d prn-jax ] || git clone -q '$REPOSITORY' prn-jax
      cd prn-jax && git pull -q
      [ -d .venv ] || python3.11 -m venv .venv
      .venv/bin/pip install -q -e '.[tpu]'"
    ;;
  run)
    needs BUCKET "gs://..., for the data and the results"
    # Quoted twice: once for this shell, once for the workers'.
    arguments=$(printf ' %q' "$@")
    on all "cd prn-jax && nohup .venv/bin/python launch/main.py \
      --workdir='$BUCKET/runs/$NAME' --config.data.data_dir='$BUCKET/tfds' \
      --config.data.manual_dir= $arguments \
      >train.log 2>&1 </dev/null &"
    on 0 "tail -F prn-jax/train.log"
    ;;
  logs) on 0 "tail -n 40 -F prn-jax/train.log" ;;
  stop) on all "pkill -TERM -f launch/main.py" ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
    ;;
  -h | --help | help) usage 0 ;;
  *) usage ;;
esac
