"""What tests of the exchange with transformers share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 320


def from_hf(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def hf_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def bpe(texts: list[str]) -> dict[str, Any]:
    """A byte-level BPE tokenizer of 320 tokens with three special ones, as tokenizer.json holds it."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>", "<|begin|>", "<|pad|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(texts[:5], trainer)
    assert backend.get_vocab_size() == VOCAB
    spec: dict[str, Any] = json.loads(backend.to_str())
    return spec
