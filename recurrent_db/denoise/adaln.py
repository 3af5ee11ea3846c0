"""Layers of any library, conditioned on the noise level and a class by AdaLN (DiT, arXiv 2212.09748).

Two places for the modulation: outside a layer, or after each of its norms. Both start at zero and then change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurrent_db.denoise.noise_embedding import NoiseEmbedding
from recurrent_db.errors import UserError

CHANNEL_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
)
"""Modules that read (B, C, ...)."""


def _like(m: Tensor, x: Tensor) -> Tensor:
    """Modulation (B, width), broadcast to x (B, ..., width), in its dtype."""
    return m.view(m.shape[0], *[1] * (x.ndim - 2), m.shape[-1]).to(x.dtype)


MODULATIONS = {"layers": 3, "norms": 2, "inside": 6}
"""Where a layer is modulated (see `convert.convert`), and the vectors for each place."""


class _AfterNorm:
    """Forward hook of a norm: (1 + scale) x + shift, while a `DenoisingBlock` has set both.

    An object and no closure, so that a deep copy of the network has hooks of its own.
    """

    def __init__(self) -> None:
        self.modulation: tuple[Tensor, ...] | None = None

    def __call__(self, norm: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.modulation is None:
            return out
        if len(out) != len(self.modulation[0]):
            raise UserError(f"{type(norm).__name__} does not keep the batch first: use modulation='layers'")
        shift, scale = (_like(m, out) for m in self.modulation)
        return out + scale * out + shift


def _norms(layer: nn.Module, width: int) -> list[nn.Module]:
    """The layer's LayerNorms and RMSNorms over ``width`` numbers, each once. Norms of single heads are smaller."""
    found = []
    for module in layer.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
            shape = getattr(module, "normalized_shape", None) or getattr(getattr(module, "weight", None), "shape", None)
            if shape is not None and tuple(shape) == (width,):
                found.append(module)
    return found


class DenoisingBlock(nn.Module):
    """Some layers of a network, conditioned on the noise level and, with ``classes``, on a class."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        width: int,
        d_condition: int,
        classes: int = 0,
        modulation: str = "layers",
        first: int = 1,
    ) -> None:
        super().__init__()
        if width < 1 or d_condition < 1:
            raise UserError(f"width and d_condition must be at least 1, got {width} and {d_condition}")
        self.layers, self.width = nn.ModuleList(layers), width
        self.frame: nn.Module | None = None
        """The block's own copy of the frame, if it has one."""
        self.names = [f"layer {index} ({type(layer).__name__})" for index, layer in enumerate(layers, first)]
        self.hooks: list[list[_AfterNorm]] = []
        self.inside = modulation == "inside"
        count, parts = len(layers), MODULATIONS[modulation]
        if modulation == "norms":
            self._hook_norms()
            count = sum(map(len, self.hooks))
        self.conditioning = NoiseEmbedding(width, count, d_condition, parts)
        nn.init.normal_(self.conditioning.hidden.weight, std=d_condition**-0.5)
        for parameter in (self.conditioning.hidden.bias, *self.conditioning.out.parameters()):
            nn.init.zeros_(parameter)
        self.labels = nn.Embedding(classes + 1, d_condition) if classes else None

    def _hook_norms(self) -> None:
        for layer, name in zip(self.layers, self.names, strict=True):
            norms = _norms(layer, self.width)
            if not norms:
                raise UserError(f"modulation='norms' needs norms of size {self.width} in each layer: {name} has none")
            self.hooks.append([_AfterNorm() for _ in norms])
            for norm, hook in zip(norms, self.hooks[-1], strict=True):
                norm.register_forward_hook(hook)

    def check_hidden(self, hidden: Any, batch: int) -> None:
        """Raise UserError if ``hidden`` is not a hidden sequence (batch, ..., width)."""
        if not isinstance(hidden, Tensor):
            raise UserError(f"the frame's embed must return a tensor, got {type(hidden).__name__}")
        if hidden.ndim < 2 or hidden.shape[0] != batch or hidden.shape[-1] != self.width:
            first = hidden.ndim > 2 and hidden.shape[1] == self.width
            hint = "; channels must come last" if first else ""
            raise UserError(f"layers need ({batch}, ..., {self.width}), got {tuple(hidden.shape)}{hint}")

    def _run(self, index: int, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One layer, whose output must be a tensor like ``x`` or a tuple that starts with it."""
        layer, name = self.layers[index], self.names[index]
        if str(getattr(layer, "norm_type", "")).startswith("ada_norm") and arguments.get("timestep") is None:
            raise UserError(f"{name} has its own level conditioning: return its timestep from the frame's `arguments`")
        if self.hooks and self.training and getattr(layer, "gradient_checkpointing", False):
            raise UserError(
                f"{name}: modulation='norms' does not work with gradient checkpointing"
            )  # it runs norms again
        out = layer(x, **arguments)
        if isinstance(out, tuple) and out:
            out = out[0]
        if not isinstance(out, Tensor):
            raise UserError(f"{name} must return a tensor, or a tuple that starts with one, got {type(out).__name__}")
        if out.shape != x.shape:
            raise UserError(f"{name} must keep its input's shape: {tuple(x.shape)} became {tuple(out.shape)}")
        return out

    def forward(self, x: Tensor, c_noise_B: Tensor, label_B: Tensor | None = None, **arguments: Any) -> Tensor:
        """Apply the layers to x (B, ..., width). ``arguments`` go to every layer."""
        beside = None if self.labels is None or label_B is None else self.labels(label_B)
        modulation = self.conditioning(c_noise_B, beside)
        for index in range(len(self.layers)):
            if self.inside:
                own = tuple(_like(m, x) for m in modulation[index])
                x = self._run(index, x, {**arguments, "modulation": own})
                continue
            if not self.hooks:
                shift, scale, gate = (_like(m, x) for m in modulation[index])
                seen = x + scale * x + shift
                x = x + (1 + gate) * (self._run(index, seen, arguments) - seen)
                continue
            hooks, start = self.hooks[index], sum(map(len, self.hooks[:index]))
            try:
                for hook, both in zip(hooks, modulation[start:], strict=False):
                    hook.modulation = both
                x = self._run(index, x, arguments)
            finally:
                for hook in hooks:
                    hook.modulation = None
        return x


def refuse_channel_first(layer: nn.Module, name: str, width: int) -> None:
    """Raise UserError if ``layer`` is no module, or reads its input as (B, C, ...) or as (N, B, C).

    A small input shows whether a convolution or batch norm of ``width`` channels sees the layer's input as it is. A layer
    that moves the channels itself is right.
    """
    if not isinstance(layer, nn.Module):
        raise UserError(f"{name} is not a torch.nn.Module")
    if isinstance(layer, nn.TransformerEncoderLayer) and not layer.self_attn.batch_first:
        raise UserError(f"{name} must have batch_first=True: it would attend across the batch")
    some = next(layer.parameters(), torch.zeros(0))
    probe = torch.zeros(2, 4, width, dtype=some.dtype, device=some.device)

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        channels = next(
            getattr(module, k) for k in ("in_channels", "num_features", "num_channels") if hasattr(module, k)
        )
        seen = args[0] if args else None
        if (
            isinstance(seen, Tensor)
            and (seen.shape, seen.stride()) == (probe.shape, probe.stride())
            and channels == width
        ):
            raise UserError(f"{name} is channel-first, (B, C, ...): wrap it in a layer that takes (B, N, {width})")

    found = [module for module in layer.modules() if isinstance(module, CHANNEL_FIRST)]
    if not found:
        return
    handles = [module.register_forward_pre_hook(look) for module in found]
    training = [module for module in layer.modules() if module.training]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            layer.eval()(probe)
    except Exception as error:  # a layer may need more than the probe: its first use will tell
        if isinstance(error, UserError):
            raise
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
