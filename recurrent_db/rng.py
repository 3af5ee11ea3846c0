"""Randomness as a function of (seed, step, global sample index, stream), and of nothing else.

No generator is carried along: every draw seeds its own. So neither a resumption, nor the number of processes, nor the
micro-batch size changes a number, and two streams never share one. Bulk draws are PyTorch's on the tensor's device
(a GPU draws other numbers than a CPU); scalar draws are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from statistics import NormalDist

import torch
from torch import Tensor

EVALUATION_STEP = -1
"""The step under which scoring and generation draw, so that they share no number with training."""


def key(*parts: int | str) -> int:
    """Hash the parts into a 63-bit seed (BLAKE2b)."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Rng:
    """The draws of one optimizer step (or of one evaluation: ``step = EVALUATION_STEP``)."""

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step

    def scalar(self, stream: str) -> float:
        """One uniform in (0, 1), the same on every process."""
        return (key(self.seed, self.step, stream) + 0.5) / 2**63

    def scalar_normal(self, stream: str) -> float:
        """One standard normal, the same on every process."""
        return NormalDist().inv_cdf(self.scalar(stream))

    def uniform(
        self,
        samples: Tensor | Iterable[int],
        shape: tuple[int, ...],
        stream: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Uniforms in [0, 1), shape (B, *shape); row b depends on samples[b] alone."""
        return self._rows(samples, shape, stream, device, dtype, Tensor.uniform_)

    def normal(
        self, samples: Tensor | Iterable[int], shape: tuple[int, ...], stream: str, device: torch.device | str = "cpu"
    ) -> Tensor:
        """float32 standard normals, shape (B, *shape), on ``device``; row b depends on samples[b] alone."""
        return self._rows(samples, shape, stream, device, torch.float32, Tensor.normal_)

    def _rows(
        self,
        samples: Tensor | Iterable[int],
        shape: tuple[int, ...],
        stream: str,
        device: torch.device | str,
        dtype: torch.dtype,
        fill: Callable[..., Tensor],
    ) -> Tensor:
        indices = samples.tolist() if isinstance(samples, Tensor) else list(samples)
        out = torch.empty(len(indices), *shape, dtype=dtype, device=device)
        generator = torch.Generator(device=device)
        for row, index in zip(out, indices, strict=True):
            fill(row, generator=generator.manual_seed(key(self.seed, self.step, int(index), stream)))
        return out
