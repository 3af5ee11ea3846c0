"""Run the whole workflow in ten minutes on two cores: `make demo`.

Trains four models on the sources of the Python standard library at one FLOP budget: denoise, one_step, unrolled, and the
flat control next_token. Scores them by number of iterations K, runs an lm-eval task and samples text with one of them, and
writes runs/demo/report.html. Every step is a command of this project, and is printed before it runs, so it can be copied.
Without a terminal, a line of progress is printed every 15 seconds instead of a progress bar.
"""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import recurrent_db
from recurrent_db.arguments import listed, run_command
from recurrent_db.data import load_tokenizer, open_data
from recurrent_db.data.ngram import bigram_nll, unigram_nll
from recurrent_db.files import write_atomic
from recurrent_db.schema import Positive, PositiveInt
from recurrent_db.store.metrics import read_metrics

ROOT = Path(__file__).parents[1]
ARMS = ("denoise", "one_step", "unrolled", "next_token")
SAMPLED = "one_step"
"""The arm that runs the lm-eval task and generates text. The README's example loads it."""
EVERY = 15.0
"""Seconds between two lines of progress."""


@dataclass
class Args:
    """Train four models on the Python standard library, compare them, and sample from one of them."""

    out: Path = Path("runs/demo")
    """Output folder. An earlier demo in it is replaced."""
    flops: Positive = 5.0e12
    """Training budget of each arm, in model FLOPs."""
    vocab_size: int = 2048
    """Vocabulary size of the tokenizer."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations) to score, separated by commas."""
    score_tokens: PositiveInt = 16384
    """Number of held-out tokens to score."""
    seed: int = 0
    """Seed of the runs."""


@contextmanager
def progress_lines(what: str, state: Callable[[], str] | None = None) -> Iterator[None]:
    """While the body runs, print progress every ``EVERY`` seconds. At a terminal, progress bars show it instead."""
    if sys.stderr.isatty():
        yield
        return
    started, ended = time.perf_counter(), threading.Event()

    def lines() -> None:
        while not ended.wait(EVERY):
            parts = [*([state()] if state else []), f"{time.perf_counter() - started:.0f} s"]
            print(f"{what}: {', '.join(parts)}", flush=True)

    thread = threading.Thread(target=lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def spent(run: Path, flops: Positive) -> str:
    """Share of the budget that a training run has spent so far, and its loss."""
    rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    if not rows:
        return "0% of the budget"
    loss = "not finite" if rows[-1]["loss"] is None else f"{rows[-1]['loss']:.3f}"
    return f"{min(1.0, rows[-1]['flops'] / flops):.0%} of the budget, loss {loss}"


def command(*words: object, what: str = "", state: Callable[[], str] | None = None) -> None:
    """Print a command as a user would type it, and run it."""
    print("\n$ python " + shlex.join(str(word) for word in words), flush=True)
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    try:
        with progress_lines(what or str(words[0]), state):
            status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached the process too, and a trainer saves a checkpoint before it ends
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
    """Continuations of two prompts at two values of K."""
    model, tokenizer = recurrent_db.load(run)
    settings: dict[str, Any] = {"max_new_tokens": 48, "temperature": 0.7, "top_p": 0.95, "seed": seed}
    result = []
    for prompt in ("def __init__(self", "import os\nimport sys\n\n"):
        for k in (1, 4):
            text = recurrent_db.generate(model, tokenizer, prompt, k=k, **settings)
            result.append({"prompt": prompt, "k": k, **settings, "text": text})
    return result


def scores(run: Path) -> dict[str, dict[str, float]]:
    """Held-out scores by number of iterations."""
    by_k: dict[str, dict[str, float]] = json.loads((run / "eval/depth_curve.json").read_text())["by_k"]
    return by_k


def best_k(run: Path) -> str:
    """The K with the lowest held-out NLL."""
    by_k = scores(run)
    return min(by_k, key=lambda k: by_k[k]["nll"])


def summary(out: Path, floor: dict[str, float], seconds: float) -> str:
    """The final tables, and a sentence about the result."""
    ks = list(scores(out / ARMS[0]))
    lines = ["Held-out NLL by K, in nats per token", f"{'arm':<12}" + "".join(f"{'K=' + k:>9}" for k in ks)]
    lines += [f"{arm:<12}" + "".join(f"{scores(out / arm)[k]['nll']:>9.3f}" for k in ks) for arm in ARMS]
    lines += [f"{name:<12}{nll:>9.3f}" for name, nll in floor.items()]
    lines += ["", f"{'arm':<12}{'best NLL':>9}{'at K':>6}{'bits/byte':>11}{'FLOPs':>11}{'tokens':>11}{'steps':>7}"]
    best: dict[str, float] = {}
    for arm in ARMS:
        k = best_k(out / arm)
        score, last = scores(out / arm)[k], read_metrics(out / arm / "metrics.jsonl")[-1]
        best[arm] = score["nll"]
        lines.append(
            f"{arm:<12}{score['nll']:>9.3f}{k:>6}{score['bits_per_byte']:>11.3f}{last['flops']:>11.3e}"
            f"{last['tokens']:>11,}{last['step']:>7}"
        )
    lines.append(f"\nLowest held-out NLL at equal FLOPs: {', then '.join(sorted(best, key=lambda arm: best[arm]))}.")
    lines.append(f"One seed, small models, a short budget: a demonstration, not a ranking. Took {seconds:.0f} s.")
    lines.append(f"Open {out / 'report.html'} in a browser.")
    return "\n".join(lines)


def main(args: Args) -> int:
    started = time.perf_counter()
    out, data = args.out, args.out / "data"
    if out.exists():
        if any(out.iterdir()) and not (out / "data").exists() and not (out / "tokenizer.model").exists():
            raise recurrent_db.UserError(f"{out} exists and is not an earlier demo: choose another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)

    tokenizer = out / "tokenizer.model"
    command("tokenizers/train_tokenizer.py", "--input", "stdlib", "--vocab-size", args.vocab_size, "--out", tokenizer)
    command("train/prepare_data.py", "--source", "stdlib", "--tokenizer", tokenizer, "--out", data)
    with progress_lines("baselines"):
        floor = baselines(data)
    write_atomic(out / "baselines.json", json.dumps(floor))

    for arm in ARMS:
        command(
            "train/pretrain.py", "train/configs/tiny.toml", "--objective.name", arm, "--data.path", data,
            "--run.dir", out / arm, "--budget.flops", f"{args.flops:g}", "--seed", args.seed,
            what=arm, state=functools.partial(spent, out / arm, args.flops),
        )  # fmt: skip
    for arm in ARMS:
        command(
            "eval/depth_curve.py", out / arm, "--data", data, "--k", listed(args.k), "--tokens", args.score_tokens,
            "--draws", 2, "--json", out / arm / "eval/depth_curve.json", what=f"{arm}, NLL by K",
        )  # fmt: skip
    run = out / SAMPLED
    command(
        "eval/lm_eval_cli.py", "--model", "recurrent_db", "--model_args", f"checkpoint={run},k={best_k(run)}",
        "--tasks", "heldout_cloze", "--data", data, "--limit", "100", "--output_path", run / "eval/lm_eval.json",
        what=f"{SAMPLED}, lm-eval",
    )  # fmt: skip
    [result] = (run / "eval").glob("lm_eval_*.json")  # the harness puts the date into the name
    result.rename(run / "eval/lm_eval.json")
    with progress_lines(f"{SAMPLED}, samples"):
        written = samples(run, args.seed)
    write_atomic(run / "eval/samples.json", json.dumps(written, indent=1))
    print(f"\n{SAMPLED} at K = {written[0]['k']} continues {written[0]['prompt']!r}:\n{written[0]['text']}", flush=True)
    command("-m", "recurrent_db", "report", *(out / arm for arm in ARMS), "-o", out / "report.html", what="report")
    print("\n" + summary(out, floor, time.perf_counter() - started))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
