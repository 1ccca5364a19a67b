#!/usr/bin/env bash
# One node, all of its GPUs; started again, the run goes on from its newest checkpoint.
#
#     parallel/launch/node.sh paper-offline --model Qwen3-4B --data interactions.jsonl --out runs/a
#
# RANKS: processes (default: one per GPU). Ctrl-C or SIGTERM saves a checkpoint and ends cleanly;
# SAVE_SECONDS (default 600) is how long that may take.
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
exec torchrun --standalone --nproc-per-node="${RANKS:-gpu}" \
    --shutdown-timeout "${SAVE_SECONDS:-600}" -m sdpo.train "$@" --resume
