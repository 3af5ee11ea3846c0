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
# A budget among the options is each block's. To train a block anew, remove its folder.
# BLOCKS_AT_ONCE=1 trains them one after another, to the same bits. PYTHON names the interpreter.
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi
if [ $# -lt 2 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    [ "${1:-}" = --help ] || [ "${1:-}" = -h ] && exit 0 || exit 2
fi
config=$1 runs=$2
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}

read -r n_blocks shared owner < <("$python" - "$config" "$@" <<'PYTHON'
import sys
from pathlib import Path

from recurrent_db.commandline import guard
from recurrent_db.config import load_config
from recurrent_db.errors import UserError


def say() -> None:
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    if not config.model.n_blocks:
        raise UserError(f"{sys.argv[1]} has no blocks (model.n_blocks is 0)")
    if config.blocks.shared == "all":
        raise UserError("blocks.shared = all needs all blocks in one process: take owned or frozen")
    print(config.model.n_blocks, config.blocks.shared, config.blocks.owner)


guard(say)
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

failed=0 stopped=
logs=()
block() { # number, more words of the trainer
    local number=$1
    shift
    "$python" "$root/train/pretrain.py" "$config" "$@" --blocks.only "$number" --run.dir "$runs/block-$number" --resume \
        > "$runs/block-$number.log" 2>&1 &
    children+=($!)
    logs+=("$runs/block-$number.log")
}
finish() { # waits for the oldest child
    wait "${children[0]}" || failed=1
    # A block that a signal stopped has saved itself and ends well, but is not done.
    if grep -q '^stopped by signal' "${logs[0]}"; then failed=1 stopped="${logs[0]}"; fi
    children=("${children[@]:1}") logs=("${logs[@]:1}")
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
    grep -h '^error' "$runs"/block-*.log >&2 || tail -n 3 "$runs"/block-*.log >&2
    exit 2
fi
blocks=()
for number in $(seq "$n_blocks"); do blocks+=("$runs/block-$number"); done
exec "$python" -m recurrent_db blocks join "${blocks[@]}" "$runs/joined" --overwrite
