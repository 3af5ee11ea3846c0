"""Numbers that blow up: steps that are skipped, runs that go back, and what to say about it.

Three lines of defence, from the cheap to the dear:

1. A step whose loss or gradient is not finite, or whose loss stands far above its running mean (``guard.spike``), changes
   nothing but the counters. The judgement stays on the device: the host waits for nothing.
2. After ``optim.max_skipped`` such steps in a row, or where weights or the optimizer's state are not finite when a
   checkpoint is due, the run goes back to its last good checkpoint and on from there with
   another order of the data and other noise.
3. After ``guard.rollbacks`` of these it stops with a diagnosis.

What no single number shows is watched at log points and warned of: a loss that has risen and stays up, one that is not below
the entropy of the tokens' frequencies, a state that grows over the iterations.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from recurrent_db.store.folder import fault, list_checkpoints
from recurrent_db.store.tensors import optimizer_tensors
from recurrent_db.store.train_state import TrainState

WARM_UP = 50
"""Steps before a loss is called a spike; then the memory of the running mean, in steps."""
RISE = 0.5
"""Nats above its lowest value at which the running mean of the loss is warned of."""
MOST_ITERATIONS = 32
"""Iterations over which the state is watched, at most."""
UNIGRAM_TOKENS = 1 << 22
"""Training tokens that are counted for the unigram's entropy, at most."""


def data_seed(config: Config, rollbacks: int) -> int:
    """The seed of data order and noise: the run's own, and another after each return to a checkpoint."""
    return config.seed if not rollbacks else key(config.seed, "rollback", rollbacks)


def unigram_entropy(data: TokenData) -> float:
    """Entropy of the tokens' frequencies, in nats: what a model reaches that has learned nothing else."""
    counts = np.zeros(data.vocab_size)
    for source in data.sources.values():
        most = max(1, UNIGRAM_TOKENS * source.tokens // max(1, data.tokens))
        counts += np.bincount(source.read(0, min(most, source.tokens)), minlength=data.vocab_size)[: data.vocab_size]
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


class LossGuard:
    """Judges every step on the device, and the run at its log points.

    Args:
        config: of the run.
        state: counters so far; `settle` brings them up to date.
        device: where losses are.
        floor: entropy of the unigram, in nats.
    """

    def __init__(self, config: Config, state: TrainState, device: torch.device, floor: float) -> None:
        self.config, self.floor = config, floor
        self.counts = torch.tensor([state.skipped, state.skipped_in_a_row, state.spikes], device=device)
        law = [state.loss_mean, state.loss_variance, float(state.loss_count)]
        self.law = torch.tensor(law, dtype=torch.float32, device=device)
        self._said: set[str] = set()

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step is to be skipped (0-dimensional bool): its loss (nats) or gradient is not finite, or its loss is a
        spike. The losses of other steps enter the running mean and variance (exponential, `WARM_UP` steps long)."""
        mean, variance, count = self.law
        broken = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        skip = broken
        if self.config.guard.spike:
            high = loss > mean + self.config.guard.spike * variance.sqrt()
            skip = broken | ((count >= WARM_UP) & high)
        keep = torch.clamp(count / (count + 1), max=1 - 1 / WARM_UP)
        change = torch.where(skip, torch.zeros_like(mean), loss.float() - mean)
        spread = torch.where(skip, variance, keep * (variance + (1 - keep) * change.square()))
        self.law = torch.stack((mean + (1 - keep) * change, spread, count + ~skip))
        skipped, in_a_row, spikes = self.counts
        self.counts = torch.stack((skipped + skip, (in_a_row + 1) * skip, spikes + (skip & ~broken)))
        return skip

    def forget(self, state: TrainState) -> None:
        """Begin the running loss anew, where the model is another one from here on."""
        self.law, state.loss_lowest = torch.zeros_like(self.law), 0.0

    def settle(self, state: TrainState) -> None:
        """Bring ``state`` up to date; the host waits for the device."""
        state.skipped, state.skipped_in_a_row, state.spikes = self.counts.tolist()
        state.loss_mean, state.loss_variance, count = self.law.tolist()
        state.loss_count = int(count)

    def trouble(self, state: TrainState, unsound: list[str]) -> str:
        """Why the run cannot go on from here; empty where it can. ``unsound`` names tensors that are not finite."""
        if state.skipped_in_a_row >= self.config.optim.max_skipped:
            spike = " or far above its mean" if self.config.guard.spike else ""
            return f"loss or gradient not finite{spike} {state.skipped_in_a_row} steps in a row"
        return f"{unsound[0]} is not finite" if unsound else ""

    def warnings(self, state: TrainState, progress: float, growth: float | None) -> Iterator[str]:
        """Lines about what looks wrong at a log point, each kind once. ``progress`` is the share of the budget that is
        spent, ``growth`` that of the state's RMS from the first to the last iteration."""
        if state.loss_count < 2 * WARM_UP:
            return
        error = 3 * math.sqrt(state.loss_variance / (2 * WARM_UP - 1))  # of the running mean
        lowest = state.loss_lowest or state.loss_mean
        state.loss_lowest = min(lowest, state.loss_mean)
        if state.loss_mean > lowest + RISE + error:
            yield from self._once(
                "rise",
                f"the loss has risen from {lowest:.2f} to {state.loss_mean:.2f} nats and stays there: training may have"
                f" collapsed, try a lower optim.lr (now {self.config.optim.lr:g})",
            )
        if progress >= 0.25 and state.loss_count >= 4 * WARM_UP and state.loss_mean > self.floor - 0.05:
            yield from self._once(
                "unigram",
                f"after {state.step} steps the loss, {state.loss_mean:.2f} nats, is not below the entropy of the tokens'"
                f" frequencies, {self.floor:.2f}: nothing else has been learned; try a longer schedule.warmup"
                f" (now {self.config.schedule.warmup:g} of the budget), or a lower optim.lr (now {self.config.optim.lr:g})",
            )
        if growth is not None and not growth <= self.config.guard.state_growth:
            yield from self._once(
                "growth",
                f"the state grows {growth:.3g} times over the iterations (guard.state_growth ="
                f" {self.config.guard.state_growth:g}): the loop is not stable",
            )

    def _once(self, kind: str, line: str) -> Iterator[str]:
        if kind not in self._said:
            self._said.add(kind)
            yield f"warning: {line}"


# ---------------------------------------------------------------------------------------------------------------------
# Looking


@torch.no_grad()
def state_rms(model: LoopedLM, tokens_BT: Tensor, config: Config) -> list[float]:
    """Root mean square of the state after each iteration (of a walk: of its estimate), for one sequence, at the largest K
    that is evaluated. Empty for a model in blocks, whose layers are no loop."""
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
    """Names of this process's weights and optimizer tensors that hold NaN or infinity; the host waits for the device."""
    tensors: dict[str, Tensor] = {f"weight {name}": p for name, p in model.named_parameters()}
    tensors |= {f"optimizer state {name}": t for name, t in optimizer_tensors(model, optimizer).items()}
    finite = {name: torch.isfinite(local(t.detach())).all() for name, t in tensors.items()}
    return [name for name, whole in finite.items() if not bool(whole)]


def gradients_not_finite(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[str]:
    """Names of the parameters whose gradient of ``loss_of()`` holds NaN or infinity, the loss itself first."""
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
    """The same as JSON has it: null for what is not finite."""
    return [v if math.isfinite(v) else None for v in values]


def write_diagnosis(run_dir: Path, found: dict[str, Any]) -> None:
    """Append one line to ``RUN/diagnosis.jsonl``."""
    with (run_dir / "diagnosis.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Going back


def last_good(run_dir: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint that was not saved between skipped steps; else the oldest undamaged one."""
    good = [Checkpoint(path) for path in list_checkpoints(run_dir) if fault(path) is None]
    before = [checkpoint for checkpoint in good if not checkpoint.training()[0].skipped_in_a_row]
    return before[-1] if before else good[0] if good else None


def forget_later(run_dir: Path, step: int) -> None:
    """Remove the checkpoints of steps that are trained again."""
    for path in list_checkpoints(run_dir):
        if int(path.name.removeprefix("step-")) > step:
            doomed = path.with_name(f".deleting-{path.name}")  # a half-deleted folder must not look like a checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def continued(before: TrainState, lost: TrainState) -> TrainState:
    """The counters after a return: position and budget are the checkpoint's, what was computed in vain is kept beside."""
    before.rollbacks, before.skipped_in_a_row = lost.rollbacks + 1, 0
    before.flops_abandoned = lost.flops_abandoned + lost.flops.total - before.flops.total
    before.skipped, before.spikes = lost.skipped, lost.spikes
    return before
