"""Report what a denoiser has learned, and how much its iterations help.

python eval/diagnostics/denoiser_report.py RUN --data DIR [--control FLAT_RUN] [--json OUT] [--png OUT]

All numbers are nats per held-out token. Numbers of runs that start from pure noise are likelihoods. `nll_by_sigma` is not a
likelihood: z is made from the answer, as in training, to show how well each noise level is denoised. Parts that do not apply
to a run's objective are null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from recurrent_db.arguments import run_command  # before torch: sets how idle threads wait

# isort: split
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from recurrent_db.data import Batch, open_data, validation_batches
from recurrent_db.denoise.noise import log_uniform_grid, share_below, sigma_star
from recurrent_db.evaluation.likelihood import score_draws
from recurrent_db.files import check_output, write_atomic
from recurrent_db.model.looped import STATE_STD, LoopedLM
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.objectives.base import cross_entropy
from recurrent_db.objectives.denoise import mean_pairwise_cosine
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.schema import PositiveInt, at_least
from recurrent_db.store.loading import load_with_config


@dataclass
class Args:
    """Report what a run's denoiser has learned, and how much its iterations help."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint folder."""
    data: Path
    """Folder made by train/prepare_data.py with the run's tokenizer. Its validation split is scored."""
    control: Path | None = None
    """A flat `next_token` run to score for comparison."""
    k: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16, 32)
    """Values of K (core iterations)."""
    draws: tuple[PositiveInt, ...] = (1, 4, 16)
    """Numbers M of noise draws averaged in a likelihood."""
    sigmas: Annotated[int, at_least(2)] = 12
    """Number of noise levels in nll_by_sigma, equally spaced in ln sigma."""
    tokens: PositiveInt = 4096
    """Number of held-out tokens to score, spread evenly over the split."""
    batch_size: Annotated[int, at_least(2)] = 8
    """Sequences in a batch, at least 2. Contexts and states are shuffled within a batch."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """cpu, cuda, cuda:N or auto."""
    json: Path | None = None
    """File for the result; RUN/eval/denoiser_report.json by default."""
    png: Path | None = None
    """File for the plots; by default the JSON file's name with the ending .png."""


class Probes:
    """The report's measurements on one model and one set of held-out batches."""

    def __init__(self, model: LoopedLM, batches: list[Batch], seed: int) -> None:
        self.model, self.rng = model, Rng(seed, EVALUATION_STEP)
        self.device = model.embedding.weight.device
        # Contexts and states are shuffled within a batch, which needs at least two sequences.
        self.batches = [batch.to(self.device) for batch in batches if len(batch) > 1]

    def noise(self, batch: Batch) -> NoiseSource:
        return NoiseSource(self.rng, batch.sample_index_B, self.model.config.max_seq_len)

    def mean(self, measure: Callable[[Batch], Tensor]) -> float:
        """Mean of a (B, T) measurement over all batches."""
        values = [measure(batch) for batch in self.batches]
        return (sum(v.double().sum().item() for v in values)) / sum(v.numel() for v in values)

    def teacher_forced(self, batch: Batch, sigma: float, shift: int = 0) -> Tensor:
        """Cross-entropy, (B, T), at one noise level with z made from the answer. With ``shift`` = 1 each sequence gets
        another one's context."""
        model, walk = self.model, self.model.recurrence.walk
        assert walk is not None
        tokens_BT, docs_BT = batch.tokens_BT.roll(shift, 0), batch.doc_ids_BT.roll(shift, 0)
        visible = model.visible(tokens_BT.shape[1], docs_BT)
        e_BTD = model.encode(tokens_BT, visible)
        y_BTD = walk.targets(model)[batch.targets_BT]
        eps = self.rng.normal(batch.sample_index_B, tuple(y_BTD.shape[1:]), "report", self.device)
        part = walk.at(model, sigma)
        clean = walk.clean_contexts(part, e_BTD, visible)
        estimate = walk.estimate(part, y_BTD + sigma * eps, sigma, e_BTD, clean, visible)
        return cross_entropy(model, walk.read(part, estimate, e_BTD.dtype, visible=visible), batch.targets_BT)[1]

    def scored(self, batch: Batch, k: int, edit: Callable[[Tensor], Tensor] | None = None, shift: int = 0) -> Tensor:
        """Cross-entropy, (B, T), after K iterations from noise. ``edit`` changes the state before the last iteration."""
        model = self.model
        tokens = batch.tokens_BT.roll(shift, 0)
        visible = model.visible(tokens.shape[1], batch.doc_ids_BT.roll(shift, 0))
        probe, e_BTD = Probe(edit) if edit is not None else None, model.encode(tokens, visible)
        [(_, hidden)] = model.recurrence.hidden(model, tokens, e_BTD, [k], self.noise(batch), probe, visible)
        return cross_entropy(model, hidden, batch.targets_BT)[1]

    def state_gap(self, k: int) -> dict[str, float]:
        """Increase of the NLL at K when the state is replaced before the last pass. 0 means that the state is not used."""

        def like_noise(state: Tensor) -> Tensor:
            noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(k)).to(state)
            rms = state.float().square().mean().sqrt().to(state.dtype)
            return noise * torch.where(rms > 0, rms, STATE_STD)  # a zero state has no scale to match

        edits: dict[str, Callable[[Tensor], Tensor]] = {
            "zeros": torch.zeros_like,
            "noise": like_noise,
            "other_sequence": lambda state: state.roll(1, 0),
        }
        intact = self.mean(lambda batch: self.scored(batch, k))
        return {
            name: self.mean(lambda batch, edit=edit: self.scored(batch, k, edit)) - intact  # type: ignore[misc]
            for name, edit in edits.items()
        }

    def walk_entropy(self, k: int) -> list[float]:
        """Mean entropy, in nats, of the read-out after each core pass of a run of K iterations (Heun has 2 K - 1 passes)."""
        model, recurrence, walk = self.model, self.model.recurrence, self.model.recurrence.walk
        sums: list[list[Tensor]] = []
        for batch in self.batches:
            visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
            probe, e_BTD = Probe(), model.encode(batch.tokens_BT, visible)
            [_] = list(recurrence.hidden(model, batch.tokens_BT, e_BTD, [k], self.noise(batch), probe, visible))
            row = []
            for index, state in enumerate(probe.states):
                if walk is not None:
                    hidden = walk.read(probe.parts[index], state, e_BTD.dtype, visible)
                else:
                    hidden = model.decode(state, visible=visible)
                log_p = model.logits(hidden).float().log_softmax(-1)
                row.append(-(log_p.exp() * log_p).sum(-1).mean())
            sums.append(row)
        return [torch.stack(level).mean().item() for level in zip(*sums, strict=True)]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw five plots and a list of numbers into one PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")

    def draw(index: int, title: str, x_label: str, y_label: str, log: bool = True) -> Any:
        axis = axes.flat[index]
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
        if log:
            axis.set_xscale("log", base=2 if x_label.startswith("K") else 10)
        axis.grid(alpha=0.3)
        return axis

    axis = draw(0, "Denoising, z made from the answer", "sigma", "cross-entropy (nats/token)")
    if result["nll_by_sigma"]:
        levels = [point["sigma"] for point in result["nll_by_sigma"]]
        axis.plot(levels, [p["nll"] for p in result["nll_by_sigma"]], "o-", label="matched context")
        axis.plot(levels, [p["nll_shuffled"] for p in result["nll_by_sigma"]], "s--", label="shuffled context")
        axis.axvline(result["sigma_star"], color="gray", linestyle=":", label="sigma*")
        axis.legend()
    axis = draw(1, "Likelihood by iterations", "K (core iterations)", "NLL (nats/token)")
    ks = [int(k) for k in result["nll_by_k"]]
    for marker, draws in zip("os^Dvx", next(iter(result["nll_by_k"].values())), strict=False):
        axis.plot(ks, [by[draws]["nll"] for by in result["nll_by_k"].values()], marker + "-", label=f"M = {draws}")
    if result["nll_control"] is not None:
        axis.axhline(result["nll_control"], color="gray", linestyle=":", label="flat control, K = 1")
    axis.legend()
    axis = draw(2, "What the state is worth", "K (core iterations)", "NLL increase when replaced (nats/token)")
    for marker, name in zip("os^", ("zeros", "noise", "other_sequence"), strict=True):
        gaps = [gap[name] for gap in result["state_gap"].values()]
        axis.plot([int(k) for k in result["state_gap"]], gaps, marker + "-", label=name.replace("_", " "))
    axis.legend()
    axis = draw(3, "Entropy along the walk", "core pass", "entropy of the read-out (nats)", log=False)
    axis.plot(range(1, len(result["walk_entropy"]) + 1), result["walk_entropy"], "o-")
    axis = draw(4, "What the context is worth", "sigma", "matched minus shuffled NLL (nats/token)")
    if result["nll_by_sigma"]:
        axis.plot(levels, [p["nll"] - p["nll_shuffled"] for p in result["nll_by_sigma"]], "o-")
    axes.flat[5].axis("off")
    facts = {
        "NLL at sigma_max": result["nll_sigma_max"],
        "flat control": result["nll_control"],
        "sigma*": result["sigma_star"],
        "draws below sigma*": result["share_below_sigma_star"],
        "context gap at sigma_max": result["context_gap"],
        "mean cosine of targets": result["target_cosine"],
    }
    lines = [f"{name}: {value:.4g}" for name, value in facts.items() if value is not None]
    axes.flat[5].text(0, 0.95, "\n".join(lines), va="top", fontsize=13)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def without_nan(value: Any) -> Any:
    """Replace numbers that JSON cannot hold (NaN, infinity) by null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.no_grad()
def main(args: Args) -> int:
    ks, draws = sorted(set(args.k)), sorted(set(args.draws))
    model, tokenizer, config, checkpoint = load_with_config(args.run, args.device)
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    out = args.json or run / "eval" / "denoiser_report.json"
    check_output(out)
    data = open_data(str(args.data), "validation", expect_tokenizer_hash=tokenizer.hash, verify=True)
    length = config.data.sequence_length
    batches = list(validation_batches(data, length, args.batch_size, args.tokens))
    probes, walk = Probes(model, batches, args.seed), model.recurrence.walk
    bar = tqdm(total=4, desc="likelihoods", disable=None, leave=False)

    by_draws = score_draws(model, batches, ks, tokenizer.byte_lengths(), draws, args.seed)
    nll_by_k = {str(k): {str(m): vars(scores.by_k[k]) for m, scores in by_draws.items()} for k in ks}
    control = None
    if args.control is not None:
        flat, flat_tokenizer, _, _ = load_with_config(args.control, args.device)
        open_data(str(args.data), "validation", expect_tokenizer_hash=flat_tokenizer.hash)
        [scores] = score_draws(flat, batches, [1], tokenizer.byte_lengths(), (1,), args.seed).values()
        control = scores.by_k[1].nll
    bar.update()
    bar.set_description("states")
    state_gap = {str(k): probes.state_gap(k) for k in ks}
    bar.update()
    bar.set_description("noise levels")
    denoiser: dict[str, Any] = {"nll_by_sigma": None, "nll_sigma_max": None, "sigma_star": None,
                                "share_below_sigma_star": None, "target_cosine": None}  # fmt: skip
    if walk is not None:
        star = sigma_star(walk.targets(model), walk.density.sigma_min, walk.density.sigma_max)
        denoiser = {
            "nll_by_sigma": [
                {
                    "sigma": sigma,
                    "nll": probes.mean(lambda batch, s=sigma: probes.teacher_forced(batch, s)),  # type: ignore[misc]
                    "nll_shuffled": probes.mean(lambda batch, s=sigma: probes.teacher_forced(batch, s, 1)),  # type: ignore[misc]
                }
                for sigma in log_uniform_grid(walk.density, args.sigmas)[::-1]
            ],
            "nll_sigma_max": by_draws[max(by_draws)].by_k[ks[0]].nll if ks[0] == 1 else None,
            "sigma_star": star,
            "share_below_sigma_star": share_below(walk.density, walk.config.atom, star),
            "target_cosine": mean_pairwise_cosine(model.embedding.weight).item(),
        }
    bar.update()
    bar.set_description("context and entropy")
    result: dict[str, Any] = {
        **denoiser,
        "nll_control": control,
        "context_gap": probes.mean(lambda batch: probes.scored(batch, 1))
        - probes.mean(lambda batch: probes.scored(batch, 1, shift=1)),
        "state_gap": state_gap,
        "walk_entropy": probes.walk_entropy(max(ks)),
        "nll_by_k": nll_by_k,
        "objective": config.objective.name,
        "tokens": next(iter(by_draws.values())).tokens,
        "seed": args.seed,
        "checkpoint": str(checkpoint),
    }

    bar.close()
    show(result, by_draws, ks)
    result = without_nan(result)
    write_atomic(out, json.dumps(result, indent=1))
    plot(result, args.png or out.with_suffix(".png"))
    print(f"wrote {out} and {args.png or out.with_suffix('.png')}")
    return 0


def show(result: dict[str, Any], by_draws: dict[int, Any], ks: list[int]) -> None:
    """Print the result as tables."""
    print(f"{result['checkpoint']}: {result['objective']}, {result['tokens']:,} held-out tokens, seed {result['seed']}")
    if result["nll_by_sigma"]:
        print(f"sigma* {result['sigma_star']:.3g}, {result['share_below_sigma_star']:.1%} of the draws below it;"
              f" mean cosine of targets {result['target_cosine']:.3f}")  # fmt: skip
        print(f"{'sigma':>9} {'matched':>9} {'shuffled':>9}   cross-entropy with z made from the answer")
        for point in result["nll_by_sigma"]:
            print(f"{point['sigma']:>9.3g} {point['nll']:>9.3f} {point['nll_shuffled']:>9.3f}")
    flat = f"; flat control {result['nll_control']:.3f}" if result["nll_control"] is not None else ""
    print(f"context gap at K = 1 (matched minus shuffled): {result['context_gap']:.3f}{flat}")
    header = "".join(f"{f'NLL, M={m}':>12}" for m in by_draws)
    print(f"{'K':>4}{header}{'zeros':>9}{'noise':>9}{'other':>9}   NLL increase with the last state replaced")
    for k in ks:
        nlls = "".join(f"{scores.by_k[k].nll:>12.4f}" for scores in by_draws.values())
        gap = result["state_gap"][str(k)]
        print(f"{k:>4}{nlls}{gap['zeros']:>9.3f}{gap['noise']:>9.3f}{gap['other_sequence']:>9.3f}")
    print("entropy along the walk: " + " ".join(f"{value:.2f}" for value in result["walk_entropy"]))


if __name__ == "__main__":
    run_command(Args, main)
