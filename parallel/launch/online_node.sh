#!/usr/bin/env bash
# One node that learns while it talks: the last SERVE of its GPUs (default: half) each run a vLLM
# server, the others learn. With two GPUs that is one of each.
#
#     VLLM=/opt/vllm/bin/vllm parallel/launch/online_node.sh \
#         online --model Qwen/Qwen3-4B --prompts prompts.jsonl --phases persona.toml:50 --out runs/a
#
# GPUS is their number, where nvidia-smi does not say; PORT the first server's (default 8000). CONFIG
# names a TOML file of more settings, without [sampler]. SERVE_FLAGS go to `sdpo serve`, VLLM_FLAGS to
# vLLM. The run waits (WAIT seconds, default 1200) until each server can do what it needs, and ends
# them when it ends.
set -euo pipefail
gpus="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"
serve="${SERVE:-$((gpus / 2))}"
learn=$((gpus - serve))
((serve > 0 && learn > 0)) || { echo "$gpus GPUs: one must serve and one learn" >&2; exit 2; }

model="" out=""
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    case "${!i}" in
    --model) model="${!next}" ;;
    --out) out="${!next}" ;;
    esac
done
[[ -n "$model" && -n "$out" ]] || { echo "give --model and --out" >&2; exit 2; }

urls=()
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
for ((gpu = learn; gpu < gpus; gpu++)); do
    port=$((${PORT:-8000} + gpu - learn))
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=$gpu sdpo serve "$model" --vllm "${VLLM:-vllm}" --port "$port" \
        ${SERVE_FLAGS:-} -- ${VLLM_FLAGS:-} >"$out.server-$port.log" 2>&1 &
    urls+=("http://127.0.0.1:$port")
done

config="$out.servers.toml"
{
    [[ -z "${CONFIG:-}" ]] || cat "$CONFIG"
    printf '\n[sampler]\nkind = "VLLM"\nurls = ["%s"]\n' "$(sed 's/ /", "/g' <<<"${urls[*]}")"
} >"$config"
sdpo check-server "${urls[@]}" --wait "${WAIT:-1200}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((learn - 1))) torchrun --standalone --nproc-per-node="$learn" \
    --shutdown-timeout "${SAVE_SECONDS:-600}" -m sdpo.online "$@" --config "$config" --resume
