"""The configuration of a recurrent_db model for Hugging Face transformers."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig


class RecurrentDBConfig(PretrainedConfig):
    """The model's shape and the start of its iterations. Keys that are not listed here are transformers' own.

    Args:
        num_key_value_heads, head_dim: None for those of plain attention.
        layer: huginn, llama or neox; see `layers_recurrent_db.Block`.
        rope_size: number of components of a head that are rotated; 0 means all.
        tied: whether the embedding is the head.
        num_recurrence: number of core iterations K.
        initial_state: zeros, random or noise.
        seed: seed of random and noise starts.
        use_cache: whether the model returns keys and values unless a call says otherwise.
        walk: for ``noise``: sd, mute, bridge, grid, and the log-normal distribution of the noise level (sigma_min,
            sigma_max, p_mean, p_std).
        run: configuration of the exported run; not used here.
    """

    model_type = "recurrent_db"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (Trainer leaves them out of its results)

    def __init__(
        self,
        vocab_size: int = 2048,
        hidden_size: int = 128,
        intermediate_size: int = 352,
        num_attention_heads: int = 4,
        n_prelude: int = 1,
        n_core: int = 2,
        n_coda: int = 1,
        max_position_embeddings: int = 128,
        injection: str = "linear",
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        layer: str = "huginn",
        v_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rope_base: float = 50_000.0,
        rope_size: int = 0,
        tied: bool = True,
        noise_features: int = 0,
        num_recurrence: int = 1,
        initial_state: str = "zeros",
        seed: int = 0,
        use_cache: bool = True,
        walk: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.layer, self.v_bias, self.qk_norm, self.norm_eps = layer, v_bias, qk_norm, norm_eps
        self.rope_base, self.rope_size, self.tied = rope_base, rope_size, tied
        self.n_prelude, self.n_core, self.n_coda = n_prelude, n_core, n_coda
        self.max_position_embeddings = max_position_embeddings
        self.injection, self.noise_features = injection, noise_features
        self.num_recurrence, self.initial_state, self.seed = num_recurrence, initial_state, seed
        self.use_cache, self.walk, self.run = use_cache, walk, run
        self.initializer_range = math.sqrt(2 / (5 * hidden_size))
        kwargs["num_hidden_layers"] = n_prelude + n_core + n_coda
        # A tied head has no weight of its own, because it uses the embedding's.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
