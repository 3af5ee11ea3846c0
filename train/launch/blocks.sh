#!/usr/bin/env bash
# Train each block of a model in its own process, then join the blocks.
#
#   train/launch/blocks.sh [--dry-run] CONFIG.toml RUNS [--dotted.key value ...]
#
# --dry-run prints the cost of each block and the commands, and starts nothing.
#
# Block b trains in RUNS/block-b and logs to RUNS/block-b.log. The joined model is RUNS/joined. A budget in the options applies
# to each block. The processes do not communicate while they train. With blocks.shared = owned, the block that owns the
# embedding is trained first, and the others read the embedding when they start. With frozen, all blocks start at once, and
# with all too: each block of a network for images then has a copy of what the blocks share.
#
# The same command again continues stopped blocks and skips finished ones. The blocks are joined when all are finished. An
# existing RUNS/joined with the same blocks is left unchanged; one that was evaluated or trained further is renamed and kept.
# To train a block again, remove its folder.
#
# Environment:
#   BLOCKS_AT_ONCE  processes that run at the same time; their number does not change the result. Default: all blocks
#   PYTHON          interpreter. Default: python
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
if [ $# -lt 2 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,20s/^# \{0,1\}//p' "$0"
    [ "${1:-}" = --help ] || [ "${1:-}" = -h ] && exit 0 || exit 2
fi
config=$1 runs=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
if ! [[ ${BLOCKS_AT_ONCE:-1} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: BLOCKS_AT_ONCE must be a whole number above 0, got $BLOCKS_AT_ONCE" >&2
    exit 2
fi
if [ -e "$runs/joined" ] && ! [ -e "$runs/joined/blocks.json" ]; then
    echo "error: $runs/joined exists and is not a joined run: move or remove it" >&2
    exit 2
fi

read -r n_blocks shared owner < <("$python" - "$config" "$runs" "$@" <<'PYTHON'
import sys
from pathlib import Path

from recurrent_db.arguments import run_and_exit
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError


def check_owner(config: Config, owner: Path, others: list[Path]) -> None:
    from recurrent_db.store.checkpoint import Checkpoint  # imported here because it loads torch, which takes seconds
    from recurrent_db.store.folder import find_checkpoint, list_checkpoints

    others = [path for path in others if list_checkpoints(path)]
    if others and list_checkpoints(owner):
        if Checkpoint(find_checkpoint(owner)).training()[0].spent(config.budget) < 1:
            raise UserError(
                f"{owner} has budget left to train, but {others[0]} was trained on its present embedding: use another"
                " folder, or remove the other blocks first"
            )


def check_and_print() -> None:
    config, runs = load_config(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2])
    if not config.model.n_blocks:
        raise UserError(f"{sys.argv[1]} is not a model in blocks (model.n_blocks is 0)")
    if config.blocks.shared == "all" and not config.objective.own.copies:
        raise UserError("blocks.shared = all needs all blocks in one process: use owned or frozen")
    owner = runs / f"block-{config.blocks.owner}"
    others = [path for path in sorted(runs.glob("block-*/")) if path != owner]
    if config.blocks.shared == "owned":
        if config.init.from_:
            raise UserError("init.from needs blocks.shared = frozen: with owned, blocks start from the embedding's owner")
        if others:
            check_owner(config, owner, others)
    print(config.model.n_blocks, config.blocks.shared, config.blocks.owner)


run_and_exit(check_and_print)
PYTHON
) || exit 2
if [ -n "$dry_run" ]; then
    # The table describes CONFIG alone: it ignores dotted options that change the model's shape.
    "$python" -m recurrent_db flops "$config"
    echo "would run, ${BLOCKS_AT_ONCE:-$n_blocks} at once$([ "$shared" = owned ] && echo ", block $owner first"):"
    for number in $(seq "$n_blocks"); do
        from=()
        if [ "$shared" = owned ] && [ "$number" != "$owner" ]; then from=(--init.from "$runs/block-$owner"); fi
        printf ' %q' "$python" "$root/train/pretrain.py" "$config" "$@" "${from[@]}" --blocks.only "$number" \
            --run.dir "$runs/block-$number" --resume
        echo
    done
    exit 0
fi
mkdir -p "$runs"

children=()
stop() {
    kill -TERM "${children[@]}" 2>/dev/null || true
    wait || true
    echo "stopped; the same command continues" >&2
    exit 130
}
trap stop INT TERM

failed=0 stopped= broken=()
logs=() starts=()
block() { # NUMBER [trainer options]: start a block
    local number=$1 log="$runs/block-$1.log"
    shift
    touch "$log"
    starts+=($(($(wc -c < "$log") + 1)))
    "$python" "$root/train/pretrain.py" "$config" "$@" --blocks.only "$number" --run.dir "$runs/block-$number" --resume \
        >> "$log" 2>&1 &
    children+=($!)
    logs+=("$log")
}
finish() { # wait for the oldest child
    local output
    wait "${children[0]}" || failed=1 broken+=("${logs[0]}:${starts[0]}")
    output=$(tail -c "+${starts[0]}" "${logs[0]}") # only the lines of this command
    # A block that was stopped by a signal has saved a checkpoint and exits with status 0, but it is not finished.
    if grep -q '^stopped by signal' <<< "$output"; then failed=1 stopped="${logs[0]}"; fi
    children=("${children[@]:1}") logs=("${logs[@]:1}") starts=("${starts[@]:1}")
}

given=("$@")
if [ "$shared" = owned ]; then
    block "$owner" "${given[@]}"
    finish
    given+=(--init.from "$runs/block-$owner")
fi
for number in $(seq "$n_blocks"); do
    if [ "$shared" = owned ] && [ "$number" = "$owner" ]; then continue; fi
    if [ "$failed" = 1 ]; then break; fi
    while [ "${#children[@]}" -ge "${BLOCKS_AT_ONCE:-$n_blocks}" ]; do finish; done
    block "$number" ${given[@]+"${given[@]}"}
done
while [ "${#children[@]}" -gt 0 ]; do finish; done
if [ -n "$stopped" ]; then
    echo "$(basename "$stopped" .log) was stopped; the same command continues" >&2
    exit 130
fi
if [ "$failed" = 1 ]; then
    for entry in "${broken[@]}"; do
        output=$(tail -c "+${entry##*:}" "${entry%:*}")
        grep '^error' <<< "$output" >&2 || tail -n 3 <<< "$output" >&2
    done
    exit 2
fi
blocks=()
for number in $(seq "$n_blocks"); do blocks+=("$runs/block-$number"); done
exec "$python" -m recurrent_db blocks join "${blocks[@]}" "$runs/joined" --overwrite
