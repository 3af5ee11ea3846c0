"""Predicts the memory of a training step: the bytes that each part holds at the peak.

`Step.timeline` replays a step in order (gather, forward, head, backward, update), block by block. Each event allocates or
frees bytes of one part, and the peak is the largest sum. The tensors that a block keeps for its backward pass are counted
one by one from the model's code. Of the temporary tensors inside a block, only their largest sum is counted.
`benchmarks/speed/footprint.py` measures the same steps on a CPU and prints both.

Sharding is that of the trainer. Each block of prelude and coda is an FSDP unit, gathered for its forward pass and again for
its backward pass. The core is one unit, gathered once and kept until its last backward pass, for any K. Embedding, norms
and noise embedding are gathered once, in fp32. Gradients are exchanged only in the last micro-batch.

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
"""The parts that memory is split into.

``gathered``: copies of weights made by FSDP or autocast. ``working``: temporary tensors inside operations, and local
variables of an objective. ``communication``: buffers of collectives."""


@dataclass(frozen=True)
class Sizes:
    """Number of parameters by sharding unit."""

    block: int
    """Parameters of one block of prelude or coda."""
    core: int
    """Parameters of the core's adapter and blocks."""
    rest: int
    """Parameters of embedding, final norm and noise embedding."""
    ends: int
    """Number of blocks in prelude and coda together."""
    matrices: int
    """Entries of the weights of all linear layers, which autocast copies to half precision."""
    muon: int
    """The part of ``matrices`` that Muon updates."""
    widest: int
    """Entries of the largest matrix."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.ends * self.block + self.core + self.rest

    @classmethod
    def of(cls, config: Config) -> Sizes:
        """Count the parameters of a configuration's model. It is built on the meta device, without allocating memory."""
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
    """Bytes held by each part, and the split at the peak."""

    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        """Current bytes by part."""
        self.peak: dict[str, int] = {}
        """Bytes by part at the peak."""
        self.largest = 0
        """Bytes of all parts at the peak."""

    def hold(self, part: str, size: float) -> None:
        """Allocate ``size`` bytes of ``part``."""
        self.held[part] += round(size)
        if (now := sum(self.held.values())) > self.largest:
            self.largest, self.peak = now, dict(self.held)

    def drop(self, part: str, size: float) -> None:
        """Free ``size`` bytes of ``part``."""
        self.held[part] -= round(size)

    def pulse(self, part: str, size: float) -> None:
        """Allocate ``size`` bytes of ``part`` and free them at once."""
        self.hold(part, size)
        self.drop(part, size)


@dataclass(frozen=True)
class Step:
    """A training step of one process."""

    config: Config
    sequences: int
    """Sequences per micro-batch, B."""
    micro_batches: int = 1
    """Micro-batches per step."""
    passes: Passes = Passes()  # noqa: RUF009
    """Passes of the deepest step."""
    mode: Mode = "none"
    shards: int = 1
    """Processes that share one copy of parameters, gradients and optimizer state."""
    half: bool = False
    """Whether the step uses bfloat16 autocast."""
    cuda: bool = False
    """Whether the step runs on a GPU."""
    masked: bool = True
    """Whether packed documents need a dense attention mask, as with sdpa. The masks of flash and flex are negligible."""

    # -- bytes for each token of a micro-batch ---------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch, N."""
        return self.sequences * self.config.data.sequence_length

    @property
    def size(self) -> int:
        """Bytes per number in matrix products."""
        return 2 if self.half else 4

    def _norm(self) -> float:
        return 4 * self.config.model.d_model + 4  # normalised input and its scale, always fp32

    def block_saved(self, modulated: bool = False, levels: int = 1, beside: bool = False) -> float:
        """Bytes per token that one block keeps for its backward pass.

        These are: the norms; the inputs of four matrix products; the rotated queries and keys (one tensor); the output of
        the fused projection, whose last part holds the values; attention's log-sum-exp; the MLP's gate, up and product.
        Norms on queries and keys keep the fp32 normalised input and a scale for each head.

        Args:
            modulated: the block is conditioned on noise.
            levels: noise levels per sequence.
            beside: the block attends to a second stream.
        """
        model, a = self.config.model, self.size
        width, hidden = model.d_model, model.d_mlp
        mixed, keys = model.n_heads * model.d_head, model.kv_heads * model.d_head
        # With a second stream the keys and values of both streams are copied together.
        attention = 2 * mixed + keys + (4 * keys if beside else self._values())
        norms = {"huginn": 4, "llama": 2, "neox": 1}[model.layer]  # neox: both LayerNorms keep their common input
        products = 2 if model.layer == "neox" else 4
        saved = norms * self._norm() + a * (2 * width + attention + products * hidden) + 4 * model.n_heads
        if model.qk_norm:
            saved += 4 * (mixed + keys) + 4 * (model.n_heads + model.kv_heads)
        if modulated:
            saved += a * 2 * width  # outputs of both branches, for the gradient of the gates
            if model.layer == "neox":
                saved += 4 * 2 * width  # the modulation keeps the results of both LayerNorms
            if self.cuda:
                saved += 4 * 2 * width  # PyTorch's own norm keeps its input, and the modulation keeps the norm's result
            if levels > 1:
                saved += 4 * 4 * width  # scales and gates for each token
        return saved

    def _values(self) -> int:
        """Numbers per token of the tensor that holds the values: the fused projection's output, or the sum with a bias."""
        model = self.config.model
        return model.kv_heads * model.d_head if model.v_bias or model.layer == "neox" else model.d_qkv

    def keys_values_saved(self) -> float:
        """Bytes per token that a block keeps if it computes only keys and values."""
        model, a = self.config.model, self.size
        rotated = (model.n_heads + model.kv_heads) * model.d_head
        return self._norm() + a * (model.d_model + self._values() + rotated)

    def adapter_saved(self) -> float:
        """Bytes per token that the adapter keeps for its backward pass."""
        width, a = self.config.model.d_model, self.size
        return {"linear": a * 2 * width, "diagonal": 4 * width + a * width, "add": 0}[self.config.model.injection]

    def iteration_saved(self) -> float:
        """Bytes per token that one core pass with gradient keeps for its backward pass."""
        passes = self.passes
        modulated = passes.noise_levels > 0
        block = self.block_saved(modulated, passes.noise_levels, passes.beside)
        return self.adapter_saved() + self.config.model.n_core * block

    def conditioning_saved(self) -> float:
        """Bytes that the noise embedding keeps: features, hidden layer before and after its activation, modulation."""
        model, passes = self.config.model, self.passes
        if not passes.noise_levels:
            return 0.0
        embeddings = self.sequences * passes.noise_levels
        return 4.0 * embeddings * (3 * model.d_condition + 6 * model.n_core * model.d_model)

    def backward_working(self) -> float:
        """Peak of the temporary bytes in a block's backward pass.

        It is reached in the MLP, with the gradients of gate, up and their product, and of a weight. The gradients of the
        residual stream take the place of tensors that the previous norm has freed.
        """
        model = self.config.model
        return self.tokens * self.size * 3 * model.d_mlp + 4 * model.d_mlp * model.d_model

    def forward_working(self) -> float:
        """Peak of the temporary bytes per token in a block's forward pass without gradient."""
        model, a = self.config.model, self.size
        return a * 4 * model.d_mlp + 3 * 4 * model.d_model

    def clean_saved(self) -> float:
        """Bytes per token that the clean stream of two-stream conditioning keeps for its backward pass."""
        if not self.passes.clean_grad:
            return 0.0
        return self.adapter_saved() + (self.config.model.n_core - 1) * self.block_saved() + self.keys_values_saved()

    def locals(self) -> float:
        """Bytes per token of an objective's local variables: context, state and hidden vectors.

        For a denoiser also the noise, the target, the noised target and the estimate.
        """
        width = self.config.model.d_model
        if self.passes.noise_levels:
            return 4.0 * width * 5 + self.size * width
        return 4.0 * width + 2 * self.size * width

    # -- bytes of a micro-batch -----------------------------------------------------------------------------------------

    def beside_blocks(self) -> float:
        """Bytes that a micro-batch keeps for its backward pass outside the blocks."""
        tokens, width = self.tokens, self.config.model.d_model
        kept = 16 * tokens + self.conditioning_saved() + 2 * tokens * self._norm()
        if self.passes.noise_levels:
            kept += tokens * (4 * width + 12)  # target embeddings and their norms
        if self.config.run.activation_checkpointing:
            kept += tokens * 4 * width  # the context, which is an input of every checkpointed pass
        return kept

    def mask(self) -> int:
        """Bytes of the mask of packed documents."""
        data = self.config.data
        if not (self.masked and data.document_mask):
            return 0
        return self.sequences * data.sequence_length**2 * (1 if self.cuda else self.size)

    def timeline(self) -> Timeline:
        """Replay the step from its first micro-batch to its update.

        At most two micro-batches are replayed, because all later ones hold the same as the second.
        """
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
        """Bytes per number in gathered blocks."""
        self.casts = 2 * self.sizes.matrices if step.half and not self.sharded else 0
        """Bytes of autocast's half-precision copies of the weights."""
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
        self.release(sizes.rest, 4)
        self.update()
        return line

    # -- sharding units ------------------------------------------------------------------------------------------------

    def gather(self, parameters: int, size: int) -> None:
        """Gather a unit with this many parameters, at ``size`` bytes per number. Does nothing without sharding."""
        if self.part > 1:
            self.line.hold("gathered", size * parameters)
            self.line.pulse("communication", size * parameters)  # received into one buffer and copied from there

    def release(self, parameters: int, size: int) -> None:
        """Free a gathered unit."""
        if self.part > 1:
            self.line.drop("gathered", size * parameters)

    def gather_block(self) -> None:
        """Gather a block of prelude or coda."""
        size = self.gathered_size * self.sizes.block
        self.gather(self.sizes.block, self.gathered_size)
        self.line.pulse("gathered", size if self.part > 1 else 0)  # FSDP prefetches the next block

    def gradients(self, parameters: int, again: bool, last: bool) -> None:
        """A unit's gradient is complete. Add it to the gradient of earlier micro-batches (``again``).

        In the ``last`` micro-batch, FSDP reduces it to this process's shard.
        """
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
            self.release(self.sizes.block, self.gathered_size)

    def head(self) -> None:
        """The fused cross-entropy: its forward pass, and the gradients of the embedding and of the hidden vectors."""
        line, step, tokens = self.line, self.step, self.tokens
        vocabulary, width = self.model.vocab_size, self.model.d_model
        line.hold("working", tokens * step.locals())
        line.hold("gradients", 4 * vocabulary * width)
        line.hold("logits and head", tokens * width * step.size)
        # Logits and their softmax. On a CPU half-precision logits are first copied to fp32.
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
            self.release(self.sizes.core, self.gathered_size)
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
            self.release(self.sizes.block, self.gathered_size)
            self.gradients(self.sizes.block, again, last)

    def core_backward(self) -> None:
        line, n_core = self.line, self.model.n_core
        for index in range(self.step.passes.core_grad):
            line.drop("activations", self.kept_iteration)
            line.hold("activations", self.iteration)
            for _ in range(n_core):
                # All passes but the first hold one more matrix, whose entries are added to the existing gradient.
                line.pulse("working", self.step.backward_working() + (4 * self.sizes.widest if index else 0))
                line.hold("gradients", 0 if index else 4 * self.sizes.core / n_core)
                line.drop("activations", self.iteration / n_core)

    def update(self) -> None:
        line, sizes = self.line, self.sizes
        if self.config.optim.ema_decay:
            line.pulse("working", 4 * sizes.total / self.part)
        if sizes.muon:
            # Copies for undoing a skipped step, Nesterov's sum, and the half-precision matrices of Newton-Schulz.
            line.pulse("working", sizes.widest * (4 * 3 + 2 * 4))
        line.drop("gradients", line.held["gradients"])
