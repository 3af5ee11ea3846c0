#!/usr/bin/env bash
# Trains each block of a model in a process of its own, and joins them:
#
#   train/launch/blocks.sh [--dry-run] CONFIG.toml RUNS [--dotted.key value ...]
#
# --dry-run prints what each block takes, and the commands; it starts nothing.
# The processes share nothing while they train: no process group, no gradient, no barrier. Block b trains in RUNS/block-b with
# its log in RUNS/block-b.log; the whole model is RUNS/joined. Where a block owns the embedding (blocks.shared = owned) it is
# trained first, and the others read it from there as they start; where it is frozen, all start at once.
#
# The same call again continues what was stopped and does not repeat what is done; while a block is not done, none is joined.
# A joined model that has these blocks stays as it is; one that was evaluated or trained further is moved aside for another.
# A budget among the options is each block's. To train a block anew, remove its folder.
# BLOCKS_AT_ONCE=1 trains them one after another, to the same bits. PYTHON names the interpreter.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
if [ $# -lt 2 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,15s/^# \{0,1\}//p' "$0"
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
    echo "error: $runs/joined exists and is not a joined run: move it away" >&2
    exit 2
fi

read -r n_blocks shared owner < <("$python" - "$config" "$runs" "$@" <<'PYTHON'
import sys
from pathlib import Path

from recurrent_db.arguments import run_and_exit
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError


def check(config: Config, owner: Path, others: list[Path]) -> None:
    from recurrent_db.store.checkpoint import Checkpoint  # here, since it loads torch, which takes seconds
    from recurrent_db.store.folder import find_checkpoint, list_checkpoints

    others = [path for path in others if list_checkpoints(path)]
    if others and list_checkpoints(owner):
        if Checkpoint(find_checkpoint(owner)).training()[0].spent(config.budget) < 1:
            raise UserError(
                f"{owner} would train further, and {others[0]} was trained on its table as it is: take another folder,"
                " or remove the other blocks first"
            )


def say() -> None:
    config, runs = load_config(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2])
    if not config.model.n_blocks:
        raise UserError(f"{sys.argv[1]} has no blocks (model.n_blocks is 0)")
    if config.blocks.shared == "all":
        raise UserError("blocks.shared = all needs all blocks in one process: take owned or frozen")
    owner = runs / f"block-{config.blocks.owner}"
    others = [path for path in sorted(runs.glob("block-*/")) if path != owner]
    if config.blocks.shared == "owned":
        if config.init.from_:
            raise UserError("init.from and blocks.shared = owned: the others start from their owner; take frozen")
        if others:
            check(config, owner, others)
    print(config.model.n_blocks, config.blocks.shared, config.blocks.owner)


run_and_exit(say)
PYTHON
) || exit 2
if [ -n "$dry_run" ]; then
    # The table is of the file: options that change the shape are not in it.
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
    echo "stopped; the same call continues" >&2
    exit 130
}
trap stop INT TERM

failed=0 stopped= broken=()
logs=() starts=()
block() { # number, more words of the trainer
    local number=$1 log="$runs/block-$1.log"
    shift
    touch "$log"
    starts+=($(($(wc -c < "$log") + 1)))
    "$python" "$root/train/pretrain.py" "$config" "$@" --blocks.only "$number" --run.dir "$runs/block-$number" --resume \
        >> "$log" 2>&1 &
    children+=($!)
    logs+=("$log")
}
finish() { # waits for the oldest child
    local said
    wait "${children[0]}" || failed=1 broken+=("${logs[0]}:${starts[0]}")
    said=$(tail -c "+${starts[0]}" "${logs[0]}") # of this call
    # A block that a signal stopped has saved itself and ends well, but is not done.
    if grep -q '^stopped by signal' <<< "$said"; then failed=1 stopped="${logs[0]}"; fi
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
    echo "$(basename "$stopped" .log) was stopped; the same call continues" >&2
    exit 130
fi
if [ "$failed" = 1 ]; then
    for entry in "${broken[@]}"; do
        said=$(tail -c "+${entry##*:}" "${entry%:*}")
        grep '^error' <<< "$said" >&2 || tail -n 3 <<< "$said" >&2
    done
    exit 2
fi
blocks=()
for number in $(seq "$n_blocks"); do blocks+=("$runs/block-$number"); done
exec "$python" -m recurrent_db blocks join "${blocks[@]}" "$runs/joined" --overwrite
