"""The looped language model: prelude -> core x K -> coda. Read this first.

    tokens_BT --embed, prelude--> e_BTD                  once       `encode`
    state_0   --core(inject(state, e))--> ... state_K    K times    `iterate`
    state_K   --final norm, coda, final norm--> hidden   once       `decode`
    hidden    --head--> logits_BTV                                  `logits`

The architecture is Huginn's (arXiv 2502.05171): the same layers and initialisation, one weight-tied core, the prelude's
output injected before every iteration, and one final norm used twice.

This class adds optional conditioning of the core on a noise level, a choice of injection, and layers without sandwich norms,
as in Llama. A model with such layers does not scale its embedding and uses the final norm only before the head. Losses,
training and noise schedules are outside the model: an objective calls the four parts.

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
from recurrent_db.denoise.noise_embedding import NoiseEmbedding
from recurrent_db.denoise.precond import Precond
from recurrent_db.errors import UserError
from recurrent_db.model.attention import SDPA, Backend, Past, Rule, Visible
from recurrent_db.model.head import SoftmaxLoss, softmax_loss, softmax_loss_to_fuse
from recurrent_db.model.injection import INJECTIONS
from recurrent_db.model.layers import Block, Context, Embedding, build_norm, contexts, lookup, rope_table
from recurrent_db.model.norms import wide
from recurrent_db.model.recurrence import Recurrence

Modulation = list[tuple[Tensor, ...]]

STATE_STD = math.sqrt(2 / 5)
"""Standard deviation of the random initial state (Huginn)."""


class Core(nn.Module):
    """The weight-tied core. It is one module so that a sharded run gathers its parameters once for all iterations."""

    checkpointing = False
    """Store only each iteration's input, and compute the iteration again in the backward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.injection = INJECTIONS[config.injection](config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_core))

    def iteration(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        modulation: Modulation | None = None,
        beside: list[Context] | None = None,
    ) -> Tensor:
        """One iteration: the injection, then all layers. (B, T, D) to (B, T, D)."""
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
                # An iteration draws no random numbers, so the generator's state need not be saved.
                state_BTD = checkpoint(self.iteration, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state_BTD = self.iteration(*arguments)
        return state_BTD

    def inject(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        """The injection without the core's layers, (B, T, D).

        The layers get gradients of zero instead of none, because DDP and FSDP2 wait for a gradient of each parameter.
        """
        unused = cast(Tensor, sum(parameter.sum() for parameter in self.blocks.parameters()))
        return self.injection(state_BTD, e_BTD) + 0 * unused

    def contexts(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Visible,
        modulation: Modulation | None,
    ) -> list[Context]:
        """Keys and values of one iteration over a context stream; see `LoopedLM.core_contexts`."""
        return contexts(self.blocks, self.injection(state_BTD, e_BTD), rope, visible, modulation)


def _compiled_in_training(owner: nn.Module, part: Callable[..., Any], backend: str) -> Callable[..., Any]:
    fast = torch.compile(part, dynamic=False, backend=backend)
    return lambda *args, **kwargs: (fast if owner.training else part)(*args, **kwargs)


class LoopedLM(nn.Module):
    """A looped language model. ``config.vocab_size`` must be set; raises `UserError` if it is 0."""

    recurrence: Recurrence
    """Runs K iterations at inference as the model's objective requires. Loading a checkpoint or a training run sets it."""
    attention: Backend = SDPA
    """Back end that computes attention. All back ends compute the same function."""
    softmax_loss: SoftmaxLoss = staticmethod(softmax_loss)
    """Softmax, loss and gradient of the head; `compile_parts` replaces it by a compiled form."""
    fuse: Callable[[Callable[..., Any]], Callable[..., Any]] = staticmethod(lambda function: function)
    """Returns a compiled form of a pure function of tensors after `compile_parts`, and the function itself before."""
    compiled: bool = False
    """Whether `compile_parts` was called."""
    document_mask: bool = True
    """Whether attention stays within packed documents (config.DataConfig.document_mask)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise UserError("model.vocab_size is not set: set it, or set data.path to use its tokenizer's")
        self.config = config
        width = config.d_model
        self.embedding = Embedding(config.vocab_size, width)
        self.prelude = nn.ModuleList(Block(config) for _ in range(config.n_prelude))
        self.core = Core(config)
        self.coda = nn.ModuleList(Block(config) for _ in range(config.n_coda))
        self.final_norm = build_norm(config)
        self.head = None if config.tied else Embedding(config.vocab_size, width)
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
            longest = max(length, self.config.max_seq_len)
            with torch.inference_mode(False):  # training may later use a table that generation made
                self._ropes[place] = rope_table(self.config, longest, *place)
        cos, sin = self._ropes[place]
        return cos[:length], sin[:length]

    def visible(self, length: int, docs_BT: Tensor | None = None) -> Visible:
        """The causal attention mask of a forward pass over sequences of ``length`` tokens.

        With ``docs_BT`` (document of each position, int (B, T), on the CPU) positions see their own document only. The
        methods below make a plain causal mask if none is given. Call this under the same autocast as the forward pass.
        """
        return self.served(Rule(length, length, docs_BT if self.document_mask else None))

    def served(self, rule: Rule, past: Past | None = None) -> Visible:
        """Prepare an attention rule for a forward pass of this model: choose the back end and build its mask.

        ``past`` holds the keys and values of earlier positions. Call this under the same autocast as the forward pass.
        """
        weight = self.embedding.weight
        kind, dtype = weight.device.type, weight.dtype
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return Visible.make(rule, weight.device, dtype, self.attention, self.compiled and self.training, past)

    def _frame(self, length: int, visible: Visible | None) -> tuple[tuple[Tensor, Tensor], Visible]:
        """Rotary tables and attention mask of a forward pass over ``length`` positions."""
        visible = visible or self.visible(length)
        return self.rope(length) if visible.past is None else visible.past.rope, visible

    def encode(self, tokens_BT: Tensor, visible: Visible | None = None) -> Tensor:
        """Embedding and prelude: int64 tokens (B, T) to the context e (B, T, D). Position i sees tokens <= i."""
        return self._encode(tokens_BT, *self._frame(tokens_BT.shape[1], visible))

    def _encode(self, tokens_BT: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        x_BTD = self.embedding_rows(tokens_BT)
        if self.config.layer == "huginn":
            x_BTD = x_BTD * math.sqrt(self.config.d_model)
        for block in self.prelude:
            x_BTD = block(x_BTD, rope, visible)
        return x_BTD

    def _modulation(self, c_noise_Bs: Tensor | None) -> Modulation | None:
        if c_noise_Bs is None:
            return None
        if self.noise_embedding is None:
            raise UserError("this model was built without noise conditioning: its objective does not use noise levels")
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
        """Apply the core ``iterations`` times, (B, T, D) to (B, T, D). Position i sees states and contexts <= i.

        Args:
            state_BTD: initial state.
            e_BTD: context, from `encode`.
            iterations: number of core passes.
            c_noise_Bs: noise conditioning of each pass, fp32 (B, 1) or (B, T); see `Precond.c_noise`.
            beside: a second stream's keys and values, from `core_contexts`. Position i then sees itself and that stream's
                positions <= i, instead of its own stream's earlier positions.
            visible: attention mask; plain causal by default.

        Raises:
            UserError: ``c_noise_Bs`` is given and the model has no noise conditioning.
        """
        rope, visible = self._frame(e_BTD.shape[1], visible)
        return self.core(state_BTD, e_BTD, rope, visible, iterations, self._modulation(c_noise_Bs), beside)

    def denoise(
        self,
        precond: Precond,
        z_BTD: Tensor,
        sigma_Bs: Tensor,
        e_BTD: Tensor,
        beside: list[Context] | None = None,
        visible: Visible | None = None,
    ) -> Tensor:
        """Estimate y from z by one core pass conditioned on the noise level. Returns D, fp32 or wider (B, T, D).

        Args:
            precond: EDM's scalings around the core.
            z_BTD: noised target, fp32.
            sigma_Bs: noise levels, fp32 (B, 1) or (B, T).
            e_BTD: context, from `encode`.
            beside: clean stream for two-stream attention, from `core_contexts`.
            visible: attention mask; plain causal by default.
        """
        sigma = sigma_Bs[..., None]
        view_BTD = self.fuse(precond.view)(z_BTD, sigma).to(e_BTD.dtype)
        state_BTD = self.iterate(view_BTD, e_BTD, 1, precond.c_noise(sigma_Bs), beside, visible)
        return self.fuse(precond.combine)(z_BTD, state_BTD, sigma)

    def inject(self, state_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        """Apply the injection without the core's layers, (B, T, D) to (B, T, D)."""
        return cast(Tensor, self.core.inject(state_BTD, e_BTD))

    def core_contexts(
        self,
        state_BTD: Tensor,
        e_BTD: Tensor,
        c_noise_Bs: Tensor | None = None,
        visible: Visible | None = None,
    ) -> list[Context]:
        """Run one core pass over a context stream and return each layer's keys and values, for ``beside`` in `iterate`."""
        rope, visible = self._frame(e_BTD.shape[1], visible)
        modulation = self._modulation(c_noise_Bs)
        return self.core.contexts(state_BTD, e_BTD, rope, visible, modulation)

    def decode(self, state_BTD: Tensor, visible: Visible | None = None) -> Tensor:
        """Final norm (of Huginn's layers), coda, final norm: state (B, T, D) to the head's input (B, T, D)."""
        return self._decode(state_BTD, *self._frame(state_BTD.shape[1], visible))

    def _decode(self, state_BTD: Tensor, rope: tuple[Tensor, Tensor], visible: Visible) -> Tensor:
        x_BTD = self.final_norm(state_BTD) if self.config.layer == "huginn" else state_BTD
        for block in self.coda:
            x_BTD = block(x_BTD, rope, visible)
        return self.final_norm(x_BTD)

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Embeddings of tokens, (*ids.shape, D). Their gradient goes to the embedding."""
        return lookup(ids, self.embedding.weight, self.config.tied)

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, (V, D): the embedding if they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Head: (..., D) to logits (..., V) in the model's dtype."""
        return nn.functional.linear(hidden_BTD, self.head_weight)

    def forward(self, tokens_BT: Tensor, iterations: int = 1) -> Tensor:
        """Logits (B, T, V) after ``iterations`` core passes from a zero state, without noise conditioning."""
        e_BTD = self.encode(tokens_BT)
        return self.logits(self.decode(self.iterate(torch.zeros_like(e_BTD), e_BTD, iterations)))

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile the parts that training runs: prelude, one core iteration, coda, noise conditioning, softmax and loss, and
        functions that an objective passes to `fuse`. Each part is compiled by itself.

        The loop over iterations is not compiled, so a new depth needs no compilation. An iteration has at most three graphs:
        without gradient, with gradient from a state that needs none, and with gradient from a state that needs one. Under
        autocast it has at most five, because the first state is fp32 and later states are not. Shapes are static. In
        evaluation mode (``model.eval()``) the parts run without compilation, because shapes vary.
        """
        for owner, name in ((self, "_encode"), (self.core, "iteration"), (self, "_decode")):
            setattr(owner, name, _compiled_in_training(owner, getattr(owner, name), backend))
        if self.noise_embedding is not None:
            embed = _compiled_in_training(self, self.noise_embedding.forward, backend)
            setattr(self.noise_embedding, "forward", embed)  # noqa: B010
        # Each function is compiled once, however often `fuse` is called with it.
        fused = functools.cache(lambda function: torch.compile(function, dynamic=False, backend=backend))
        self.fuse = lambda function: fused(function) if self.training else function
        self.softmax_loss = fused(softmax_loss_to_fuse)
        self.compiled = True

    def compile_decoding(self, backend: str = "inductor") -> None:
        """Compile what generation runs for each token in evaluation mode: a layer's work before and after attention, for a
        single position. Attention and the cache are not compiled, because the number of keys grows with each token.

        All layers share their graphs: two for layers without noise conditioning and two for layers with it. A second batch
        size compiles them once more, for any batch size.
        """
        for block in self.modules():
            if isinstance(block, Block):
                block.one_position = (
                    torch.compile(block.before, backend=backend),
                    torch.compile(block.after, backend=backend),
                )

    def checkpoint_activations(self, on: bool) -> None:
        """Turn activation checkpointing of the core on or off: the backward then computes each iteration again instead of
        storing its activations."""
        self.core.checkpointing = on

    # -- initialisation and size ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw initial weights as Huginn does, in place.

        Matrices are normal with std sqrt(2 / (5 D)), truncated at three standard deviations. Projections into the residual
        stream are divided by sqrt(2 * effective depth). Norms are one, biases zero. Noise conditioning changes nothing at
        first. With ``silent_state`` the linear adapter's weights on the state are zero. ``generator`` must be on the
        parameters' device.
        """
        config = self.config
        std = math.sqrt(2 / (5 * config.d_model))
        effective_depth = config.n_prelude + config.n_coda + config.n_core * config.expected_depth
        for name, parameter in self.named_parameters():
            if name == "noise_embedding.hidden.weight":
                nn.init.normal_(parameter, std=1 / math.sqrt(config.d_condition), generator=generator)
            elif name.startswith("noise_embedding.") or name.endswith("bias"):
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
        """Number of parameters of each part. ``total`` leaves out ``noise_conditioning``, so that it is comparable between
        objectives."""

        def count(module: nn.Module | None) -> int:
            return sum(p.numel() for p in module.parameters()) if module is not None else 0

        parts = {
            "embedding": count(self.embedding),
            "prelude": count(self.prelude),
            "adapter": count(self.core.injection),
            "core": count(self.core.blocks),
            "coda": count(self.coda),
            "norm": count(self.final_norm),
            **({} if self.head is None else {"head": count(self.head)}),
        }
        conditioning = count(self.noise_embedding)
        return {
            **parts,
            "total": sum(parts.values()),
            "noise_conditioning": conditioning,
        }
