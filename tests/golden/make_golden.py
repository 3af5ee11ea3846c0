"""Write the golden loss curves: 20 steps of each objective on seeded synthetic tokens or on digits, CPU, one thread.

Without arguments it writes the curves that are missing. Named curves are rewritten, and with ``--all`` every curve.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import image_runs  # noqa: E402
from helpers import MICRO, OBJECTIVES, synthetic_data  # noqa: E402

from recurrent_db.config import load_config  # noqa: E402
from recurrent_db.training import trainer  # noqa: E402

STEPS = 20
COLUMNS = ("loss", "grad_norm", "lr", "flops", "eval/nll_k1", "eval/nll_k2", "eval/loss")
NAMES = (*OBJECTIVES, *image_runs.OBJECTIVES)


def curve(objective: str, folder: Path) -> dict[str, list[float | None]]:
    """The columns of metrics.jsonl that a golden file holds, of one run of the real trainer."""
    on_images = objective in image_runs.OBJECTIVES
    data, run = folder / ("images" if on_images else "data"), folder / objective
    if not data.exists():
        (image_runs.digits if on_images else synthetic_data)(data)
    if on_images:
        augmented = ["--data.flip", "True", "--data.crop_padding", 1, "--optim.ema_decay", 0.9, "--eval.k", 1, 2]
        image_runs.train(data, run, objective, "--budget.steps", STEPS, *augmented)
    else:
        words = ["--objective.name", objective, "--budget.steps", str(STEPS), "--data.path", str(data)]
        trainer.train(load_config(None, [*MICRO, *words, "--run.dir", str(run)]))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: [row.get(name) for row in rows] for name in COLUMNS}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def main(words: list[str] | None = None, folder: Path = HERE) -> None:
    parser = argparse.ArgumentParser(description="Record golden loss curves, by default the missing ones.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"curves to rewrite, of {', '.join(NAMES)}")
    parser.add_argument("--all", action="store_true", help="rewrite every curve")
    args = parser.parse_args(words)
    if unknown := sorted(set(args.names) - set(NAMES)):
        parser.error(f"not in OBJECTIVES of tests/helpers.py or tests/image_runs.py: {', '.join(unknown)}")
    missing = [name for name in NAMES if not (folder / f"{name}.json").exists()]
    chosen = NAMES if args.all else args.names or missing
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            (folder / f"{name}.json").write_text(json.dumps(curve(name, Path(scratch)), indent=1) + "\n")
            print(f"wrote {name}.json")
    if not chosen:
        print("no curve is missing; name the curves to rewrite, or rewrite every one with --all (make golden ALL=1)")


if __name__ == "__main__":
    main()
