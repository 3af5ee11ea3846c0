#!/usr/bin/env bash
# Train on several machines without a scheduler: start this same command on each of them.
#
#   HEAD=node0:29500 NNODES=4 train/launch/multinode.sh [--dry-run] CONFIG.toml [--dotted.key value ...]
#
# --dry-run prints what it would cost and the exact command, and starts nothing.
#
# Environment:
#   HEAD          host:port of one of the machines, which all the others can reach
#   NNODES        machines. A range such as 4:8 lets torchrun go on with fewer, down to four, when some are lost; data.batch_size
#                 must divide among all numbers of processes (the plan is for the most). Not tried on real nodes
#   NPROC         processes on each, one for each GPU. Default: 8
#   JOB_ID        any word, the same on all machines; another job at the same HEAD needs another. Default: recurrent_db
#   MAX_RESTARTS  how often all processes are started again when one dies. Default: 3
#   GPU, PYTHON   as in torchrun.sh
#
# The machines find each other by torchrun's c10d rendezvous: the one that HEAD names keeps the store, all others ask there
# for their rank, so none needs to be told its number. When a process or a machine dies, everybody meets again there, and
# the trainer continues from the newest checkpoint (--resume is always given; it starts afresh where there is none).
# run.dir must be a folder that all machines see, and data.path the same data on each.
#
# A lost machine: start this command again on it, or on another in its place; the others wait for it. Only HEAD's must not be
# lost: without its store all others end, and this command is started again on all of them. torchrun would hand its own store
# to the processes and, where one machine of several is new, announce it to nobody (torch 2.13): hence the variable below.
#
# Over nodes, --parallel.mode fsdp --parallel.shard-size 8 keeps the gathering of parameters on the fast links within a
# node and sends only gradients between nodes (HSDP): compare the plan's columns.
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
[[ $HEAD =~ ^[^:]+:[0-9]+$ ]] || fail "HEAD must be host:port of a machine that all can reach, got '$HEAD'"

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
