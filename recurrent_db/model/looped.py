"""The looped language model: prelude -> core x K -> coda. Read this first.

    tokens_BT --embed, prelude--> e_BTD                  once       `encode`
    state_0   --core(inject(state, e))--> ... state_K    K times    `iterate`
    state_K   --final norm, coda, final norm--> hidden   once       `decode`
    hidden    --tied head--> logits_BTV                             `logits`

The architecture is Huginn's (arXiv 2502.05171): blocks and initialisation exactly, one weight-tied core, the prelude's
output injected before every iteration, one final norm used twice. Added here: conditioning of the core on a noise
level (zero-initialised, absent unless asked for), and a choice of injection. The model knows nothing of losses, of how
it is trained, or of noise schedules; an objective calls the four parts.

Shapes: B sequences, T positions, D width, V vocabulary. States and hidden vectors have the model's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurrent_db.config import ModelConfig
from recurrent_db.errors import UserError
from recurrent_db.model.attention import SDPA, Backend, Past, Rule, Visible
from recurrent_db.model.head import SoftmaxLoss, softmax_loss, softmax_loss_to_fuse
from recurrent_db.model.layers import (
    Block,
    Context,
    Embedding,
    Linear,
    NoiseEmbedding,
    RMSNorm,
    contexts,
    lookup,
    rope_table,
    wide,
)
from recurrent_db.model.recurrence import Recurrence

Modulation = list[tuple[Tensor, ...]]

STATE_STD = math.sqrt(2 / 5)
"""Huginn's standard deviation of the random initial state."""


class LinearInjection(nn.Module):
    """Huginn's adapter: W [state, e], bias-free, from 2D to D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.adapter = Linear(2 * dim, dim, bias=False)

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        return self.adapter(torch.cat((state_BTD, e_BTD), dim=-1))


class DiagonalInjection(nn.Module):
    """Parcae's (arXiv 2604.12946) linear time-invariant injection: a * state + W e, with 0 < a < 1 for each channel.

    a = exp(-exp(log_rate)), so that no value of the parameter makes the recurrence expand. It starts at one half.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.full((dim,), math.log(math.log(2.0))))
        self.adapter = Linear(dim, dim, bias=False)

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        decay_D = torch.exp(-torch.exp(self.log_rate))
        return decay_D.to(state_BTD.dtype) * state_BTD + self.adapter(e_BTD)


class AddInjection(nn.Module):
    """state + e. Both leave a normalised block, so they have comparable scales."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        return state_BTD + e_BTD


INJECTIONS: dict[str, type[nn.Module]] = {
    "linear": LinearInjection,
    "diagonal": DiagonalInjection,
    "add": AddInjection,
}


class Core(nn.Module):
    """The weight-tied recurrence as one module, so that a sharded run gathers its parameters once for all K iterations."""

    checkpointing = False
    """Keep each iteration's input alone for the backward, and run the iteration again there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.injection = INJECTIONS[config.injection](config.d_model)
        self.blocks = nn.ModuleList(Block(config.d_model, config.n_heads, config.d_mlp) for _ in range(config.n_core))

    def iteration(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        modulation: Modulation | None = None,
        beside: list[Context] | None = None,
    ) -> Tensor:
        """Injection and all blocks, once."""
        state_BTD = self.injection(state_BTD, e_BTD)
        for index, block in enumerate(self.blocks):
            layer = modulation[index] if modulation else None
            state_BTD = block(state_BTD, rope, visible, layer, beside[index] if beside else None)
        return state_BTD

    def forward(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        iterations: int = 1,
        modulation: Modulation | None = None,
        beside: list[Context] | None = None,
    ) -> Tensor:
        for _ in range(iterations):
            arguments = state_BTD, e_BTD, rope, visible, modulation, beside
            if self.checkpointing and torch.is_grad_enabled():
                # Nothing in an iteration is random, so there is no generator's state to keep.
                state_BTD = checkpoint(self.iteration, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state_BTD = self.iteration(*arguments)
        return state_BTD

    def inject(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        """The injection alone: see `LoopedLM.inject`. The blocks' gradients are zeros, since who shares a model out (DDP,
        FSDP2) waits for all of them."""
        unread = cast(Tensor, sum(parameter.sum() for parameter in self.blocks.parameters()))
        return self.injection(state_BTD, e_BTD) + 0 * unread

    def contexts(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        modulation: Modulation | None,
    ) -> list[Context]:
        """One iteration as a context stream: see `LoopedLM.core_contexts`."""
        return contexts(self.blocks, self.injection(state_BTD, e_BTD), rope, visible, modulation)


def _compiled_in_training(owner: nn.Module, part: Callable[..., Any], backend: str) -> Callable[..., Any]:
    fast = torch.compile(part, dynamic=False, backend=backend)
    return lambda *args, **kwargs: (fast if owner.training else part)(*args, **kwargs)


class LoopedLM(nn.Module):
    """A recurrent-depth language model. ``config.vocab_size`` must be set."""

    recurrence: Recurrence
    """How its objective runs K iterations at inference; set by whoever builds the model for more than its parts."""
    attention: Backend = SDPA
    """What computes attention; the same function whichever it is."""
    softmax_loss: SoftmaxLoss = staticmethod(softmax_loss)
    """What the head's loss is made by; compiled with the other parts."""
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = staticmethod(lambda function: function)
    """Compiles a pure function of tensors that an objective runs beside the parts, where the parts are compiled."""
    compiled: bool = False
    """Whether `compile_parts` was called."""
    document_mask: bool = True
    """Whether packed documents do not attend to each other (config.DataConfig.document_mask)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("model.vocab_size is not set: give it, or data.path to take the tokenizer's")
        self.config = config
        width = config.d_model
        block = lambda: Block(width, config.n_heads, config.d_mlp)  # noqa: E731
        self.embedding = Embedding(config.vocab_size, width)
        self.prelude = nn.ModuleList(block() for _ in range(config.n_prelude))
        self.core = Core(config)
        self.coda = nn.ModuleList(block() for _ in range(config.n_coda))
        self.final_norm = RMSNorm(width)
        self.noise_embedding = (
            NoiseEmbedding(width, config.n_core, config.d_condition) if config.noise_conditioning else None
        )
        self._ropes: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    # -- the four parts ------------------------------------------------------------------------------------------------

    def rope(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables for positions 0..length-1, (T, E/2) each, fp32 or wider."""
        weight = self.embedding.weight
        place = weight.device, wide(weight.dtype)
        if place not in self._ropes or len(self._ropes[place][0]) < length:
            head_size = self.config.d_model // self.config.n_heads
            longest = max(length, self.config.max_seq_len)
            with torch.inference_mode(False):  # training may need what generation made
                self._ropes[place] = rope_table(longest, head_size, *place)
        cos, sin = self._ropes[place]
        return cos[:length], sin[:length]

    def visible(self, length: int, docs_BT: Tensor | None = None) -> Visible:
        """Who sees whom in sequences of ``length`` tokens, for all of a forward pass: positions <= i, and where
        ``docs`` says which document each position belongs to (int (B, T), on the CPU), those of i's own document.

        The parts below make a plain causal one where none is given. Ask under the autocast that the pass runs under.
        """
        return self.served(Rule(length, length, docs_BT if self.document_mask else None))

    def served(self, rule: Rule, past: Past | None = None) -> Visible:
        """A rule with what serves it here, for all of a forward pass. Ask under the autocast that the pass runs under."""
        weight = self.embedding.weight
        kind, dtype = weight.device.type, weight.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return Visible.make(rule, weight.device, dtype, self.attention, self.compiled and self.training, past)

    def _frame(self, length: int, visible: Visible | None) -> tuple[tuple[Tensor, Tensor], Visible]:
        """Rotary tables of a pass over ``length`` positions, and who sees whom in it."""
        visible = visible or self.visible(length)
        return self.rope(length) if visible.past is None else visible.past.rope, visible

    def encode(self, tokens_BT: Tensor, visible: Visible | None = None) -> Tensor:
        """Prelude: int64 tokens (B, T) to the clean context e (B, T, D). Position i sees tokens <= i."""
        return self._encode(tokens_BT, *self._frame(tokens_BT.shape[1], visible))

    def _encode(self, tokens_BT: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        x_BTD = lookup(tokens_BT, self.embedding.weight) * math.sqrt(self.config.d_model)
        for block in self.prelude:
            x_BTD = block(x_BTD, rope, visible)
        return x_BTD

    def _modulation(self, c_noise_Bs: Tensor | None) -> Modulation | None:
        if c_noise_Bs is None:
            return None
        if self.noise_embedding is None:
            raise UserError("this model has no noise conditioning (model.noise_conditioning = false)")
        return self.noise_embedding(c_noise_Bs)

    def iterate(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        iterations: int = 1,
        c_noise_Bs: Tensor | None = None,
        beside: list[Context] | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """``iterations`` passes of the core, (B, T, D) to (B, T, D). Position i sees states and contexts <= i.

        ``c_noise`` (fp32, (B, 1) or (B, T)) conditions every pass; it needs a model built with noise conditioning.
        ``beside`` (from `core_contexts`) makes position i see another stream's positions instead of its neighbours.
        """
        rope, visible = self._frame(e_BTD.shape[1], visible)
        return self.core(state_BTD, e_BTD, rope, visible, iterations, self._modulation(c_noise_Bs), beside)

    def inject(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        """What an iteration begins with, and nothing of the core's blocks, (B, T, D) to (B, T, D): no iteration at all."""
        return cast(Tensor, self.core.inject(state_BTD, e_BTD))

    def core_contexts(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        c_noise_Bs: Tensor | None = None,
        visible: Visible | None = None,
    ) -> list[Context]:
        """Keys and values of one core pass of a context stream, for `iterate`'s ``beside``: one entry for each block."""
        rope, visible = self._frame(e_BTD.shape[1], visible)
        modulation = self._modulation(c_noise_Bs)
        return self.core.contexts(state_BTD, e_BTD, rope, visible, modulation)

    def decode(self, state_BTD: Tensor, visible: Visible | None = None) -> Tensor:
        """Final norm, coda, final norm: (B, T, D) to the hidden vectors (B, T, D) that the head reads."""
        return self._decode(state_BTD, *self._frame(state_BTD.shape[1], visible))

    def _decode(self, state_BTD: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        x_BTD = self.final_norm(state_BTD)
        for block in self.coda:
            x_BTD = block(x_BTD, rope, visible)
        return self.final_norm(x_BTD)

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, (*ids, D); they share the head's gradient."""
        return lookup(ids, self.embedding.weight)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Tied head: (..., D) to (..., V) in the model's dtype."""
        return nn.functional.linear(hidden_BTD, self.embedding.weight)

    def forward(self, tokens_BT: Tensor, iterations: int = 1) -> Tensor:
        """Unconditioned logits (B, T, V) after ``iterations`` passes from a zero state."""
        e_BTD = self.encode(tokens_BT)
        return self.logits(self.decode(self.iterate(torch.zeros_like(e_BTD), e_BTD, iterations)))

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile what training runs: prelude, one core iteration, coda, noise conditioning, softmax and loss, and what an
        objective hands to `fuse`, each for itself.

        The loop over iterations stays outside, so no depth is compiled twice: an iteration has at most three graphs
        (without gradient, with it from a state that needs none, with it from one that does), or five under autocast, where
        the first state is fp32 and later ones are not. Shapes are static. In evaluation (``model.eval()``), whose shapes
        vary, the parts run as they are.
        """
        for owner, name in ((self, "_encode"), (self.core, "iteration"), (self, "_decode")):
            setattr(owner, name, _compiled_in_training(owner, getattr(owner, name), backend))
        if self.noise_embedding is not None:
            embed = _compiled_in_training(self, self.noise_embedding.forward, backend)
            setattr(self.noise_embedding, "forward", embed)  # noqa: B010
        # One compilation for each function, however often it is asked for.
        fused = functools.cache(lambda function: torch.compile(function, dynamic=False, backend=backend))
        self.fuse = lambda function: fused(function) if self.training else function
        self.softmax_loss = fused(softmax_loss_to_fuse)
        self.compiled = True

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Compile what generation runs for each token, in evaluation: a block's work before and after attention, for
        passes over one position. Attention and the cache, whose keys grow by one each time, stay as they are.

        All blocks share their graphs: two for those without noise conditioning and two for those with it; a second
        number of rows makes these anew, for any number of them.
        """
        for block in self.modules():
            if isinstance(block, Block):
                block.one_position = (
                    torch.compile(block.before, backend=backend),
                    torch.compile(block.after, backend=backend),
                )

    def checkpoint_activations(self, on: bool) -> None:
        """Whether the backward runs each core iteration again instead of keeping its activations."""
        self.core.checkpointing = on

    # -- initialisation and size ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Huginn's initialisation: normal with std sqrt(2 / (5 D)) cut at three standard deviations; the projections
        back into the residual stream divided by sqrt(2 * effective depth); norms one, biases zero; with ``silent_state`` the
        linear adapter's half for the state zero. The noise conditioning starts as the identity. The generator must live on
        the parameters' device."""
        config = self.config
        std = math.sqrt(2 / (5 * config.d_model))
        effective_depth = config.n_prelude + config.n_coda + config.n_core * config.expected_depth
        for name, parameter in self.named_parameters():
            if name == "noise_embedding.hidden.weight":
                nn.init.normal_(parameter, std=1 / math.sqrt(config.d_condition), generator=generator)
            elif name.startswith("noise_embedding.") or name.endswith("qk_bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("log_rate"):
                nn.init.constant_(parameter, math.log(math.log(2.0)))
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                scale = std / math.sqrt(2 * effective_depth) if name.endswith("proj.weight") else std
                nn.init.trunc_normal_(parameter, std=scale, a=-3 * scale, b=3 * scale, generator=generator)
                if config.silent_state and name == "core.injection.adapter.weight" and config.injection == "linear":
                    parameter[:, : config.d_model] = 0

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; ``total`` is the plain network, without noise conditioning, as presets are quoted."""

        def count(module: nn.Module | None) -> int:
            return sum(p.numel() for p in module.parameters()) if module is not None else 0

        parts = {
            "embedding": count(self.embedding),
            "prelude": count(self.prelude),
            "adapter": count(self.core.injection),
            "core": count(self.core.blocks),
            "coda": count(self.coda),
            "norm": count(self.final_norm),
        }
        conditioning = count(self.noise_embedding)
        return {
            **parts,
            "total": sum(parts.values()),
            "noise_conditioning": conditioning,
        }
