"""The ``recurrent-db`` command: ``flops`` and ``report``. Each is a dataclass of arguments and a function."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from recurrent_db import report
from recurrent_db.commandline import guard, parse
from recurrent_db.config import Config, load_config
from recurrent_db.errors import UserError
from recurrent_db.flops import Cost, Passes, cost_per_token, total
from recurrent_db.model import build_model


@dataclass
class FlopsArgs:
    """FLOPs per training token by part, for every objective, at a config's shape."""

    config: Annotated[Path, tyro.conf.Positional]
    """TOML configuration."""
    vocab_size: int = 2048
    """Vocabulary where the config takes the tokenizer's."""
    json: bool = False
    """Print JSON instead of the table (``--json True``)."""


def training_passes(config: Config) -> dict[str, tuple[Passes, bool]]:
    """Passes of a mean training step by way of training, and whether its core is conditioned on noise."""
    unrolled = config.objective.unrolled
    depth, truncation = unrolled.mean_depth, min(unrolled.truncation or unrolled.mean_depth, unrolled.mean_depth)
    return {
        "next_token": (Passes(core_grad=1), False),
        "unrolled_truncated": (Passes(core_no_grad=depth - truncation, core_grad=truncation), False),
        "unrolled_full": (Passes(core_grad=depth), False),
        "denoise": (Passes(core_grad=1), True),
    }


def flops_table(config: Config) -> dict[str, Any]:
    """Everything that ``recurrent-db flops`` prints, as plain values: FLOPs per token of a training step."""
    parts: dict[str, dict[str, Cost]] = {}
    for name, (passes, conditioned) in training_passes(config).items():
        config.model.noise_conditioning = conditioned
        parts[name] = cost_per_token(config.model, config.data.sequence_length, passes)
    config.model.noise_conditioning = True
    per_token = {name: total(costs).total for name, costs in parts.items()}
    return {
        "per_token": per_token,
        "by_part": {
            name: {part: {"forward": c.forward, "backward": c.backward} for part, c in costs.items()}
            for name, costs in parts.items()
        },
        "parameters": build_model(config.model, None, "meta").parameter_counts(),
        "ratio_to_denoise": {name: value / per_token["denoise"] for name, value in per_token.items()},
    }


def flops(args: FlopsArgs) -> int:
    config = load_config(args.config)
    config.model.vocab_size = config.model.vocab_size or args.vocab_size
    table = flops_table(config)
    if args.json:
        print(json.dumps(table, indent=1))
        return 0
    names = list(table["per_token"])
    print(f"{args.config}: FLOPs per training token (matrix products and attention, forward + backward)")
    print(f"{'part':<14}" + "".join(f"{name:>20}" for name in names))
    for part in table["by_part"]["denoise"]:
        row = [sum(table["by_part"][name][part].values()) for name in names]
        print(f"{part:<14}" + "".join(f"{value:>20.4g}" for value in row))
    print(f"{'total':<14}" + "".join(f"{table['per_token'][name]:>20.4g}" for name in names))
    print(f"{'x denoise':<14}" + "".join(f"{table['ratio_to_denoise'][name]:>20.2f}" for name in names))
    counts = table["parameters"]
    print(f"parameters: {counts['total']:,}, and {counts['noise_conditioning']:,} for noise conditioning")
    return 0


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "flops": (FlopsArgs, flops),
    "report": (report.ReportArgs, report.main),
}


def usage() -> str:
    lines = [f"  recurrent-db {name:<8} {(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(["usage: recurrent-db COMMAND ...  (COMMAND --help says more)", *lines])


def run(argv: list[str]) -> int:
    """Run one command. Raises `UserError` for a name that is none."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; commands: {', '.join(COMMANDS)}")
    kind, action = COMMANDS[argv[0]]
    return action(parse(kind, argv[1:], prog=f"recurrent-db {argv[0]}"))


def main() -> None:
    """Entry point of the installed command."""
    guard(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
