"""Pretrain a looped language model: python train/pretrain.py CONFIG.toml [--dotted.key value ...]

With torchrun in place of python, on several processes (docs/distributed.md): `team` is what they have in common.

Read it from top to bottom: set-up, then one loop. What varies between ways of training is the objective (a file in
recurrent_db/objectives); this script knows none of them by name. Everything random is a function of (seed, step, sample),
so a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from recurrent_db.accounting.flops import step_cost
from recurrent_db.accounting.hardware import (
    EnergyMeter,
    UpdateClock,
    choose_device,
    environment,
    peak_flops,
    peak_memory_bytes,
)
from recurrent_db.accounting.memory_split import MemorySplit
from recurrent_db.arguments import run_and_exit
from recurrent_db.commands.train import arguments
from recurrent_db.config import Config, rows_of_vocabulary
from recurrent_db.data import Loader, load_tokenizer, open_data, prefetch, validation_batches
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.distributed.rendezvous import job_identity, restarted
from recurrent_db.distributed.team import Team
from recurrent_db.distributed.watchdog import report_lost
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import score
from recurrent_db.files import check_links, locked, write_atomic
from recurrent_db.model import build_model
from recurrent_db.model.attention import Need, choose
from recurrent_db.objectives import Metrics, build_objective, load_objective_state
from recurrent_db.optim.optimizer import EMA, build_optimizer, step_unless, update_flops
from recurrent_db.optim.schedule import budget_progress, learning_rate_scale
from recurrent_db.rng import Rng
from recurrent_db.schema import to_dict
from recurrent_db.store.checkpoint import Checkpoint, build_saver, load_checkpoint
from recurrent_db.store.folder import clean_leftovers, find_checkpoint, list_checkpoints
from recurrent_db.store.loading import check_owner, start_from
from recurrent_db.store.metrics import MetricLog, NoLog, StepClock
from recurrent_db.store.train_state import TrainState
from recurrent_db.training.guard import (
    LossGuard,
    continued,
    data_seed,
    forget_later,
    gradients_not_finite,
    last_good,
    not_finite,
    numbers,
    state_rms,
    unigram_entropy,
    write_diagnosis,
)


def after_restart(config: Config, resume: str, overwrite: bool) -> tuple[str, bool]:
    """How to begin: as asked for, but what this very job had begun before torchrun restarted it is continued."""
    with contextlib.suppress(OSError, ValueError):
        if restarted() and json.loads((Path(config.run.dir) / "job.json").read_text()) == job_identity():
            return "last-good", False
    return resume, overwrite


def check_run_dir(config: Config, resume: str, overwrite: bool, held: contextlib.ExitStack) -> Checkpoint | None:
    """Refuse a run directory that cannot be used; lock it, and find the checkpoint to continue from. Changes nothing."""
    if not config.run.dir:
        raise UserError("run.dir is not set: say where the run lives with --run.dir DIR")
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run.dir {run_dir} is a file")
    if run_dir.exists() and any(run_dir.iterdir()) and not resume:
        if not overwrite:
            raise UserError(f"run directory {run_dir} exists; continue it with --resume or replace it with --overwrite")
        if not (run_dir / "config.json").exists():
            raise UserError(f"{run_dir} is not a run directory (no config.json); --overwrite does not touch it")
    if resume and run_dir.exists():
        check_links(run_dir)
    if run_dir.exists() and (resume or overwrite):
        held.enter_context(locked(run_dir))
    if resume and list_checkpoints(run_dir):
        return Checkpoint(find_checkpoint(run_dir, fall_back=resume == "last-good"))
    return None


def make_run_dir(config: Config, resume: str, overwrite: bool, held: contextlib.ExitStack) -> Path:
    """Make the run directory, in place of an older one where that was asked for. Set-up has succeeded by now."""
    run_dir = Path(config.run.dir)
    try:
        if not run_dir.exists() or not (resume or overwrite):
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir))
            if (run_dir / "config.json").exists():
                raise UserError(f"run directory {run_dir} has just been made by another process")
        for path in run_dir.iterdir() if overwrite else ():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        clean_leftovers(run_dir)
        write_atomic(run_dir / "config.json", json.dumps(to_dict(config), indent=1))
        if (job := job_identity()) is not None:
            write_atomic(run_dir / "job.json", json.dumps(job))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None
    return run_dir


def check_resumable(config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[str]:
    """Refuse to continue with another model, objective or tokenizer. Returns lines that say what else differs."""
    before, now = to_dict(checkpoint.config()), to_dict(config)
    for section in ("objective", "model", "blocks", "seed"):
        if before[section] != now[section]:
            old, new = json.dumps(before[section]), json.dumps(now[section])
            if isinstance(before[section], dict):
                key = next(k for k in now[section] if before[section][k] != now[section][k])
                old, new, section = before[section][key], now[section][key], f"{section}.{key}"
            raise UserError(f"cannot resume {config.run.dir}: {section} was {old} and is now {new}")
    if checkpoint.tokenizer().hash != tokenizer.hash:
        raise UserError(f"cannot resume {config.run.dir}: the data was made with another tokenizer")
    if before["optim"]["name"] != now["optim"]["name"]:  # their states have nothing in common
        old, new = before["optim"]["name"], now["optim"]["name"]
        raise UserError(f"cannot resume {config.run.dir}: optim.name was {old} and is now {new}")
    return [
        f"note: resuming with {section}.{key} = {value} (was {before[section][key]})"
        for section in ("data", "optim", "schedule", "budget")
        for key, value in now[section].items()
        if before[section][key] != value
    ]


def train(config: Config, resume: str = "", overwrite: bool = False) -> int:
    """Train as ``config`` says, and return the exit status; the run directory is locked until then."""
    with contextlib.ExitStack() as held:
        return pretrain(config, resume, overwrite, held)


def pretrain(config: Config, resume: str, overwrite: bool, held: contextlib.ExitStack) -> int:
    # -----------------------------------------------------------------------------------------------------------------
    # Set-up: device, data, model, objective, optimizer
    if not config.data.path:
        raise UserError("data.path is not set: give a folder made by train/prepare_data.py with --data.path DIR")
    if all(limit is None for limit in vars(config.budget).values()):
        raise UserError("no budget is set: give --budget.flops, --budget.tokens, --budget.steps or --budget.seconds")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    team = Team.join(config.parallel, choose_device(config.run.device))
    device = team.device
    say = functools.partial(print, file=sys.stderr) if team.first else lambda *lines: None
    bfloat16 = config.run.dtype == "bfloat16" or (config.run.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    length, batch_size = config.data.sequence_length, config.data.batch_size
    share = team.sequences_per_process(batch_size)
    micro_batch_size = min(config.data.micro_batch_size or share, share)
    data = open_data(config.data.path, "train", verify=config.data.verify)
    tokenizer = load_tokenizer(config.data.path)
    loader = Loader(data, length, batch_size, config.seed, config.data.mixture or None)
    floor = unigram_entropy(data)
    validation = open_data(
        config.data.val_path or config.data.path,
        "validation",
        expect_tokenizer_hash=tokenizer.hash,
        verify=config.data.verify,
    )
    config.model.vocab_size = config.model.vocab_size or rows_of_vocabulary(config, tokenizer.vocab_size)
    if config.model.vocab_size < rows_of_vocabulary(config, tokenizer.vocab_size):
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} tokens"
        )

    if config.eval.points:  # found out now, and not at the first evaluation
        next(validation_batches(validation, length, 1, length))
    resume, overwrite = team.decide(lambda: after_restart(config, resume, overwrite))
    checkpoint = team.decide(lambda: check_run_dir(config, resume, overwrite, held))
    objective = build_objective(config)
    need = Need(
        device=device,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        head_size=config.model.d_model // config.model.n_heads,
        documents=config.data.document_mask,
        two_stream=objective.two_stream,
    )
    attention, attention_line = choose(config.run.attention, need)
    model = build_model(config.model, config.seed, device, config.blocks.only)
    model.recurrence, model.attention, model.document_mask = objective.recurrence, attention, config.data.document_mask
    model.checkpoint_activations(config.run.activation_checkpointing)
    if config.run.compile:
        model.compile_parts()
    objective.prepare(model)
    state, notes = TrainState(), []

    # -----------------------------------------------------------------------------------------------------------------
    # Continue a run, start from another's weights, or start afresh
    if checkpoint is not None:
        notes = check_resumable(config, checkpoint, tokenizer)
    elif config.init.from_:
        notes = [start_from(model, config, tokenizer)]
    team.wrap(model, config, bfloat16)
    optimizer = build_optimizer(model, config.optim)
    ema = EMA(model, config.optim.ema_decay) if config.optim.ema_decay else None
    if checkpoint is not None:
        load_checkpoint(checkpoint, model, optimizer, ema)
        check_owner(model, config)
        state, objective_state, ema_updates = checkpoint.training()
        load_objective_state(objective, objective_state, checkpoint.path)
        loader.seed = data_seed(config, state.rollbacks)
        if ema is not None:
            ema.updates = ema_updates
    run_dir = team.decide(lambda: make_run_dir(config, resume, overwrite, held))
    peak = peak_flops(device, config.run.peak_flops)
    peak_line = (
        f"utilisation is a share of {peak:.3g} FLOPs/s" if peak else "utilisation: no peak known for this device"
    )
    if config.run.peak_flops is None:
        peak_line += ", measured" if device.type != "cuda" else ", from the table" if peak else "; set --run.peak_flops"
    described = {**environment(device), "peak_flops": peak, "peak_note": peak_line}
    if team.first:
        write_atomic(run_dir / "environment.json", json.dumps(described, indent=1))

    counts = model.parameter_counts()
    memory, update = MemorySplit(model), sum(update_flops(model, config.optim).values())
    cost_of = functools.cache(lambda passes: step_cost(config, passes))
    update_clock = UpdateClock(device)
    with team.whole(model):
        description = objective.describe(model)
    for line in (
        *notes,
        f"{config.objective.name} on {team}: {counts['total']:,} parameters"
        f" ({counts['total'] - counts['embedding']:,} without the embedding)"
        f" + {counts['noise_conditioning']:,} for noise conditioning",
        f"{data.tokens:,} training tokens, {length * batch_size:,} a step; run directory {run_dir}",
        attention_line,
        peak_line,
        *description,
        *([f"resuming at step {state.step}"] if checkpoint is not None else []),
        *([f"no checkpoint in {run_dir}: starting afresh"] if resume and checkpoint is None else []),
    ):
        say(line)

    def progress_after(flops: float, tokens: float, steps: float, seconds: float = 0.0) -> float:
        """Share of the budget that is spent when this much comes on top."""
        return budget_progress(
            config.budget, state.flops.total + flops, state.tokens + tokens, state.step + steps, state.seconds + seconds
        )

    def evaluate() -> dict[str, float]:
        """Held-out scores, with the averaged weights where there are any."""
        team.beat("evaluating")
        batches = list(
            validation_batches(validation, length, config.eval.batch_size, config.eval.tokens, team.rank, team.world)
        )
        if ema is not None:
            ema.swap(model)
        model.recurrence = objective.recurrence  # what the objective has learned by now is part of it
        model.eval()
        with autocast, team.whole(model):
            row = objective.held_out(model, batches, tokenizer, config.seed)
            if not row:
                lengths = tokenizer.byte_lengths()
                row = score(
                    model, team.beating(batches), config.eval.k, lengths, config.eval.draws, config.seed, team.processes
                ).row()
        model.train()
        if ema is not None:
            ema.swap(model)
        return row

    def share_of_update() -> str:
        """What the update takes of this process's steps, where it is more than AdamW's few percent."""
        if config.optim.name != "muon" or not update_clock.step_seconds:
            return ""
        return f", update {update_clock.update_seconds / update_clock.step_seconds:.1%} of the time"

    def save() -> None:
        team.beat("writing a checkpoint")
        log.flush()
        saver.save(model, optimizer, ema, state, objective.state_dict())

    def settle() -> None:
        """Wait for the device, and bring the counters that it holds up to date."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.settle(state)
        if config.budget.seconds:  # it decides when to stop, so all go by one clock
            state.seconds = team.decide(lambda: state.seconds)
        watch.settle(state)

    def unsound_tensors() -> list[str]:
        """Weights and optimizer tensors that are not finite, on any process."""
        names = not_finite(model, optimizer)
        return names if team.all(not names) else names or ["a tensor of another process"]

    def norms_by_iteration() -> list[float]:
        """The state's RMS after each iteration, for a sequence of the last batch."""
        model.recurrence = objective.recurrence
        with autocast, team.whole(model):
            return state_rms(model, micro.tokens_BT, config)

    # SIGINT and SIGTERM to any process end the run after the step in flight, with a checkpoint.
    stop_signal = stopping = 0

    def request_stop(number: int, frame: object) -> None:
        nonlocal stop_signal
        stop_signal = number

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop
    log = MetricLog(run_dir, config, state.step) if team.first else NoLog()
    clock = StepClock(peak and peak * team.world, EnergyMeter(device))
    saver = build_saver(team, run_dir, config, tokenizer)
    progress = progress_after(0, 0, 0)
    layout = "{l_bar}{bar}|{elapsed}<{remaining}{postfix}"
    silent = None if team.first else True
    bar = tqdm(total=100, initial=round(100 * min(progress, 1)), disable=silent, bar_format=layout)
    if progress >= 1:
        say(f"nothing to do: at step {state.step} the budget is spent")
    batches = prefetch(loader, state.step, micro_batch_size, device, rank=team.rank, world=team.world)
    model.train()
    if team.mode == "ddp":
        sample = next(loader.micro_batches(0, micro_batch_size, team.rank, team.world)).to(device)
        with autocast:
            team.rehearse(model, functools.partial(objective, model, sample, Rng(config.seed, 0), 1.0))
        objective.after_step(torch.zeros((), dtype=torch.bool), team.sum)  # it learns nothing from that
    watch = LossGuard(config, state, device, floor)

    def grow() -> None:
        """Let the objective set weights; what is known of those before, and of the loss, is then of another model."""
        if parameters := objective.grow(model, progress):
            for parameter in parameters:
                optimizer.state.pop(parameter, None)
            watch.forget(state)
            if ema is not None:
                ema.restart(model)

    def go_back(trouble: str, unsound: list[str]) -> None:
        """Continue from the last good checkpoint with another order of the data, or end the run; both with a diagnosis."""
        nonlocal state, watch, batches, progress
        log.flush()
        saver.finish()
        if team.world == 1:  # the gradients of the last micro-batch, once more
            with autocast:
                unsound = unsound + gradients_not_finite(model, lambda: forward()[0])
            objective.after_step(torch.zeros((), dtype=torch.bool, device=device), team.sum)
        norms = norms_by_iteration()
        target = team.decide(lambda: last_good(run_dir) if state.rollbacks < config.guard.rollbacks else None)
        found = {"step": state.step, "trouble": trouble, "not_finite": unsound, "state_rms": numbers(norms),
                 "grad_norm": numbers([float(grad_norm)])[0], "lr": config.optim.lr * scale,
                 "back_to": target.training()[0].step if target else None}  # fmt: skip
        if team.first:
            write_diagnosis(run_dir, found)
        first = f" (first of {len(unsound)}: {unsound[0]})" if unsound else ""
        growth = ", ".join(f"{norm:.3g}" for norm in norms) or "none"
        line = f"at step {state.step}: {trouble}{first}; state RMS by iteration {growth}"
        if target is None:
            log.close()
            raise UserError(
                f"stopped {line}; after {state.rollbacks} returns to a checkpoint; the newest one is from before, try a"
                f" lower optim.lr (now {config.optim.lr:g}); see {run_dir}/diagnosis.jsonl"
            )
        load_checkpoint(target, model, optimizer, ema)
        before, objective_state, updates = target.training()
        load_objective_state(objective, objective_state, target.path)
        if ema is not None:
            ema.updates = updates
        state = continued(before, lost=state)
        say(f"warning: {line}; going back to step {state.step}, with another order of the data")
        team.decide(lambda: forget_later(run_dir, state.step))
        log.rewind(state.step)
        watch = LossGuard(config, state, device, floor)
        loader.seed = data_seed(config, state.rollbacks)
        batches = prefetch(loader, state.step, micro_batch_size, device, rank=team.rank, world=team.world)
        progress = progress_after(0, 0, 0)
        grow()

    grow()
    while progress < 1 and not stopping:
        team.beat(f"at step {state.step + 1}")
        clock.start()
        update_clock.mark()
        rng = Rng(data_seed(config, state.rollbacks), state.step)
        tokens = batch_size * length
        passes = objective.passes(rng, progress)
        cost = cost_of(passes)
        # The rate of a step is that of its middle, so that neither the first nor the last step has rate zero.
        scale = learning_rate_scale(config.schedule, progress_after(cost.total * tokens / 2, tokens / 2, 0.5))
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * scale

        # Forward and backward, micro-batch by micro-batch; each weighs as many of the batch's sequences as it has.
        metrics: Metrics = {"loss": torch.zeros((), device=device)}
        left = share
        for micro in next(batches):
            left -= len(micro)
            weight = len(micro) / batch_size
            forward = functools.partial(objective, model, micro, rng, progress)
            with team.micro_batch(model, last=not left):
                with autocast, memory.forward(device, passes.core_grad):
                    micro_loss, micro_metrics = team.forward(forward)
                team.backward(micro_loss * weight)
            for name, value in {"loss": micro_loss.detach(), **micro_metrics}.items():
                value = value if value.ndim else value * weight
                metrics[name] = metrics[name] + value if name in metrics else value
        metrics = team.sum_all(metrics)
        loss = metrics.pop("loss")
        update_clock.mark()
        grad_norm = team.clip(model, config.optim.clip_norm)

        # A step whose loss or gradient is not finite changes nothing but the counters, and no host waits to learn of it.
        skip = watch.judge(loss, grad_norm)
        step_unless(skip, optimizer)
        if ema is not None:
            ema.update(model, skip)
        optimizer.zero_grad(set_to_none=True)
        update_clock.mark()
        objective.after_step(~skip, team.sum)

        state.step += 1
        state.count(cost, update, tokens)
        row = {
            "step": state.step,
            "tokens": state.tokens,
            **state.flops.row(),
            "loss": loss,
            "lr": config.optim.lr * scale,
            "grad_norm": grad_norm,
            "skipped": watch.counts[0],
            "spikes": watch.counts[2],
            "rollbacks": state.rollbacks,
            "peak_memory_bytes": peak_memory_bytes(device),
            **memory.row(optimizer, ema, passes.core_grad),
            **metrics,
        }
        log.add(row)
        clock.add(row, tokens, cost)

        # Now and then the host waits, looks at the clock, and writes what it has.
        if config.budget.seconds:
            settle()
        before, progress = progress, progress_after(0, 0, 0)
        grow()
        points = config.eval.points
        evaluating = points and (progress >= 1 or int(progress * points) > int(before * points))
        logging = state.step % config.run.log_every == 0 or progress >= 1
        saving = state.step % config.run.checkpoint_every == 0
        if evaluating or logging or saving:
            settle()
        if evaluating:
            row.update(evaluate())
        if logging:
            row["optimizer_share"] = update_clock.share()
            if team.world == 1 or evaluating:
                growth = None
                if norms := norms_by_iteration():
                    row["state/rms_first"], row["state/rms_last"] = norms[0], norms[-1]
                    row["state/growth"] = growth = norms[-1] / max(norms[0], 1e-30)
                for line in watch.warnings(state, progress, growth):
                    say(line)
            last = log.flush()
            if last is not None and last["loss"] is not None:
                bar.set_postfix_str(
                    f" step {state.step} loss {last['loss']:.3f} {last['tokens_per_s']:,.0f} tokens/s"
                    f" {state.flops.total:.2e} FLOPs{share_of_update()}", refresh=False
                )  # fmt: skip
            bar.update(round(100 * min(progress, 1)) - bar.n)
        unsound = unsound_tensors() if saving else []
        if trouble := watch.trouble(state, unsound):
            go_back(trouble, unsound)
            continue
        if saving:
            save()
        stopping = team.largest(stop_signal)

    # -----------------------------------------------------------------------------------------------------------------
    # The end
    bar.close()
    settle()
    if unsound := unsound_tensors():
        say(f"warning: {unsound[0]} is not finite at step {state.step}: no checkpoint is written")
    else:
        save()
    saver.finish()
    log.close()
    team.leave()
    if stopping:
        say(f"stopped by signal {stopping} at step {state.step}; continue with --resume")
        return 130 if stopping == signal.SIGINT else 0
    skipped = f", {state.skipped} steps skipped" if state.skipped else ""
    say(
        f"done: {state.step} steps, {state.tokens:,} tokens, {state.flops.total:.4g} FLOPs"
        f"{skipped}{share_of_update()}; {run_dir}"
    )
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: report_lost(lambda: train(*arguments(sys.argv[1:], prog="pretrain.py"))))
