"""A bound on the likelihood of a walk, by importance sampling from the answer's own noising.

The walk whose likelihood is bounded starts from z_0 ~ N(0, sigma_0^2) and at each level draws a token from the read-out,
u ~ p_k(. | z_k), then z_{k+1} ~ N(m_k(u), s_k^2), the posterior of the noised target given z_k and y_u (the ancestral step);
at the last level it draws the token that it says. The paths cannot be summed over, but for one answer v the path can be
drawn as if u = v at every step, and weighted:

    w = p_K(v | z_K) prod_k  sum_u p_k(u | z_k) N(z_{k+1}; m_k(u), s_k^2) / N(z_{k+1}; m_k(v), s_k^2).

E[w] = p(v), so log w is a lower bound on average, and log-mean-exp over M draws a tighter one (arXiv 1509.00519). For a
denoiser that is exact, w = p(v) for every path: the posterior odds of u and v before a step times the odds of where it went
are those after it. The mixture over a walk's read-outs has the same mean and no such property: late read-outs are nearly
point masses, and it takes e^(their NLL) draws to meet the answer.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from recurrent_db.denoise.sampler import ancestral


def step_log_weight(
    log_p_BTV: Tensor, rows_VD: Tensor, answers_BT: Tensor, eps_BTD: Tensor, sigma: float, following: float
) -> Tensor:
    """log of sum_u p(u) N(z'; m(u), s^2) / N(z'; m(v), s^2) for z' = m(v) + s eps, (B, T).

    ``log_p`` is the read-out at ``sigma``, ``rows`` are the clean targets, all of one norm, ``answers`` the tokens v, and
    ``following`` < sigma is the level of z'. With r = following / sigma, m(u) = (1 - r^2) y_u + r^2 z and
    s^2 = following^2 (1 - r^2), so z itself cancels.
    """
    share = 1 - (following / sigma) ** 2
    pull, push = share / following**2, math.sqrt(share) / following
    y_BTD = rows_VD[answers_BT]
    of_rows_BTV = (pull * y_BTD + push * eps_BTD) @ rows_VD.T
    own_BT = pull * y_BTD.square().sum(-1) + push * (eps_BTD * y_BTD).sum(-1)
    return (log_p_BTV + of_rows_BTV).logsumexp(-1) - own_BT


def walk_log_weight(
    read: Callable[[Tensor, float], Tensor],
    rows_VD: Tensor,
    answers_BT: Tensor,
    start_BTD: Tensor,
    sigmas: Sequence[float],
    noise: Callable[[int], Tensor],
) -> Tensor:
    """log w of one draw, in ``start``'s dtype (B, T).

    Args:
        read: (z, sigma) -> log-probabilities (B, T, V) of the read-out there.
        rows_VD: clean targets, all of one norm.
        answers_BT: tokens whose likelihood is asked for.
        start_BTD: z at ``sigmas[0]``, drawn without the answer.
        sigmas: noise levels of the walk, falling; with one, w is the read-out's probability.
        noise: step's number -> standard normals (B, T, D).
    """
    z_BTD, y_BTD = start_BTD, rows_VD[answers_BT]
    total_BT = start_BTD.new_zeros(answers_BT.shape)
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        eps_BTD = noise(index)
        total_BT = total_BT + step_log_weight(read(z_BTD, sigma), rows_VD, answers_BT, eps_BTD, sigma, following)
        z_BTD = ancestral(lambda z, sigma: y_BTD, z_BTD, sigma, following, eps_BTD)
    return total_BT + read(z_BTD, sigmas[-1]).gather(-1, answers_BT[..., None])[..., 0]
