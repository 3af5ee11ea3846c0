"""`denoise`: one pass with gradient from a state that the model itself reached. The recipe; docs/method.md has the story.

What is denoised is the state and not the answer. A step runs the core l times without gradient from the silent state,
s_l = f(s_{l-1}, e), makes one more pass with gradient, and takes the cross-entropy of its read-out:

    loss = -log p(token_{i+1} | read(f(stop(s_l), e)))

The state never sees the answer, so there is nothing to copy, and the likelihood at every K is that of one deterministic
pass. Up to ``depth`` + 1 iterations are what training showed. Each is trained alone, as in DiffusionBlocks (arXiv
2506.14202); the gradient of one step through the last iteration alone is that of HRM (arXiv 2506.21734).

The first ``flat`` share of the budget trains the first iteration only (l = 0), which is plain next-token training; then
``start`` of the steps do, and in the others l is uniform over 1 to ``depth``. With ``noise``, a share of a sequence's
context tokens, uniform between 0 and twice ``noise``, is replaced by tokens drawn from the vocabulary: the state is
then an estimate from a corrupted context, which each pass learns to improve. That pays where a corpus is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recurrent_db.config import Config
from recurrent_db.data import Batch
from recurrent_db.flops import Passes
from recurrent_db.model.looped import LoopedLM
from recurrent_db.objectives.base import Metrics, Stateless, cross_entropy
from recurrent_db.recurrence import PlainRecurrence
from recurrent_db.rng import Rng


class Denoise(Stateless):
    """Draw how many iterations came before, run them without gradient, train the next one."""

    def __init__(self, config: Config) -> None:
        self.config = config.objective.denoise
        self.recurrence = PlainRecurrence(initial="zeros")

    def _before(self, rng: Rng, progress: float) -> int:
        """Iterations before the one that a step trains."""
        if progress < self.config.flat or rng.scalar("start") < self.config.start:
            return 0
        return 1 + int(rng.scalar("depth") * self.config.depth)

    def corrupted(self, tokens_BT: Tensor, samples_B: Tensor, vocab_size: int, rng: Rng) -> Tensor:
        """The context with a share of its tokens replaced, int64 (B, T), on the tokens' device."""
        shape = (tokens_BT.shape[1],)
        rate_B1 = rng.uniform(samples_B, (1,), "noise/rate") * 2 * self.config.noise
        hit_BT = rng.uniform(samples_B, shape, "noise/where") < rate_B1
        other_BT = (rng.uniform(samples_B, shape, "noise/what") * vocab_size).long()
        return torch.where(hit_BT.to(tokens_BT.device), other_BT.to(tokens_BT.device), tokens_BT)

    def __call__(self, model: LoopedLM, batch: Batch, rng: Rng, progress: float) -> tuple[Tensor, Metrics]:
        before, tokens_BT = self._before(rng, progress), batch.tokens_BT
        if self.config.noise:
            tokens_BT = self.corrupted(tokens_BT, batch.sample_index_B, model.config.vocab_size, rng)
        visible = model.visible(tokens_BT.shape[1], batch.doc_ids_BT)
        e_BTD = model.encode(tokens_BT, visible)
        with torch.no_grad():
            state_BTD = model.iterate(torch.zeros_like(e_BTD), e_BTD, before, visible=visible)
        state_BTD = model.iterate(state_BTD, e_BTD, visible=visible)
        loss = cross_entropy(model, model.decode(state_BTD, visible=visible), batch.targets_BT)[0]
        state_rms = state_BTD.detach().float().square().mean().sqrt()
        return loss, {"depth": torch.tensor(1.0 + before), "state_rms": state_rms}

    def passes(self, rng: Rng, progress: float) -> Passes:
        return Passes(core_no_grad=self._before(rng, progress), core_grad=1)
