"""Small pretrained-like models of each family that can be imported, made with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from hf_helpers import VOCAB, bpe

LAYERS, WINDOW = 5, 2048
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "max_position_embeddings": WINDOW, "eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "smollm": ("llama", {**GROUPED, "num_key_value_heads": 3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**GROUPED, "head_dim": 16, "sliding_window": None}),
    "qwen2": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 12}),
    "pythia": ("gpt_neox", {**SHAPE, "rotary_pct": 0.25, "num_attention_heads": 3}),
}
"""Name of a model: its ``model_type``, and the arguments of its configuration."""


def source_model(name: str) -> Any:
    """A model with random weights, large enough that every part matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, arguments = SOURCES[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **arguments)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.2 * noise + ("norm" in key and key.endswith("weight")))
            else:
                value.copy_(noise * 0.9 / math.sqrt(value.shape[-1]))
    return model


def save_source(name: str, folder: Path, texts: list[str]) -> Any:
    """Save a model with its tokenizer, as transformers does, and return it."""
    model = source_model(name)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(bpe(texts)))
    specials = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|begin|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    return model
