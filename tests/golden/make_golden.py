"""Write the golden loss curves: 20 steps of each objective on seeded synthetic tokens, CPU, one thread."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from helpers import MICRO, OBJECTIVES, synthetic_data  # noqa: E402

from recurrent_db.config import load_config  # noqa: E402
from recurrent_db.training import trainer  # noqa: E402

STEPS = 20
COLUMNS = ("loss", "grad_norm", "lr", "flops", "eval/nll_k1", "eval/nll_k2")


def curve(objective: str, folder: Path) -> dict[str, list[float | None]]:
    """The columns of metrics.jsonl that a golden file holds, of one run of the real trainer."""
    data = folder / "data"
    if not data.exists():
        synthetic_data(data)
    words = ["--objective.name", objective, "--budget.steps", str(STEPS), "--data.path", str(data)]
    config = load_config(None, [*MICRO, *words, "--run.dir", str(folder / objective)])
    trainer.train(config)
    rows = [json.loads(line) for line in (folder / objective / "metrics.jsonl").read_text().splitlines()]
    return {name: [row.get(name) for row in rows] for name in COLUMNS}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name in OBJECTIVES:
            (HERE / f"{name}.json").write_text(json.dumps(curve(name, Path(scratch)), indent=1) + "\n")
            print(f"wrote {name}.json")
