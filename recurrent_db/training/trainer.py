"""Pretraining. `Trainer.run` is the loop: read it from top to bottom.

The objective (a file in `objectives`) defines what a step computes. The task (`tasks`) supplies the data. The trainer names
neither. Every random number is a function of (seed, step, sample), so a resumed run equals an uninterrupted one bit for
bit. Under torchrun several processes train one model (`distributed`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.hardware import (
    EnergyMeter,
    UpdateClock,
    choose_device,
    environment,
    peak_flops,
    peak_memory_bytes,
    peak_note,
)
from recurrent_db.accounting.memory_split import MemorySplit
from recurrent_db.config import Config, check_readable
from recurrent_db.data import Slots
from recurrent_db.distributed.team import Team
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.model.passes import Passes
from recurrent_db.objectives import Metrics, build_objective, load_objective_state
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.optimizer import CLIP_NORM, build_optimizer, step_unless, update_flops
from recurrent_db.optim.schedule import budget_progress, learning_rate_scale, middle_of_step
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.checkpoint import build_saver, load_checkpoint
from recurrent_db.store.loading import check_owner, start_from
from recurrent_db.store.metrics import MetricLog, NoLog, StepClock
from recurrent_db.store.run_directory import after_restart, check_resumable, check_run_dir, make_run_dir
from recurrent_db.store.train_state import TrainState
from recurrent_db.training import guard
from recurrent_db.training.stop_signal import StopSignal
from recurrent_db.training.tasks import build_task


def train(config: Config, resume: str = "", overwrite: bool = False) -> int:
    """Train a model, in this process or as one of torchrun's processes.

    The run directory is locked while the run lasts.

    Args:
        config: the run's configuration. ``run.dir`` and at least one limit of ``budget`` must be set.
        resume: "newest" continues the run from its newest checkpoint, "last-good" from its newest undamaged one. ""
            starts a new run.
        overwrite: replace an existing run directory.

    Returns:
        The exit status: 0, or 130 after SIGINT.

    Raises:
        UserError: a setting is wrong, a file cannot be used, or the run has diverged.
    """
    check_readable(config)
    with contextlib.ExitStack() as held:
        return Trainer(config, resume, overwrite, held).run()


class Trainer:
    """One run: model, optimizer, data, logs and counters. Arguments and errors are those of `train`.

    Args:
        held: releases the run directory's lock and restores the signal handlers when it closes.
    """

    def __init__(self, config: Config, resume: str, overwrite: bool, held: contextlib.ExitStack) -> None:
        if all(limit is None for limit in vars(config.budget).values()):
            raise UserError("no budget is set: use --budget.flops, --budget.tokens, --budget.steps or --budget.seconds")
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.config = config
        self.team = Team.join(config.parallel, choose_device(config.run.device))
        self.device = self.team.device
        self.bfloat16 = config.run.dtype in (("bfloat16", "auto") if self.device.type == "cuda" else ("bfloat16",))
        self.task = build_task(config, self.team)
        resume, overwrite = self.team.decide(lambda: after_restart(config, resume, overwrite))
        checkpoint = self.team.decide(lambda: check_run_dir(config, resume, overwrite, held))
        self.objective = build_objective(config)
        self.model = self.task.build_model(self.objective, self.bfloat16)
        self.state, self.notes = TrainState(), list[str]()
        if checkpoint is not None:
            self.notes = check_resumable(config, checkpoint, self.task.vocabulary)
        elif config.init.from_:
            self.notes = [start_from(self.model, config, self.task.vocabulary)]
        self.team.wrap(self.model, config, self.bfloat16)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.ema = EMA(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        if checkpoint is not None:
            self.state = self._load(checkpoint)
            check_owner(self.model, config)
        self.run_dir = self.team.decide(lambda: make_run_dir(config, resume, overwrite, held))
        self._set_up_meters(held)
        self.notes += self._description()
        if resume:
            begun = (
                f"resuming at step {self.state.step}"
                if checkpoint
                else f"no checkpoint in {self.run_dir}: starting from step 0"
            )
            self.notes.append(begun)

    # -- set-up --------------------------------------------------------------------------------------------------------

    def _load(self, checkpoint: Any) -> TrainState:
        """Fill model, optimizer, EMA and objective from a checkpoint, and return its counters."""
        load_checkpoint(checkpoint, self.model, self.optimizer, self.ema)
        state, objective_state, ema_updates = checkpoint.training()
        slot_tensors = checkpoint.slot_tensors(self.team.slots(self.config.data.batch_size))
        load_objective_state(self.objective, objective_state, checkpoint.path, slot_tensors)
        if self.ema is not None:
            self.ema.updates = ema_updates
        return state

    def _set_up_meters(self, held: contextlib.ExitStack) -> None:
        """Set up clocks, logs, the checkpoint saver, the guard and the signal handlers."""
        config, team, device = self.config, self.team, self.device
        peak = peak_flops(device, config.run.peak_flops)
        self.peak_note = peak_note(device, peak, given=config.run.peak_flops is not None)
        if team.first:
            described = {**environment(device), "peak_flops": peak, "peak_note": self.peak_note}
            write_atomic(self.run_dir / "environment.json", json.dumps(described, indent=1))
        self.memory = MemorySplit(self.model)
        self.flops_of_update = sum(update_flops(self.model, config.optim).values())
        self.cost_of = functools.cache(functools.partial(step_cost, config))
        self.update_clock = UpdateClock(device, worth_a_note=config.optim.name == "muon")
        self.log = MetricLog(self.run_dir, config, self.state.step) if team.first else NoLog()
        self.clock = StepClock(peak and peak * team.world, EnergyMeter(device))
        self.saver = build_saver(team, self.run_dir, config, self.task.vocabulary)
        self.loss_guard = guard.LossGuard(config, self.state, device, self.task.floor)
        self.progress = self._progress_after()
        self.stop_signal = StopSignal(held)

    def _description(self) -> Iterator[str]:
        """Log lines about the network, data, machine and objective."""
        yield from self.task.describe(self.model)
        yield f"run directory {self.run_dir}"
        yield self.peak_note
        with self.team.whole(self.model) as model:
            yield from self.objective.describe(model)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train until the budget is spent or a signal comes, and return the exit status."""
        config, team, task, objective, model = self.config, self.team, self.task, self.objective, self.model
        for note in self.notes:
            self.say(note)
        if self.progress >= 1:
            self.say(f"nothing to do: at step {self.state.step} the budget is spent")
        percent, layout = round(100 * min(self.progress, 1)), "{l_bar}{bar}|{elapsed}<{remaining}{postfix}"
        bar = tqdm(total=100, initial=percent, disable=None if team.first else True, bar_format=layout)
        batches = self._batches()
        model.train()
        self._rehearse()
        self._grow()
        stopping = 0
        while self.progress < 1 and not stopping:
            team.beat(f"at step {self.state.step + 1}")
            self.clock.start()
            self.update_clock.mark()
            if objective.visits(self.progress) != self.state.visits:
                batches = self._batches()
            rng = Rng(self.data_seed, self.state.step)
            passes = objective.passes(rng, self.progress)
            cost, tokens = self.cost_of(passes), task.tokens_per_step
            # At the middle of the step no rate is 0, except the first one's if budget.seconds is the only limit.
            half_way = self._progress_after(cost.total * tokens / 2, tokens / 2, 0.5)
            lr = config.optim.lr * learning_rate_scale(config.schedule, middle_of_step(self.progress, half_way))
            for group in self.optimizer.param_groups:
                group["lr"] = lr

            metrics = self._forward_backward(next(batches), rng, passes)
            loss = metrics.pop("loss")
            self.update_clock.mark()
            grad_norm = team.clip(model, CLIP_NORM)

            # A skipped step changes only the counters. The host does not wait for the decision.
            skip = self.loss_guard.judge(loss, grad_norm)
            step_unless(skip, self.optimizer)
            if self.ema is not None:
                self.ema.update(model, skip)
            self.optimizer.zero_grad(set_to_none=True)
            self.update_clock.mark()

            self.state.step += 1
            self.state.count(cost, self.flops_of_update, tokens)
            row = self._row(loss, lr, grad_norm, passes, metrics)
            self.log.add(row)
            self.clock.add(row, tokens, cost)

            # The host waits for the device only if it must read the clock, evaluate, log or save.
            if config.budget.seconds:
                self._settle()
            before, self.progress = self.progress, self._progress_after()
            self._grow()
            evaluating, logging, saving = self._due(before)
            if evaluating or logging or saving:
                self._settle()
            if evaluating:
                row.update(self.evaluate())
            if logging:
                self._log(row, bar, norms=team.world == 1 or evaluating)
            unsound = self._unsound_tensors() if saving else []
            if trouble := self.loss_guard.trouble(self.state, unsound):
                self._go_back(trouble, unsound, grad_norm, lr)
                batches = self._batches()
                continue
            if saving:
                self.save()
            stopping = team.largest(self.stop_signal.number)
        bar.close()
        return self._finish(stopping)

    def _forward_backward(self, micro_batches: Iterable[Any], rng: Rng, passes: Passes) -> Metrics:
        """Accumulate the gradients of a step over its micro-batches, each weighted by its share of the batch.

        Returns:
            The loss and the objective's metrics, summed over all processes.
        """
        batch_size, left = self.config.data.batch_size, self.team.sequences_per_process(self.config.data.batch_size)
        metrics: Metrics = {"loss": torch.zeros((), device=self.device)}
        for micro in micro_batches:
            left -= len(micro)
            weight = len(micro) / batch_size
            self.last_micro_batch = micro
            self.last_forward = functools.partial(self.objective, self.model, micro, rng, self.progress)
            with self.team.micro_batch(self.model, last=not left):
                with self.autocast(), self.memory.forward(self.device, passes.core_grad):
                    loss, micro_metrics = self.team.forward(self.last_forward)
                self.team.backward(loss * weight)
            for name, value in {"loss": loss.detach(), **micro_metrics}.items():
                value = value if value.ndim else value * weight
                metrics[name] = metrics[name] + value if name in metrics else value
        return self.team.sum_all(metrics)

    # -- evaluation, checkpoints, recovery -----------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Held-out scores as columns of metrics.jsonl, with the EMA weights if the run keeps them."""
        self.team.beat("evaluating")
        if self.ema is not None:
            self.ema.swap(self.model)
        self.model.eval()
        with self.autocast(), self.team.whole(self.model) as model:
            row = self.task.evaluate(model, self.objective)
        self.model.train()
        if self.ema is not None:
            self.ema.swap(self.model)
        return row

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        self.team.beat("writing a checkpoint")
        self.log.flush()
        objective = self.objective
        self.saver.save(
            self.model, self.optimizer, self.ema, self.state, objective.state_dict(), objective.slot_tensors()
        )

    def _rehearse(self) -> None:
        """Run one pass that changes nothing, from which DDP learns the autograd graph (see `Team.rehearse`)."""
        if self.team.mode != "ddp":
            return
        forward = functools.partial(
            self.objective, self.model, self.task.sample(), Rng(self.config.seed, EVALUATION_STEP), 1.0
        )
        with self.autocast():
            self.team.rehearse(self.model, forward)

    def _grow(self) -> None:
        """Let the objective initialise weights. Their optimizer state, the loss statistics and the EMA then restart."""
        if parameters := self.objective.grow(self.model, self.progress):
            for parameter in parameters:
                self.optimizer.state.pop(parameter, None)
            self.loss_guard.forget(self.state)
            if self.ema is not None:
                self.ema.restart(self.model)

    def _go_back(self, trouble: str, unsound: list[str], grad_norm: Tensor, lr: float) -> None:
        """Write a diagnosis and return to the last good checkpoint with another data order.

        Raises:
            UserError: there is no good checkpoint, or `guard.ROLLBACKS` returns are used up.
        """
        config, team, run_dir = self.config, self.team, self.run_dir
        self.log.flush()
        self.saver.finish()
        if team.world == 1:  # repeat the last micro-batch to find the gradients that are not finite
            with self.autocast():
                unsound = unsound + guard.gradients_not_finite(self.model, lambda: self.last_forward()[0])
        norms, may_go_back = self._norms_by_iteration(), self.state.rollbacks < guard.ROLLBACKS
        target = team.decide(lambda: guard.last_good(run_dir) if may_go_back else None)
        line = guard.diagnose(
            run_dir if team.first else None, self.state, trouble, unsound, norms, float(grad_norm), lr, target
        )
        if target is None:
            self.log.close()
            raise UserError(
                f"training diverged and was stopped {line}; it had returned to a checkpoint {self.state.rollbacks} times."
                f" Try an optim.lr below {config.optim.lr:g}. Details: {run_dir}/diagnosis.jsonl"
            )
        self.state = guard.continued(self._load(target), lost=self.state)
        self.say(f"warning: {line}; returning to step {self.state.step} with another data order")
        team.decide(lambda: guard.forget_later(run_dir, self.state.step))
        self.log.rewind(self.state.step)
        self.loss_guard = guard.LossGuard(config, self.state, self.device, self.task.floor)
        self.progress = self._progress_after()
        self._grow()

    def _finish(self, stopping: int) -> int:
        """Save the last checkpoint, print a summary, and return the exit status."""
        self._settle()
        if unsound := self._unsound_tensors():
            self.say(f"warning: {unsound[0]} is not finite at step {self.state.step}: no checkpoint was written")
        else:
            self.save()
        self.saver.finish()
        self.log.close()
        self.team.leave()
        if stopping:
            self.say(f"stopped by signal {stopping} at step {self.state.step}; continue with --resume")
            return 130 if stopping == signal.SIGINT else 0
        skipped = f", {self.state.skipped} steps skipped" if self.state.skipped else ""
        self.say(
            f"done: {self.state.step} steps, {self.state.tokens:,} tokens, {self.state.flops.total:.4g} FLOPs{skipped}"
            f"{self.update_clock.note()}; {self.run_dir}"
        )
        return 0

    # -- helpers -------------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        """Print a line on standard error. Only the first process prints."""
        if self.team.first:
            print(line, file=sys.stderr)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass: bfloat16 autocast if the run uses it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def _batches(self) -> Iterator[Iterable[Any]]:
        """The batches from the current step on. All slots take new samples if the objective's number of visits changed."""
        visits = self.objective.visits(self.progress)
        if visits != self.state.visits:
            self.state.visits, self.state.visits_start = visits, self.state.step
        return self.task.batches(self.state.step, self.data_seed, Slots(visits, self.state.visits_start))

    @property
    def data_seed(self) -> int:
        """The seed of data order and noise."""
        return guard.data_seed(self.config, self.state.rollbacks)

    def _progress_after(self, flops: float = 0.0, tokens: float = 0.0, steps: float = 0.0) -> float:
        """Share of the budget that is spent after this many additional FLOPs, tokens and steps."""
        state = self.state
        return budget_progress(
            self.config.budget, state.flops.total + flops, state.tokens + tokens, state.step + steps, state.seconds
        )

    def _due(self, before: float) -> tuple[bool, bool, bool]:
        """Whether to evaluate, log and save after this step. ``before`` is the progress at its start."""
        run, points, spent = self.config.run, self.config.eval.points, self.progress >= 1
        evaluating = points > 0 and (spent or int(self.progress * points) > int(before * points))
        logging = spent or self.state.step % run.log_every == 0
        return evaluating, logging, self.state.step % run.checkpoint_every == 0

    def _row(self, loss: Tensor, lr: float, grad_norm: Tensor, passes: Passes, metrics: Metrics) -> dict[str, Any]:
        """A step's row of metrics.jsonl. Its tensors are read from the device when it is written."""
        return {
            "step": self.state.step,
            "tokens": self.state.tokens,
            **self.state.flops.row(),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            **self.loss_guard.row(),
            "rollbacks": self.state.rollbacks,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            **self.memory.row(self.optimizer, self.ema, passes.core_grad),
            **metrics,
        }

    def _log(self, row: dict[str, Any], bar: tqdm[Any], norms: bool) -> None:
        """Write the rows so far, print warnings, and update the progress bar. ``norms``: measure the state's growth."""
        row["optimizer_share"] = self.update_clock.share()
        if norms:
            growth = None
            if found := self._norms_by_iteration():
                row["state/rms_first"], row["state/rms_last"] = found[0], found[-1]
                row["state/growth"] = growth = found[-1] / max(found[0], 1e-30)
            for line in self.loss_guard.warnings(self.state, self.progress, growth):
                self.say(line)
        last = self.log.flush()
        if last is not None and last["loss"] is not None:
            bar.set_postfix_str(
                f" step {self.state.step} loss {last['loss']:.3f} {last['tokens_per_s']:,.0f} tokens/s"
                f" {self.state.flops.total:.2e} FLOPs{self.update_clock.note()}", refresh=False
            )  # fmt: skip
        bar.update(round(100 * min(self.progress, 1)) - bar.n)

    def _settle(self) -> None:
        """Wait for the device, and copy the counters that it holds into ``self.state``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.clock.settle(self.state)
        if self.config.budget.seconds:  # all processes must stop at the same step, so they use one clock
            self.state.seconds = self.team.decide(lambda: self.state.seconds)
        self.loss_guard.settle(self.state)

    def _unsound_tensors(self) -> list[str]:
        """Names of weights and optimizer tensors that are not finite, on any process."""
        names = guard.not_finite(self.model, self.optimizer)
        return names if self.team.all(not names) else names or ["a tensor of another process"]

    def _norms_by_iteration(self) -> list[float]:
        """RMS of the state after each iteration, for one sequence of the last micro-batch."""
        with self.autocast(), self.team.whole(self.model) as model:
            return self.task.state_rms(model, self.last_micro_batch)
