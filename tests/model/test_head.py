"""Head and loss by chunks: against PyTorch's two ways, and the memory that it is for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recurrent_db.accounting.memory_split import peak_live_bytes
from recurrent_db.model.head import SoftmaxLoss, chunk_rows, linear_cross_entropy, softmax_loss, softmax_loss_to_fuse

pytestmark = pytest.mark.fast


def problem(n: int, v: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_()
    table = (0.3 * torch.randn(v, d, generator=generator, dtype=dtype)).requires_grad_()
    targets = torch.randint(v, (n,), generator=generator)
    weights = torch.rand(n, generator=generator, dtype=dtype)
    return hidden, table, targets, weights


@pytest.mark.parametrize("softmax", [softmax_loss, softmax_loss_to_fuse])
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), v=st.integers(1, 50), d=st.integers(1, 9), rows=st.integers(1, 50), seed=st.integers(0, 99)
)
def test_loss_and_gradients_are_those_of_the_whole(
    n: int, v: int, d: int, rows: int, seed: int, softmax: SoftmaxLoss
) -> None:
    hidden, table, targets, weights = problem(n, v, d, seed, torch.float64)
    total, losses = linear_cross_entropy(hidden, table, targets, weights, rows, softmax)
    gradients = torch.autograd.grad(total * 1.7, (hidden, table))
    expected = F.cross_entropy(hidden @ table.T, targets, reduction="none")
    wanted = torch.autograd.grad((expected * weights).sum() * 1.7, (hidden, table))
    torch.testing.assert_close(losses, expected)
    assert not losses.requires_grad
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
def test_agrees_with_pytorchs_chunked_one() -> None:
    hidden, table, targets, _ = problem(600, 3000, 48)
    mean = torch.full((600,), 1 / 600)
    ours = linear_cross_entropy(hidden, table, targets, mean)[0]
    theirs = F.linear_cross_entropy(hidden, table, targets, options=torch.nn.LinearCrossEntropyOptions())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, table)) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_memory_is_below_an_eighth_of_the_logits() -> None:
    """Forward and backward; what is left over as gradients is not the head's buffer."""
    n, v, d = 8192, 8000, 32
    hidden, table, targets, weights = problem(n, v, d)

    def step() -> None:
        hidden.grad = table.grad = None
        linear_cross_entropy(hidden, table, targets, weights)[0].backward()

    def whole() -> None:  # the control: a quarter of the rows, so that the test stays small
        hidden.grad = table.grad = None
        F.cross_entropy(hidden[: n // 4] @ table.T, targets[: n // 4]).backward()

    logits = n * v * 4
    gradients = hidden.nbytes + table.nbytes  # made once, and scaled in place
    assert peak_live_bytes(step) - gradients < logits / 8
    assert peak_live_bytes(whole) > logits / 4
    assert chunk_rows(n) == n // 32
    # A chunk's logits and their softmax, and nothing of the chunk before.
    assert peak_live_bytes(step) - gradients < 2.1 * logits / 32


def test_half_precision_products_under_autocast() -> None:
    hidden, table, targets, weights = problem(300, 700, 64)
    exact = linear_cross_entropy(hidden, table, targets, weights)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = linear_cross_entropy(hidden, table, targets, weights)
    assert losses.dtype == torch.float32  # softmax and loss stay wide
    torch.testing.assert_close(total, exact, rtol=1e-2, atol=0)
    ours, theirs = (torch.autograd.grad(x, (hidden, table)) for x in (total, exact))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_without_gradient_none_is_made() -> None:
    hidden, table, targets, weights = problem(10, 20, 4)
    with torch.no_grad():
        total, losses = linear_cross_entropy(hidden, table, targets, weights)
    assert not total.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ table.T, targets, reduction="none").detach())
    total, _ = linear_cross_entropy(hidden.detach(), table, targets, weights)
    total.backward()
    assert hidden.grad is None
    assert table.grad is not None
