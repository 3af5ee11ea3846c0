#!/usr/bin/env bash
# Train on the GPUs of one machine.
#
#   train/launch/torchrun.sh [--dry-run] CONFIG.toml [--dotted.key value ...]
#
# --dry-run prints the plan (memory per GPU, FLOPs per step, estimated tokens/s, time for the budget) and the exact command,
# and starts nothing.
#
# Environment:
#   NPROC         number of processes, one per GPU. Default: the GPUs that nvidia-smi lists, or 1
#   MAX_RESTARTS  how often torchrun restarts all processes when one dies. Default: 3
#   GPU           GPU name for the plan (H100, H200, ...). Default: H100
#   PYTHON        interpreter. Default: python
#
# torchrun sets RANK, LOCAL_RANK and WORLD_SIZE for every process, and the port at which they meet (--standalone picks a free
# one). Several processes train with DDP by default; --parallel.mode fsdp shards parameters, gradients and optimizer state.
# data.batch_size counts the sequences of all processes, so the same command trains the same model on 1 GPU or on 8.
#
# After a restart by torchrun the job continues from its newest checkpoint. To continue an earlier job, add --resume, which
# starts at step 0 if there is no checkpoint. The trainer reports a mistake in one line, to which torchrun adds its own output;
# --dry-run finds most mistakes in advance. Ctrl-C and SIGTERM end the run after the current step, with a checkpoint.
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

# One thread per process by default, because processes that each use all cores slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
command=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS"
  "$PRETRAIN" "$@")

if [[ -n $dry_run ]]; then
  show_plan "$NPROC" "$@"
  show_command "${command[@]}"
  exit 0
fi
exec "${command[@]}"
