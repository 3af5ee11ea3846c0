"""Read-outs after each iteration, for tokens of a generated text.

In a plain loop the read-out after iteration i is the model's output at K = i. In a denoiser's walk it is the read-out of the
estimate at level i of K; a walk with another K has other levels. The last read-out is the distribution from which the token
was drawn, before temperature and filters, if the text used a full cache. It is equal up to rounding.

Shapes: T positions, D width, V vocabulary, K iterations, N tokens traced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.denoise.sampler import EVALUATIONS
from recurrent_db.generation.sequences import context_start
from recurrent_db.model.looped import LoopedLM
from recurrent_db.model.recurrence import NoiseSource, Probe
from recurrent_db.repl.console import BOLD, DIM, GREEN, YELLOW, paint, width_of
from recurrent_db.rng import EVALUATION_STEP, Rng


@dataclass(frozen=True)
class Trace:
    """Read-outs by iteration for N tokens."""

    log_p_NKV: Tensor
    """Log-probabilities, fp64, on the CPU."""

    @property
    def entropy_NK(self) -> Tensor:
        """Entropy of each read-out, in nats."""
        return torch.special.entr(self.log_p_NKV.exp()).sum(-1)

    @property
    def moved_NK(self) -> Tensor:
        """KL divergence of each read-out from the previous one, KL(p_i || p_{i-1}), in nats; NaN for the first."""
        later, before = self.log_p_NKV[:, 1:], self.log_p_NKV[:, :-1]
        kl = (later.exp() * (later - before)).sum(-1).clamp(min=0)
        return torch.nn.functional.pad(kl, (1, 0), value=float("nan"))


def _hidden(model: LoopedLM, tokens_BT: Tensor, k: int, noise: NoiseSource) -> Tensor:
    """Hidden vectors after each iteration, (K, B, T, D)."""
    recurrence, e_BTD = model.recurrence.ready(model), model.encode(tokens_BT)
    if (walk := recurrence.walk) is None:
        return torch.stack([hidden for _, hidden in recurrence.hidden(model, tokens_BT, e_BTD, range(1, k + 1), noise)])
    probe = Probe()
    for _ in recurrence.hidden(model, tokens_BT, e_BTD, [k], noise, probe):
        pass
    each = EVALUATIONS[walk.config.sampler]  # the first evaluation of a step is at its level
    estimates = zip(probe.parts[::each], probe.states[::each], strict=True)
    return torch.stack([walk.read(part, estimate, e_BTD.dtype) for part, estimate in estimates])


@torch.inference_mode()
def trace(model: LoopedLM, ids: list[int], prompt: int, k: int, seed: int = 0, request: int = 0) -> Trace:
    """Read-outs for the token after the first ``prompt`` ids, and for the token after each later id.

    Args:
        ids: the tokens of a prompt and of the text generated after it.
        prompt: the prompt's length in tokens, 1 or more.
        k, seed, request: the values with which the text was generated.
    """
    window, rng, each = model.config.max_seq_len, Rng(seed, EVALUATION_STEP), []
    lengths = range(prompt, len(ids) + 1)
    starts = [context_start(prompt, length, window) for length in lengths]
    for start in sorted(set(starts)):
        ends = [length - start - 1 for length, first in zip(lengths, starts, strict=True) if first == start]
        context = torch.tensor([ids[start : start + ends[-1] + 1]], device=model.embedding.weight.device)
        noise = NoiseSource(rng, torch.tensor([request]), window, offset=start)
        hidden_KND = _hidden(model, context, k, noise)[:, 0, ends]
        each.append(model.logits(hidden_KND).cpu().double().log_softmax(-1).transpose(0, 1))
    return Trace(torch.cat(each))


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as a short text: quoted, or as bytes if it holds part of a character; special tokens in angle brackets."""
    piece = tokenizer.decode_bytes([token])
    if not piece:
        return "<end>" if token == tokenizer.eos_id else f"<{token}>"
    try:
        return repr(piece.decode())
    except UnicodeDecodeError:
        return repr(piece)[1:]


def table(
    result: Trace, index: int, model: LoopedLM, tokenizer: Tokenizer, drawn: int | None = None, width: int = 100
) -> list[str]:
    """Lines of the table of one traced token: iteration, noise level (walks only), entropy, KL divergence from the previous
    read-out, and the most likely tokens with their probabilities. ``drawn`` is marked. Lines have at most ``width`` columns,
    or more if one token needs more."""
    k, name_width = result.log_p_NKV.shape[1], 10
    sigmas = model.recurrence.levels(k)
    head = f"{'k':>4}" + (f"{'sigma':>9}" if sigmas else "") + f"{'entropy':>9}{'moved':>9}  "
    cells = max(1, min(5, (width - len(head)) // (name_width + 9)))
    lines = [paint(head + "most likely tokens", DIM)]
    entropy_K, moved_K = result.entropy_NK[index].tolist(), result.moved_NK[index].tolist()
    for i in range(k):
        line = f"{i + 1:>4}" + (f"{sigmas[i]:>9.3g}" if sigmas else "") + f"{entropy_K[i]:>9.3f}"
        line += f"{moved_K[i]:>9.3f}  " if i else f"{'':>9}  "
        p, tokens = result.log_p_NKV[index, i].exp().topk(min(cells, result.log_p_NKV.shape[2]))
        for probability, token in zip(p.tolist(), tokens.tolist(), strict=True):
            name = label(tokenizer, token)
            name = name if width_of(name) <= name_width else name[: name_width - 1] + "…"
            face = [GREEN] if probability >= 0.5 else [YELLOW] if probability >= 0.1 else [DIM]
            face += [BOLD] if token == drawn else []
            padding, mark = " " * (name_width - width_of(name)), "*" if token == drawn else " "
            line += paint(f"{name}{padding} {probability:.3f}{mark}", *face) + "  "
        lines.append(line.rstrip())
    return lines
