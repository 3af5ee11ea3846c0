"""Guards a run against divergence: skips bad steps, returns to a good checkpoint, or stops with a diagnosis.

1. A step is skipped if its loss or gradient is not finite, or if its loss is far above the running mean (``guard.spike``).
   A skipped step changes only the counters. The decision is made on the device, and the host does not wait for it.
2. The run returns to its last good checkpoint after `MOST_SKIPPED` skipped steps in a row, or if a weight or optimizer
   tensor is not finite when a checkpoint is due. It continues with another data order and other noise.
3. If it diverges again after `ROLLBACKS` returns, the run stops with a diagnosis.

At log points the run also warns of slower trouble: a loss that has risen and stays high, a loss not below the entropy of
the target frequencies, and a state that grows over the iterations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recurrent_db.config import Config
from recurrent_db.data.shards import TokenData
from recurrent_db.distributed.team import local
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.rng import EVALUATION_STEP, Rng, key
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import fault, list_checkpoints, remove_checkpoint
from recurrent_db.store.tensors import optimizer_tensors
from recurrent_db.store.train_state import TrainState

MOST_SKIPPED = 20
"""Skipped steps in a row after which the run returns to its last good checkpoint."""
ROLLBACKS = 2
"""Most returns to a checkpoint. The run stops at the next failure."""
STATE_GROWTH = 10.0
"""The run warns if the RMS of the state after the last iteration exceeds this multiple of the RMS after the first."""
WARM_UP = 50
"""Length of the running mean of the loss, in steps. No loss counts as a spike before this many steps."""
RISE = 0.5
"""The run warns if the running mean of the loss is more than this many nats above its lowest value."""
MOST_ITERATIONS = 32
"""Most iterations over which the state's growth is measured."""
UNIGRAM_TOKENS = 1 << 22
"""Most training tokens of each source that the unigram entropy is estimated from."""


def data_seed(config: Config, rollbacks: int) -> int:
    """The seed of data order and noise: ``config.seed``, or a new seed after each return to a checkpoint."""
    return config.seed if not rollbacks else key(config.seed, "rollback", rollbacks)


def unigram_entropy(data: TokenData, mixture: Mapping[str, float] | None = None) -> float:
    """Entropy of the token frequencies in nats per token: the loss of a model that knows only these frequencies.

    Sources count by their weights in ``mixture``, or by their sizes without one.
    """
    p = np.zeros(data.vocab_size)
    for name, source in data.sources.items():
        weight = mixture.get(name, 0) if mixture else source.tokens
        ids = source.read(0, min(UNIGRAM_TOKENS, source.tokens))
        if weight and len(ids):
            p += weight / len(ids) * np.bincount(ids, minlength=data.vocab_size)[: data.vocab_size]
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


class LossGuard:
    """Decides on the device which steps to skip, and warns at log points.

    Args:
        config: the run's configuration.
        state: the run's counters so far.
        device: device of the losses.
        floor: unigram entropy, in nats per token.
    """

    def __init__(self, config: Config, state: TrainState, device: torch.device, floor: float) -> None:
        self.config, self.floor = config, floor
        self.counts = torch.tensor([state.skipped, state.skipped_in_a_row, state.spikes], device=device)
        moments = [state.loss_mean, state.loss_variance, float(state.loss_count)]
        self.moments = torch.tensor(moments, dtype=torch.float32, device=device)
        self._warned: set[str] = set()

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether to skip a step: its loss (nats) or gradient norm is not finite, or its loss is a spike.

        The losses of all other steps enter the exponential running mean and variance, which are `WARM_UP` steps long.

        Args:
            loss, grad_norm: 0-dimensional, on the device.

        Returns:
            A 0-dimensional bool on the device.
        """
        mean, variance, count = self.moments
        broken = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        skip = broken
        if self.config.guard.spike:
            high = loss > mean + self.config.guard.spike * variance.sqrt()
            skip = broken | ((count >= WARM_UP) & high)
        keep = torch.clamp(count / (count + 1), max=1 - 1 / WARM_UP)
        change = torch.where(skip, torch.zeros_like(mean), loss.float() - mean)
        spread = torch.where(skip, variance, keep * (variance + (1 - keep) * change.square()))
        self.moments = torch.stack((mean + (1 - keep) * change, spread, count + ~skip))
        skipped, in_a_row, spikes = self.counts
        self.counts = torch.stack((skipped + skip, (in_a_row + 1) * skip, spikes + (skip & ~broken)))
        return skip

    def row(self) -> dict[str, Tensor]:
        """Columns of metrics.jsonl: all skipped steps so far, and the skipped steps with a finite loss (spikes)."""
        return {"skipped": self.counts[0], "spikes": self.counts[2]}

    def forget(self, state: TrainState) -> None:
        """Restart the running mean of the loss, because the objective has changed the model."""
        self.moments, state.loss_lowest = torch.zeros_like(self.moments), 0.0

    def settle(self, state: TrainState) -> None:
        """Copy the counters from the device into ``state``. The host waits for the device."""
        state.skipped, state.skipped_in_a_row, state.spikes = self.counts.tolist()
        state.loss_mean, state.loss_variance, count = self.moments.tolist()
        state.loss_count = int(count)

    def trouble(self, state: TrainState, unsound: list[str]) -> str:
        """Why the run cannot continue; empty if it can. ``unsound`` lists the names of tensors that are not finite."""
        if state.skipped_in_a_row >= MOST_SKIPPED:
            spike = " or far above its mean" if self.config.guard.spike else ""
            return f"loss or gradient not finite{spike} {state.skipped_in_a_row} steps in a row"
        return f"{unsound[0]} is not finite" if unsound else ""

    def warnings(self, state: TrainState, progress: float, growth: float | None) -> Iterator[str]:
        """Warnings at a log point. Each kind is given once.

        Args:
            state: counters that `settle` has brought up to date.
            progress: share of the budget that is spent (0 to 1).
            growth: RMS of the state after the last iteration divided by the RMS after the first; None if not measured.
        """
        if state.loss_count < 2 * WARM_UP:
            return
        error = 3 * math.sqrt(state.loss_variance / (2 * WARM_UP - 1))  # three standard errors of the running mean
        lowest = state.loss_lowest or state.loss_mean
        state.loss_lowest = min(lowest, state.loss_mean)
        if state.loss_mean > lowest + RISE + error:
            yield from self._once(
                "rise",
                f"the loss has risen from {lowest:.2f} to {state.loss_mean:.2f} nats and stays there. Training may have"
                f" collapsed: try an optim.lr below {self.config.optim.lr:g}",
            )
        if progress >= 0.25 and state.loss_count >= 4 * WARM_UP and state.loss_mean > self.floor - 0.05:
            yield from self._once(
                "unigram",
                f"after {state.step} steps the loss ({state.loss_mean:.2f} nats) is not below the entropy of the target"
                f" frequencies ({self.floor:.2f} nats): the model has learned only these. Try a schedule.warmup above"
                f" {self.config.schedule.warmup:g} of the budget, or an optim.lr below {self.config.optim.lr:g}",
            )
        if growth is not None and not growth <= STATE_GROWTH:
            yield from self._once(
                "growth",
                f"the state grows by a factor of {growth:.3g} over the iterations: the loop is not stable",
            )

    def _once(self, kind: str, line: str) -> Iterator[str]:
        if kind not in self._warned:
            self._warned.add(kind)
            yield f"warning: {line}"


# ---------------------------------------------------------------------------------------------------------------------
# Diagnosis


@torch.no_grad()
def state_rms(model: LoopedLM, tokens_BT: Tensor, config: Config) -> list[float]:
    """RMS of the state after each iteration; for a denoiser, of its estimate.

    Runs the first sequence of ``tokens_BT`` at the largest K of ``eval.k``, or `MOST_ITERATIONS` if that is less. Empty
    for a model in blocks, which has no loop.
    """
    if config.model.n_blocks:
        return []
    k, was_training = min(max(config.eval.k), MOST_ITERATIONS), model.training
    tokens_BT, probe = tokens_BT[:1], Probe()
    model.eval()
    noise = NoiseSource(Rng(config.seed, EVALUATION_STEP), torch.zeros(1, dtype=torch.int64), tokens_BT.shape[1])
    e_BTD = model.encode(tokens_BT)
    for _ in model.recurrence.ready(model).hidden(model, tokens_BT, e_BTD, [k], noise, probe):
        pass
    model.train(was_training)
    norms: list[float] = torch.stack([s.float().square().mean().sqrt() for s in probe.states]).tolist()
    return norms


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of this process's weights and optimizer tensors that hold NaN or infinity. The host waits for the device."""
    tensors: dict[str, Tensor] = {f"weight {name}": p for name, p in model.named_parameters()}
    tensors |= {f"optimizer state {name}": t for name, t in optimizer_tensors(model, optimizer).items()}
    finite = {name: torch.isfinite(local(t.detach())).all() for name, t in tensors.items()}
    return [name for name, whole in finite.items() if not bool(whole)]


def gradients_not_finite(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[str]:
    """Names of the parameters whose gradient of ``loss_of()`` holds NaN or infinity.

    "loss" comes first if the loss itself is not finite. All gradients are cleared before and after.
    """
    model.zero_grad(set_to_none=True)
    loss = loss_of()
    loss.backward()
    found = [] if bool(torch.isfinite(loss)) else ["loss"]
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            found.append(f"gradient of {name}")
    model.zero_grad(set_to_none=True)
    return found


def numbers(values: list[float]) -> list[float | None]:
    """``values`` for JSON, with None in place of numbers that are not finite."""
    return [v if math.isfinite(v) else None for v in values]


def diagnose(
    run_dir: Path | None,
    state: TrainState,
    trouble: str,
    unsound: list[str],
    norms: list[float],
    grad_norm: float,
    lr: float,
    target: Checkpoint | None,
) -> str:
    """Describe in one line what went wrong, and append the details to ``RUN/diagnosis.jsonl``.

    Args:
        run_dir: the run directory; None writes no file.
        trouble: result of `LossGuard.trouble`.
        unsound: names of tensors that are not finite.
        norms: RMS of the state after each iteration.
        target: the checkpoint that the run returns to; None if it stops.
    """
    found = {"step": state.step, "trouble": trouble, "not_finite": unsound, "state_rms": numbers(norms),
             "grad_norm": numbers([grad_norm])[0], "lr": lr,
             "back_to": target.training()[0].step if target else None}  # fmt: skip
    if run_dir is not None:
        with (run_dir / "diagnosis.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    first = f" (first of {len(unsound)}: {unsound[0]})" if unsound else ""
    growth = ", ".join(f"{norm:.3g}" for norm in norms) or "none"
    return f"at step {state.step}: {trouble}{first}; state RMS by iteration {growth}"


# ---------------------------------------------------------------------------------------------------------------------
# Returning to a checkpoint


def last_good(run_dir: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint that was not saved right after a skipped step.

    Falls back to the oldest undamaged one, and to None if all are damaged.
    """
    good = [Checkpoint(path) for path in list_checkpoints(run_dir) if fault(path) is None]
    before = [checkpoint for checkpoint in good if not checkpoint.training()[0].skipped_in_a_row]
    return before[-1] if before else good[0] if good else None


def forget_later(run_dir: Path, step: int) -> None:
    """Remove the checkpoints after ``step``: the run trains these steps again."""
    for path in list_checkpoints(run_dir):
        if int(path.name.removeprefix("step-")) > step:
            remove_checkpoint(path)


def continued(before: TrainState, lost: TrainState) -> TrainState:
    """The counters after a return to a checkpoint: ``before`` with the abandoned FLOPs and skipped steps of ``lost``.

    Args:
        before: counters of the checkpoint; changed in place.
        lost: counters at the failure.
    """
    before.rollbacks, before.skipped_in_a_row = lost.rollbacks + 1, 0
    before.flops_abandoned = lost.flops_abandoned + lost.flops.total - before.flops.total
    before.skipped, before.spikes = lost.skipped, lost.spikes
    return before
