"""The plan of a training run as lines of text. `plan` computes it."""

from __future__ import annotations

from recurrent_db.accounting.plan import COUNTS, DRAWS, HOP, USABLE, Estimate, Planner
from recurrent_db.accounting.step_memory import PARTS


def lines(planner: Planner, gpus: int, source: str) -> list[str]:
    """The plan as lines of text. ``source`` names the configuration in the first line."""
    config, estimates, best = planner.config, planner.estimates(gpus), planner.best(gpus)
    return [
        f"{source}: {config.objective.name} on {gpus} x {planner.cluster.name}, {planner.sizes.total:,} parameters",
        f"one step: {config.data.batch_size:,} sequences of {config.data.sequence_length:,} = {planner.tokens:,} tokens,"
        f" {planner.step_flops:.4g} model FLOPs; per GPU {best.micro_batches} micro-batches of {best.sequences}",
        "",
        *_memory_lines(planner, gpus, estimates),
        *_network_lines(estimates),
        "",
        *_time_lines(planner, estimates),
        "",
        *_scaling_lines(planner),
        "",
        *_inference_lines(planner),
        "",
        *_assumption_lines(planner),
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def duration(seconds: float) -> str:
    """Seconds as text, in the largest fitting unit."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _budget(planner: Planner, estimate: Estimate) -> str:
    steps = planner.steps()
    return "none set" if steps is None else duration(steps * estimate.seconds)


def _memory_lines(planner: Planner, gpus: int, estimates: list[Estimate]) -> list[str]:
    """Memory by part and mode and, if no mode fits, changes that would fit."""
    cells = lambda words: "".join(f"{word:>10}" for word in words)  # noqa: E731
    out = [
        "peak memory, GB per GPU     " + cells(e.mode for e in estimates),
        *(
            f"  {part:<26}" + cells(_gb(e.memory[part]) for e in estimates)
            for part in PARTS
            if any(e.memory[part] for e in estimates)
        ),
        "  total                     " + cells(_gb(e.peak_bytes) for e in estimates),
        f"  {f'fits in {_gb(USABLE * planner.cluster.gpu.memory)} GB':<26}"
        + cells("yes" if e.fits else "no" for e in estimates),
        "",
    ]
    best = planner.best(gpus)
    if not best.fits:
        remedies = planner.remedies(gpus)
        advice = (
            f"these changes would fit: {'; or '.join(remedies)}"
            if remedies
            else "checkpointing, smaller micro-batches and more GPUs do not help"
        )
        out += [
            f"does not fit on {gpus} x {planner.cluster.name}: at least {_gb(best.peak_bytes)} GB per GPU; {advice}",
            "",
        ]
    return out


def _network_lines(estimates: list[Estimate]) -> list[str]:
    out = [f"{'communication':<14}{'collective':<16}{'count':>7}{'GB':>10}{'GB sent/GPU':>16}{'seconds':>10}"]
    for e in estimates:
        out += [
            f"{e.mode:<14}{c.kind:<16}{c.count:>7}{c.bytes / 1e9:>10.2f}{c.wire_bytes / 1e9:>16.2f}{c.seconds:>10.4f}"
            for c in e.collectives
        ] or [f"{e.mode:<14}nothing"]
    return out


def _time_lines(planner: Planner, estimates: list[Estimate]) -> list[str]:
    out = [f"{'time':<14}{'compute s':>12}{'network s':>12}{'network %':>11}{'tokens/s':>14}{'budget time':>16}"]
    for e in estimates:
        out.append(
            f"{e.mode:<14}{e.compute_seconds:>12.3f}{e.communication_seconds:>12.4f}{e.communication_share:>11.1%}"
            f"{planner.tokens / e.seconds:>14,.0f}{_budget(planner, e):>16}"
        )
    return out


def _scaling_lines(planner: Planner) -> list[str]:
    """The best mode for each number of GPUs in `COUNTS`."""
    out = [
        "fastest mode that fits, by number of GPUs",
        f"{'GPUs':>6} {'mode':<6}{'fits':>5}{'GB per GPU':>12}{'micro-batches':>15}{'network':>9}{'tokens/s':>14}"
        f"{'budget time':>16}",
    ]
    for n in COUNTS:
        if not planner.divides(n):
            out.append(f"{n:>6} data.batch_size = {planner.config.data.batch_size} is not a multiple of {n}")
            continue
        e = planner.best(n)
        out.append(
            f"{n:>6} {e.mode:<6}{'yes' if e.fits else 'no':>5}{_gb(e.peak_bytes):>12}"
            f"{e.micro_batches:>11} x {e.sequences:<2}{e.communication_share:>8.1%}"
            f"{planner.tokens / e.seconds:>14,.0f}{_budget(planner, e):>16}"
        )
    return out


def _inference_lines(planner: Planner) -> list[str]:
    cache = ", ".join(f"K={k}: {size / 1e9:.3g} GB" for k, size in planner.cache_bytes().items())
    length = planner.config.model.max_seq_len
    return [f"inference: bfloat16 key-value cache for one sequence of {length:,} tokens: {cache}"]


def _assumption_lines(planner: Planner) -> list[str]:
    deepest, cluster, network = planner.deepest, planner.cluster, planner.cluster.network
    return [
        "assumptions:",
        f"- memory: {cluster.gpu.memory / 1e9:.0f} GB per GPU; tensors can fill {USABLE:.0%} of it; the deepest of {DRAWS}"
        f" random steps ({deepest.core_grad} core passes with gradient, {deepest.core_no_grad} without); eager mode;"
        f" fp32 weights{', bfloat16 autocast' if planner.half else ''}; a mask for packed documents",
        "- fsdp: each block of prelude and coda is a sharding unit. The core is one unit, gathered once for all iterations"
        " and kept until the step's last backward pass. Embedding, norms and noise embedding are gathered once, in fp32."
        " Gradients are sent once, in fp32; with several micro-batches they are unsharded until then",
        f"- compute: model FLOPs averaged over the random depths, at {cluster.mfu:.0%} of {cluster.peak / 1e12:,.0f} TFLOP/s"
        " (dense bf16)",
        f"- network: per GPU {network.intra / 1e9:g} GB/s within nodes of {network.per_node} GPUs and"
        f" {network.inter / 1e9:g} GB/s between nodes; {network.utilisation:.0%} of these rates is reached; each collective"
        f" takes another {HOP * 1e6:.0f} us for each doubling of GPUs; no overlap with compute",
        "- not counted: evaluation, checkpoints and the optimizer update's time",
    ]
