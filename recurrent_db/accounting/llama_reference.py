"""A plain Llama of the same shape as the looped model, from Hugging Face transformers, as a baseline for speed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recurrent_db.config import Config
from recurrent_db.errors import UserError


def build_llama(config: Config) -> nn.Module:
    """A Llama with the looped model's widths and vocabulary, its layers at K = 1, tied embeddings and fused attention.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise UserError("the Llama reference needs pip install transformers; --no-reference leaves it out") from None
    model = config.model
    shape: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_mlp,
        "num_hidden_layers": model.n_prelude + model.n_core + model.n_coda,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_heads,
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**shape))


def llama_flops(model: nn.Module, tokens_1T: Tensor) -> float:
    """FLOPs per token of a forward and backward pass, from PyTorch's counter.

    Attention runs without fusion, because the counter misses some fused kernels. Gradients are cleared afterwards.

    Args:
        tokens_1T: token ids, int64, shape (1, T).
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=tokens_1T, labels=tokens_1T).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / tokens_1T.numel()
