"""Run directories with plausible synthetic numbers, for tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from recurrent_db.accounting.flop_count import FlopCount
from recurrent_db.accounting.flops import step_cost
from recurrent_db.config import Config, resolve
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective
from recurrent_db.optim.schedule import budget_progress, learning_rate_scale
from recurrent_db.rng import Rng
from recurrent_db.schema import to_dict

OBJECTIVES = ("denoise", "unrolled", "next_token")


def fake_config(objective: str = "next_token", steps: int = 200) -> Config:
    """A tiny run's configuration, resolved as training saves it."""
    config = Config()
    config.objective.name = objective
    config.model.vocab_size = 512
    config.objective.unrolled.mean_depth, config.objective.unrolled.truncation = 8, 4
    config.budget.steps = float(steps)
    config.data.path = "runs/demo/data"
    resolve(config)
    return config


def fake_run(
    folder: Path, objective: str = "next_token", steps: int = 200, floor: float = 2.2, seed: int = 0, share: float = 1.0,
    energy_per_token: float = 0.0,
) -> Path:  # fmt: skip
    """A run directory with plausible numbers in every file; ``share`` below 1 cuts it short. Energy (joules per token)
    is read every tenth step where it is given."""
    random = np.random.default_rng(seed)
    config = fake_config(objective, steps)
    config.seed = seed
    law = build_objective(config)
    ks = [1, 4]
    (folder / "eval").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    tokens, seconds, progress, spent = 0, 0.0, 0.0, FlopCount()
    parameters = sum(p.numel() for p in build_model(config.model, seed=None, device="meta").parameters())
    for step in range(round(steps * share)):
        passes = law.passes(Rng(seed, step), progress)
        cost = step_cost(config, passes)
        rate = config.optim.lr * learning_rate_scale(config.schedule, (step + 0.5) / steps)
        tokens += tokens_per_step
        spent.add(cost, 20.0 * parameters, tokens_per_step)
        took = cost.total * tokens_per_step / 2e10 * random.uniform(0.9, 1.15)
        seconds += took
        before, progress = progress, budget_progress(config.budget, spent.total, tokens, step + 1, seconds)
        annealed = 0.25 * max(0.0, (progress - 0.7) / 0.3)
        true_loss = floor + 4.2 * (1 + step / (0.06 * steps)) ** -0.8 - annealed
        row: dict[str, Any] = {
            "step": step + 1, "tokens": tokens, **spent.row(), "loss": true_loss + random.normal(0, 0.08), "lr": rate,
            "grad_norm": 0.5 + 3 / (1 + step / 20) + abs(random.normal(0, 0.1)), "tokens_per_s": tokens_per_step / took,
            "mfu": cost.total * tokens_per_step / took / 5e10, "hfu": cost.hardware * tokens_per_step / took / 5e10,
            "peak_memory_bytes": 4.1e8 + 1e6 * min(step, 60), "memory/parameters_bytes": 4 * parameters,
            "memory/gradients_bytes": 4 * parameters, "memory/optimizer_bytes": 8 * parameters,
            "memory/average_bytes": 4 * parameters if config.optim.ema_decay else 0,
            "memory/activations_bytes": (6 + passes.core_grad + (step % 9 == 4)) * 2_000_000, "seconds": seconds,
            "skipped": 0,
        }  # fmt: skip
        if energy_per_token and (step + 1) % 10 == 0:
            row["energy_joules"] = energy_per_token * tokens
        if objective == "unrolled":
            row |= {"depth": float(passes.core_no_grad + passes.core_grad), "state_rms": 1 + 0.3 * progress}
        if objective.startswith("denoise"):
            row["loss_sigma_max"] = None if step % 7 == 3 else row["loss"]
            row["loss"] *= 0.6
        if int(progress * 5) > int(before * 5):
            for k in ks:
                nll = true_loss + 0.05 - (0.06 * math.log2(k) if objective == "unrolled" else 0.0)
                row[f"eval/nll_k{k}"], row[f"eval/bits_per_byte_k{k}"] = nll, nll * 0.62
            row |= {"eval/tokens": 16384, "eval/draws": 1}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    environment = {
        "python": "3.11.7", "device": "cpu", "device_name": "x86_64", "git_commit": "0123456789abcdef",
        "command": ["train/pretrain.py", "tiny.toml", "--objective.name", objective],
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    recurrence = law.recurrence
    end = floor - 0.1
    curve = {
        str(k): {
            "nll": end + (0.25 / k if objective == "unrolled" else -0.004 * math.log2(k)),
            "bits_per_byte": end * 0.62, "stderr": 0.021,
            "flops_per_token": step_cost(config, recurrence.passes(k)).forward,
        }
        for k in (1, 2, 4, 8, 16, 32)
    }  # fmt: skip
    grown = {
        "next_token": lambda i: 1.4**i,
        "unrolled": lambda i: 0.9 - 0.5 / i,
        "denoise": lambda i: 1 - 0.6 / i,
        "one_step": lambda i: 1 - 0.6 / i,
    }
    save(folder, "depth_curve", {
        "by_k": curve, "tokens": 65536, "draws": 4, "sigma": None, "objective": objective,
        "state_is": "estimate" if objective.startswith("denoise") else "state",
        "state_rms_by_iteration": {str(i): grown[objective.split("-")[0]](i) for i in range(1, 33)},
    })  # fmt: skip
    texts = [
        {"prompt": prompt, "k": k, "temperature": 0.8, "seed": 1, "text": prompt + " self, value):\n        " * 3}
        for prompt in ("def __init__(", "import os\n", 'class Node:\n    """')
        for k in (1, 8)
    ]
    save(folder, "samples", texts)
    tasks = {
        task: {"alias": task, "acc,none": random.uniform(0.25, 0.6), "acc_stderr,none": 0.013}
        for task in ("arc_easy", "piqa", "blimp_anaphor_number_agreement")
    }
    save(folder, "lm_eval", {"by_k": {"1": tasks, "8": tasks}} if objective != "next_token" else {"results": tasks})
    if objective.startswith("denoise"):
        levels = [{"sigma": s, "nll": end / (1 + (0.3 / s) ** 1.5)} for s in np.geomspace(0.02, 20, 12).tolist()]
        save(folder, "denoiser_report", {"nll_by_sigma": levels, "sigma_star": 0.21})
    return folder


def save(run: Path, name: str, value: object) -> None:
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / f"{name}.json").write_text(json.dumps(value))
