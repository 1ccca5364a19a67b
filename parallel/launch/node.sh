#!/usr/bin/env bash
# One node, all of its GPUs. Started again, the run continues from its newest checkpoint.
#
#     parallel/launch/node.sh paper-offline --model Qwen/Qwen3-4B --data interactions.jsonl --out runs/a
#
# RANKS is the number of processes (default: one per GPU). Ctrl-C or SIGTERM saves a checkpoint and
# ends the run cleanly; SAVE_SECONDS (default 600) limits how long that may take.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
exec torchrun --standalone --nproc-per-node="${RANKS:-gpu}" \
    --shutdown-timeout "${SAVE_SECONDS:-600}" -m sdpo.train "$@" --resume
