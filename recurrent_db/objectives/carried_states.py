"""States that `one_step` carries from one step to the next, and metrics by visit.

A slot is a place in the batch. While a slot holds the same sample (`data.loader.Slots`), each visit starts from the state
that the previous visit left, without gradient. The first visit starts from zero. A visit's number, counted from 1, is the
iteration that it trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recurrent_db.objectives.base import Metrics
from recurrent_db.rng import Rng


@dataclass
class Held:
    """What a slot holds after a visit."""

    seed: int
    """Seed of the data order. With another seed the same position is another sample."""
    position: int
    """The sample's position in the run."""
    visit: int
    """The number of the visit that left the state."""
    state_TD: Tensor


class CarriedStates:
    """The states of this process's slots.

    Args:
        batch_size: slots of all processes. The sample at position p is in slot p mod ``batch_size``.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.held: dict[int, Held] = {}

    def take(self, positions_B: Tensor, rng: Rng, zeros_BTD: Tensor) -> tuple[Tensor, list[int]]:
        """The states that a step starts from, (B, T, D), and the numbers of its visits (B).

        Args:
            positions_B: each sample's position in the run.
            zeros_BTD: the states of first visits.
        """
        states, visits = [], []
        for position, zeros_TD in zip(positions_B.tolist(), zeros_BTD, strict=True):
            held = self.held.get(position % self.batch_size)
            if held and (held.seed, held.position, held.state_TD.shape) == (rng.seed, position, zeros_TD.shape):
                states.append(held.state_TD.to(zeros_TD))
                visits.append(held.visit + 1)
            else:
                states.append(zeros_TD)
                visits.append(1)
        return torch.stack(states), visits

    def keep(self, positions_B: Tensor, rng: Rng, visits_B: list[int], state_BTD: Tensor) -> None:
        """Keep the states that a step leaves. A state that is not finite becomes zero, so that it harms one step only."""
        if rng.step < 0:  # not a training step
            return
        state_BTD = state_BTD.detach()
        finite_B11 = torch.isfinite(state_BTD).all(-1, keepdim=True).all(-2, keepdim=True)
        state_BTD = torch.where(finite_B11, state_BTD, torch.zeros_like(state_BTD))
        for position, visit, state_TD in zip(positions_B.tolist(), visits_B, state_BTD, strict=True):
            self.held[position % self.batch_size] = Held(rng.seed, position, visit, state_TD)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: ``state.SLOT`` (T, D), and ``held.SLOT`` with seed, position and visit, int64 (3,)."""
        found = {}
        for slot, held in self.held.items():
            found[f"state.{slot}"] = held.state_TD
            found[f"held.{slot}"] = torch.tensor([held.seed, held.position, held.visit])
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the states by the result of `tensors`.

        Raises:
            ValueError or KeyError: ``tensors`` is anything else.
        """
        self.held = {}
        for name, tensor in tensors.items():
            kind, _, slot = name.partition(".")
            if kind == "held" and tensor.dtype == torch.int64 and tensor.shape == (3,):
                state_TD = tensors[f"state.{slot}"]
                if state_TD.ndim != 2 or not state_TD.is_floating_point():
                    raise ValueError(f"state.{slot} is not a state: {state_TD.dtype} of shape {tuple(state_TD.shape)}")
                seed, position, visit = tensor.tolist()
                self.held[int(slot)] = Held(seed, position, visit, state_TD)
            elif kind != "state" or f"held.{slot}" not in tensors:
                raise ValueError(f"{name} does not describe the state of a slot")


def by_visit(visits: int, visit_B: list[int], losses_BT: Tensor, state_BTD: Tensor) -> Metrics:
    """Loss (nats per token) and RMS of the state at each visit, as (sum, weight) over the sequences at this visit."""
    values_2B = torch.stack((losses_BT.float().mean(-1), state_BTD.detach().float().square().mean(-1).sqrt().mean(-1)))
    at_VB = torch.tensor([[visit == number for visit in visit_B] for number in range(1, visits + 1)])
    at_VB = at_VB.to(values_2B.device, non_blocking=True)
    sums_2V = torch.where(at_VB, values_2B[:, None], 0).sum(-1)
    metrics = {}
    for name, sums_V in zip(("loss_visit", "state_rms_visit"), sums_2V, strict=True):
        for number in range(visits):
            metrics[f"{name}_{number + 1}"] = torch.stack((sums_V[number], at_VB[number].sum().to(sums_V)))
    return metrics
