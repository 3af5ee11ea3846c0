"""`masked`: masked diffusion (MD4, arXiv 2406.04329) with the linear schedule, end to end or in blocks that train alone.

At time t in (0, 1] each token is hidden with probability 1 - alpha_t = t. The network sees the other tokens, on both sides,
and predicts the hidden ones. The negative evidence lower bound (ELBO) is the expectation over uniform t of

    (-alpha'_t / (1 - alpha_t)) sum over hidden positions of -log p(x_i | x_t) = (1/t) sum ...

in nats per sequence. Time takes the place of sigma. Each of the model's B blocks has a range of t in which alpha changes by
1/B; block 1 starts at t = 1, where all tokens are hidden. The bound is a sum over these ranges, so each block has its own
term, and blocks that train alone together minimise the whole bound. A single block with all layers trains end to end.

The model is not autoregressive: it has no likelihood per token and does not generate from left to right. See `Masked.elbo`
and `unmask`.

Shapes: B sequences, T positions, V vocabulary. The vocabulary's last token is the mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.denoise.noise import Uniform
from recurrent_db.denoise.partition import Partition
from recurrent_db.errors import UserError
from recurrent_db.model.attention import Rule, Visible
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.passes import Passes
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.objectives.base import Metrics, Objective, cross_entropy
from recurrent_db.objectives.block_choice import drawn_block, freeze_shared, trains_shared
from recurrent_db.rng import EVALUATION_STEP, Rng


def time_partition(n_blocks: int) -> Partition:
    """Equal ranges of time t for the blocks. They are equal ranges of alpha too, because the schedule is linear."""
    return Partition.cut(Uniform(0.0, 1.0), n_blocks)


def both_sides(model: LoopedLM, length: int, docs_BT: Tensor | None) -> Visible:
    """Attention in which each position sees its whole document. ``docs_BT``: document of each position, or None."""
    return model.served(Rule(length, length, docs_BT if model.document_mask else None, causal=False))


def hidden_vectors(model: BlocksLM, block: int, tokens_BT: Tensor, t_B: Tensor, visible: Visible) -> Tensor:
    """Run a block on partly masked tokens. Returns the head's input, (B, T, D). Times ``t_B`` must be in the block's
    range."""
    part = model.block(block)
    e_BTD = part.encode(tokens_BT, visible)
    state_BTD = part.iterate(torch.zeros_like(e_BTD), e_BTD, 1, t_B.float()[:, None], visible=visible)
    return part.decode(state_BTD, visible=visible)


def strata(shift: float, number: int, count: int) -> float:
    """The ``number``-th of ``count`` evenly spaced points in [0, 1), shifted by ``shift`` and wrapped around.

    With a uniform shift they are uniform draws whose mean has less variance than that of independent draws (MD4,
    arXiv 2406.04329, appendix).
    """
    return (shift + number % count / count) % 1.0


@dataclass(frozen=True)
class Elbo:
    """Upper bound on the NLL of held-out text, in nats per token (negative ELBO)."""

    by_block: dict[int, float]
    """Each block's term of the bound, in nats per token."""
    stderr: float
    """Standard error of the bound, over sequences; NaN for a single sequence."""
    by_sequence: list[float]
    """The bound of each sequence, in nats per token, for paired comparisons of two models."""
    tokens: int
    """Number of tokens scored."""
    characters: int
    """Number of characters in the scored text."""

    @property
    def nats(self) -> float:
        """The bound: the sum of the blocks' terms, in nats per token."""
        return math.fsum(self.by_block.values())

    @property
    def bits_per_character(self) -> float:
        """The bound in bits per character, which is comparable between tokenizers."""
        return self.nats * self.tokens / self.characters / math.log(2)


class NotLeftToRight:
    """The recurrence of masked diffusion: all methods raise `UserError`, because it has no next-token iterations."""

    stochastic = False
    loop = None
    walk = None

    @staticmethod
    def _refuse() -> NoReturn:
        raise UserError(
            "a masked-diffusion model does not predict from left to right, so it has no NLL by K, lm-eval scores or"
            " generation from a prompt; use eval/masked.py for bits per character and samples"
        )

    def hidden(
        self, model: LoopedLM, tokens_BT: Tensor, e_BTD: Tensor, ks: Sequence[int], noise: NoiseSource,
        probe: Probe | None = None, visible: Visible | None = None,
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        self._refuse()

    def levels(self, k: int) -> list[float]:
        self._refuse()

    def start(self, like_BTD: Tensor, noise: NoiseSource) -> Tensor:
        self._refuse()

    def ready(self, model: LoopedLM) -> NotLeftToRight:
        self._refuse()

    def passes(self, k: int) -> Passes:
        self._refuse()


class Masked(Objective):
    """Train one block per step, at one random time per sequence from the block's range."""

    recurrence = NotLeftToRight()

    def __init__(self, config: Config) -> None:
        self.config, self.partition = config, time_partition(max(1, config.model.n_blocks))

    def prepare(self, model: LoopedLM) -> None:
        freeze_shared(self.config, model)

    def _losses(self, model: BlocksLM, block: int, batch: Batch, t_B: Tensor, hide_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy times 1/t at hidden positions, 0 elsewhere: the mean with gradient, and each position's, (B, T),
        detached. ``hide_BT``: bool, which tokens are hidden."""
        tokens_BT, length = batch.tokens_BT, batch.tokens_BT.shape[1]
        t_B, hide_BT = t_B.to(tokens_BT.device), hide_BT.to(tokens_BT.device)
        seen_BT = tokens_BT.masked_fill(hide_BT, model.config.vocab_size - 1)
        hidden = hidden_vectors(model, block, seen_BT, t_B, both_sides(model, length, batch.doc_ids_BT))
        weights_BT = hide_BT / t_B.float()[:, None]
        loss, losses_BT = cross_entropy(model, hidden, tokens_BT, weights_BT)
        return loss, losses_BT * weights_BT

    def _draw(
        self, block: int, batch: Batch, rng: Rng, count: int, draw: int = 0, first: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw times in the block's range, float64 (B,), and which tokens are hidden, bool (B, T), both on the CPU.

        ``count`` sequences divide the range evenly. A sequence's place among them is its sample index, or in evaluation its
        position from ``first`` on. ``draw`` numbers repeated draws.
        """
        low, high = self.partition.range_of(block)
        shift = rng.scalar(f"time/{block}/{draw}")
        places = batch.sample_index_B.tolist() if first is None else range(first, first + len(batch))
        u_B = torch.tensor([strata(shift, place, count) for place in places], dtype=torch.float64)
        t_B = high - u_B * (high - low)  # above low, so never 0
        u_BT = rng.uniform(batch.sample_index_B, (batch.tokens_BT.shape[1],), f"mask/{block}/{draw}")
        return t_B, u_BT < t_B[:, None]

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        assert isinstance(model, BlocksLM)
        block = drawn_block(self.config, rng)
        model.train_shared(trains_shared(self.config, block))
        loss, _ = self._losses(model, block, batch, *self._draw(block, batch, rng, self.config.data.batch_size))
        return loss, {f"loss_block_{block}": loss.detach()}

    def passes(self, rng: Rng, progress: float) -> Passes:
        block = drawn_block(self.config, rng)
        layers = self.config.model.block_layers[block - 1]
        shared = trains_shared(self.config, block)
        return Passes(core_grad=1, core_layers=layers, noise_levels=1, tables_grad=shared, causal=False)

    def describe(self, model: LoopedLM) -> list[str]:
        lines = []
        for block in [self.config.blocks.only] if self.config.blocks.only else range(1, self.partition.n_blocks + 1):
            low, high = self.partition.range_of(block)
            layers = self.config.model.block_layers[block - 1]
            lines.append(f"block {block} of {self.partition.n_blocks}: {layers} layers, t in ({low:.3g}, {high:.3g}]")
        return lines

    @torch.no_grad()
    def elbo(self, model: LoopedLM, batches: Iterable[Batch], tokenizer: Tokenizer, seed: int, draws: int = 1) -> Elbo:
        """Estimate the bound on held-out sequences.

        Args:
            model: the `BlocksLM` to score. If it holds a single block, the result has that block's term only.
            batches: sequences; each is scored from its own tokens alone.
            tokenizer: decodes the tokens, to count characters.
            seed: seed of the times and masks.
            draws: times drawn per block and sequence.
        """
        assert isinstance(model, BlocksLM)
        rng, batches = Rng(seed, EVALUATION_STEP), list(batches)
        count = sum(map(len, batches))
        sums: dict[int, list[Tensor]] = {block: [] for block in model.held()}
        tokens = characters = scored = 0
        for batch in batches:
            tokens += batch.tokens_BT.numel()
            characters += sum(len(tokenizer.decode(row)) for row in batch.tokens_BT.tolist())
            here = batch.to(model.embedding.weight.device)
            for block in model.held():
                low, high = self.partition.range_of(block)
                each = [
                    self._losses(model, block, here, *self._draw(block, batch, rng, count, d, first=scored))[1]
                    for d in range(draws)
                ]
                mean_B = torch.stack(each).double().mean((0, 2)).cpu()
                sums[block].append((high - low) * mean_B)
            scored += len(batch)
        terms = {block: torch.cat(parts) for block, parts in sums.items()}
        whole_N = torch.stack(list(terms.values())).sum(0)
        stderr = (whole_N.std() / math.sqrt(len(whole_N))).item() if len(whole_N) > 1 else math.nan
        return Elbo(
            {block: term.mean().item() for block, term in terms.items()}, stderr, whole_N.tolist(), tokens, characters
        )

    def held_out(self, model: LoopedLM, batches: Iterable[Batch], vocabulary: Tokenizer, seed: int) -> dict[str, float]:
        """The bound's term for each block; with all blocks also the bound in nats per token and in bits per character."""
        found = self.elbo(model, batches, vocabulary, seed, self.config.eval.draws)
        row: dict[str, float] = {f"eval/loss_block_{block}": value for block, value in found.by_block.items()}
        if not self.config.blocks.only:
            row |= {"eval/elbo": found.nats, "eval/elbo_stderr": found.stderr,
                    "eval/bits_per_character": found.bits_per_character}  # fmt: skip
        return {**row, "eval/tokens": found.tokens, "eval/draws": self.config.eval.draws}


@torch.no_grad()
def unmask(model: LoopedLM, tokens_BT: Tensor, steps: int, seed: int = 0) -> Tensor:
    """Replace the masks in ``tokens_BT`` by sampled tokens, in ``steps`` equal steps of t from 1 to 0.

    In the step from t to s, each masked token is revealed with probability (t - s) / t. It is drawn from the prediction of
    the block whose range holds t. Other tokens do not change. Returns int64 (B, T).
    """
    assert isinstance(model, BlocksLM)
    partition, mask = time_partition(model.config.n_blocks), model.config.vocab_size - 1
    tokens_BT = tokens_BT.clone()
    visible, rng = both_sides(model, tokens_BT.shape[1], None), Rng(seed, EVALUATION_STEP)
    samples, device = range(len(tokens_BT)), tokens_BT.device
    times = [*partition.levels(steps), 0.0]
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        t_B = torch.full((len(tokens_BT),), t, dtype=torch.float64, device=device)
        hidden = hidden_vectors(model, partition.block_of(t), tokens_BT, t_B, visible)
        logits_BTV = model.logits(hidden).double()
        logits_BTV[..., mask] = -math.inf
        u_BT2 = rng.uniform(samples, (tokens_BT.shape[1], 2), f"unmask/{step}").to(device)
        guess_BT = (logits_BTV.softmax(-1).cumsum(-1) < u_BT2[..., :1]).sum(-1).clamp(max=mask - 1)
        shown_BT = (tokens_BT == mask) & (u_BT2[..., 1] < (t - s) / t)
        tokens_BT = torch.where(shown_BT, guess_BT, tokens_BT)
    return tokens_BT


def build(config: Config) -> Masked:
    return Masked(config)
