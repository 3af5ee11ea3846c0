"""Plans a training run before one pays for it: memory, communication and time.

Memory is `step_memory`'s, for the deepest of the run's first steps. FLOPs are `flops`', the mean over the same steps. Time
is FLOPs over the GPUs' peak at a stated utilisation, plus communication over a share of the links' line rate. Nothing
overlaps in it, so a run that hides its communication is faster. Every assumption is printed with the figures.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recurrent_db.accounting.flops import cache_numbers_per_token, step_cost
from recurrent_db.accounting.hardware import GPUS, Gpu, table_peak_flops
from recurrent_db.accounting.step_memory import PARTS, Mode, Sizes, Step
from recurrent_db.config import Config
from recurrent_db.errors import UserError
from recurrent_db.model.passes import Passes

DRAWS = 1000
"""First steps of a run whose draws of depth a plan looks at."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
USABLE = 0.94
"""Share of a GPU's memory that tensors may fill: the rest is the CUDA context, NCCL's own buffers, and gaps."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at once (PyTorch's default)."""
HOP = 20e-6
"""Seconds that a collective takes besides its bytes, for each doubling of the number of GPUs."""


def find_gpu(name: str) -> tuple[str, Gpu, float]:
    """A GPU's name in the table, its entry, and its peak. Raises `UserError` with a suggestion."""
    known = {key.lower(): key for key in GPUS}
    key = known.get(name.lower().removeprefix("nvidia ").strip())
    if key is None:
        near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.4)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise UserError(f"--gpu {name!r} is not in the table{hint}; known: {', '.join(GPUS)}")
    peak = table_peak_flops(key)
    assert peak is not None
    return key, GPUS[key], peak


@dataclass(frozen=True)
class Collective:
    """What a step sends by one kind of collective."""

    kind: str
    count: int
    bytes: float
    """Size of the tensors, over a step."""
    wire_bytes: float
    """Bytes that each GPU sends (and receives)."""
    seconds: float


@dataclass(frozen=True)
class Network:
    """How fast GPUs reach each other. Bytes per second of one GPU, one way."""

    intra: float
    inter: float
    per_node: int
    utilisation: float

    def rate(self, group: int, one_per_node: bool = False) -> float:
        """Rate of a ring over ``group`` GPUs. Within a node it is that of the node's links. Across nodes the ring's channels
        share all network cards of a node; with ``one_per_node``, one GPU of each node, it is one card's."""
        if one_per_node:
            return self.inter * self.utilisation
        across = self.intra if group <= self.per_node else min(self.intra, self.inter * self.per_node)
        return across * self.utilisation

    def collective(self, kind: str, count: int, size: float, group: int, one_per_node: bool = False) -> Collective:
        times = 2 if kind == "all-reduce" else 1
        wire = times * size * (group - 1) / group
        seconds = wire / self.rate(group, one_per_node) + count * HOP * math.ceil(math.log2(group))
        return Collective(kind, count, size, wire, seconds)


def collectives(
    sizes: Sizes, mode: Mode, world: int, shards: int, micro_batches: int, size: int, network: Network
) -> list[Collective]:
    """What a step sends. The core is gathered once for all its iterations and all micro-batches. A block of prelude or coda
    is gathered for the first forward and for each backward. Gradients, fp32, are sent once."""
    if world == 1:
        return []
    if mode == "ddp":
        size_all = 4.0 * sizes.total
        return [network.collective("all-reduce", math.ceil(size_all / BUCKET), size_all, world)]
    if mode not in ("fsdp", "hsdp"):
        return []
    gathers = sizes.ends * (1 + micro_batches)
    gathered = size * (gathers * sizes.block + sizes.core) + 4.0 * sizes.rest
    units = sizes.ends + 2
    found = [
        network.collective("all-gather", gathers + 2, gathered, shards),
        network.collective("reduce-scatter", units, 4.0 * sizes.total, shards),
    ]
    if mode == "hsdp":
        part = 4.0 * sizes.total / shards
        found.append(network.collective("all-reduce", units, part, world // shards, one_per_node=True))
    return found


@dataclass(frozen=True)
class Estimate:
    """One mode on one number of GPUs."""

    mode: Mode
    gpus: int
    shards: int
    sequences: int
    """Of a micro-batch."""
    micro_batches: int
    memory: dict[str, int]
    """Bytes per GPU by part at the peak."""
    peak_bytes: int
    fits: bool
    collectives: list[Collective]
    compute_seconds: float
    communication_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return self.compute_seconds + self.communication_seconds

    @property
    def communication_share(self) -> float:
        return self.communication_seconds / self.seconds


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, the rate they reach, and the network between them."""

    name: str
    """The GPU's name in the table."""
    gpu: Gpu
    peak: float
    """Dense bf16 FLOPs per second of one GPU."""
    mfu: float
    """Share of the peak that a step's model FLOPs reach while nothing waits for the network."""
    network: Network


class Planner:
    """A configuration on a cluster, asked for different numbers of GPUs.

    Args:
        drawn: what the run's steps compute, and the share of each.
        inference: what the recurrence computes at K iterations.

    Raises:
        UserError: the model is in blocks.
    """

    def __init__(
        self, config: Config, cluster: Cluster, drawn: Mapping[Passes, float], inference: Callable[[int], Passes]
    ) -> None:
        if config.model.n_blocks:
            raise UserError(
                "a plan is for looped models; a model in blocks trains each block alone: recurrent-db flops CONFIG lists"
                " what each takes"
            )
        self.config, self.cluster, self.inference = config, cluster, inference
        self.sizes = Sizes.of(config)
        self.half = config.run.dtype != "float32"
        self.deepest = max(drawn, key=lambda passes: (passes.core_grad, passes.core_no_grad))
        self.tokens = config.data.batch_size * config.data.sequence_length
        per_token = sum(step_cost(config, passes).total * share for passes, share in drawn.items())
        self.step_flops = per_token * self.tokens

    def modes(self, gpus: int) -> list[tuple[Mode, int]]:
        """Ways to share the model that the configuration allows, and how many GPUs hold one copy of it."""
        parallel = self.config.parallel
        group = parallel.shard_size or self.cluster.network.per_node
        hybrid: list[tuple[Mode, int]] = [("hsdp", group)] if 1 < group < gpus and gpus % group == 0 else []
        if gpus == 1:
            return [("none", 1)]
        if parallel.mode == "fsdp":
            return hybrid if parallel.shard_size and hybrid else [("fsdp", gpus), *hybrid]
        if parallel.mode == "ddp" or self.config.optim.name == "muon":
            return [("ddp", 1)]
        return [("ddp", 1), ("fsdp", gpus), *hybrid]

    def estimate(self, gpus: int, mode: Mode, shards: int) -> Estimate:
        share = self.config.data.batch_size // gpus
        sequences = min(self.config.data.micro_batch_size or share, share)
        micro_batches = math.ceil(share / sequences)
        step = Step(self.config, sequences, micro_batches, self.deepest, mode, shards, self.half, cuda=True)
        line = step.timeline()
        sent = collectives(self.sizes, mode, gpus, shards, micro_batches, step.size, self.cluster.network)
        return Estimate(
            mode, gpus, shards, sequences, micro_batches,
            {part: line.peak.get(part, 0) for part in PARTS}, line.largest, line.largest <= USABLE * self.cluster.gpu.memory,
            sent, self.step_flops / (gpus * self.cluster.peak * self.cluster.mfu), sum(c.seconds for c in sent),
        )  # fmt: skip

    def divides(self, gpus: int) -> bool:
        return self.config.data.batch_size % gpus == 0

    def estimates(self, gpus: int) -> list[Estimate]:
        return [self.estimate(gpus, mode, shards) for mode, shards in self.modes(gpus)]

    def best(self, gpus: int) -> Estimate:
        """The fastest mode that fits; if none fits, the smallest."""
        found = self.estimates(gpus)
        fitting = [e for e in found if e.fits]
        return min(fitting, key=lambda e: e.seconds) if fitting else min(found, key=lambda e: e.peak_bytes)

    def remedies(self, gpus: int) -> list[str]:
        """Changes that make the model fit; each was tried."""
        run, data, found = self.config.run, self.config.data, []
        before = run.activation_checkpointing, data.micro_batch_size
        sequences = self.best(gpus).sequences
        checkpointing, halves = [False, *([True] if not before[0] else [])], [sequences]
        while halves[-1] > 1:
            halves.append(halves[-1] // 2)
        for again in checkpointing:
            for half in halves:
                run.activation_checkpointing, data.micro_batch_size = before[0] or again, half
                if self.best(gpus).fits:
                    words = ["--run.activation-checkpointing"] if again else []
                    words += [f"--data.micro-batch-size {half}"] if half < sequences else []
                    found.append(f"{' '.join(words)} (with {self.best(gpus).mode})")
                    break
        run.activation_checkpointing, data.micro_batch_size = before
        more = next((n for n in COUNTS if n > gpus and self.divides(n) and self.best(n).fits), None)
        if more is not None:
            found.append(f"{more} GPUs (with {self.best(more).mode})")
        return found

    def steps(self) -> float | None:
        """Optimizer steps until the first limit of the budget is reached."""
        budget = self.config.budget
        limits = [(budget.steps, 1.0), (budget.tokens, self.tokens), (budget.flops, self.step_flops)]
        counts = [limit / each for limit, each in limits if limit is not None]
        return min(counts) if counts else None

    def cache_bytes(self) -> dict[int, int]:
        """Bytes of a key-value cache in bfloat16 for one sequence of the longest context, by K."""
        numbers = {k: cache_numbers_per_token(self.config.model, self.inference(k)) for k in self.config.eval.k}
        return {k: 2 * count * self.config.model.max_seq_len for k, count in numbers.items()}


def _row(planner: Planner, e: Estimate) -> dict[str, Any]:
    steps = planner.steps()
    return {
        **{k: v for k, v in asdict(e).items() if k != "collectives"},
        "collectives": [asdict(c) for c in e.collectives],
        "step_seconds": e.seconds,
        "communication_share": e.communication_share,
        "tokens_per_s": planner.tokens / e.seconds,
        "budget_seconds": None if steps is None else steps * e.seconds,
    }


def table(planner: Planner, gpus: int) -> dict[str, Any]:
    """Everything that the command prints, as plain values."""
    fits = planner.best(gpus).fits
    return {
        "gpu": planner.cluster.name,
        "gpus": gpus,
        "objective": planner.config.objective.name,
        "parameters": asdict(planner.sizes) | {"total": planner.sizes.total},
        "memory_per_gpu_bytes": planner.cluster.gpu.memory,
        "usable_share": USABLE,
        "peak_flops": planner.cluster.peak,
        "mfu": planner.cluster.mfu,
        "network": asdict(planner.cluster.network),
        "tokens_per_step": planner.tokens,
        "flops_per_step": planner.step_flops,
        "core_iterations_backpropagated": planner.deepest.core_grad,
        "modes": [_row(planner, e) for e in planner.estimates(gpus)],
        "best": planner.best(gpus).mode,
        "fits": fits,
        "remedies": [] if fits else planner.remedies(gpus),
        "by_gpus": [_row(planner, planner.best(n)) for n in COUNTS if planner.divides(n)],
        "cache_bytes": planner.cache_bytes(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The printed plan


def lines(planner: Planner, gpus: int, source: str) -> list[str]:
    """The printed plan."""
    config, estimates, best = planner.config, planner.estimates(gpus), planner.best(gpus)
    return [
        f"{source}: {config.objective.name} on {gpus} x {planner.cluster.name}, {planner.sizes.total:,} parameters",
        f"a step: {config.data.batch_size:,} sequences of {config.data.sequence_length:,} = {planner.tokens:,} tokens,"
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
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _budget(planner: Planner, estimate: Estimate) -> str:
    steps = planner.steps()
    return "none set" if steps is None else duration(steps * estimate.seconds)


def _memory_lines(planner: Planner, gpus: int, estimates: list[Estimate]) -> list[str]:
    """Memory by part and mode, and what would fit if nothing does."""
    cells = lambda words: "".join(f"{word:>10}" for word in words)  # noqa: E731
    out = [
        "GB per GPU at the peak      " + cells(e.mode for e in estimates),
        *(
            f"  {part:<26}" + cells(_gb(e.memory[part]) for e in estimates)
            for part in PARTS
            if any(e.memory[part] for e in estimates)
        ),
        "  all                       " + cells(_gb(e.peak_bytes) for e in estimates),
        f"  fits in {_gb(USABLE * planner.cluster.gpu.memory)}            "
        + cells("yes" if e.fits else "no" for e in estimates),
        "",
    ]
    best = planner.best(gpus)
    if not best.fits:
        remedies = planner.remedies(gpus)
        told = (
            f"what fits: {'; or '.join(remedies)}"
            if remedies
            else "neither checkpointing, smaller micro-batches nor more GPUs help"
        )
        out += [
            f"does not fit on {gpus} x {planner.cluster.name}: {_gb(best.peak_bytes)} GB in its smallest mode; {told}",
            "",
        ]
    return out


def _network_lines(estimates: list[Estimate]) -> list[str]:
    out = [f"{'a step sends':<14}{'kind':<16}{'count':>7}{'GB':>10}{'GB on the wire':>16}{'seconds':>10}"]
    for e in estimates:
        out += [
            f"{e.mode:<14}{c.kind:<16}{c.count:>7}{c.bytes / 1e9:>10.2f}{c.wire_bytes / 1e9:>16.2f}{c.seconds:>10.4f}"
            for c in e.collectives
        ] or [f"{e.mode:<14}nothing"]
    return out


def _time_lines(planner: Planner, estimates: list[Estimate]) -> list[str]:
    out = [f"{'time':<14}{'compute s':>12}{'network s':>12}{'its share':>11}{'tokens/s':>14}{'budget':>16}"]
    for e in estimates:
        out.append(
            f"{e.mode:<14}{e.compute_seconds:>12.3f}{e.communication_seconds:>12.4f}{e.communication_share:>11.1%}"
            f"{planner.tokens / e.seconds:>14,.0f}{_budget(planner, e):>16}"
        )
    return out


def _scaling_lines(planner: Planner) -> list[str]:
    """The best mode on each number of GPUs."""
    out = [
        "from 1 to 1,024 GPUs, the fastest mode that fits",
        f"{'GPUs':>6} {'mode':<6}{'fits':>5}{'GB per GPU':>12}{'micro':>9}{'network':>9}{'tokens/s':>14}{'budget':>16}",
    ]
    for n in COUNTS:
        if not planner.divides(n):
            out.append(f"{n:>6} data.batch_size = {planner.config.data.batch_size} does not divide among them")
            continue
        e = planner.best(n)
        out.append(
            f"{n:>6} {e.mode:<6}{'yes' if e.fits else 'no':>5}{_gb(e.peak_bytes):>12}{e.micro_batches:>5} x {e.sequences:<2}"
            f"{e.communication_share:>8.1%}{planner.tokens / e.seconds:>14,.0f}{_budget(planner, e):>16}"
        )
    return out


def _inference_lines(planner: Planner) -> list[str]:
    cache = ", ".join(f"K={k}: {size / 1e9:.3g} GB" for k, size in planner.cache_bytes().items())
    length = planner.config.model.max_seq_len
    return [f"inference: a bfloat16 key-value cache of {length:,} tokens, for each sequence: {cache}"]


def _assumption_lines(planner: Planner) -> list[str]:
    deepest, cluster, network = planner.deepest, planner.cluster, planner.cluster.network
    return [
        "assumed:",
        f"- memory: {cluster.gpu.memory / 1e9:.0f} GB a GPU, of which tensors may fill {USABLE:.0%}; the"
        f" deepest of {DRAWS} drawn steps"
        f" ({deepest.core_grad} backpropagated core iterations, {deepest.core_no_grad} without); eager,"
        f"{' bfloat16 autocast over' if planner.half else ''} fp32 weights; a mask for packed documents",
        "- sharding: blocks of prelude and coda are units; the core is one, gathered once for all its iterations and held"
        " until the step's last backward; embedding, norms and noise embedding once, in fp32; gradients sent once, in"
        " fp32, and held whole until then where there is more than one micro-batch",
        f"- compute: {cluster.mfu:.0%} of {cluster.peak / 1e12:,.0f} TFLOP/s (bf16, dense), model FLOPs,"
        f" the mean of the drawn depths",
        f"- network: {network.intra / 1e9:g} GB/s a GPU within nodes of {network.per_node},"
        f" {network.inter / 1e9:g} GB/s between them, {network.utilisation:.0%} of it reached,"
        f" {HOP * 1e6:.0f} us for each doubling of GPUs in each collective; nothing overlaps",
        "- evaluation, checkpoints and the update's own time are not counted",
    ]
