"""`recurrent-db flops`: what training and generation cost, by part."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from recurrent_db.accounting.flops import (
    Cost,
    Passes,
    cache_numbers_per_token,
    cost_per_token,
    inference_cost,
    step_cost,
    total,
)
from recurrent_db.arguments import parse
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError
from recurrent_db.model import build_model
from recurrent_db.objectives import build_objective, drawn_passes
from recurrent_db.objectives.blocks import freeze_shared
from recurrent_db.objectives.one_step import OneStep
from recurrent_db.optim.optimizer import update_flops
from recurrent_db.rng import Rng

KS = (1, 2, 4, 8, 16, 32)
POLICIES = ("full", "modulo-4", "last")
"""Of the key-value cache; see `recurrent_db.generation.cache`."""


@dataclass
class Args:
    """FLOPs per training token by part, for every way of training, and per generated token by K, at a config's shape."""

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    epochs_ratio: float = 3.0
    """Tokens that `one_step` is trained on for each token of `unrolled`; the paper's 15 epochs against 5 are 3."""
    vocab_size: int = 2048
    """Vocabulary where the config takes the tokenizer's."""
    cache_bytes: int = 2
    """Bytes of a number in the key-value cache (2: bfloat16)."""
    json: bool = False
    """Print JSON instead of tables."""


def training_passes(config: Config) -> dict[str, Passes]:
    """Passes of a training step of depth r = mean_depth.

    The depth sampler's own mean is r + 1 (its Poisson count starts at one); runs log what they really did.
    """
    unrolled = config.objective.unrolled
    depth, truncation = unrolled.mean_depth, min(unrolled.truncation or unrolled.mean_depth, unrolled.mean_depth)
    levels = config.data.sequence_length if config.objective.denoise.draw == "token" else 1
    return {
        "next_token": Passes(core_grad=1),
        "unrolled_truncated": Passes(core_no_grad=depth - truncation, core_grad=truncation),
        "unrolled_full": Passes(core_grad=depth),
        "denoise": Passes(core_grad=1, noise_levels=levels),
        "denoise_two_stream": Passes(core_grad=1, clean_grad=1, beside=True, noise_levels=levels),
    }


def _kinds(cost: Cost) -> dict[str, float]:
    """FLOPs by kind, and the two other ways to look at them."""
    names = ("forward", "backward", "backward_input", "backward_weight", "recomputed", "attention", "causal")
    return {name: getattr(cost, name) for name in names}


KIND_LABELS = {
    "forward": "forward",
    "backward_input": "backward to inputs",
    "backward_weight": "backward to weights",
    "recomputed": "done again in the backward",
}


DRAWS = 1000
"""Steps whose mean the recipe's cost is."""


def flops_table(config: Config, epochs_ratio: float, cache_size: int) -> dict[str, Any]:
    """Everything that ``recurrent-db flops`` prints, as plain values."""
    length = config.data.sequence_length
    parts: dict[str, dict[str, Cost]] = {}
    for name, passes in training_passes(config).items():
        parts[name] = cost_per_token(config.model, length, passes, config.run.activation_checkpointing)
    per_token = {name: total(costs).total for name, costs in parts.items()}

    config.objective.name = "one_step"
    drawn = drawn_passes(config, DRAWS)
    recipe = sum(step_cost(config, passes).total * share for passes, share in drawn.items())
    has_budget = any(limit is not None for limit in vars(config.budget).values())

    inference: dict[str, dict[str, float]] = {}
    cache: dict[str, dict[str, dict[str, int]]] = {policy: {} for policy in POLICIES}
    for name in ("unrolled", "denoise"):
        config.objective.name = "denoise" if name == "denoise" else "unrolled"
        recurrence = build_objective(config).recurrence
        inference[name] = {str(k): inference_cost(config.model, length, recurrence.passes(k)) for k in KS}
        for policy, by_name in cache.items():
            numbers = {k: cache_numbers_per_token(config.model, recurrence.passes(k), policy) for k in KS}
            by_name[name] = {str(k): cache_size * count for k, count in numbers.items()}
    config.model.noise_conditioning = True
    depth = config.objective.unrolled.mean_depth
    model = build_model(config.model, None, "meta")
    return {
        "per_token": per_token,
        "by_part": {name: {part: _kinds(cost) for part, cost in costs.items()} for name, costs in parts.items()},
        "by_kind": {name: _kinds(total(costs)) for name, costs in parts.items()},
        "update": {
            "flops_per_step": update_flops(model, config.optim),
            "tokens_per_step": config.data.batch_size * length,
        },
        "parameters": model.parameter_counts(),
        "recipe": {
            "per_token": recipe,
            "ratio_to_next_token": recipe / per_token["next_token"],
            "shallow_share": OneStep(config).shallow if has_budget else None,
            "shallow_asked": OneStep(config).asked if has_budget else None,
        },
        "ratio_to_denoise": {name: value / per_token["denoise"] for name, value in per_token.items()},
        "epochs_ratio": epochs_ratio,
        "ratio_of_runs": {
            "iterations": depth / epochs_ratio,
            "flops_full": per_token["unrolled_full"] / per_token["denoise"] / epochs_ratio,
            "flops_truncated": per_token["unrolled_truncated"] / per_token["denoise"] / epochs_ratio,
        },
        "inference_flops_per_token": inference,
        "cache_bytes_per_token": cache["full"]["unrolled"],
        "cache_bytes_per_token_by_policy": cache,
    }


def blocks_table(config: Config) -> dict[str, Any]:
    """What `recurrent-db flops` says of a model in blocks: each block as a process of its own, and the same network end to
    end."""
    length, rows = config.data.sequence_length, {}
    for block in range(1, config.model.n_blocks + 1):
        alone = copy.deepcopy(config)
        alone.blocks.only, alone.blocks.shared = (
            block,
            "owned" if config.blocks.shared == "all" else config.blocks.shared,
        )
        objective = build_objective(alone)
        parts = cost_per_token(config.model, length, objective.passes(Rng(0, 0), 0.0))
        model = build_model(config.model, None, "meta", block)
        freeze_shared(alone, model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows[str(block)] = {
            "layers": config.model.block_layers[block - 1], "by_part": {part: _kinds(c) for part, c in parts.items()},
            "flops_per_token": total(parts).total, "parameters": sum(p.numel() for p in model.parameters()),
            "trained_parameters": trained,
            "training_bytes": 4 * (sum(p.numel() for p in model.parameters()) + 3 * trained),
            "data_parallel_bytes_per_step": 4 * trained,
        }  # fmt: skip
    whole = copy.deepcopy(config)
    whole.model.n_blocks, whole.model.block_layers, whole.blocks.shared = 1, [config.model.n_core], "all"
    cost = total(cost_per_token(whole.model, length, build_objective(whole).passes(Rng(0, 0), 0.0)))
    plain = total(cost_per_token(config.model, length, Passes(core_grad=1, causal=config.objective.name != "masked")))
    return {"blocks": rows, "end_to_end_flops_per_token": cost.total, "plain_flops_per_token": plain.total}


def print_blocks(path: Path, table: dict[str, Any]) -> None:
    print(
        f"{path}: each block as a process of its own; FLOPs per training token, forward + backward, attention over all pairs"
    )
    print(f"{'block':>5}{'layers':>8}{'FLOPs/token':>14}{'x end-to-end':>14}{'parameters':>12}{'trained':>12}"
          f"{'MiB held*':>11}{'MiB if shared**':>17}")  # fmt: skip
    whole = table["end_to_end_flops_per_token"]
    for block, row in table["blocks"].items():
        print(f"{block:>5}{row['layers']:>8}{row['flops_per_token']:>14.4g}{row['flops_per_token'] / whole:>14.3f}"
              f"{row['parameters']:>12,}{row['trained_parameters']:>12,}{row['training_bytes'] / 2**20:>11.1f}"
              f"{row['data_parallel_bytes_per_step'] / 2**20:>17.2f}")  # fmt: skip
    print(
        f"end to end, conditioned as the blocks are: {whole:.4g}; the plain network: {table['plain_flops_per_token']:.4g}"
    )
    print("* parameters, gradients and AdamW's two moments in fp32; activations are logged in training (memory/*)")
    print(
        "** gradients that data-parallel training would exchange in each step; blocks that train alone exchange nothing"
    )


def arguments(words: list[str], prog: str) -> Args:
    return parse(Args, words, prog=prog)


def run(args: Args) -> int:
    config = load_config(args.config)
    for option, value in (("--epochs-ratio", args.epochs_ratio), ("--cache-bytes", args.cache_bytes),
                          ("--vocab-size", args.vocab_size)):  # fmt: skip
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{option} must be above 0, got {value}")
    config.model.vocab_size = config.model.vocab_size or args.vocab_size
    in_blocks = blocks_table(config) if config.model.n_blocks else None
    if in_blocks is not None and not args.json:
        print_blocks(args.config, in_blocks)
        return 0
    config.model.n_blocks, config.model.block_layers = 0, []  # the table below is of the layers as a core
    table = flops_table(config, args.epochs_ratio, args.cache_bytes)
    if in_blocks is not None:
        table |= in_blocks
    if args.json:
        print(json.dumps(table, indent=1))
        return 0
    names = list(table["per_token"])

    def line(label: str, values: list[float], form: str = ".4g") -> None:
        print(f"{label:<28}" + "".join(f"{value:>20{form}}" for value in values))

    print(f"{args.config}: FLOPs per training token at T = {config.data.sequence_length}")
    print(
        "(model FLOPs: matrix products, and attention over all pairs, forward + backward; unrolled at depth r exactly,"
    )
    print(" where the sampler's mean is r + 1)")
    print(f"{'':<28}" + "".join(f"{name:>20}" for name in names))
    for part in table["by_part"]["denoise"]:
        row = [table["by_part"][name][part]["forward"] + table["by_part"][name][part]["backward"] for name in names]
        if any(row) or part == "embedding":
            line(part, row)
    line("total", [table["per_token"][name] for name in names])
    line("x denoise", [table["ratio_to_denoise"][name] for name in names], ".2f")
    recipe = table["recipe"]
    print(
        f"one_step takes"
        f" {recipe['per_token']:.4g}, the mean of its steps over a run, {recipe['ratio_to_next_token']:.3f} x next_token"
        + (
            "\n(no budget in the configuration: its first phase, without the core's blocks, is left out)"
            if recipe["shallow_share"] is None
            else f" ({recipe['shallow_share']:.0%} of the budget without the core's blocks)"
            if recipe["shallow_share"] or not recipe["shallow_asked"]
            else f"\n({recipe['shallow_asked']:.1%} of the budget without the core's blocks is left out as too little)"
        )
    )
    print("\nthe total by kind")
    kinds = table["by_kind"]
    for kind, label in KIND_LABELS.items():
        line(f"  {label}", [kinds[name][kind] for name in names])
    print("of the total")
    line("  products with weights", [table["per_token"][name] - kinds[name]["attention"] for name in names])
    line("  attention", [kinds[name]["attention"] for name in names])
    line("with the causal half alone", [kinds[name]["causal"] for name in names])
    update = table["update"]
    parts = ", ".join(f"{name} {value:.3g}" for name, value in update["flops_per_step"].items() if value)
    per_token = sum(update["flops_per_step"].values()) / update["tokens_per_step"]
    print(
        f"\nnot in the total, per optimizer step: {parts}; that is {per_token:.3g} per token of a step"
        f" of {update['tokens_per_step']:,}, {100 * per_token / table['per_token']['denoise']:.2g} percent of denoise"
    )
    runs, ratio, depth = table["ratio_of_runs"], table["ratio_to_denoise"], config.objective.unrolled.mean_depth
    print(
        f"\nunrolled against denoise trained on {args.epochs_ratio:g}x the tokens. Counted in iterations, as the paper does:"
        f" {runs['iterations']:.1f}; counted in FLOPs: {runs['flops_full']:.1f} (full backpropagation),"
        f" {runs['flops_truncated']:.1f} (truncated)."
    )
    print(
        f"Per token, before the extra epochs: {depth} iterations; {ratio['unrolled_full']:.1f} (full) and"
        f" {ratio['unrolled_truncated']:.1f} (truncated) in FLOPs."
    )
    print(
        "\nper generated token, from a key-value cache as `generate` keeps: FLOPs at"
        f" {config.data.sequence_length:,} tokens of context; bytes that each token adds, {args.cache_bytes} a number"
    )
    print(f"{'':<28}" + "".join(f"{f'K={k}':>12}" for k in KS))
    for name, by_k in table["inference_flops_per_token"].items():
        print(f"{'FLOPs, ' + name:<28}" + "".join(f"{value:>12.3g}" for value in by_k.values()))
    for policy, by_name in table["cache_bytes_per_token_by_policy"].items():
        for name, by_k in by_name.items():
            print(f"{f'cache bytes, {policy}, {name}':<28}" + "".join(f"{value:>12,}" for value in by_k.values()))
    counts = table["parameters"]
    print(f"\nparameters: {counts['total']:,}, and {counts['noise_conditioning']:,} for noise conditioning")
    return 0
