"""Repeat the experiment of DiffusionBlocks' table 5 (arXiv:2506.14202): Huginn's training against the denoiser's.

python benchmarks/paper/table5.py --data DIR --out DIR [--judge-data DIR] [--size cpu|gpu] [--seeds 0]

Arms: `unrolled` (mean depth 32, truncation 8) on N tokens, `denoise_paper` (the paper's constants) on 3 N tokens, and the
flat control `next_token` on 3 N tokens. Prints the FLOPs of each arm and its NLL by K. For the denoiser, K = 1 is the
read-out at sigma_max and K > 1 a mixture over draws.

With a judge, the quality of generated text is measured too: 5 continuations of 50 tokens for each prompt. `--judge-data` is
a folder prepared from other documents, on which a judge is trained; `--judge RUN` names an existing judge. Every arm uses
both of the paper's decodings: top-p 0.95, which the paper used for its unrolled arm, and greedy, which it used for its
denoiser with 4 steps. Greedy decoding of the denoiser takes the most likely token after the walk, with the bridge `hard`.
The denoiser is also sampled at K = 1.

The command can be stopped and repeated: complete runs are kept and interrupted ones continue. RESULT.json in --out is
written again after every arm.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from recurrent_db.arguments import listed, run_command
from recurrent_db.errors import UserError
from recurrent_db.evaluation.text_metrics import cells, heading, rank
from recurrent_db.files import write_atomic
from recurrent_db.schema import Count, PositiveInt, above
from recurrent_db.store.folder import list_checkpoints
from recurrent_db.store.metrics import read_metrics

ROOT = Path(__file__).parents[2]
PASSES = {"unrolled": 1, "denoise_paper": 3, "next_token": 3}
"""Training tokens of each arm, in units of N. The paper trains 5 epochs against 15."""
JUDGE_PASSES = 5
"""Training tokens of the judge, in units of N."""
TEXT = {
    "unrolled": ("--k", 32),
    "denoise_paper": ("--k", "1,4", "--bridge", "hard"),
    "next_token": ("--k", 1),
}
"""Options of eval/generation.py for each arm's text, in addition to the decodings."""
DECODINGS = "p=0.95,greedy"

SIZES: dict[str, dict[str, Any]] = {
    # The tiny shape with Huginn's depths. On one thread one seed takes 13 minutes, including scoring with two draws, and
    # the judge and the text take 8 minutes more.
    "cpu": {
        "config": "tiny.toml",
        "tokens": 200_000,
        "options": ["--model.expected_depth", "32"],
        "score_tokens": 8192,
        "prompts": 100,
    },
    # The paper's shape, for a GPU. Its time is not yet measured.
    "gpu": {
        "config": "pythia-70m-looped.toml",
        "tokens": 40_000_000,
        "options": [],
        "score_tokens": 262_144,
        "prompts": 1000,
    },
}


@dataclass
class Args:
    """Train and score the arms of table 5. Can be stopped and continued."""

    data: Path
    """Folder made by train/prepare_data.py, for training and scoring."""
    out: Path
    """Folder for the runs and RESULT.json."""
    size: Literal["cpu", "gpu"] = "cpu"
    """Model shape and number of tokens."""
    seeds: tuple[Count, ...] = (0,)
    """Seeds."""
    tokens: Annotated[float | None, above(0)] = None
    """N, the training tokens of the `unrolled` arm. The default depends on --size."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations) to score."""
    draws: PositiveInt = 4
    """Noise draws averaged in a likelihood."""
    judge_data: Path | None = None
    """Folder prepared from other documents than --data (train/prepare_data.py --part). A judge is trained in OUT/judge."""
    judge: Path | None = None
    """Run directory of an existing judge; excludes --judge-data."""
    prompts: int | None = None
    """Number of prompts for generated text. The default depends on --size."""
    each: int = 5
    """Continuations of each prompt."""
    text_tokens: int = 50
    """Length of a continuation, in tokens."""
    prompt_tokens: int = 32
    """Length of a prompt, in tokens."""
    resamples: int = 200
    """Half samples of the prompts, from which the intervals are computed."""


def call(*words: object) -> None:
    """Print and run a command of the project. Raises `UserError` if it fails."""
    print("$ python " + " ".join(map(str, words)), flush=True)
    if subprocess.run([sys.executable, *map(str, words)], cwd=ROOT).returncode:
        raise UserError("the command above failed; repeat this command to continue")


def complete(run: Path, tokens: float) -> bool:
    """Whether a run has spent its budget and saved its last step."""
    if not (run / "metrics.jsonl").exists() or not list_checkpoints(run):
        return False
    rows = read_metrics(run / "metrics.jsonl")
    return (
        bool(rows) and rows[-1]["tokens"] >= tokens and list_checkpoints(run)[-1].name == f"step-{rows[-1]['step']:08d}"
    )


def scored_already(curve: Path, checkpoint: Path, ks: list[str], draws: PositiveInt) -> bool:
    """Whether a depth curve belongs to this checkpoint, these K and this number of draws (1 for models without noise)."""
    if not curve.exists():
        return False
    found = json.loads(curve.read_text())
    same = Path(found["checkpoint"]).name == checkpoint.name and list(found["by_k"]) == ks
    return same and (found["draws"] == draws or (found["draws"] == 1 and found["objective"] == "next_token"))


def make_judge(args: Args) -> Path | None:
    """The judge's run directory; trains the judge first if --judge-data is given. None without a judge."""
    if args.judge is not None and args.judge_data is not None:
        raise UserError("--judge and --judge-data exclude each other")
    if args.judge_data is None:
        return args.judge.resolve() if args.judge is not None else None
    size, run = SIZES[args.size], args.out / "judge"
    tokens = (args.tokens or size["tokens"]) * JUDGE_PASSES
    if not complete(run, tokens) or not (run / "judge.json").exists():
        call(
            "eval/train_judge.py", ROOT / "train/configs" / size["config"], "--data.path", args.judge_data.resolve(),
            "--run.dir", run, "--budget.tokens", f"{tokens:g}", "--run.checkpoint_every", 100, "--resume",
            "--apart-from", args.data,
        )  # fmt: skip
    return run


def text_half(args: Args, name: str, run: Path, judge: Path) -> dict[str, Any]:
    """Result of eval/generation.py for one arm. An existing result for the same checkpoints and settings is reused. All arms
    and seeds continue the same prompts."""
    out = run / "eval" / "generation.json"
    settings = {
        "checkpoint": str(list_checkpoints(run)[-1]), "judge": str(list_checkpoints(judge)[-1]), "data": str(args.data),
        "prompts": args.prompts or SIZES[args.size]["prompts"], "each": args.each, "tokens": args.text_tokens,
        "prompt_tokens": args.prompt_tokens, "resamples": args.resamples, "seed": 0,
    }  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if any(found.get(key) != value for key, value in settings.items()):
        words = (f"--{key.replace('_', '-')}={settings[key]}" for key in settings if key not in ("checkpoint", "judge"))
        call(
            "eval/generation.py", run, "--judge", judge, *words, *TEXT[name], "--decodings", DECODINGS, "--json", out
        )  # fmt: skip
        found = json.loads(out.read_text())
    return found


def arm(args: Args, name: str, seed: int, judge: Path | None) -> dict[str, Any]:
    """Train and score one arm, and measure its text. Existing results are kept."""
    size = SIZES[args.size]
    run, tokens = args.out / f"{name}-{seed}", (args.tokens or size["tokens"]) * PASSES[name]
    if not complete(run, tokens):
        call(
            "train/pretrain.py", ROOT / "train/configs" / size["config"], "--objective.name", name, "--data.path", args.data,
            "--run.dir", run, "--seed", seed, "--budget.tokens", f"{tokens:g}", "--objective.unrolled.mean_depth", 32,
            "--objective.unrolled.truncation", 8, "--run.checkpoint_every", 100, *size["options"], "--resume",
        )  # fmt: skip
    curve = run / "eval" / "depth_curve.json"
    ks = [str(k) for k in sorted(set(args.k))]
    if not scored_already(curve, list_checkpoints(run)[-1], ks, args.draws):
        call(
            "eval/depth_curve.py", run, "--data", args.data, "--k", listed(args.k), "--draws", args.draws,
            "--tokens", size["score_tokens"], "--json", curve,
        )  # fmt: skip
    last, scored = read_metrics(run / "metrics.jsonl")[-1], json.loads(curve.read_text())
    return {
        "seed": seed, "tokens": last["tokens"], "steps": last["step"], "flops": last["flops"],
        "flops_forward": last["flops_forward"], "flops_backward": last["flops_backward"], "seconds": last["seconds"],
        "nll_by_k": {k: entry["nll"] for k, entry in scored["by_k"].items()},
        "stderr_by_k": {k: entry["stderr"] for k, entry in scored["by_k"].items()}, "draws": scored["draws"],
        "nll_sigma_max": scored["by_k"].get("1", {}).get("nll") if scored["sigma"] is not None else None,
        "text": text_half(args, name, run, judge) if judge is not None else None,
    }  # fmt: skip


def table(arms: dict[str, list[dict[str, Any]]]) -> str:
    """One row per arm and seed: tokens, FLOPs, FLOPs relative to the denoiser's, NLL by K."""
    ks = list(next(iter(arms.values()))[0]["nll_by_k"])
    head = f"{'arm':<16}{'seed':>5}{'tokens':>12}{'FLOPs':>11}{'x':>7}" + "".join(f"{f'K={k}':>9}" for k in ks)
    lines = [head]
    for name, results in arms.items():
        for index, result in enumerate(results):
            base = arms.get("denoise_paper", [])
            ratio = f"{result['flops'] / base[index]['flops']:.2f}" if len(base) > index else "-"
            nlls = "".join(f"{nll:>9.3f}" for nll in result["nll_by_k"].values())
            lines.append(
                f"{name:<16}{result['seed']:>5}{result['tokens']:>12,}{result['flops']:>11.3e}{ratio:>7}{nlls}"
            )
    return "\n".join(lines)


def text_table(arms: dict[str, list[dict[str, Any]]]) -> str:
    """One row per arm, seed, K and decoding: text quality beside NLL and training FLOPs. Ranks are over all arms. Real text
    and the baselines have one row each."""
    results = [(name, result) for name, runs in arms.items() for result in runs]
    trained = [
        (name, result, row) for name, result in results for row in result["text"]["rows"] if row["name"] == "model"
    ]
    real, *others = [row for row in results[0][1]["text"]["rows"] if row["name"] != "model"]
    rank(real, [row for _, _, row in trained] + others)
    lines = [f"{'arm':<14}{'seed':>4}{'K':>4} {'decoding':<9}{heading()}{'rank':>5}{'NLL':>8}{'FLOPs':>11}"]
    for name, result, row in trained:
        nll = result["nll_by_k"].get(str(row["k"]))
        lines.append(
            f"{name:<14}{result['seed']:>4}{row['k']:>4} {row['decoding']:<9}{cells(row)}{row['rank'] or '-':>5}"
            f"{'-' if nll is None else f'{nll:.3f}':>8}{result['flops']:>11.3e}"
        )
    lines += [
        f"{row['name']:<14}{'':>4}{'':>4} {row['decoding'] or '':<9}{cells(row)}{row['rank'] or '-':>5}"
        for row in (real, *others)
    ]
    return "\n".join(lines)


def main(args: Args) -> int:
    seeds = sorted(set(args.seeds))
    args.out, args.data = args.out.resolve(), args.data.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "RESULT.json").exists():  # keep the seeds of earlier calls in the table
        earlier = json.loads((args.out / "RESULT.json").read_text())["arms"].get("next_token", [])
        seeds = sorted({*seeds, *(result["seed"] for result in earlier)})
    judge = make_judge(args)
    arms: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        for name in ("denoise_paper", "unrolled", "next_token"):
            arms.setdefault(name, []).append(arm(args, name, seed, judge))
            result = {"size": args.size, "data": args.data.name, "command": sys.argv[1:], "arms": arms}
            write_atomic(args.out / "RESULT.json", json.dumps(result, indent=1))
    print(table(arms))
    if judge is None:
        print("no text half: measuring text needs a judge (--judge-data or --judge)")
    else:
        print(f"\ntext, judged by {judge}:\n{text_table(arms)}")
    return 0


if __name__ == "__main__":
    run_command(Args, main)
