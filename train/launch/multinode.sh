#!/usr/bin/env bash
# Train on several machines without a scheduler. Start the same command on each machine.
#
#   HEAD=node0:29500 NNODES=4 train/launch/multinode.sh [--dry-run] CONFIG.toml [--dotted.key value ...]
#
# --dry-run prints the plan and the exact command, and starts nothing.
#
# Environment:
#   HEAD          host:port of one of the machines, reachable from all others
#   NNODES        number of machines. A range such as 4:8 lets torchrun continue with fewer machines, here at least four, when
#                 some are lost. data.batch_size must be a multiple of every possible number of processes. The plan is for the
#                 largest number. Ranges have not been tried on real nodes
#   NPROC         processes per machine, one per GPU. Default: 8
#   JOB_ID        name of the job, the same on all machines. Jobs with the same HEAD need different names. Default: recurrent_db
#   MAX_RESTARTS  how often torchrun restarts all processes when one dies. Default: 3
#   GPU, PYTHON   as in torchrun.sh
#
# The machines find each other by torchrun's c10d rendezvous. The machine HEAD keeps the store, from which each machine gets
# its rank. When a process or machine dies, all processes meet there again, and the trainer continues from the newest
# checkpoint. --resume is always passed; it starts at step 0 if there is no checkpoint. run.dir must be a folder that all
# machines share, and data.path must hold the same data on each.
#
# If a machine is lost, start this command again on it or on a replacement; the others wait. If HEAD is lost, its store is gone
# and all others end: start this command again on all machines. By default torchrun shares its own store with the processes,
# but does not announce it when one of several machines is new (torch 2.13). TORCH_DISABLE_SHARE_RDZV_TCP_STORE prevents that.
#
# With --parallel.mode fsdp --parallel.shard-size 8 (HSDP), parameters are gathered over the fast links within a node, and only
# gradients are sent between nodes. The plan shows the cost of each mode.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=train/launch/common.sh
source "$ROOT/train/launch/common.sh"
[[ $# -ge 1 ]] || fail "usage: HEAD=host:port NNODES=N multinode.sh [--dry-run] CONFIG.toml [--dotted.key value ...]"

NPROC=${NPROC:-8}
NNODES=${NNODES:-}
HEAD=${HEAD:-}
need_count NPROC "$NPROC"
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES must be a number of machines or a range such as 3:4, got '$NNODES'"
[[ $HEAD =~ ^[^:]+:[0-9]+$ ]] || fail "HEAD must be host:port of a machine that all others can reach, got '$HEAD'"

resume=(--resume)
for word in "$@"; do
  [[ $word != --resume && $word != --overwrite ]] || resume=()
done

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
command=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC"
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB_ID:-recurrent_db}"
  --max-restarts "${MAX_RESTARTS:-3}" "$PRETRAIN" "$@" "${resume[@]}")

if [[ -n $dry_run ]]; then
  show_plan $((${NNODES#*:} * NPROC)) "$@"
  show_command "${command[@]}"
  exit 0
fi
exec "${command[@]}"
