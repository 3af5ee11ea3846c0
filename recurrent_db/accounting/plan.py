"""Estimates the memory, communication and time of a training run before it starts.

Memory comes from `step_memory`, for the deepest of the run's first steps. FLOPs come from `flops`, as the mean over the same
steps. The time of a step is its FLOPs divided by the GPUs' peak times an assumed utilisation, plus its communication
divided by a share of the links' line rate. The estimate assumes no overlap, so a run that hides its communication is
faster. All assumptions are printed with the plan.
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
"""Number of steps, from the run's start, whose random depths a plan averages."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of GPUs that the scaling table compares."""
USABLE = 0.94
"""Share of a GPU's memory that tensors can fill. The CUDA context, NCCL's buffers and fragmentation take the rest."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP sends at once (PyTorch's default)."""
HOP = 20e-6
"""Latency of a collective in seconds, for each doubling of the number of GPUs."""


def find_gpu(name: str) -> tuple[str, Gpu, float]:
    """Look up a GPU by name, in any case and with or without "NVIDIA ".

    Returns:
        Its name in `GPUS`, its entry, and its peak in dense bf16 FLOPs per second.

    Raises:
        UserError: the GPU is not in the table. The message suggests a similar name.
    """
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
    """The collectives of one kind in a training step."""

    kind: str
    """all-reduce, all-gather or reduce-scatter."""
    count: int
    """Collectives per step."""
    bytes: float
    """Total size of the tensors, per step."""
    wire_bytes: float
    """Bytes that each GPU sends, and receives, per step."""
    seconds: float
    """Time per step."""


@dataclass(frozen=True)
class Network:
    """Links between GPUs. Rates are bytes per second of one GPU, one way."""

    intra: float
    """Rate of the links within a node."""
    inter: float
    """Rate of a GPU's share of its node's network."""
    per_node: int
    """GPUs per node."""
    utilisation: float
    """Share of these rates that collectives reach (0 to 1)."""

    def rate(self, group: int, one_per_node: bool = False) -> float:
        """Bytes per second per GPU of a ring over ``group`` GPUs.

        Within a node the node's links set the rate. Across nodes the ring uses all network cards of a node, unless the group
        has only one GPU in each node (``one_per_node``): then it uses one card.
        """
        if one_per_node:
            return self.inter * self.utilisation
        across = self.intra if group <= self.per_node else min(self.intra, self.inter * self.per_node)
        return across * self.utilisation

    def collective(self, kind: str, count: int, size: float, group: int, one_per_node: bool = False) -> Collective:
        """The cost of ``count`` collectives of tensors with ``size`` bytes in all, over ``group`` GPUs."""
        times = 2 if kind == "all-reduce" else 1
        wire = times * size * (group - 1) / group
        seconds = wire / self.rate(group, one_per_node) + count * HOP * math.ceil(math.log2(group))
        return Collective(kind, count, size, wire, seconds)


def collectives(
    sizes: Sizes, mode: Mode, world: int, shards: int, micro_batches: int, size: int, network: Network
) -> list[Collective]:
    """The collectives of one training step.

    FSDP gathers the core once per step, for all iterations and micro-batches. It gathers a block of prelude or coda for the
    first forward pass and for each backward pass. Gradients are sent once per step, in fp32.

    Args:
        sizes: parameters by sharding unit.
        world: number of GPUs.
        shards: number of GPUs that hold one copy of the model.
        size: bytes per number of the gathered blocks.
    """
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
    """The estimate for one parallel mode on one number of GPUs."""

    mode: Mode
    gpus: int
    shards: int
    """GPUs that hold one copy of the model."""
    sequences: int
    """Sequences per micro-batch."""
    micro_batches: int
    """Micro-batches per step and GPU."""
    memory: dict[str, int]
    """Bytes per GPU at the peak, by part."""
    peak_bytes: int
    """Bytes per GPU at the peak."""
    fits: bool
    """Whether the peak fits into the usable memory of a GPU."""
    collectives: list[Collective]
    compute_seconds: float
    """Seconds of computation per step."""
    communication_seconds: float
    """Seconds of communication per step."""

    @property
    def seconds(self) -> float:
        """Seconds per step, without overlap."""
        return self.compute_seconds + self.communication_seconds

    @property
    def communication_share(self) -> float:
        """Share of a step's time spent in communication."""
        return self.communication_seconds / self.seconds


@dataclass(frozen=True)
class Cluster:
    """GPUs of one type, their speed, and the network between them."""

    name: str
    """The GPU's name in `GPUS`."""
    gpu: Gpu
    peak: float
    """Dense bf16 FLOPs per second of one GPU."""
    mfu: float
    """Share of the peak that a step reaches in model FLOPs while it does not wait for the network (0 to 1)."""
    network: Network


class Planner:
    """Estimates for one configuration on a cluster, for any number of GPUs.

    Args:
        drawn: the different steps of the run, and the share of each among all steps.
        inference: K -> what inference with K iterations computes.

    Raises:
        UserError: the model is in blocks.
    """

    def __init__(
        self, config: Config, cluster: Cluster, drawn: Mapping[Passes, float], inference: Callable[[int], Passes]
    ) -> None:
        if config.model.n_blocks:
            raise UserError(
                "recurrent-db plan does not support models in blocks: recurrent-db flops CONFIG lists the cost of each"
                " block"
            )
        self.config, self.cluster, self.inference = config, cluster, inference
        self.sizes = Sizes.of(config)
        self.half = config.run.dtype != "float32"
        self.deepest = max(drawn, key=lambda passes: (passes.core_grad, passes.core_no_grad))
        self.tokens = config.data.batch_size * config.data.sequence_length
        per_token = sum(step_cost(config, passes).total * share for passes, share in drawn.items())
        self.step_flops = per_token * self.tokens

    def modes(self, gpus: int) -> list[tuple[Mode, int]]:
        """The parallel modes that the configuration allows, each with the number of GPUs that hold one copy of the model."""
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
        """The estimate for one of `modes`."""
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
        """Whether the batch divides evenly among ``gpus`` GPUs."""
        return self.config.data.batch_size % gpus == 0

    def estimates(self, gpus: int) -> list[Estimate]:
        """An estimate for each of `modes`."""
        return [self.estimate(gpus, mode, shards) for mode, shards in self.modes(gpus)]

    def best(self, gpus: int) -> Estimate:
        """The fastest mode that fits into memory. If none fits, the mode with the lowest peak."""
        found = self.estimates(gpus)
        fitting = [e for e in found if e.fits]
        return min(fitting, key=lambda e: e.seconds) if fitting else min(found, key=lambda e: e.peak_bytes)

    def remedies(self, gpus: int) -> list[str]:
        """Changes that make the model fit into memory. Each one was checked by an estimate."""
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
        """Optimizer steps until the first limit of the budget is reached; None without a limit other than seconds."""
        budget = self.config.budget
        limits = [(budget.steps, 1.0), (budget.tokens, self.tokens), (budget.flops, self.step_flops)]
        counts = [limit / each for limit, each in limits if limit is not None]
        return min(counts) if counts else None

    def cache_bytes(self) -> dict[int, int]:
        """Bytes of a bfloat16 key-value cache for one sequence of ``model.max_seq_len`` tokens, by K."""
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
    """The plan as JSON values, for ``--json``."""
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
