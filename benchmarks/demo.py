"""The main job, end to end, in ten minutes on two cores: `make demo`.

Trains three looped models on the Python standard library's own sources at one FLOP budget (denoise, unrolled, and the
flat control next_token), scores them by number of iterations K, runs an lm-eval task, samples text, and writes
runs/demo/report.html. Every step is a command of this project, printed before it runs, so it can be copied.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import recurrent_db
from recurrent_db.arguments import run_command
from recurrent_db.data import load_tokenizer, open_data
from recurrent_db.data.ngram import bigram_nll, unigram_nll
from recurrent_db.files import write_atomic

ROOT = Path(__file__).parents[1]
ARMS = ("one_step", "unrolled", "next_token")


@dataclass
class Args:
    """Train, score and sample three looped models on the embedded corpus, and compare them."""

    out: Path = Path("runs/demo")
    """Folder for everything; replaced if it holds an earlier demo."""
    flops: float = 7.0e12
    """Training budget of each arm, in model FLOPs."""
    vocab_size: int = 2048
    """Tokens of the tokenizer."""
    k: str = "1,2,4,8,16,32"
    """Numbers of iterations to score."""
    score_tokens: int = 16384
    """Held-out tokens to score."""
    seed: int = 0
    """Seed of the runs."""


def command(*words: object) -> None:
    """Print a command as a user would type it, and run it."""
    print("\n$ python " + shlex.join(str(word) for word in words), flush=True)
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached it too; a trainer saves before it goes
        raise
    if status:
        raise SystemExit(status)


def baselines(data: Path) -> dict[str, float]:
    """Unigram and bigram NLL on the whole held-out split, counted on the whole training split."""
    vocab_size = load_tokenizer(data).vocab_size
    train, held_out = (
        np.concatenate([source.read(0, source.tokens) for source in open_data(data, split).sources.values()])
        for split in ("train", "validation")
    )
    return {
        "unigram": unigram_nll(train, held_out, vocab_size),
        "bigram": bigram_nll(train, held_out, vocab_size),
    }


def samples(run: Path, seed: int) -> list[dict[str, Any]]:
    """A few continuations at several K."""
    model, tokenizer = recurrent_db.load(run)
    settings = {"max_new_tokens": 48, "temperature": 0.7, "top_p": 0.95, "seed": seed}
    result = []
    for prompt in ("def __init__(self", "import os\nimport sys\n\n"):
        for k in (1, 4):
            text = recurrent_db.generate(model, tokenizer, prompt, k=k, **settings)
            result.append({"prompt": prompt, "k": k, **settings, "text": text})
    return result


def best_k(run: Path) -> int:
    """The number of iterations with the lowest held-out NLL."""
    by_k = json.loads((run / "eval/depth_curve.json").read_text())["by_k"]
    return int(min(by_k, key=lambda k: by_k[k]["nll"]))


def summary(out: Path, floor: dict[str, float], seconds: float) -> str:
    """The table at the end, and its reading in words."""
    lines = [f"{'arm':<12}{'best NLL':>9}{'at K':>6}{'bits/byte':>11}{'FLOPs':>11}{'tokens':>11}{'steps':>7}"]
    best: dict[str, float] = {}
    for arm in ARMS:
        by_k = json.loads((out / arm / "eval/depth_curve.json").read_text())["by_k"]
        k = best_k(out / arm)
        score = by_k[str(k)]
        last = json.loads((out / arm / "metrics.jsonl").read_text().splitlines()[-1])
        best[arm] = score["nll"]
        lines.append(
            f"{arm:<12}{score['nll']:>9.3f}{k:>6}{score['bits_per_byte']:>11.3f}{last['flops']:>11.3e}"
            f"{last['tokens']:>11,}{last['step']:>7}"
        )
    lines += [f"{name:<12}{nll:>9.3f}" for name, nll in floor.items()]
    ranking = sorted(best, key=lambda arm: best[arm])
    lines.append(f"\nLowest held-out NLL at equal FLOPs: {ranking[0]}, then {ranking[1]}, then {ranking[2]}.")
    lines.append(f"One seed, a small model, a short budget: a demonstration, not a ranking. Took {seconds:.0f} s.")
    lines.append(f"Open {out / 'report.html'} in a browser.")
    return "\n".join(lines)


def main(args: Args) -> int:
    started = time.perf_counter()
    out, data = args.out, args.out / "data"
    if out.exists():
        if any(out.iterdir()) and not (out / "data").exists() and not (out / "tokenizer.model").exists():
            raise recurrent_db.UserError(f"{out} exists and is no earlier demo; name another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)

    tokenizer = out / "tokenizer.model"
    command("tokenizers/train_tokenizer.py", "--input", "stdlib", "--vocab-size", args.vocab_size, "--out", tokenizer)
    command("train/prepare_data.py", "--source", "stdlib", "--tokenizer", tokenizer, "--out", data)
    floor = baselines(data)
    write_atomic(out / "baselines.json", json.dumps(floor))

    for arm in ARMS:
        command(
            "train/pretrain.py", "train/configs/tiny.toml", "--objective.name", arm, "--data.path", data,
            "--run.dir", out / arm, "--budget.flops", f"{args.flops:g}", "--seed", args.seed,
        )  # fmt: skip
    for arm in ARMS:
        curve = out / arm / "eval/depth_curve.json"
        command(
            "eval/depth_curve.py", out / arm, "--data", data, "--k", args.k, "--tokens", args.score_tokens,
            "--draws", 2, "--json", curve,
        )  # fmt: skip
    for arm in ARMS:
        model = f"checkpoint={out / arm},k={best_k(out / arm)}"
        command(
            "eval/lm_eval_cli.py", "--model", "recurrent_db", "--model_args", model,
            "--tasks", "heldout_cloze", "--data", data, "--limit", "100", "--output_path", out / arm / "eval/lm_eval.json",
        )  # fmt: skip
        # The harness puts the date into the name.
        [result] = (out / arm / "eval").glob("lm_eval_*.json")
        result.rename(out / arm / "eval/lm_eval.json")
        write_atomic(out / arm / "eval/samples.json", json.dumps(samples(out / arm, args.seed), indent=1))
    command("-m", "recurrent_db", "report", *(out / arm for arm in ARMS), "-o", out / "report.html")
    print("\n" + summary(out, floor, time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
