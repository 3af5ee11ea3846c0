"""Predicts the memory of a training step before it is run: how many bytes each part holds at the peak.

`Step.timeline` replays a step in its own order (gather, forward, head, backward, update), block by block. Each event
holds or drops some bytes of one part; the peak is the largest sum. What a block keeps for its backward is counted tensor
by tensor from the model's code; of what lives for a moment inside a block, the largest moment counts.
`benchmarks/speed/footprint.py` measures the same steps on a CPU and prints both.

Sharding follows the trainer. Each block of prelude and coda is a unit of FSDP, gathered for its forward and again for
its backward. The core is one unit, gathered once and kept until its last backward, whatever K is. Embedding, norms and
noise embedding are gathered once, in fp32. Gradients are exchanged in the last micro-batch alone.

Shapes: N tokens of a micro-batch (B sequences of T), D width, M hidden width of the MLP, H heads, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from recurrent_db.config import Config
from recurrent_db.model import build_model
from recurrent_db.model.head import chunk_rows
from recurrent_db.model.passes import Passes
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
    """Embedding, final norm, noise embedding."""
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
        """What a block keeps if it makes only keys and values, bytes per token."""
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

    def clean_saved(self) -> float:
        """What two-stream conditioning's clean stream keeps for its backward, bytes per token."""
        if not self.passes.clean_grad:
            return 0.0
        return self.adapter_saved() + (self.config.model.n_core - 1) * self.block_saved() + self.keys_values_saved()

    def locals(self) -> float:
        """What an objective holds until it returns, bytes per token: context, state, hidden vectors; for a denoiser noise,
        clean and noisy target and estimate too."""
        width = self.config.model.d_model
        if self.passes.noise_levels:
            return 4.0 * width * 5 + self.size * width
        return 4.0 * width + 2 * self.size * width

    # -- bytes of a micro-batch -----------------------------------------------------------------------------------------

    def beside_blocks(self) -> float:
        """What a micro-batch keeps for its backward outside of all blocks, bytes."""
        tokens, width = self.tokens, self.config.model.d_model
        kept = 16 * tokens + self.conditioning_saved() + 2 * tokens * self._norm()
        if self.passes.noise_levels:
            kept += tokens * (4 * width + 12)  # target rows and their norms
        if self.config.run.activation_checkpointing:
            kept += tokens * 4 * width  # the context, which every iteration's input refers to
        return kept

    def mask(self) -> int:
        """The mask of packed documents, bytes."""
        data = self.config.data
        if not (self.masked and data.document_mask):
            return 0
        return self.sequences * data.sequence_length**2 * (1 if self.cuda else self.size)

    def timeline(self) -> Timeline:
        """What the step holds from its first micro-batch to its update. Later micro-batches hold what the second holds."""
        return _Replay(self).run()


class _Replay:
    """One replay of a step on a `Timeline`."""

    def __init__(self, step: Step) -> None:
        config, tokens = step.config, step.tokens
        self.step, self.config, self.model, self.tokens = step, config, config.model, tokens
        self.sizes, self.line = Sizes.of(config), Timeline()
        self.sharded = step.mode in ("fsdp", "hsdp")
        self.part = step.shards if self.sharded else 1
        self.gathered_size = step.size if self.sharded else 4
        """Bytes of a number in gathered blocks."""
        self.casts = 2 * self.sizes.matrices if step.half and not self.sharded else 0
        """Autocast's half-precision copies of the weights."""
        self.block = tokens * step.block_saved()
        self.iteration = tokens * step.iteration_saved()
        checkpointed = config.run.activation_checkpointing
        self.kept_iteration = tokens * step.size * self.model.d_model if checkpointed else self.iteration
        self.clean = tokens * step.clean_saved()
        self.other = step.beside_blocks() + step.mask()

    def run(self) -> Timeline:
        line, sizes = self.line, self.sizes
        line.hold("parameters", 4 * sizes.total / self.part)
        line.hold("optimizer", 4 * (2 * (sizes.total - sizes.muon) + sizes.muon) / self.part)
        if self.config.optim.ema_decay:
            line.hold("average", 4 * sizes.total / self.part)
        self.gather(sizes.rest, 4)
        count = min(self.step.micro_batches, 2)
        for number in range(count):
            again, last = number > 0, number == count - 1
            line.hold("gathered", self.casts)
            line.hold("activations", self.other)
            self.forward(again)
            self.head()
            self.backward(again, last)
            line.drop("activations", self.other)
            line.drop("gathered", self.casts)
        self.let_go(sizes.rest, 4)
        self.update()
        return line

    # -- units of sharding ---------------------------------------------------------------------------------------------

    def gather(self, parameters: int, size: int) -> None:
        if self.part > 1:
            self.line.hold("gathered", size * parameters)
            self.line.pulse("communication", size * parameters)  # arrives in one piece, and is copied out

    def let_go(self, parameters: int, size: int) -> None:
        if self.part > 1:
            self.line.drop("gathered", size * parameters)

    def gather_block(self) -> None:
        size = self.gathered_size * self.sizes.block
        self.gather(self.sizes.block, self.gathered_size)
        self.line.pulse("gathered", size if self.part > 1 else 0)  # the next one is fetched early

    def gradients(self, parameters: int, again: bool, last: bool) -> None:
        """A unit's gradient is complete: added to an earlier micro-batch's, then, sharded, sent away."""
        line, part = self.line, self.part
        if again:
            line.drop("gradients", 4 * parameters)
        if self.sharded and last and part > 1:
            line.pulse("communication", 4 * parameters * (1 + 1 / part))
            line.drop("gradients", 4 * parameters)
            line.hold("gradients", 4 * parameters / part)

    # -- phases --------------------------------------------------------------------------------------------------------

    def forward(self, again: bool) -> None:
        self.blocks_forward(self.model.n_prelude)
        if not again:
            self.gather(self.sizes.core, self.gathered_size)
        if self.step.passes.core_no_grad:
            self.line.pulse("working", self.tokens * self.step.forward_working())
        self.line.hold("activations", self.clean)
        for _ in range(self.step.passes.core_grad):
            self.line.hold("activations", self.kept_iteration)
        self.blocks_forward(self.model.n_coda)

    def blocks_forward(self, count: int) -> None:
        """Blocks of prelude or coda."""
        for _ in range(count):
            self.gather_block()
            self.line.hold("activations", self.block)
            self.let_go(self.sizes.block, self.gathered_size)

    def head(self) -> None:
        """The fused cross-entropy: forward, and the gradients of the embedding and of the hidden vectors."""
        line, step, tokens = self.line, self.step, self.tokens
        vocabulary, width = self.model.vocab_size, self.model.d_model
        line.hold("working", tokens * step.locals())
        line.hold("gradients", 4 * vocabulary * width)
        line.hold("logits and head", tokens * width * step.size)
        # Logits and their softmax; of half-precision logits a CPU makes a wide copy first.
        chunk = min(chunk_rows(tokens), tokens) * vocabulary * (10 if step.half and not step.cuda else 8)
        line.pulse("logits and head", chunk + (2 * vocabulary * width if step.half else 0))
        line.drop("working", tokens * step.locals())

    def backward(self, again: bool, last: bool) -> None:
        self.blocks_backward(self.model.n_coda, again, last)
        self.line.drop("logits and head", self.tokens * self.model.d_model * self.step.size)
        self.core_backward()
        self.line.drop("activations", self.clean)
        self.gradients(self.sizes.core, again, last)
        if last:
            self.let_go(self.sizes.core, self.gathered_size)
        self.blocks_backward(self.model.n_prelude, again, last)
        self.line.hold("gradients", 4 * (self.sizes.rest - self.model.vocab_size * self.model.d_model))
        self.gradients(self.sizes.rest, again, last)

    def blocks_backward(self, count: int, again: bool, last: bool) -> None:
        """Blocks of coda or prelude."""
        for _ in range(count):
            self.gather_block()
            self.line.pulse("working", self.step.backward_working())
            self.line.hold("gradients", 4 * self.sizes.block)
            self.line.drop("activations", self.block)
            self.let_go(self.sizes.block, self.gathered_size)
            self.gradients(self.sizes.block, again, last)

    def core_backward(self) -> None:
        line, n_core = self.line, self.model.n_core
        for index in range(self.step.passes.core_grad):
            line.drop("activations", self.kept_iteration)
            line.hold("activations", self.iteration)
            for _ in range(n_core):
                # Later iterations add their gradient to the first one's, by way of one more matrix.
                line.pulse("working", self.step.backward_working() + (4 * self.sizes.widest if index else 0))
                line.hold("gradients", 0 if index else 4 * self.sizes.core / n_core)
                line.drop("activations", self.iteration / n_core)

    def update(self) -> None:
        line, sizes = self.line, self.sizes
        if self.config.optim.ema_decay:
            line.pulse("working", 4 * sizes.total / self.part)
        if sizes.muon:
            # What a step that may be skipped puts back, Nesterov's sum, and the half-precision matrices of Newton-Schulz.
            line.pulse("working", sizes.widest * (4 * 3 + 2 * 4))
        line.drop("gradients", line.held["gradients"])
