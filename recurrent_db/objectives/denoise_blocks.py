"""`denoise` for a model in blocks: each block is trained as the denoiser of its own noise range (arXiv 2506.14202).

Training a block is `denoise` with the block as the model and with its noise range, widened by the overlap. Other blocks are
neither read nor run nor updated. With ``blocks.only`` the process holds that block alone. Otherwise each step draws a block
and trains it; the other blocks' weights and optimizer state do not change, not even by weight decay.

The clean context is a second stream, from the embedding through the block's own layers. Position i of the noised stream sees
clean tokens <= i and itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.denoise.noise import LogNormal
from recurrent_db.denoise.partition import Partition
from recurrent_db.denoise.sampler import EVALUATIONS
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.objectives.base import Metrics, Objective, cross_entropy
from recurrent_db.objectives.block_choice import drawn_block, freeze_shared, trains_shared
from recurrent_db.objectives.denoise import Denoise, noised, own_section
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.rng import EVALUATION_STEP, Rng

HELD_OUT_LEVELS = 4
"""Number of noise levels at which a run of a single block is scored."""


def noise_partition(config: Config) -> Partition:
    """The noise range of each block, by the configuration."""
    own = own_section(config)
    law = LogNormal(own.p_mean, own.p_std, own.sigma_min, own.sigma_max)
    return Partition.cut(law, config.model.n_blocks, config.blocks.gamma, config.blocks.partition == "uniform")


@dataclass(frozen=True)
class BlockWalk(DenoiseWalk):
    """A walk in which each noise level is one pass of the block that has that level."""

    partition: Partition = field(kw_only=True)
    layers: tuple[int, ...] = field(kw_only=True)
    """Number of layers of each block."""

    def at(self, model: LoopedLM, sigma: float) -> LoopedLM:
        assert isinstance(model, BlocksLM)
        return model.block(self.partition.block_of(sigma))

    def levels(self, k: int) -> list[float]:
        whole = self.density.sigma_max == self.partition.edges[0]
        return self.partition.levels(k) if self.config.grid == "edges" and whole else super().levels(k)

    def passes(self, k: int) -> Passes:
        levels = self.levels(k)
        again = EVALUATIONS[self.config.sampler] - 1  # a second-order step also evaluates at the next level
        runs = [self.partition.block_of(sigma) for sigma in [*levels, *levels[1:] * again]]
        touched = set(runs)
        return dataclasses.replace(
            super().passes(k),
            core_layers=sum(self.layers[block - 1] for block in runs) / len(runs),
            clean_no_grad=len(touched),
            clean_layers=sum(self.layers[block - 1] for block in touched) / len(touched),
        )


class DenoiseBlocks(Objective):
    """Train each block as a denoiser of its own."""

    two_stream = True

    def __init__(self, config: Config) -> None:
        self.config, self.partition = config, noise_partition(config)
        own, only = own_section(config), config.blocks.only
        self.blocks = {
            block: self._denoise(block) for block in ([only] if only else range(1, config.model.n_blocks + 1))
        }
        law, precond = self.partition.law, next(iter(self.blocks.values())).precond
        layers = tuple(config.model.block_layers)
        self.recurrence: BlockWalk = BlockWalk(law, precond, own, partition=self.partition, layers=layers)

    def _denoise(self, block: int) -> Denoise:
        """`denoise` on the block's range. Only the first block draws exactly sigma_max (the atom)."""
        low, high = self.partition.range_of(block)
        own = own_section(self.config)
        part = dataclasses.replace(own, sigma_min=low, sigma_max=high, atom=own.atom if block == 1 else 0.0)
        return Denoise(part, self.config.model.d_model)

    def prepare(self, model: LoopedLM) -> None:
        freeze_shared(self.config, model)

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        assert isinstance(model, BlocksLM)
        block = drawn_block(self.config, rng)
        model.train_shared(trains_shared(self.config, block))
        loss, metrics = self.blocks[block](model.block(block), batch, rng, progress)
        metrics[f"loss_block_{block}"] = metrics.pop("loss_cross_entropy")
        if block > 1:
            del metrics["loss_sigma_max"]  # only the first block has sigma_max
        return loss, metrics

    def passes(self, rng: Rng, progress: float) -> Passes:
        block = drawn_block(self.config, rng)
        layers = self.config.model.block_layers[block - 1]
        return dataclasses.replace(
            self.blocks[block].passes(rng, progress), core_layers=layers, clean_layers=layers,
            tables_grad=trains_shared(self.config, block),
        )  # fmt: skip

    def describe(self, model: LoopedLM) -> list[str]:
        counts, shared = self.config.model.block_layers, self.config.blocks.shared
        lines = []
        for block, denoise in self.blocks.items():
            low, high = self.partition.range_of(block)
            atom = f", {denoise.config.atom:.0%} of the draws at its upper end" if denoise.config.atom else ""
            lines.append(
                f"block {block} of {len(counts)}: {counts[block - 1]} layers, sigma in [{low:.3g}, {high:.3g}]{atom}"
            )
        who = f"trained by block {self.config.blocks.owner}" if shared == "owned" else f"trained by {shared} blocks"
        return [*lines, f"embedding and head: {'frozen' if shared == 'frozen' else who}"]

    @torch.no_grad()
    def held_out(self, model: LoopedLM, batches: Iterable[Batch], vocabulary: Tokenizer, seed: int) -> dict[str, float]:
        """Score a run of a single block: cross-entropy at noise levels spread over its range, each level and their mean.

        z is made from the answer, as in training, so this is not a likelihood. Block 1 also reports its loss on pure noise
        at sigma_max, which is the likelihood at K = 1. Empty for a model with all blocks, which is scored by K.
        """
        block = self.config.blocks.only
        if not block:
            return {}
        assert isinstance(model, BlocksLM)
        part, denoise, walk = model.block(block), self.blocks[block], self.recurrence
        levels = self.partition.levels_inside(block, HELD_OUT_LEVELS)
        if block == 1:  # pure noise: the likelihood at K = 1
            levels.append(self.partition.edges[0])
        sums, rng, count = dict.fromkeys(levels, 0.0), Rng(seed, EVALUATION_STEP), 0
        device = model.embedding.weight.device
        for batch in batches:
            batch = batch.to(device)
            visible = model.visible(batch.tokens_BT.shape[1], batch.doc_ids_BT)
            e_BTD = part.encode(batch.tokens_BT, visible)
            clean = walk.clean_contexts(part, e_BTD, visible)
            embeddings_BTD = model.embedding_rows(batch.targets_BT).float()
            eps_BTD = rng.normal(batch.sample_index_B, tuple(embeddings_BTD.shape[1:]), "held out", device)
            for sigma in levels:
                sigma_B1 = torch.full((len(embeddings_BTD), 1), sigma, device=device)
                top = block == 1 and sigma == self.partition.edges[0]
                z_BTD = sigma * eps_BTD if top else noised(embeddings_BTD, eps_BTD, sigma_B1)
                estimate = part.denoise(denoise.precond, z_BTD, sigma_B1, e_BTD, clean, visible)
                hidden = walk.read(part, estimate, e_BTD.dtype, visible=visible)
                sums[sigma] += cross_entropy(part, hidden, batch.targets_BT)[1].double().sum().item()
            count += batch.targets_BT.numel()
        means = {sigma: value / count for sigma, value in sums.items()}
        row = {f"eval/loss_sigma_{sigma:.3g}": value for sigma, value in means.items()}
        row[f"eval/loss_block_{block}"] = math.fsum(list(means.values())[:HELD_OUT_LEVELS]) / HELD_OUT_LEVELS
        if block == 1:
            row["eval/nll_k1"] = means[self.partition.edges[0]]
        return row


def build(config: Config) -> DenoiseBlocks:
    return DenoiseBlocks(config)
