"""The tables of `recurrent-db flops`, as plain values for JSON and as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from recurrent_db.accounting.flops import Cost, cache_numbers_per_token, cost_per_token, inference_cost, total
from recurrent_db.accounting.image_flops import image_cost, positions
from recurrent_db.config import Config
from recurrent_db.model import build_model
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.image_networks import build_image_network
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import build_objective
from recurrent_db.optim.optimizer import update_flops

KS = (1, 2, 4, 8, 16, 32)
POLICIES = ("full", "modulo-4", "last")
"""Policies of the key-value cache; see `recurrent_db.generation.cache`."""
KINDS = ("forward", "backward", "backward_input", "backward_weight", "recomputed", "attention", "causal")
KIND_LABELS = {
    "forward": "forward",
    "backward_input": "backward to inputs",
    "backward_weight": "backward to weights",
    "recomputed": "recomputed in backward",
}


def mean_cost(config: Config, steps: Mapping[Passes, float]) -> dict[str, Cost]:
    """Mean FLOPs per training token of each part of the model. ``steps`` maps kinds of step to their shares."""
    found: dict[str, Cost] = {}
    for passes, share in steps.items():
        parts = cost_per_token(config.model, config.data.sequence_length, passes, config.run.activation_checkpointing)
        found = {part: found.get(part, Cost()) + share * cost for part, cost in parts.items()}
    return found


def _by_kind(cost: Cost) -> dict[str, float]:
    return {name: getattr(cost, name) for name in KINDS}


def flops_table(
    config: Config,
    training: Mapping[str, Mapping[Passes, float]],
    inference: Mapping[str, Callable[[int], Passes]],
    epochs_ratio: float,
    cache_size: int,
) -> dict[str, Any]:
    """All values that the command prints for a looped model.

    Args:
        training: for each way to train, its kinds of step and their shares.
        inference: for each recurrence, a function from K to the passes of K iterations.
        epochs_ratio: training tokens of `denoise` divided by those of `unrolled`, for the comparison of whole runs.
        cache_size: bytes per number in the key-value cache.
    """
    parts = {name: mean_cost(config, steps) for name, steps in training.items()}
    per_token = {name: total(costs).total for name, costs in parts.items()}
    model = build_model(replace(config.model, noise_conditioning=True), None, "meta")
    cache = cache_bytes(config, inference, cache_size)
    length = config.data.sequence_length
    return {
        "per_token": per_token,
        "by_part": {name: {part: _by_kind(cost) for part, cost in costs.items()} for name, costs in parts.items()},
        "by_kind": {name: _by_kind(total(costs)) for name, costs in parts.items()},
        "update": {
            "flops_per_step": update_flops(model, config.optim),
            "tokens_per_step": config.data.batch_size * length,
        },
        "parameters": model.parameter_counts(),
        "ratio_to_denoise": {name: value / per_token["denoise"] for name, value in per_token.items()},
        "epochs_ratio": epochs_ratio,
        "ratio_of_runs": {
            "iterations": config.objective.unrolled.mean_depth / epochs_ratio,
            "flops_full": per_token["unrolled_full"] / per_token["denoise"] / epochs_ratio,
            "flops_truncated": per_token["unrolled_truncated"] / per_token["denoise"] / epochs_ratio,
        },
        "inference_flops_per_token": {
            name: {str(k): inference_cost(config.model, length, passes(k)) for k in KS}
            for name, passes in inference.items()
        },
        "cache_bytes_per_token": cache["full"]["unrolled"],
        "cache_bytes_per_token_by_policy": cache,
    }


def cache_bytes(
    config: Config, inference: Mapping[str, Callable[[int], Passes]], size: int
) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes that each token adds to the key-value cache, by policy, recurrence and K. ``size`` is in bytes per number."""
    return {
        policy: {
            name: {str(k): size * cache_numbers_per_token(config.model, passes(k), policy) for k in KS}
            for name, passes in inference.items()
        }
        for policy in POLICIES
    }


def lines(table: dict[str, Any], config: Config, source: object, cache_size: int) -> list[str]:
    """The printed form of `flops_table`. ``table`` must also have the result of `costs.skip_core_phase`."""
    return [
        *_training_lines(table, config, source),
        _skip_core_line(**table["one_step"]),
        *_kind_lines(table),
        *_comparison_lines(table, config),
        *_inference_lines(table, config, cache_size),
    ]


def _row(label: str, values: list[float], form: str = ".4g") -> str:
    return f"{label:<28}" + "".join(f"{value:>20{form}}" for value in values)


def _training_lines(table: dict[str, Any], config: Config, source: object) -> list[str]:
    names, by_part = list(table["per_token"]), table["by_part"]
    found = [
        f"{source}: FLOPs per training token at T = {config.data.sequence_length}",
        "(model FLOPs: matrix products and attention over all pairs, forward + backward; unrolled at depth r exactly,",
        " although the mean depth of its steps is r + 1)",
        f"{'':<28}" + "".join(f"{name:>20}" for name in names),
    ]
    for part in by_part["denoise"]:
        row = [by_part[name][part]["forward"] + by_part[name][part]["backward"] for name in names]
        if any(row) or part == "embedding":
            found.append(_row(part, row))
    return [
        *found,
        _row("total", [table["per_token"][name] for name in names]),
        _row("x denoise", [table["ratio_to_denoise"][name] for name in names], ".2f"),
    ]


def _skip_core_line(skip_core_share: float | None, skip_core_asked: float | None) -> str:
    if skip_core_share is None:
        what = "without the skip-core phase, because the configuration has no budget"
    elif skip_core_share or not skip_core_asked:
        what = f"skip-core phase: {skip_core_share:.0%} of the budget"
    else:
        what = f"the skip-core phase, {skip_core_asked:.1%} of the budget, is too short and left out"
    return f"one_step is the mean over the steps of a run ({what})"


def _kind_lines(table: dict[str, Any]) -> list[str]:
    names, kinds, update = list(table["per_token"]), table["by_kind"], table["update"]
    each = ", ".join(f"{name} {value:.3g}" for name, value in update["flops_per_step"].items() if value)
    per_token = sum(update["flops_per_step"].values()) / update["tokens_per_step"]
    return [
        "\nthe total by kind",
        *(_row(f"  {label}", [kinds[name][kind] for name in names]) for kind, label in KIND_LABELS.items()),
        "of the total",
        _row("  products with weights", [table["per_token"][name] - kinds[name]["attention"] for name in names]),
        _row("  attention", [kinds[name]["attention"] for name in names]),
        _row("total with causal attention", [kinds[name]["causal"] for name in names]),
        f"\nnot in the total: the update, {each} FLOPs per optimizer step. At {update['tokens_per_step']:,} tokens per step"
        f" that is {per_token:.3g} per token, {100 * per_token / table['per_token']['denoise']:.2g} percent of denoise.",
    ]


def _comparison_lines(table: dict[str, Any], config: Config) -> list[str]:
    runs, ratio = table["ratio_of_runs"], table["ratio_to_denoise"]
    return [
        f"\ncost of unrolled divided by that of denoise with {table['epochs_ratio']:g}x the tokens."
        f" Counted in iterations, as the paper does: {runs['iterations']:.1f}; counted in FLOPs:"
        f" {runs['flops_full']:.1f} (full backpropagation), {runs['flops_truncated']:.1f} (truncated).",
        f"The same per token: {config.objective.unrolled.mean_depth} in iterations;"
        f" {ratio['unrolled_full']:.1f} (full) and {ratio['unrolled_truncated']:.1f} (truncated) in FLOPs.",
    ]


def _inference_lines(table: dict[str, Any], config: Config, cache_size: int) -> list[str]:
    counts = table["parameters"]
    return [
        f"\nper generated token, with a key-value cache: FLOPs at {config.data.sequence_length:,} tokens of context, and"
        f" bytes that each token adds to the cache ({cache_size} per number)",
        f"{'':<28}" + "".join(f"{f'K={k}':>12}" for k in KS),
        *(
            f"{'FLOPs, ' + name:<28}" + "".join(f"{value:>12.3g}" for value in by_k.values())
            for name, by_k in table["inference_flops_per_token"].items()
        ),
        *(
            f"{f'cache bytes, {policy}, {name}':<28}" + "".join(f"{value:>12,}" for value in by_k.values())
            for policy, by_name in table["cache_bytes_per_token_by_policy"].items()
            for name, by_k in by_name.items()
        ),
        f"\nparameters: {counts['total']:,}, plus {counts['noise_conditioning']:,} for noise conditioning",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A model in blocks


def blocks_table(config: Config, by_block: Mapping[int, Passes], whole: Passes) -> dict[str, Any]:
    """All values that the command prints for a model in blocks.

    Args:
        by_block: the passes of a training step of each block, each in a process of its own.
        whole: the passes of a training step if the same network is trained end to end.
    """
    model, length, rows = config.model, config.data.sequence_length, {}
    for block, passes in by_block.items():
        parts, held = cost_per_token(model, length, passes), build_model(model, None, "meta", block)
        assert isinstance(held, BlocksLM)
        held.train_shared(passes.tables_grad)
        parameters = sum(p.numel() for p in held.parameters())
        trained = sum(p.numel() for p in held.parameters() if p.requires_grad)
        rows[str(block)] = {
            "layers": model.block_layers[block - 1],
            "by_part": {part: _by_kind(cost) for part, cost in parts.items()},
            "flops_per_token": total(parts).total,
            "parameters": parameters,
            "trained_parameters": trained,
            "training_bytes": 4 * (parameters + 3 * trained),
            "data_parallel_bytes_per_step": 4 * trained,
        }
    end_to_end = replace(model, n_blocks=1, block_layers=[model.n_core])
    plain = Passes(core_grad=1, causal=whole.causal)
    return {
        "blocks": rows,
        "end_to_end_flops_per_token": total(cost_per_token(end_to_end, length, whole)).total,
        "plain_flops_per_token": total(cost_per_token(model, length, plain)).total,
    }


def blocks_lines(table: dict[str, Any], source: object) -> list[str]:
    """The printed form of `blocks_table`."""
    whole = table["end_to_end_flops_per_token"]
    return [
        f"{source}: each block in a process of its own; FLOPs per training token, forward + backward, with attention over"
        " all pairs",
        f"{'block':>5}{'layers':>8}{'FLOPs/token':>14}{'x end-to-end':>14}{'parameters':>12}{'trained':>12}"
        f"{'MiB held*':>11}{'MiB if shared**':>17}",
        *(
            f"{block:>5}{row['layers']:>8}{row['flops_per_token']:>14.4g}{row['flops_per_token'] / whole:>14.3f}"
            f"{row['parameters']:>12,}{row['trained_parameters']:>12,}{row['training_bytes'] / 2**20:>11.1f}"
            f"{row['data_parallel_bytes_per_step'] / 2**20:>17.2f}"
            for block, row in table["blocks"].items()
        ),
        f"trained end to end with noise conditioning: {whole:.4g}; without: {table['plain_flops_per_token']:.4g}",
        "* parameters, gradients and AdamW's two moments in fp32; activations are logged in training (memory/*)",
        "** gradients that data-parallel training would exchange per step; blocks that train alone exchange nothing",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# A network for images


def image_table(config: Config, steps: Mapping[str, tuple[Config, Passes]]) -> dict[str, Any]:
    """All values that the command prints for a network for images.

    Args:
        config: with ``model.image_size`` and ``model.n_classes`` set.
        steps: the kinds of training steps: for each name the configuration of its process, and its passes.
    """
    count, rows = positions(config.model), {}
    for name, (own, passes) in steps.items():
        parts = {part: count * cost for part, cost in image_cost(own.model, passes).items()}
        network = build_image_network(own, None, "meta")
        build_objective(own).prepare(network)
        parameters = sum(p.numel() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        rows[name] = {
            "layers": own.model.block_layers[max(0, own.blocks.only - 1)] if own.model.n_blocks else own.model.n_core,
            "by_part": {part: _by_kind(cost) for part, cost in parts.items()},
            "by_kind": _by_kind(total(parts)),
            "flops_per_image": total(parts).total,
            "parameters": parameters,
            "trained_parameters": trained,
            "training_bytes": 4 * (parameters + 3 * trained),
        }
    return {"image_size": config.model.image_size, "classes": config.model.n_classes, "positions": count, "steps": rows}


def image_lines(table: dict[str, Any], source: object) -> list[str]:
    """The printed form of `image_table`."""
    (height, width), steps = table["image_size"], table["steps"]
    last = list(steps.values())[-1]["flops_per_image"]

    def row(label: str, values: Iterable[object]) -> str:
        return f"{label:<28}" + "".join(f"{value:>14}" for value in values)

    return [
        f"{source}: FLOPs per image of a training step, images of {height} x {width} pixels, {table['classes']} classes,"
        f" {table['positions']} positions",
        "(model FLOPs: matrix products and attention, forward + backward)",
        row("", steps),
        *(row(part, [f"{sum(step['by_part'][part][kind] for kind in KINDS[:2]):.4g}" for step in steps.values()])
          for part in next(iter(steps.values()))["by_part"]),
        row("total", [f"{step['flops_per_image']:.4g}" for step in steps.values()]),
        *([row("x end to end", [f"{step['flops_per_image'] / last:.3f}" for step in steps.values()])] * (len(steps) > 1)),
        "\nthe total by kind",
        *(
            row(f"  {label}", [f"{step['by_kind'][kind]:.4g}" for step in steps.values()])
            for kind, label in KIND_LABELS.items() if kind != "recomputed"
        ),
        row("  of it attention", [f"{step['by_kind']['attention']:.4g}" for step in steps.values()]),
        "",
        row("layers", [step["layers"] for step in steps.values()]),
        row("parameters", [f"{step['parameters']:,}" for step in steps.values()]),
        row("  trained", [f"{step['trained_parameters']:,}" for step in steps.values()]),
        row("MiB held*", [f"{step['training_bytes'] / 2**20:.1f}" for step in steps.values()]),
        "* parameters, gradients and AdamW's two moments in fp32; activations are logged in training (memory/*)",
    ]  # fmt: skip
