"""A bound on the likelihood of a walk, by importance sampling of paths that lead to the answer.

The walk in question starts from z_0 ~ N(0, sigma_0^2). At each level it draws a token u ~ p_k(. | z_k) from the read-out,
then z_{k+1} ~ N(m_k(u), s_k^2), the posterior of the noised target given z_k and y_u (the ancestral step). At the last level
the drawn token is the result. There are too many paths to sum over. For one answer v, a path is drawn with u = v at every
step and weighted by

    w = p_K(v | z_K) prod_k  sum_u p_k(u | z_k) N(z_{k+1}; m_k(u), s_k^2) / N(z_{k+1}; m_k(v), s_k^2).

E[w] = p(v), so the mean of log w is a lower bound on log p(v). Log-mean-exp over M draws is a tighter bound (arXiv
1509.00519). For an exact denoiser w = p(v) on every path, because a step multiplies the posterior odds of u and v by the
likelihood ratio of where it went. The likelihood of draws, which averages read-outs over draws, has the same mean but not
this property: late read-outs are nearly point masses, so it takes about e^(their NLL) draws to hit the answer.

Shapes: B sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from recurrent_db.denoise.sampler import ancestral


def step_log_weight(
    log_p_BTV: Tensor, targets_VD: Tensor, answers_BT: Tensor, eps_BTD: Tensor, sigma: float, following: float
) -> Tensor:
    """One step's factor of the weight: log of sum_u p(u) N(z'; m(u), s^2) / N(z'; m(v), s^2) for z' = m(v) + s eps, (B, T).

    With r = following / sigma, m(u) = (1 - r^2) y_u + r^2 z and s^2 = following^2 (1 - r^2), so z itself cancels.

    Args:
        log_p_BTV: log-probabilities of the read-out at ``sigma``.
        targets_VD: targets y of all tokens, all of the same norm.
        answers_BT: tokens v.
        eps_BTD: standard normal noise of the step.
        sigma: noise level before the step.
        following: noise level of z', below ``sigma``.
    """
    share = 1 - (following / sigma) ** 2
    y_scale, eps_scale = share / following**2, math.sqrt(share) / following
    y_BTD = targets_VD[answers_BT]
    all_BTV = (y_scale * y_BTD + eps_scale * eps_BTD) @ targets_VD.T
    own_BT = y_scale * y_BTD.square().sum(-1) + eps_scale * (eps_BTD * y_BTD).sum(-1)
    return (log_p_BTV + all_BTV).logsumexp(-1) - own_BT


def walk_log_weight(
    read: Callable[[Tensor, float], Tensor],
    targets_VD: Tensor,
    answers_BT: Tensor,
    start_BTD: Tensor,
    sigmas: Sequence[float],
    noise: Callable[[int], Tensor],
) -> Tensor:
    """The log weight log w of one draw, (B, T), in the dtype of ``start_BTD``.

    Args:
        read: function from (z, sigma) to the log-probabilities (B, T, V) of the read-out there.
        targets_VD: targets y of all tokens, all of the same norm.
        answers_BT: tokens v whose likelihood is bounded.
        start_BTD: z at ``sigmas[0]``, drawn independently of the answer.
        sigmas: falling noise levels of the walk. With a single level, w is the probability of the read-out.
        noise: function from a step's number to standard normals (B, T, D).
    """
    z_BTD, y_BTD = start_BTD, targets_VD[answers_BT]
    total_BT = start_BTD.new_zeros(answers_BT.shape)
    for index, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        eps_BTD = noise(index)
        total_BT = total_BT + step_log_weight(read(z_BTD, sigma), targets_VD, answers_BT, eps_BTD, sigma, following)
        z_BTD = ancestral(lambda z, sigma: y_BTD, z_BTD, sigma, following, eps_BTD)
    return total_BT + read(z_BTD, sigmas[-1]).gather(-1, answers_BT[..., None])[..., 0]
