"""Pretrain a looped language model: python train/pretrain.py CONFIG.toml [--dotted.key value ...]

Read it from top to bottom: set-up, then one loop. What varies between ways of training is the objective (a file in
recurrent_db/objectives); this script knows none of them by name. Everything random is a function of (seed, step, sample),
so a resumed run equals an uninterrupted one bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from recurrent_db.checkpoint import (
    Checkpoint,
    TrainState,
    clean_leftovers,
    find_checkpoint,
    list_checkpoints,
    load_optimizer_tensors,
    load_weights,
    save_checkpoint,
)
from recurrent_db.commandline import guard
from recurrent_db.config import Config, load_config, rows_of_vocabulary, to_dict
from recurrent_db.data import Loader, load_tokenizer, open_data, prefetch, validation_batches
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.flops import step_cost
from recurrent_db.hardware import EnergyMeter, UpdateClock, choose_device, environment, peak_flops, peak_memory_bytes
from recurrent_db.likelihood import score
from recurrent_db.memory import MemorySplit
from recurrent_db.metrics import MetricLog, StepClock
from recurrent_db.model import build_model
from recurrent_db.model.attention import Need, choose
from recurrent_db.model.blocks import plain_weights
from recurrent_db.objectives import Metrics, ScoresItself, build_objective
from recurrent_db.objectives.blocks import freeze_shared
from recurrent_db.optim import EMA, build_optimizer, step_unless, update_flops
from recurrent_db.rng import Rng
from recurrent_db.schedule import budget_progress, learning_rate_scale
from recurrent_db.tokenizer import Tokenizer


def check_run_dir(config: Config, resume: str, overwrite: bool) -> Checkpoint | None:
    """Refuse a run directory that cannot be used; find the checkpoint to continue from. Changes nothing."""
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
    if resume and list_checkpoints(run_dir):
        return Checkpoint(find_checkpoint(run_dir, fall_back=resume == "last-good"))
    return None


def make_run_dir(config: Config, overwrite: bool) -> Path:
    """Make the run directory, in place of an older one where that was asked for. Set-up has succeeded by now."""
    run_dir = Path(config.run.dir)
    try:
        if overwrite and run_dir.exists():
            shutil.rmtree(run_dir)
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        clean_leftovers(run_dir)
        write_atomic(run_dir / "config.json", json.dumps(to_dict(config), indent=1))
    except OSError as error:
        raise UserError(f"cannot write run directory {run_dir}: {error.strerror}") from None
    return run_dir


def check_resumable(config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse to continue with another model, objective or tokenizer; say what else differs."""
    before, now = to_dict(checkpoint.config()), to_dict(config)
    for section in ("model", "objective", "blocks", "seed"):
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
    for section in ("data", "optim", "schedule", "budget"):
        for key, value in now[section].items():
            if before[section][key] != value:
                print(f"note: resuming with {section}.{key} = {value} (was {before[section][key]})", file=sys.stderr)


def train(config: Config, resume: str = "", overwrite: bool = False) -> int:
    # -----------------------------------------------------------------------------------------------------------------
    # Set-up: device, data, model, objective, optimizer
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this trainer runs in one process: start it with python, not with torchrun on several")
    if not config.data.path:
        raise UserError("data.path is not set: give a folder made by train/prepare_data.py with --data.path DIR")
    if all(limit is None for limit in vars(config.budget).values()):
        raise UserError("no budget is set: give --budget.flops, --budget.tokens, --budget.steps or --budget.seconds")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    device = choose_device(config.run.device)
    bfloat16 = config.run.dtype == "bfloat16" or (config.run.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    length, batch_size = config.data.sequence_length, config.data.batch_size
    micro_batch_size = config.data.micro_batch_size or batch_size
    data = open_data(config.data.path, "train", verify=config.data.verify)
    tokenizer = load_tokenizer(config.data.path)
    loader = Loader(data, length, batch_size, config.seed, config.data.mixture or None)
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
    checkpoint = check_run_dir(config, resume, overwrite)
    need = Need(
        device=device,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
        head_size=config.model.d_model // config.model.n_heads,
        documents=config.data.document_mask,
        two_stream=config.objective.name.startswith("denoise")
        and config.objective.denoise.conditioning == "two-stream",
    )
    attention, attention_line = choose(config.run.attention, need)
    objective = build_objective(config)
    model = build_model(config.model, config.seed, device, config.blocks.only)
    model.recurrence, model.attention, model.document_mask = objective.recurrence, attention, config.data.document_mask
    model.checkpoint_activations(config.run.activation_checkpointing)
    if config.run.compile:
        model.compile_parts()
    freeze_shared(config, model)
    optimizer = build_optimizer(model, config.optim)
    ema = EMA(model, config.optim.ema_decay) if config.optim.ema_decay else None
    state = TrainState()

    # -----------------------------------------------------------------------------------------------------------------
    # Continue a run, start from another's weights, or start afresh
    if checkpoint is not None:
        check_resumable(config, checkpoint, tokenizer)
        load_weights(model, checkpoint.weights(), str(checkpoint.path))
        load_optimizer_tensors(model, optimizer, checkpoint.optimizer())
        state, objective_state, ema_updates = checkpoint.training()
        objective.load_state_dict(objective_state)
        if ema is not None:
            averaged = checkpoint.weights(averaged=True)
            ema.shadow = {name: value.to(device) for name, value in averaged.items()}
            ema.updates = ema_updates
    elif config.init.from_:
        source = Checkpoint(find_checkpoint(Path(config.init.from_)))
        if source.tokenizer().hash != tokenizer.hash:
            raise UserError(f"init.from {config.init.from_} was trained with another tokenizer than {config.data.path}")
        # A model that starts to be conditioned on noise keeps its own zero-initialised conditioning.
        # Of a model in blocks each takes what the other has of its own: the embedding, and blocks that both hold.
        new = ("noise_embedding.", *(("blocks.",) if config.model.n_blocks else ()))
        weights = source.weights(averaged=True)
        weights = plain_weights(weights, config.model) if config.model.n_blocks else weights
        load_weights(model, weights, str(source.path), allow_new=new)
        if ema is not None:
            ema = EMA(model, config.optim.ema_decay)
    run_dir = make_run_dir(config, overwrite)
    peak = peak_flops(device, config.run.peak_flops)
    peak_line = (
        f"utilisation is a share of {peak:.3g} FLOPs/s" if peak else "utilisation: no peak known for this device"
    )
    if config.run.peak_flops is None:
        peak_line += ", measured" if device.type != "cuda" else ", from the table" if peak else "; set --run.peak_flops"
    described = {**environment(device), "peak_flops": peak, "peak_note": peak_line}
    write_atomic(run_dir / "environment.json", json.dumps(described, indent=1))

    counts = model.parameter_counts()
    memory, update = MemorySplit(model), sum(update_flops(model, config.optim).values())
    cost_of = functools.cache(lambda passes: step_cost(config, passes))
    update_clock = UpdateClock(device)
    for line in (
        f"{config.objective.name} on {device}: {counts['total']:,} parameters"
        f" ({counts['total'] - counts['embedding']:,} without the embedding)"
        f" + {counts['noise_conditioning']:,} for noise conditioning",
        f"{data.tokens:,} training tokens, {length * batch_size:,} a step; run directory {run_dir}",
        attention_line,
        peak_line,
        *objective.describe(model),
        *([f"resuming at step {state.step}"] if checkpoint is not None else []),
        *([f"no checkpoint in {run_dir}: starting afresh"] if resume and checkpoint is None else []),
    ):
        print(line, file=sys.stderr)

    def progress_after(flops: float, tokens: float, steps: float, seconds: float = 0.0) -> float:
        """Share of the budget that is spent when this much comes on top."""
        return budget_progress(
            config.budget, state.flops + flops, state.tokens + tokens, state.step + steps, state.seconds + seconds
        )

    def evaluate() -> dict[str, float]:
        """Held-out scores, with the averaged weights where there are any."""
        batches = list(validation_batches(validation, length, config.eval.batch_size, config.eval.tokens))
        if ema is not None:
            ema.swap(model)
        model.recurrence = objective.recurrence  # what the objective has learned by now is part of it
        model.eval()
        row: dict[str, float] = {}
        with autocast:
            if isinstance(objective, ScoresItself):
                row = objective.held_out(model, batches, tokenizer, config.seed)
            if not row:
                lengths = tokenizer.byte_lengths()
                row = score(model, batches, config.eval.k, lengths, config.eval.draws, config.seed).row()
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
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            print(f"warning: weights are not finite at step {state.step}: no checkpoint is written", file=sys.stderr)
            return
        log.flush()
        save_checkpoint(run_dir, config, tokenizer, model, optimizer, ema, state, objective.state_dict())

    def settle() -> None:
        """Wait for the device, and bring the counters that it holds up to date."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.settle(state)
        state.skipped, state.skipped_in_a_row = skips.tolist()

    # SIGINT and SIGTERM end the run after the step in flight, with a checkpoint.
    stop_signal = 0

    def request_stop(number: int, frame: object) -> None:
        nonlocal stop_signal
        stop_signal = number

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop
    log, clock = MetricLog(run_dir, config, state.step), StepClock(peak, EnergyMeter(device))
    progress = progress_after(0, 0, 0)
    layout = "{l_bar}{bar}|{elapsed}<{remaining}{postfix}"
    bar = tqdm(total=100, initial=round(100 * min(progress, 1)), disable=None, bar_format=layout)
    if progress >= 1:
        print(f"nothing to do: at step {state.step} the budget is spent", file=sys.stderr)
    batches = prefetch(loader, state.step, micro_batch_size, device)
    model.train()
    # Skipped steps in all and in a row. They live on the device: a step makes the host wait for nothing.
    skips = torch.tensor([state.skipped, state.skipped_in_a_row], device=device)
    while progress < 1 and not stop_signal:
        clock.start()
        update_clock.mark()
        rng = Rng(config.seed, state.step)
        tokens = batch_size * length
        passes = objective.passes(rng, progress)
        cost = cost_of(passes)
        # The rate of a step is that of its middle, so that neither the first nor the last step has rate zero.
        scale = learning_rate_scale(config.schedule, progress_after(cost.total * tokens / 2, tokens / 2, 0.5))
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * scale

        # Forward and backward, micro-batch by micro-batch; each weighs as many tokens as it has.
        loss = torch.zeros((), device=device)
        metrics: Metrics = {}
        for micro in next(batches):
            share = len(micro.tokens_BT) / batch_size
            with autocast, memory.forward(device, passes.core_grad):
                micro_loss, micro_metrics = objective(model, micro, rng, progress)
            (micro_loss * share).backward()
            loss += micro_loss.detach() * share
            for name, value in micro_metrics.items():
                value = value if value.ndim else value * share
                metrics[name] = metrics[name] + value if name in metrics else value
        update_clock.mark()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)

        # A step whose loss or gradient is not finite changes nothing but the counters.
        skip = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        step_unless(skip, optimizer)
        if ema is not None:
            ema.update(model, skip)
        optimizer.zero_grad(set_to_none=True)
        update_clock.mark()
        objective.after_step(~skip, lambda tensor: tensor)  # one process: nothing to sum over
        skips = torch.stack((skips[0] + skip, (skips[1] + 1) * skip))

        state.step += 1
        state.count(cost, update, tokens)
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "flops": state.flops,
            "flops_forward": state.flops_forward,
            "flops_backward": state.flops_backward,
            "flops_backward_weight": state.flops_backward_weight,
            "flops_recomputed": state.flops_recomputed,
            "flops_causal": state.flops_causal,
            "flops_update": state.flops_update,
            "loss": loss,
            "lr": config.optim.lr * scale,
            "grad_norm": grad_norm,
            "skipped": skips[0],
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
            last = log.flush()
            if last is not None and last["loss"] is not None:
                bar.set_postfix_str(
                    f" step {state.step} loss {last['loss']:.3f} {last['tokens_per_s']:,.0f} tokens/s"
                    f" {state.flops:.2e} FLOPs{share_of_update()}", refresh=False
                )  # fmt: skip
            bar.update(round(100 * min(progress, 1)) - bar.n)
        if state.skipped_in_a_row >= config.optim.max_skipped:
            log.close()
            raise UserError(
                f"stopped at step {state.step}: loss or gradient not finite {state.skipped_in_a_row} steps in a row;"
                f" the newest checkpoint is from before, try a lower optim.lr (now {config.optim.lr:g})"
            )
        if saving:
            save()

    # -----------------------------------------------------------------------------------------------------------------
    # The end
    bar.close()
    settle()
    save()
    log.close()
    if stop_signal:
        print(f"stopped by signal {stop_signal} at step {state.step}; continue with --resume", file=sys.stderr)
        return 130 if stop_signal == signal.SIGINT else 0
    skipped = f", {state.skipped} steps skipped" if state.skipped else ""
    print(
        f"done: {state.step} steps, {state.tokens:,} tokens, {state.flops:.4g} FLOPs{skipped}{share_of_update()}; {run_dir}",
        file=sys.stderr,
    )
    return 0


def arguments(given: list[str]) -> tuple[Config, str, bool]:
    """The command line as arguments of `train`."""
    words, resume, overwrite = list(given), "", False
    if "--resume" in words:
        at = words.index("--resume")
        resume = "last-good" if words[at + 1 : at + 2] == ["last-good"] else "newest"
        del words[at : at + (2 if resume == "last-good" else 1)]
    if "--overwrite" in words:
        words.remove("--overwrite")
        overwrite = True
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    path = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    return load_config(path, words, prog="pretrain.py CONFIG.toml"), resume, overwrite


if __name__ == "__main__":
    guard(lambda: train(*arguments(sys.argv[1:])))
