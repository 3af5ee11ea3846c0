"""Memory of a training step before it is run: what each part of it holds, when, and how much that is at the peak.

A step is walked through in its own order (gather, forward, head, backward, update) at the grain of blocks; each event
holds or lets go of so many bytes of one part, and the peak is the largest sum on the way. What a block keeps for its
backward is counted tensor by tensor from the model's code; what lives for a moment inside a block is the largest such
moment. `benchmarks/speed/footprint.py` measures the same steps on a CPU and prints both.

Sharding as the trainer does it: each block of prelude and coda is a unit of FSDP, gathered for its forward and again for
its backward; the core is one unit, gathered once and kept until its last backward, whatever K is; embedding, norms and
noise embedding are the rest, gathered once, in fp32. Gradients are exchanged in the last micro-batch alone.

Shapes: N tokens of a micro-batch (B sequences of T), D width, M hidden width of the MLP, H heads, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from recurrent_db.accounting.flops import Passes
from recurrent_db.config import Config
from recurrent_db.model import build_model
from recurrent_db.model.head import chunk_rows
from recurrent_db.optim.optimizer import hidden_matrices

Mode = Literal["none", "ddp", "fsdp", "hsdp"]

PARTS = (
    "parameters", "gradients", "optimizer", "average", "gathered", "activations", "logits and head", "working",
    "communication",
)  # fmt: skip
"""What holds memory. ``gathered``: copies of weights to compute with, FSDP's or autocast's. ``working``: what lives for a
moment inside an operation or until an objective returns. ``communication``: buffers of collectives."""


@dataclass(frozen=True)
class Sizes:
    """Parameters by unit of sharding."""

    block: int
    """One block of prelude or coda."""
    core: int
    """Adapter and blocks of the core."""
    rest: int
    """Embedding, target table, final norm, noise embedding."""
    ends: int
    """How many blocks prelude and coda have together."""
    matrices: int
    """Entries of all linear layers' weights: what autocast makes half-precision copies of."""
    muon: int
    """Of these, what Muon updates."""
    widest: int
    """Entries of the largest matrix."""

    @property
    def total(self) -> int:
        return self.ends * self.block + self.core + self.rest

    @classmethod
    def of(cls, config: Config) -> Sizes:
        """From the model itself, on the meta device: nothing is allocated."""
        model = build_model(config.model, None, "meta")
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        total, core = count(model), count(model.core)
        ends = [count(block) for block in (*model.prelude, *model.coda)]
        weights = [p.numel() for p in hidden_matrices(model)]
        return cls(
            block=ends[0] if ends else 0,
            core=core,
            rest=total - core - sum(ends),
            ends=len(ends),
            matrices=sum(weights),
            muon=sum(weights) if config.optim.name == "muon" else 0,
            widest=max(weights),
        )


class Timeline:
    """Bytes held by part; remembers the split at the largest sum."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.largest = 0

    def hold(self, part: str, size: float) -> None:
        self.held[part] += round(size)
        if (now := sum(self.held.values())) > self.largest:
            self.largest, self.peak = now, dict(self.held)

    def drop(self, part: str, size: float) -> None:
        self.held[part] -= round(size)

    def pulse(self, part: str, size: float) -> None:
        """Hold for a moment."""
        self.hold(part, size)
        self.drop(part, size)


@dataclass(frozen=True)
class Step:
    """A training step of one process."""

    config: Config
    sequences: int
    """B of a micro-batch."""
    micro_batches: int = 1
    passes: Passes = Passes()  # noqa: RUF009
    """Of the deepest step."""
    mode: Mode = "none"
    shards: int = 1
    """Processes that share one copy of parameters, gradients and optimizer state."""
    half: bool = False
    """bfloat16 autocast."""
    cuda: bool = False
    masked: bool = True
    """Whether a batch's packed documents need a mask (sdpa keeps one; flash and flex keep none to speak of)."""

    # -- bytes for each token of a micro-batch ---------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        return self.sequences * self.config.data.sequence_length

    @property
    def size(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.half else 4

    def _norm(self) -> float:
        return 4 * self.config.model.d_model + 4  # normalised input and its scale, always fp32

    def block_saved(self, modulated: bool = False, levels: int = 1, beside: bool = False) -> float:
        """What one block keeps for its backward, bytes per token: four norms; the inputs of four matrix products; queries
        and keys (rotated, in one piece) and the fused projection's output, whose last third the values are a view of;
        attention's log-sum-exp; the MLP's gate and up and their products."""
        model, a = self.config.model, self.size
        width, hidden = model.d_model, model.d_mlp
        attention = 7 * width if beside else 6 * width  # beside another stream keys and values are copied together
        saved = 4 * self._norm() + a * (2 * width + attention + 4 * hidden) + 4 * model.n_heads
        if modulated:
            saved += a * 2 * width  # both branches, for the gates' gradient
            if self.cuda:
                saved += 4 * 2 * width  # PyTorch's own norm keeps its input, and the modulation its result
            if levels > 1:
                saved += 4 * 4 * width  # scales and gates of each token
        return saved

    def keys_values_saved(self) -> float:
        """A block of which only keys and values are made, bytes per token."""
        width, a = self.config.model.d_model, self.size
        return self._norm() + a * (width + 5 * width)

    def adapter_saved(self) -> float:
        width, a = self.config.model.d_model, self.size
        return {"linear": a * 2 * width, "diagonal": 4 * width + a * width, "add": 0}[self.config.model.injection]

    def iteration_saved(self) -> float:
        """One backpropagated core iteration, bytes per token."""
        passes = self.passes
        modulated = passes.noise_levels > 0
        block = self.block_saved(modulated, passes.noise_levels, passes.beside)
        return self.adapter_saved() + self.config.model.n_core * block

    def conditioning_saved(self) -> float:
        """The noise embedding, bytes: features, hidden layer before and after its activation, and the modulation."""
        model, passes = self.config.model, self.passes
        if not passes.noise_levels:
            return 0.0
        rows = self.sequences * passes.noise_levels
        return 4.0 * rows * (3 * model.d_condition + 6 * model.n_core * model.d_model)

    def backward_working(self) -> float:
        """The largest moment of a block's backward, bytes: the gradients of the MLP's gate and up and of their product, and
        what they are made of. The residual stream's gradients take the place of what the norm before kept."""
        model = self.config.model
        return self.tokens * self.size * 3 * model.d_mlp + 4 * model.d_mlp * model.d_model

    def forward_working(self) -> float:
        """The same of a block's forward without gradient."""
        model, a = self.config.model, self.size
        return a * 4 * model.d_mlp + 3 * 4 * model.d_model

    def locals(self) -> float:
        """What an objective holds until it returns, bytes per token: context, state, hidden vectors; for a denoiser noise,
        clean and noisy target and estimate too."""
        width = self.config.model.d_model
        if self.passes.noise_levels:
            return 4.0 * width * 5 + self.size * width
        return 4.0 * width + 2 * self.size * width

    # -- the walk ------------------------------------------------------------------------------------------------------

    def walk(self) -> Timeline:
        """A step from its first micro-batch to its update. Later micro-batches hold what the second one holds."""
        config, model, sizes, line = self.config, self.config.model, Sizes.of(self.config), Timeline()
        tokens, width, passes = self.tokens, model.d_model, self.passes
        sharded = self.mode in ("fsdp", "hsdp")
        part = self.shards if sharded else 1
        rest_bytes = 4 * sizes.rest
        work = self.size if sharded else 4
        """Bytes of a number in gathered blocks."""

        line.hold("parameters", 4 * sizes.total / part)
        line.hold("optimizer", 4 * (2 * (sizes.total - sizes.muon) + sizes.muon) / part)
        if config.optim.ema_decay:
            line.hold("average", 4 * sizes.total / part)

        def gather(parameters: int, size: int) -> None:
            if part > 1:
                line.hold("gathered", size * parameters)
                line.pulse("communication", size * parameters)  # arrives in one piece, and is copied out

        def let_go(parameters: int, size: int) -> None:
            if part > 1:
                line.drop("gathered", size * parameters)

        def gradients(parameters: int, again: bool, last: bool) -> None:
            """A unit's gradient is complete: added to an earlier micro-batch's, then, sharded, sent away."""
            line.drop("gradients", 4 * parameters) if again else None
            if sharded and last and part > 1:
                line.pulse("communication", 4 * parameters * (1 + 1 / part))
                line.drop("gradients", 4 * parameters)
                line.hold("gradients", 4 * parameters / part)

        saved_block, saved_iteration = tokens * self.block_saved(), tokens * self.iteration_saved()
        kept_iteration = tokens * self.size * width if config.run.activation_checkpointing else saved_iteration
        clean = 0.0
        if passes.clean_grad:
            clean = tokens * (self.adapter_saved() + (model.n_core - 1) * self.block_saved() + self.keys_values_saved())
        ends = [model.n_prelude, model.n_coda]
        small = 16 * tokens + self.conditioning_saved() + 2 * tokens * self._norm()
        if passes.noise_levels:
            small += tokens * (4 * width + 12)  # target rows and their norms
        if config.run.activation_checkpointing:
            small += tokens * 4 * width  # the context, which every iteration's input refers to
        mask = 0
        if self.masked and config.data.document_mask:
            mask = self.sequences * config.data.sequence_length**2 * (1 if self.cuda else self.size)
        steps = min(self.micro_batches, 2)
        casts = 2 * sizes.matrices if self.half and not sharded else 0

        gather(sizes.rest, 4)
        for number in range(steps):
            again, last = number > 0, number == steps - 1
            # Forward
            line.hold("gathered", casts)
            line.hold("activations", small + mask)
            for count, where in zip(ends, ("prelude", "coda"), strict=True):
                if where == "coda":
                    if not again:
                        gather(sizes.core, work)
                    if passes.core_no_grad:
                        line.pulse("working", tokens * self.forward_working())
                    line.hold("activations", clean)
                    for _ in range(passes.core_grad):
                        line.hold("activations", kept_iteration)
                for _ in range(count):
                    gather(sizes.block, work)
                    line.pulse("gathered", work * sizes.block if part > 1 else 0)  # the next one is fetched early
                    line.hold("activations", saved_block)
                    let_go(sizes.block, work)
            line.hold("working", tokens * self.locals())
            table = 4 * model.vocab_size * width
            rows = min(chunk_rows(tokens), tokens)
            line.hold("gradients", table)
            line.hold("logits and head", tokens * width * self.size)
            # Logits and their softmax; of half-precision logits a CPU makes a wide copy first.
            chunk = rows * model.vocab_size * (10 if self.half and not self.cuda else 8)
            line.pulse("logits and head", chunk + (2 * model.vocab_size * width if self.half else 0))
            line.drop("working", tokens * self.locals())
            # Backward
            working = self.backward_working()
            for count, where in zip(reversed(ends), ("coda", "prelude"), strict=True):
                if where == "prelude":
                    line.drop("logits and head", tokens * width * self.size)
                    each = sizes.core / model.n_core
                    for index in range(passes.core_grad):
                        line.drop("activations", kept_iteration)
                        line.hold("activations", saved_iteration)
                        for _ in range(model.n_core):
                            line.pulse("working", working + (4 * sizes.widest if index else 0))
                            line.hold("gradients", 0 if index else 4 * each)
                            line.drop("activations", saved_iteration / model.n_core)
                    line.drop("activations", clean)
                    gradients(sizes.core, again, last)
                    if last:
                        let_go(sizes.core, work)
                for _ in range(count):
                    gather(sizes.block, work)
                    line.pulse("gathered", work * sizes.block if part > 1 else 0)
                    line.pulse("working", working)
                    line.hold("gradients", 4 * sizes.block)
                    line.drop("activations", saved_block)
                    let_go(sizes.block, work)
                    gradients(sizes.block, again, last)
            line.hold("gradients", 4 * (sizes.rest - model.vocab_size * width))
            gradients(sizes.rest, again, last)
            line.drop("activations", small + mask)
            line.drop("gathered", casts)
        if part > 1:
            line.drop("gathered", rest_bytes)
        # Update
        if config.optim.ema_decay:
            line.pulse("working", 4 * sizes.total / part)
        if sizes.muon:
            # What a step that may be skipped puts back, Nesterov's sum, and the half-precision matrices of Newton-Schulz.
            line.pulse("working", sizes.widest * (4 * 3 + 2 * 4))
        line.drop("gradients", line.held["gradients"])
        return line
