"""What surrounds a stack that `convert` cuts into blocks: input, read-out and loss.

Shapes: B batch, N tokens, C classes, D target. z is the noised target y + sigma eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Frame(nn.Module):
    """What surrounds a stack: how a batch becomes the hidden sequence, how that is read out, and the loss.

    Subclass it, and register as submodules what all blocks need (patch embedding, label table, head). This base class is
    the frame of a stack that works on the data itself: y is (B, ..., width).

    The whole state is noised, as in a DiT. y is an image, and `read` returns a tensor in its shape:

        class ImageFrame(Frame):
            def embed(self, view, x):
                return self.patchify(view) + self.position  # (B, N, width)

            def read(self, hidden, x):
                return self.unpatchify(self.head(hidden))

    One token is noised, as in a ViT. y is a class, x is the clean image, and `read` returns logits over the rows of `table`:

        class ClassFrame(Frame):
            def table(self):
                return self.labels.weight  # (C, D)

            def embed(self, view, x):
                return torch.cat((self.patchify(x), self.project(view)[:, None]), dim=1)  # (B, N + 1, width)

            def read(self, hidden, x):
                return self.head(hidden[:, -1])  # (B, C)
    """

    def table(self) -> Tensor | None:
        """None if y is noised directly. If y is a class, one row per class, (C, D): the noised target is row y, scaled to
        length 1 by the caller."""
        return None

    def embed(self, view: Tensor, x: Any) -> Tensor:
        """The hidden sequence (B, ..., width). ``view`` is z scaled to unit variance, in the target's shape; ``x`` is the
        clean input that the caller passed on, or None."""
        return view

    def read(self, hidden: Tensor, x: Any) -> Tensor:
        """Read out the last layer's hidden sequence: a tensor in the target's shape, or logits (B, C) with a `table`.

        Without a table this is F in EDM's estimate D = c_skip z + c_out F (arXiv 2206.00364, eq. 7).
        """
        return hidden

    def loss(self, out: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The training loss, a scalar.

        By default it is cross-entropy without a weight for logits, and EDM's weighted squared error for an estimate.

        Args:
            out: the logits with a `table`, else the estimate D of y.
            y: what the caller passed to `DiffusionBlocks.loss`.
            weight: EDM's weight of each sample's level, (B, 1, ..., 1).
        """
        if self.table() is not None:
            return F.cross_entropy(out, y)
        return (weight * (out - y).square()).mean()

    def arguments(self, sigma_B: Tensor, label_B: Tensor | None) -> dict[str, Any]:
        """Keyword arguments of every layer, for layers that have their own level conditioning (diffusers: ``timestep``)."""
        return {}


@contextmanager
def read_only(module: nn.Module) -> Iterator[None]:
    """Within it, ``module`` gets no gradients and no new running statistics. Gradients flow through it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    training = [m for m in module.modules() if m.training]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        module.eval()
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for part in training:
            part.training = True
