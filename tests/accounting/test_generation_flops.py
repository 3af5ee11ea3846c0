"""FLOPs of generation, as its decoders count them, against PyTorch's counter."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import micro_config, micro_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.generation import sequential
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.generation.samplers import make_decoder


@pytest.mark.parametrize(
    "options",
    [
        ["next_token"],
        ["unrolled"],
        ["denoise"],
        ["denoise", "--objective.denoise.bridge", "state"],
        ["denoise", "--objective.denoise.bridge", "hard", "--objective.denoise.sampler", "heun"],
        ["denoise", "--objective.denoise.conditioning", "two-stream"],
    ],
    ids="-".join,
)
@pytest.mark.parametrize("k", [1, 3])
def test_what_generation_costs(options: list[str], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what the decoder says that it did, against the counter: a prompt read in parts, single tokens, a window that
    is outgrown, a batch."""
    window = ["--model.max_seq_len", "8", "--data.sequence_length", "8"]
    model, _ = micro_model(micro_config("--objective.name", *options, *window))
    monkeypatch.setattr(sequential, "_LOGITS_AT_ONCE", 3 * 61)
    for prompts, new in (([7], 1), ([5], 6), ([4, 1], 2)):
        decoder = make_decoder(model, [list(range(n)) for n in prompts], GenerationOptions(k=k, max_new_tokens=new))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            for _ in decoder.stream():
                pass
        assert decoder.flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize("injection", ["linear", "add"])
@pytest.mark.parametrize(
    "method",
    [
        {"sampler": "speculative:1:3"},
        {"sampler": "diagonal:2"},
        {"exit": "kl:1e-2"},
        {"exit": "latent:0.1", "warm_start": True},
    ],
)
def test_what_fast_samplers_cost(injection: str, method: dict[str, Any]) -> None:
    """Block by block, against the counter: prompts of several lengths, lost drafts, a window that is outgrown."""
    window = ["--model.max_seq_len", "8", "--data.sequence_length", "8", "--model.injection", injection]
    model, _ = micro_model(micro_config("--objective.name", "unrolled", *window))
    options = GenerationOptions(k=5, max_new_tokens=9, **method)
    decoder = make_decoder(model, [[1, 2, 3, 4, 5], [6], [7, 8]], options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for _ in decoder.stream():
            pass
    assert decoder.flops == pytest.approx(counter.get_total_flops(), rel=1e-9)
