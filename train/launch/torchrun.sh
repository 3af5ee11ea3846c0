#!/usr/bin/env bash
# Train on the GPUs of one machine.
#
#   train/launch/torchrun.sh [--dry-run] CONFIG.toml [--dotted.key value ...]
#
# --dry-run prints what it would cost (memory per GPU, FLOPs of a step, estimated tokens/s, time for the budget) and the
# exact command, and starts nothing.
#
# Environment:
#   NPROC         processes, one for each GPU. Default: the GPUs that nvidia-smi lists, 1 where there is none
#   MAX_RESTARTS  how often torchrun starts all processes again when one dies. Default: 3
#   GPU           name for the plan (H100, H200, ...). Default: H100
#   PYTHON        interpreter. Default: python
#
# torchrun gives every process its RANK, LOCAL_RANK and WORLD_SIZE, and a port to meet at (--standalone picks a free one).
# With several processes the trainer takes DDP; --parallel.mode fsdp shards parameters, gradients and optimizer state.
# data.batch_size counts sequences over all processes, so the same command trains the same model on 1 GPU or on 8.
#
# A restart by torchrun continues what this job began, from its newest checkpoint. A job started anew needs --resume, which
# starts afresh where there is no checkpoint yet. A mistake is one line of the trainer's, which torchrun repeats and adds to:
# --dry-run finds most of them first. Ctrl-C and SIGTERM end the run after the step in flight, with a checkpoint.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=train/launch/common.sh
source "$ROOT/train/launch/common.sh"
[[ $# -ge 1 ]] || fail "usage: torchrun.sh [--dry-run] CONFIG.toml [--dotted.key value ...]"

if [[ -z ${NPROC:-} ]]; then
  NPROC=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
  [[ $NPROC -ge 1 ]] || NPROC=1
fi
MAX_RESTARTS=${MAX_RESTARTS:-3}
need_count NPROC "$NPROC"

# One thread per process unless asked for more: N processes that each take every core slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
command=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS"
  "$PRETRAIN" "$@")

if [[ -n $dry_run ]]; then
  show_plan "$NPROC" "$@"
  show_command "${command[@]}"
  exit 0
fi
exec "${command[@]}"
