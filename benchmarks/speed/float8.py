"""Estimate what float8 would gain: the three products of a linear layer in bf16 and in float8, at a preset's sizes.

python benchmarks/speed/float8.py [--config CONFIG.toml] [--tokens N] [--json OUT]

The three products of a training step are the output, the gradient of the input and the gradient of the weight. Each is
computed from bf16 operands in turns: in bf16, and in dynamic float8. Float8 is e4m3, or e5m2 for the gradient of the output,
with one scale per tensor. Its time includes the casts and the search for the largest value, which every training step
needs. The ratio is an upper bound on the gain, because attention, norms, head and optimizer stay as they are. The trainer
has no float8 unless a Hopper GPU shows a gain here.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks share code

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.training import seconds_of
from recurrent_db.accounting.hardware import choose_device, environment
from recurrent_db.arguments import run_command
from recurrent_db.config import load_config
from recurrent_db.errors import UserError
from recurrent_db.files import check_output, write_atomic
from recurrent_db.schema import PositiveInt

ROOT = Path(__file__).resolve().parents[2]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass
class Args:
    """Time bf16 and float8 products at the sizes of a configuration's linear layers."""

    config: Path = ROOT / "train/configs/looped-1b.toml"
    """TOML configuration whose layers are measured."""
    tokens: PositiveInt = 8192
    """Rows of each product; a multiple of 16."""
    repetitions: PositiveInt = 15
    """Pairs of timings for each layer."""
    calls: PositiveInt = 10
    """Calls per timing."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""
    seed: int = 0
    """Seed of the operands."""
    json: Path | None = None
    """File for the rows."""


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast x with one scale for the whole tensor, so that its largest value becomes the largest of ``dtype``. Also returns
    the 0-dimensional fp32 factor that reverses the scale."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def product(a_MK: Tensor, b_NK: Tensor, kinds: tuple[torch.dtype, torch.dtype] | None) -> Tensor:
    """a b^T in bf16, from bf16 operands or from their casts to the float8 types ``kinds``."""
    if kinds is None:
        return a_MK @ b_NK.T
    (a, scale_a), (b, scale_b) = to_float8(a_MK, kinds[0]), to_float8(b_NK, kinds[1])
    # The kernel needs a in row-major and b in column-major order.
    return torch._scaled_mm(a.contiguous(), b.contiguous().T, scale_a, scale_b, out_dtype=torch.bfloat16)


def training_products(x_NI: Tensor, w_OI: Tensor, dy_NO: Tensor, float8: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, and gradient of the weight."""
    kinds: list[Any] = [(E4M3, E4M3), (E5M2, E4M3), (E5M2, E4M3)] if float8 else [None] * 3
    return (
        product(x_NI, w_OI, kinds[0]),
        product(dy_NO, w_OI.T, kinds[1]),
        product(dy_NO.T, x_NI.T, kinds[2]),
    )


def main(args: Args) -> int:
    if args.tokens % 16:
        raise UserError(f"--tokens must be a multiple of 16, got {args.tokens}")
    if args.json is not None:
        check_output(args.json)
    device, model = choose_device(args.device), load_config(args.config, []).model
    generator = torch.Generator().manual_seed(args.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.bfloat16)

    layers = {
        "qkv": (model.d_model, 3 * model.d_model),
        "attention out": (model.d_model, model.d_model),
        "mlp in": (model.d_model, 2 * model.d_mlp),
        "mlp out": (model.d_mlp, model.d_model),
    }
    rows = []
    for name, (inward, outward) in layers.items():
        operands = normal(args.tokens, inward), normal(outward, inward), normal(args.tokens, outward)
        actions: list[Callable[[], object]] = [
            partial(training_products, *operands, float8) for float8 in (False, True)
        ]
        try:
            exact, rounded = actions[0](), actions[1]()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"float8 products do not run on {device}: {str(error).splitlines()[0]}") from None
        errors = [
            float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            for ours, theirs in zip(rounded, exact, strict=True)  # type: ignore[call-overload]
        ]
        pairs = [[seconds_of(action, device, args.calls) for action in actions] for _ in range(args.repetitions)]
        bf16, float8 = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append({"layer": name, "inward": inward, "outward": outward, "bf16_seconds": bf16, "float8_seconds": float8,
                     "ratio": statistics.median(a / b for a, b in pairs), "relative_errors": errors})  # fmt: skip
        print(
            f"{name:14} {inward:6} -> {outward:6}  bf16 {bf16 * 1e3:8.3f} ms  float8 {float8 * 1e3:8.3f} ms  "
            f"ratio {rows[-1]['ratio']:.2f}  error {max(errors):.3f}"
        )
    total = [sum(row[key] for row in rows) for key in ("bf16_seconds", "float8_seconds")]
    print(f"all of a block: float8 is {total[0] / total[1]:.2f} times as fast, on {device}, {args.tokens} tokens")
    if args.json is not None:
        result = {"rows": rows, "ratio": total[0] / total[1], "tokens": args.tokens, "seed": args.seed,
                  "config": args.config.stem, "machine": environment(device), "command": sys.argv}  # fmt: skip
        write_atomic(args.json, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_command(Args, main)
