"""The cost of a part of a network in FLOPs, by kind."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Cost:
    """FLOPs of one part per token, by kind."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    recomputed: float = 0.0
    """Forward work that the backward pass repeats. Not part of ``total``."""
    attention: float = 0.0
    """The part of ``total`` in attention's two products. The rest is products with weights."""
    masked: float = 0.0
    """The part of ``attention`` for pairs of positions that the causal mask hides."""

    @property
    def backward(self) -> float:
        """Backward FLOPs, without recomputation."""
        return self.backward_input + self.backward_weight

    @property
    def total(self) -> float:
        """Model FLOPs: forward and backward, with attention over all pairs."""
        return self.forward + self.backward

    @property
    def matmul(self) -> float:
        """The part of ``total`` in products with weights."""
        return self.total - self.attention

    @property
    def causal(self) -> float:
        """Model FLOPs with attention only over the pairs that the mask allows, about half of all pairs."""
        return self.total - self.masked

    @property
    def hardware(self) -> float:
        """Model FLOPs plus recomputation: what the hardware computes."""
        return self.total + self.recomputed

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
            self.recomputed + other.recomputed,
            self.attention + other.attention,
            self.masked + other.masked,
        )

    def __rmul__(self, share: float) -> Cost:
        """``share`` times each kind."""
        return Cost(*(share * value for value in astuple(self)))


def part_cost(
    weights: float, attention: float, masked: float, no_grad: float, grad: float, checkpointed: bool = False
) -> Cost:
    """The cost of one part of the model.

    Attention has no weights, so the backward pass of its two products is four products for the gradients of the inputs.
    Fused kernels do not store the scores and recompute them, which is one of the two products.

    Args:
        weights: entries of its weight matrices.
        attention: forward FLOPs per token of attention.
        masked: the part of ``attention`` for hidden pairs.
        no_grad, grad: how often the part runs without and with gradient.
        checkpointed: the backward pass recomputes the whole forward pass.
    """
    runs = no_grad + 3 * grad
    return Cost(
        forward=(no_grad + grad) * (2 * weights + attention),
        backward_input=grad * (2 * weights + 2 * attention),
        backward_weight=grad * 2 * weights,
        recomputed=grad * (attention / 2 + checkpointed * (2 * weights + attention)),
        attention=runs * attention,
        masked=runs * masked,
    )
