"""A model in blocks: a transformer whose blocks share only the embedding and head (DiffusionBlocks, arXiv 2506.14202).

Each block is a `LoopedLM` without prelude and coda, whose core runs once: injection, layers, noise conditioning, norm. A
single block (``only``) can be built, trained and saved without the others. Its parameters have the same names
(``embedding.*``, ``blocks.2.*``) and the same initial values as in the whole model.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from recurrent_db.config import ModelConfig
from recurrent_db.errors import UserError
from recurrent_db.model.layers import Embedding
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import key


def block_config(config: ModelConfig, block: int) -> ModelConfig:
    """Configuration of block ``block``, counted from 1, as a `LoopedLM`."""
    return dataclasses.replace(config, n_core=config.block_layers[block - 1], n_blocks=0, block_layers=[])


def plain_weights(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename the weights of a model without blocks, prelude and coda to those of a model in blocks.

    The layers go to the blocks in order; the injection and the norm are copied to each block. The noise conditioning is
    dropped, because its output is for all layers at once. Weights of a model in blocks are returned unchanged.
    """
    if not any(name.startswith("core.") for name in weights):
        return weights
    renamed = {}
    starts = [sum(config.block_layers[:b]) for b in range(config.n_blocks)]
    for name, value in weights.items():
        head, _, tail = name.removeprefix("core.blocks.").partition(".")
        if name.startswith("core.blocks.") and int(head) < config.n_core:
            block = max(b for b, start in enumerate(starts) if start <= int(head))
            renamed[f"blocks.{block + 1}.core.blocks.{int(head) - starts[block]}.{tail}"] = value
        elif name.startswith(("core.injection.", "final_norm.")):
            renamed |= {f"blocks.{block + 1}.{name}": value for block in range(config.n_blocks)}
        elif not name.startswith("noise_embedding."):
            renamed[name] = value
    return renamed


class BlocksLM(LoopedLM):
    """A model in blocks. It has the embedding, the head and the attention masks; each `block` denoises.

    Args:
        config: configuration with ``n_blocks`` above 0.
        only: number of the single block to build, from 1; 0 builds all.

    Raises:
        UserError: ``config.vocab_size`` is not set.
    """

    def __init__(self, config: ModelConfig, only: int = 0) -> None:
        nn.Module.__init__(self)
        if config.vocab_size < 1:
            raise UserError("model.vocab_size is not set: set it, or set data.path to use its tokenizer's")
        self.config, self.only = config, only
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.prelude, self.head = nn.ModuleList(), None
        self.noise_embedding = None
        self.blocks = nn.ModuleDict()
        self._ropes = {}
        for number in [only] if only else range(1, config.n_blocks + 1):
            block = LoopedLM(block_config(config, number))
            # The block uses the shared embedding without owning it: a plain attribute is not registered as a submodule.
            del block.embedding
            object.__setattr__(block, "embedding", self.embedding)
            self.blocks[str(number)] = block

    def block(self, number: int) -> LoopedLM:
        """Block ``number``, from 1, as a model with the shared embedding.

        Raises:
            UserError: the model was built without this block.
        """
        if str(number) not in self.blocks:
            raise UserError(
                f"this run holds only block {self.only} of {self.config.n_blocks}, not block {number}: join the runs of all"
                " blocks into one model with recurrent-db blocks join"
            )
        block = self.blocks[str(number)]
        assert isinstance(block, LoopedLM)
        block.attention, block.document_mask, block.compiled = self.attention, self.document_mask, self.compiled
        return block

    def held(self) -> list[int]:
        """Numbers of the blocks that this model was built with."""
        return [int(number) for number in self.blocks]

    def train_shared(self, on: bool) -> None:
        """Turn gradients of the shared embedding and head on or off."""
        self.embedding.weight.requires_grad_(on)

    def compile_parts(self, backend: str = "inductor") -> None:
        for number in self.held():
            self.block(number).compile_parts(backend)
        first = self.block(self.held()[0])
        self.fuse, self.softmax_loss, self.compiled = first.fuse, first.softmax_loss, True

    def checkpoint_activations(self, on: bool) -> None:
        for number in self.held():
            self.block(number).checkpoint_activations(on)

    def forward(self, tokens_BT: Tensor, iterations: int = 1) -> Tensor:
        raise UserError("a model in blocks has no forward pass without noise levels: use its recurrence")

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Draw initial weights, in place. Each block has a generator of its own, keyed by the seed of ``generator`` and the
        block's number, so its values do not depend on which blocks are built."""
        seed = generator.initial_seed()
        std = (2 / (5 * self.config.d_model)) ** 0.5
        nn.init.trunc_normal_(self.embedding.weight, std=std, a=-3 * std, b=3 * std, generator=generator)
        for number in self.held():
            self.block(number).initialize(torch.Generator().manual_seed(key(seed, "block", number)))

    def parameter_counts(self) -> dict[str, int]:
        sums: dict[str, int] = {}
        for number in self.held():
            for part, count in self.block(number).parameter_counts().items():
                sums[part] = sums.get(part, 0) + count
        repeats = len(self.held()) - 1  # each block counts the shared embedding
        tables = self.embedding.weight.numel()
        return {**sums, "embedding": tables, "total": sums["total"] - repeats * tables}
