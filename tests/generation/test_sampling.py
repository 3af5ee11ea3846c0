"""From logits to a token: filters and draws against cases made by hand."""

from __future__ import annotations

import pytest
import torch

from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.sampling import draw, probabilities

pytestmark = pytest.mark.fast

LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.2, 0.2, 0.1]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 3}, [5 / 9, 2 / 9, 2 / 9, 0]),
        ({"top_k": 2}, [5 / 7, 2 / 7, 0, 0]),
        ({"top_k": 9}, [0.5, 0.2, 0.2, 0.1]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [5 / 7, 2 / 7, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [25 / 34, 4 / 34, 4 / 34, 1 / 34]),
        ({"top_k": 2, "top_p": 0.9}, [5 / 7, 2 / 7, 0, 0]),
        ({"min_p": 0.4}, [5 / 9, 2 / 9, 2 / 9, 0]),
        ({"min_p": 0.41}, [1, 0, 0, 0]),
        ({"min_p": 1}, [1, 0, 0, 0]),
        ({"min_p": 0.4, "temperature": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_filters(settings: dict[str, float], expected: list[float]) -> None:
    ours = probabilities(LOGITS, GenerationOptions(**settings))  # type: ignore[arg-type]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_top_p_of_a_large_vocabulary_against_sorting_all_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 4.0):  # the mass lies in nearly all of the tokens, in many, in few
        logits = scale * torch.randn(5000, generator=generator, dtype=torch.float64)
        p = logits.softmax(-1)
        for top_p in (0.05, 0.9):
            order = sorted(range(5000), key=lambda i: -p[i].item())
            mass, kept = 0.0, []
            while mass < top_p:
                kept.append(order[len(kept)])
                mass += p[kept[-1]].item()
            ours = probabilities(logits, GenerationOptions(top_p=top_p))
            assert ours.nonzero()[:, 0].tolist() == sorted(kept)
            torch.testing.assert_close(ours[kept], p[kept] / mass)
    equal = probabilities(torch.zeros(5000), GenerationOptions(top_p=0.5))
    assert equal.nonzero()[:, 0].tolist() == list(range(2500))  # of equals the first


def test_repetition_penalty() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5], dtype=torch.float64)
    ours = probabilities(logits, GenerationOptions(repetition_penalty=2.0), seen=[0, 2, 0])
    torch.testing.assert_close(ours, torch.tensor([1.0, 1.5, -2.0, -1.5], dtype=torch.float64).softmax(-1))
    assert draw(logits, GenerationOptions(temperature=0, repetition_penalty=2.0), [0], 0.5) == 1
    assert draw(logits, GenerationOptions(temperature=0), [0], 0.5) == 0


def test_draws_follow_the_distribution_function() -> None:
    options = GenerationOptions(top_k=3)
    drawn = [
        draw(LOGITS, options, [], u) for u in (0, 5 / 9 - 1e-9, 5 / 9 + 1e-9, 7 / 9 - 1e-9, 7 / 9 + 1e-9, 1 - 2**-53)
    ]
    assert drawn == [0, 0, 1, 1, 2, 2]
