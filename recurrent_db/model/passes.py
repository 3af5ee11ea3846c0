"""How often a step runs each part of the network: what FLOPs and memory are counted from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passes:
    """How often a step runs each part for each token. A training step by default; see `Recurrence.passes` for
    inference."""

    core_no_grad: int = 0
    """Core iterations that cost their forward alone."""
    core_grad: int = 1
    """Core iterations that are backpropagated."""
    injections_grad: int = 0
    """Injections that none of the core's blocks follows, backpropagated."""
    readouts_no_grad: int = 0
    """Coda and head, forward alone."""
    readouts_grad: int = 1
    """Coda and head, backpropagated."""
    prelude_grad: bool = True
    """Whether the prelude is backpropagated."""
    clean_no_grad: int = 0
    """Passes of two-stream conditioning's clean stream, forward alone."""
    clean_grad: int = 0
    """The same, backpropagated."""
    beside: bool = False
    """Whether the core's passes attend to another stream's keys besides their own."""
    noise_levels: int = 0
    """Noise levels per sequence that the core is conditioned on in one pass: none, 1, or T for per-token draws."""
    bridges: int = 0
    """Products of the vocabulary's probabilities with the table of normalised embedding rows."""
    core_layers: float = 0
    """Layers of the core that one of its passes runs, on average; 0 means all. Of a model in blocks, those of the block."""
    clean_layers: float = 0
    """The same of the clean stream's passes."""
    causal: bool = True
    """Whether positions see those before them alone."""
    tables_grad: bool = True
    """Whether the tables of embedding and head get gradients. Of frozen ones the head passes the gradient on alone, and an
    adapter that reads the embedding itself, without a prelude between, needs none to its inputs."""
