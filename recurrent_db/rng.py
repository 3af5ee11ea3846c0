"""Random numbers as a function of (seed, step, global sample index, stream).

No generator is kept between draws: every draw seeds its own. So resuming a run, the number of processes and the micro-batch
size do not change any number, and two streams are independent. Tensors are drawn by PyTorch on their device, so a GPU draws
other numbers than a CPU. Scalars are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from statistics import NormalDist

import torch
from torch import Tensor

EVALUATION_STEP = -1
"""Step number of scoring and generation, so that their random numbers differ from those of training."""


def key(*parts: int | str) -> int:
    """Hash the parts into a 63-bit seed (BLAKE2b). Integers and strings of the same text give different seeds."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Rng:
    """The random numbers of one optimizer step, or with ``step = EVALUATION_STEP`` of an evaluation."""

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step

    def scalar(self, stream: str) -> float:
        """One uniform number in (0, 1), the same on every process and device."""
        return (key(self.seed, self.step, stream) + 0.5) / 2**63

    def scalar_normal(self, stream: str) -> float:
        """One standard normal number, the same on every process and device."""
        return NormalDist().inv_cdf(self.scalar(stream))

    def uniform(
        self,
        samples: Tensor | Iterable[int],
        shape: tuple[int, ...],
        stream: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Uniform numbers in [0, 1), shape (B, *shape), where B = len(samples). Entry b depends on samples[b] only."""
        return self._rows(samples, shape, stream, device, dtype, Tensor.uniform_)

    def normal(
        self, samples: Tensor | Iterable[int], shape: tuple[int, ...], stream: str, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normal numbers, float32, shape (B, *shape), where B = len(samples). Entry b depends on samples[b]
        only."""
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
