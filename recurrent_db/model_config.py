"""The settings of the network, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from recurrent_db.schema import Count, Hidden, Positive, Section, above, at_least, at_most, need

Config = Any
"""`config.Config`. This module cannot import it, because it contains these sections."""


@dataclass
class ModelConfig(Section):
    """Shape of the network: prelude -> core x K -> coda. A network for images has n_core layers and neither prelude nor
    coda."""

    network: Hidden[Literal["language", "vit", "dit"]] = "language"
    """The class of the network. The objective sets this field."""
    vocab_size: Annotated[int, at_least(0), at_most(1 << 24)] = 0
    """Size of the vocabulary, in tokens; 0 takes the tokenizer's."""
    d_model: Annotated[int, above(0), at_most(1 << 17)] = 128
    """Width of the residual stream."""
    n_heads: Annotated[int, above(0), at_most(1 << 12)] = 4
    """Number of attention heads. The head size must be a whole number, and even in language models, as rotary embeddings
    require."""
    n_kv_heads: Count = 0
    """Number of heads of keys and values. Each serves a group of n_heads / n_kv_heads query heads (grouped-query attention).
    0 means n_heads."""
    head_size: Annotated[int, at_least(0), at_most(1 << 16)] = 0
    """Size of an attention head; 0 means d_model / n_heads."""
    n_prelude: Annotated[int, at_least(0), at_most(1024)] = 1
    """Number of transformer layers before the core."""
    n_core: Annotated[int, above(0), at_most(1024)] = 2
    """Number of transformer layers in the weight-tied core."""
    n_coda: Annotated[int, at_least(0), at_most(1024)] = 1
    """Number of transformer layers after the core."""
    d_mlp: Annotated[int, above(0), at_most(1 << 20)] = 352
    """Hidden width of the MLP. If it is gated, the gate and up projections have this width each."""
    layer: Literal["huginn", "llama", "neox"] = "huginn"
    """Kind of transformer layer. huginn: an RMSNorm before and after each branch, gated MLP. llama: an RMSNorm before each
    branch only, gated MLP. neox: a LayerNorm before each branch, both branches read the layer's input, GELU MLP, biases on
    all projections. With llama and neox the embedding is not scaled, and the final norm is used only before the head."""
    v_bias: bool = False
    """Learned bias on values, as in Qwen2. Queries and keys always have one. Implied by layer = neox."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before the rotary embedding, as in Qwen3."""
    norm_eps: Positive = 1e-6
    """Epsilon of every norm."""
    rope_base: Positive = 50_000.0
    """Base of the rotary position embedding."""
    rope_size: Count = 0
    """Number of components of each head that are rotated; 0 means all."""
    tied: bool = True
    """Use the embedding as the head. False gives the head a matrix of its own."""
    max_seq_len: Annotated[int, above(0), at_most(1 << 24)] = 128
    """Longest context of scoring and generation, in tokens."""
    injection: Literal["linear", "diagonal", "add"] = "linear"
    """How the core combines its state s with the prelude's output e. linear: Huginn's adapter on [s, e]. diagonal: a decay
    of s per channel plus a projection of e (Parcae, arXiv 2604.12946). add: s + e."""
    silent_state: Hidden[bool] = False
    """Set the linear adapter's weights on the state to zero at initialisation. Iterations after the first then start as
    repetitions of it. The objective sets this field."""
    noise_conditioning: Hidden[bool] = False
    """Condition the core's layers on the noise level by AdaLN. The objective sets this field."""
    d_condition: Annotated[int, above(0), at_most(1 << 16)] = 128
    """Width of the noise level's embedding."""
    expected_depth: Annotated[int, above(0), at_most(1 << 20)] = 32
    """Mean number of core passes assumed at initialisation, where it scales the output projections."""
    n_blocks: Count = 0
    """Number of separately trained blocks into which the n_core layers are cut (DiffusionBlocks). Each layer runs once, and
    each block has its own range of noise levels. 0 makes a looped model, or for images a plain ViT. See
    docs/guides/blocks.md."""
    block_layers: list[int] = field(default_factory=list)
    """Number of layers in each block; the first block has the highest noise. Empty splits n_core evenly."""
    patch_size: Annotated[int, above(0), at_most(1 << 12)] = 4
    """Side of a square patch of an image, in pixels. Networks for images only."""
    image_size: Hidden[list[int]] = field(default_factory=list)
    """Height and width of the images, in pixels. The data sets this field."""
    n_classes: Hidden[int] = 0
    """Number of classes of the images. The data sets this field."""

    @property
    def d_head(self) -> int:
        """Size of an attention head, E."""
        return self.head_size or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values, G."""
        return self.n_kv_heads or self.n_heads

    @property
    def d_qkv(self) -> int:
        """Width of the fused projection to queries, keys and values, (H + 2 G) E."""
        return (self.n_heads + 2 * self.kv_heads) * self.d_head

    def check(self, config: Config) -> None:
        need(
            self.network == "language" or self.n_prelude == self.n_coda == 0,
            "a network for images has neither prelude nor coda: set model.n_prelude = 0 and model.n_coda = 0",
        )
        need(
            all(0 < side <= 1 << 12 and side % self.patch_size == 0 for side in self.image_size),
            f"images of {' x '.join(map(str, self.image_size))} pixels cannot be cut into patches of model.patch_size ="
            f" {self.patch_size} x {self.patch_size}",
        )
        need(0 <= self.n_classes <= 1 << 16, f"model.n_classes must be from 0 to {1 << 16}, got {self.n_classes}")
        need(
            bool(self.head_size) or self.d_model % self.n_heads == 0,
            f"model.d_model = {self.d_model} is not divisible by model.n_heads = {self.n_heads}",
        )
        need(
            self.network != "language" or self.d_head % 2 == 0,
            f"the head size {self.d_head} (model.d_model / model.n_heads) must be even for RoPE",
        )
        need(
            self.n_heads % self.kv_heads == 0,
            f"model.n_heads = {self.n_heads} is not divisible by model.n_kv_heads = {self.n_kv_heads}",
        )
        need(
            self.rope_size % 2 == 0 and self.rope_size <= self.d_head,
            f"model.rope_size = {self.rope_size} must be even and at most the head size {self.d_head}",
        )
        need(self.tied or not self.n_blocks, "a model in blocks has a tied head: set model.tied = true")
        n, layers = self.n_blocks, self.block_layers
        if not n:
            need(not layers, "model.block_layers needs model.n_blocks")
            return
        need(n <= self.n_core, f"model.n_core = {self.n_core} layers cannot be cut into {n} blocks")
        need(
            bool(layers),
            f"model.n_core = {self.n_core} layers cannot be split evenly into {n} blocks: set model.block_layers",
        )
        need(
            len(layers) == n and sum(layers) == self.n_core and min(layers) >= 1,
            f"model.block_layers = {layers} must list {n} numbers, each 1 or more, that sum to model.n_core = {self.n_core}",
        )
        need(
            self.n_prelude == self.n_coda == 0,
            "a model in blocks has neither prelude nor coda: set model.n_prelude = 0 and model.n_coda = 0",
        )
