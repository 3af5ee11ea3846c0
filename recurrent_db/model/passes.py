"""How often a step runs each part of the network. FLOPs and memory are computed from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """How often a step runs each part of the network for each token.

    The defaults describe a training step of `next_token`. For inference see `Recurrence.passes`.
    """

    core_no_grad: int = 0
    """Number of core passes without gradient (forward only)."""
    core_grad: int = 1
    """Number of core passes with gradient (forward and backward)."""
    injections_grad: int = 0
    """Number of injections with gradient that are not followed by the core's layers."""
    readouts_no_grad: int = 0
    """Number of read-outs (coda and head) without gradient."""
    readouts_grad: int = 1
    """Number of read-outs with gradient."""
    prelude_grad: bool = True
    """Whether the prelude has a backward."""
    clean_no_grad: int = 0
    """Number of core passes of the clean stream without gradient, in two-stream attention."""
    clean_grad: int = 0
    """Number of core passes of the clean stream with gradient."""
    beside: bool = False
    """Whether core passes attend to the clean stream's keys in addition to their own."""
    noise_levels: int = 0
    """Number of noise levels per sequence in one core pass: 0 without conditioning, 1 per sequence, or T for one per
    token."""
    bridges: int = 0
    """Number of soft bridges: products of (T, V) probabilities with the (V, D) targets."""
    core_layers: float = 0
    """Mean number of layers that a core pass runs; 0 means all. For a model in blocks, the layers of the block."""
    clean_layers: float = 0
    """Mean number of layers that a pass of the clean stream runs; 0 means all."""
    causal: bool = True
    """Whether attention is causal."""
    tables_grad: bool = True
    """Whether embedding and head get gradients. If not, the head computes the gradient to its input only, and an adapter
    directly after the embedding (without a prelude) computes no gradient to its context input."""
