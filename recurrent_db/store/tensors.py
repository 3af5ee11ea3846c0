"""Weights and optimizer state as tensors by name, and how they are checked and loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recurrent_db.distributed.team import sharded_like
from recurrent_db.errors import UserError


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as a flat dictionary with names ``<entry>/<parameter name>``."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{entry}/{names[id(p)]}": value.contiguous()
        for p, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the result of `optimizer_tensors` into an optimizer, on the devices of its parameters.

    Raises:
        UserError: a tensor has no parameter in this model, another shape, or an integer dtype.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, ()) or not value.is_floating_point():
            raise UserError(
                f"the optimizer state {key!r} does not fit this model: it has no such parameter, or another shape"
            )
        # Fused AdamW keeps its step counter on the parameter's device.
        value = value.to(parameter.device)
        if value.shape == parameter.shape:
            value = sharded_like(value, parameter)
        optimizer.state.setdefault(parameter, {})[entry] = value


def check_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow_new: tuple[str, ...] = ()) -> None:
    """Check that weights fit a model, which may be on the meta device.

    Args:
        source: name of the weights in error messages.
        allow_new: as in `load_weights`.

    Raises:
        UserError: a parameter is missing, unknown, of another shape or of an integer dtype. The message names the first.
    """
    parameters = dict(model.named_parameters())
    for name in parameters.keys() | weights.keys():
        if name.startswith(allow_new or ("\0",)) and (name not in parameters or name not in weights):
            continue
        if name not in weights:
            raise UserError(f"{source} has no parameter {name}: it holds a model of another shape")
        if name not in parameters:
            raise UserError(f"{source} has a parameter {name} that this model lacks: it holds a model of another shape")
        if parameters[name].shape != weights[name].shape:
            found, needed = tuple(weights[name].shape), tuple(parameters[name].shape)
            raise UserError(f"{source}: {name} has shape {found}, but this model needs {needed}")
        if not weights[name].is_floating_point():
            raise UserError(f"{source}: {name} holds {weights[name].dtype}, not floating-point numbers")


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, allow_new: tuple[str, ...] = ()) -> None:
    """Copy weights into a model by name.

    Args:
        source: name of the weights in error messages.
        allow_new: parameters whose names start with one of these prefixes may be missing in the model or in ``weights``.
            The model then keeps its own values, and weights without a parameter are ignored.

    Raises:
        UserError: as `check_weights`.
    """
    check_weights(model, weights, source, allow_new)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(sharded_like(weights[name], parameter))
