"""DiffusionBlocks: any stack of residual layers, cut into blocks that train alone (arXiv 2506.14202).

See docs/guides/blocks.md.

    blocks = convert(layers, n_blocks, density, width=64, sd=0.5)  # any layers x -> x + f(x) of one width
    blocks.loss(2, y, u, eps).backward()                           # gradients for block 2 only
    blocks.walk(eps)                                               # from noise to data, block 1 to block B

A residual stack goes from input to output in small steps, as a reverse diffusion goes from noise to data. The conversion
identifies the two: L layers become B blocks, and block b becomes the denoiser of its own range of noise levels, conditioned
on the level by AdaLN. The loss of a denoiser does not depend on the other denoisers, so each block can be trained alone.

A `Frame` says what surrounds the stack: how a batch becomes the hidden sequence, and how that is read out.

Language models have their own classes: `model.blocks_lm.BlocksLM`, trained by `objectives.denoise_blocks` and
`objectives.masked`.

Shapes: B batch, N tokens, C classes, D target. z is the noised target y + sigma eps.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurrent_db.denoise.adaln import MODULATIONS, DenoisingBlock, refuse_channel_first
from recurrent_db.denoise.frame import Frame, read_only
from recurrent_db.denoise.noise import Density, Within, draw_sigma
from recurrent_db.denoise.partition import Partition, split_layers
from recurrent_db.denoise.precond import Precond
from recurrent_db.denoise.sampler import STEPS, STOCHASTIC, euler
from recurrent_db.errors import UserError

SHARED = ("owned", "frozen", "all")
"""Who trains the frame; see `convert`."""
JOIN = "join the runs of all blocks with recurrent-db blocks join"


def _check(right: bool, message: str) -> None:
    if not right:
        raise UserError(message)


def _check_count(count: int, **tensors: Tensor | None) -> None:
    """Each tensor has one number per sample. Others would be broadcast."""
    for name, each in tensors.items():
        good = each is None or (isinstance(each, Tensor) and each.shape == (count,))
        _check(
            good, f"{name} must have shape ({count},), got {tuple(getattr(each, 'shape', ())) or type(each).__name__}"
        )


def _check_classes(y: Tensor, count: int, what: str) -> None:
    """A negative class would silently be counted from the end of a table."""
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool) and y.ndim == 1
    _check(whole, f"{what} must be whole numbers (B,), got {y.dtype} {tuple(y.shape)}")
    if y.device.type != "cpu":  # the host does not wait for the device, which stops if a class is out of range
        torch._assert_async(((y >= 0) & (y < count)).all())
    elif y.numel():
        low, high = int(y.min()), int(y.max())
        _check(low >= 0 and high < count, f"{what} must be from 0 to {count - 1}, got {low} to {high}")


class DiffusionBlocks(nn.Module):
    """A network converted by `convert`.

    Several methods take these arguments:

    - x: the clean input that the frame sees, if it needs one.
    - label: the condition beside the noise level, classes (B,) from 0. The number ``classes`` means "no class".
    - arguments: further keyword arguments of every layer, such as an attention mask.
    """

    def __init__(
        self,
        blocks: Sequence[DenoisingBlock],
        partition: Partition,
        density: Density,
        precond: Precond,
        frame: Frame | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): block for number, block in enumerate(blocks, 1)})
        self.frame = frame
        """The blocks' common frame, or None if each block has its own copy, ``block(number).frame``."""
        self.partition, self.density, self.precond = partition, density, precond
        self.owner: int | None = None
        """The block that trains `frame`, if any."""
        self.classes, self.label_dropout, self.atom = 0, 0.0, 0.0
        self._alone: set[int] = set()

    def held(self) -> list[int]:
        """Numbers of the blocks that this object has: all, or after `keep` one."""
        return [int(number) for number in self.blocks]

    def keep(self, number: int) -> None:
        """Remove all blocks but block ``number``."""
        self.blocks = nn.ModuleDict({str(number): self.block(number)})

    def block(self, number: int) -> DenoisingBlock:
        """Block ``number``, from 1.

        Raises:
            ValueError: there is no such block.
            UserError: it was removed by `keep`.
        """
        self.partition.check(number)
        _check(str(number) in self.blocks, f"only block {self.held()[0]} is here, not block {number}: {JOIN}")
        return cast(DenoisingBlock, self.blocks[str(number)])

    def trained(self, number: int) -> list[nn.Parameter]:
        """The parameters that training block ``number`` changes: give these to its optimizer."""
        shared = self.frame.parameters() if self.frame is not None and number == self.owner else ()
        return [*self.block(number).parameters(), *shared]

    @contextmanager
    def _frame(self, number: int) -> Iterator[Frame]:
        """The frame of a block, read-only unless the block trains it."""
        frame = self.frame or cast(Frame, self.block(number).frame)
        if self.frame is None or number == self.owner:
            yield frame
        else:
            with read_only(frame):
                yield frame

    def draw(self, number: int, u: Tensor) -> Tensor:
        """Noise levels in a block's training range from uniform ``u`` in [0, 1), float64."""
        return draw_sigma(Within(self.density, *self.partition.range_of(number)), self.atom if number == 1 else 0.0, u)

    def _rows(self, frame: Frame) -> Tensor | None:
        """All possible targets, each of length 1: a mean of rows of other lengths would not be a mean of targets."""
        table = frame.table()
        return None if table is None else F.normalize(table, dim=-1)

    def targets(self, number: int, y: Tensor) -> Tensor:
        """The clean targets of classes ``y`` (B,): rows of the table, scaled to length 1, (B, D).

        Raises:
            UserError: the frame has no table, or a class is out of range.
        """
        rows = self._rows(self.frame or cast(Frame, self.block(number).frame))
        _check(rows is not None, "the targets are the data itself: the frame has no table")
        _check_classes(y, len(cast(Tensor, rows)), "y, the classes,")
        return cast(Tensor, rows)[y]

    def _out(
        self,
        frame: Frame,
        number: int,
        z: Tensor,
        sigma_B: Tensor,
        x: Any,
        label: Tensor | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """The estimate D of y, or with a table the logits."""
        _check_count(len(z), sigma=sigma_B, label=label)
        block, sigma_B = self.block(number), sigma_B.to(z.device, non_blocking=True)
        sigma = sigma_B.to(z.dtype).view(-1, *[1] * (z.ndim - 1))
        if self.classes:
            _check(
                label is not None,
                f"the blocks are conditioned on a class: give label, with {self.classes} for no class",
            )
            _check_classes(cast(Tensor, label), self.classes + 1, "label")
        else:
            _check(label is None, "the blocks have no class condition: convert with classes, or give no label")
        hidden = frame.embed(self.precond.view(z, sigma), x)
        block.check_hidden(hidden, len(z))
        arguments = {**frame.arguments(sigma_B, label), **arguments}
        out = frame.read(block(hidden, self.precond.c_noise(sigma_B.float()), label, **arguments), x)
        table = frame.table()
        shape = z.shape if table is None else (len(z), len(table))
        good = isinstance(out, Tensor) and out.shape == shape
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        _check(good, f"the frame's read must return {tuple(shape)}, got {found}")
        return self.precond.combine(z, out, sigma) if table is None else out

    def denoise(
        self, number: int, z: Tensor, sigma_B: Tensor, x: Any = None, label: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Estimate the target from z = y + sigma eps by block ``number``.

        With a table, this is the mean of the targets under the read-out's probabilities (a soft bridge).
        """
        with self._frame(number) as frame:
            out, rows = self._out(frame, number, z, sigma_B, x, label, arguments), self._rows(frame)
            return out if rows is None else (out.softmax(-1) @ rows).to(z.dtype)

    def logits(
        self, number: int, z: Tensor, sigma_B: Tensor, x: Any = None, label: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """The read-out (B, C) of block ``number``. Raises UserError if the frame has no table."""
        with self._frame(number) as frame:
            _check(frame.table() is not None, "this frame reads out an estimate, not logits: it has no table")
            return self._out(frame, number, z, sigma_B, x, label, arguments)

    def loss(
        self,
        number: int,
        y: Tensor,
        u_B: Tensor,
        eps: Tensor,
        x: Any = None,
        label: Tensor | None = None,
        u_label_B: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor:
        """The frame's loss of block ``number``; by default weighted so that all noise levels count the same (EDM,
        arXiv 2206.00364, eq. 8).

        Args:
            number: the block, from 1.
            y: data: the target itself, (B, ...), or with a table the classes, (B,).
            u_B: uniform in [0, 1); it determines the noise levels.
            eps: standard normal noise in the shape of the target.
            x: clean input, for the frame.
            label: condition, (B,).
            u_label_B: uniform in [0, 1); it determines which labels are dropped. By default PyTorch draws it.
            arguments: further arguments of the layers.

        Raises:
            UserError: shapes do not fit, a class is out of range, or the loss depends on another block's parameters.
        """
        with self._frame(number) as frame:
            rows = self._rows(frame)
            if rows is not None:
                _check_classes(y, len(rows), "y, the classes,")
            target = y if rows is None else rows[y]
            _check(target.is_floating_point(), f"y must be floating point, or the frame needs a table, got {y.dtype}")
            _check(
                eps.shape == target.shape,
                f"eps must have the target's shape {tuple(target.shape)}, got {tuple(eps.shape)}",
            )
            _check_count(len(target), u=u_B, u_label=u_label_B, label=label)
            sigma_B = self.draw(number, u_B).to(target.device, non_blocking=True)
            sigma = sigma_B.to(target.dtype).view(-1, *[1] * (target.ndim - 1))
            if label is not None and self.label_dropout:
                u_label_B = torch.rand(len(label)) if u_label_B is None else u_label_B
                u_label_B = u_label_B.to(label.device, non_blocking=True)
                label = label.masked_fill(u_label_B < self.label_dropout, self.classes)
            out = self._out(frame, number, target + sigma * eps, sigma_B, x, label, arguments)
            loss = frame.loss(out, y, self.precond.weight(sigma))
        if number not in self._alone and loss.requires_grad:
            self._check_alone(number, loss)
            self._alone.add(number)
        return loss

    def _check_alone(self, number: int, loss: Tensor) -> None:
        """Raise UserError if ``loss`` has gradients for a parameter that block ``number`` does not train."""
        own = {id(parameter) for parameter in self.trained(number)}
        foreign = {id(p): name for name, p in self.named_parameters() if id(p) not in own}
        seen, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = foreign.get(id(getattr(node, "variable", None)))  # the leaves of the graph have one
            _check(
                name is None, f"block {number} reads a parameter that it does not train, {name}: let the frame hold it"
            )
            todo += [following for following, _ in node.next_functions]

    @torch.no_grad()
    def walk(
        self,
        eps: Tensor,
        steps: int = 0,
        sampler: str = "euler",
        x: Any = None,
        label: Tensor | None = None,
        guidance: float = 1.0,
        levels: Sequence[float] = (),
        **arguments: Any,
    ) -> Tensor:
        """Generate targets from standard normal ``eps``, starting with block 1. Each evaluation uses the block of its level.

        Args:
            eps: in the shape of the target.
            steps: number of steps; 0 makes one step per block.
            sampler: "euler" or "heun" (`recurrent_db.denoise.sampler`).
            x: clean input, for the frame.
            label: condition, (B,).
            guidance: strength g of classifier-free guidance (arXiv 2207.12598): D(no class) + g (D(label) - D(no class)).
                1 means none; any other strength evaluates every block twice.
            levels: the noise levels of the steps, falling; by default the partition's for this number of steps.
            arguments: further arguments of the layers.

        Raises:
            UserError: the sampler or number of steps is unknown, or guidance is asked of blocks without label dropout.
        """
        known = sorted(STEPS.keys() - STOCHASTIC)
        _check(sampler in known, f"there is no sampler {sampler!r} here: choose from {', '.join(known)}")
        _check(isinstance(steps, int) and steps >= 0, f"steps must be a whole number, at least 0, got {steps}")
        _check(math.isfinite(guidance), f"guidance must be a finite number, got {guidance}")
        guided = guidance != 1
        _check(not guided or self.label_dropout > 0, "guidance needs blocks trained with label_dropout above 0")

        def denoise(z: Tensor, sigma: float) -> Tensor:
            number, sigma_B = self.partition.block_of(sigma), torch.full((len(z),), sigma, dtype=torch.float64)
            found = self.denoise(number, z, sigma_B, x, label, **arguments)
            if not guided or label is None:
                return found
            free = self.denoise(number, z, sigma_B, x, torch.full_like(label, self.classes), **arguments)
            return free + guidance * (found - free)

        levels = list(levels) or self.partition.levels(steps or self.partition.n_blocks)
        z = eps * levels[0]
        for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
            z = STEPS[sampler](denoise, z, sigma, following, None)
        return z

    @torch.no_grad()
    def read_outs(
        self, eps: Tensor, steps: int = 0, x: Any = None, label: Tensor | None = None, **arguments: Any
    ) -> list[Tensor]:
        """The logits (B, C) at each step of an Euler walk. The last are the walk's answer. Arguments as for `walk`.

        Raises:
            UserError: the frame has no table.
        """
        _check(isinstance(steps, int) and steps >= 0, f"steps must be a whole number, at least 0, got {steps}")
        levels, found = self.partition.levels(steps or self.partition.n_blocks), []
        z = eps * levels[0]
        for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
            number, sigma_B = self.partition.block_of(sigma), torch.full((len(z),), sigma, dtype=torch.float64)
            found.append(self.logits(number, z, sigma_B, x, label, **arguments))
            with self._frame(number) as frame:
                estimate = (found[-1].softmax(-1) @ cast(Tensor, self._rows(frame))).to(z.dtype)
            z = euler(lambda *_, estimate=estimate: estimate, z, sigma, following)
        return found


def _check_parts(blocks: Sequence[nn.Module], frame: Any) -> None:
    """A parameter of two blocks could not be trained alone."""
    _check(isinstance(frame, Frame), f"frame must be a Frame, got {type(frame).__name__}")
    seen: dict[int, str] = {}
    for name, part in [*((f"block {n}", block) for n, block in enumerate(blocks, 1)), ("the frame", frame)]:
        for inner, parameter in part.named_parameters():
            other = seen.setdefault(id(parameter), name)
            _check(other == name, f"{other} and {name} share the parameter {inner}: give each a copy")


def _copy_frame(parts: Sequence[DenoisingBlock], frame: Frame) -> None:
    """Give each block a copy of the frame. A table must be fixed, so that all blocks have the same targets."""
    table = frame.table()
    _check(table is None or not table.requires_grad, "shared='all' copies the frame, so its table must be fixed")
    for index, part in enumerate(parts):
        part.frame = copy.deepcopy(frame) if index else frame


def convert(
    network: Iterable[nn.Module],
    n_blocks: int,
    noise: Density,
    width: int,
    sd: float,
    layers: Sequence[int] = (),
    gamma: float = 0.0,
    uniform: bool = False,
    d_condition: int = 64,
    frame: Frame | None = None,
    shared: str = "owned",
    owner: int = 1,
    classes: int = 0,
    label_dropout: float = 0.0,
    modulation: str = "layers",
    atom: float = 0.0,
    mute: bool = False,
) -> DiffusionBlocks:
    """Cut a stack of residual layers, each x -> x + f(x) on (B, ..., width), into blocks that train alone.

    The layers become part of the result. A projection that starts at zero conditions each on the noise level, so a fresh
    conversion computes what the layers did. A layer may return a tuple that starts with the hidden sequence.

    Args:
        network: the layers, in order.
        n_blocks: number of blocks.
        noise: distribution of the noise levels. Blocks get ranges of equal probability, high noise first.
        width: size of the hidden sequence's last dimension.
        sd: standard deviation of the target per component.
        layers: number of layers in each block; by default as even as possible.
        gamma: overlap of the ranges in training (arXiv 2506.14202, section 3: 0.1 for text).
        uniform: use ranges of equal width in ln sigma instead.
        d_condition: width of the embedding of noise level and class.
        frame: what surrounds the stack; by default the data is the hidden sequence.
        shared: who trains the frame. "owned": block ``owner``; the others use it frozen. "frozen": nobody. "all": each block
            trains a copy of its own.
        owner: number of that block.
        classes: number of classes of a condition beside the noise level; 0 means no such condition. Each block has its own
            embedding of classes + 1 rows. The last row means "no class".
        label_dropout: share of the labels that training replaces by "no class". Guidance needs it.
        modulation: "layers" conditions each layer from outside, x + (1 + gate) f((1 + scale) x + shift). "norms" puts
            (1 + scale) x + shift after each LayerNorm and RMSNorm of size ``width`` inside a layer. "inside" is for layers
            that condition themselves: each gets the argument ``modulation``, six tensors (B, 1, width) that start at zero,
            such as DiT's shift, scale and gate of attention and MLP.
        atom: probability that a training step of block 1 draws exactly the highest level, where the target is invisible.
        mute: scale the blocks' view of z down where noise hides the target; see `precond.Precond`.

    Raises:
        UserError: the layers cannot be converted or split this way, or an option is out of range.
    """
    _check(isinstance(network, Iterable), f"network must be a list of layers, got {type(network).__name__}")
    stack = list(network)
    _check(0 < sd < math.inf, f"sd, the data's standard deviation, must be above 0, got {sd}")
    _check(0 < noise.sigma_min < noise.sigma_max, f"sigma_min must be above 0 and below sigma_max: {noise}")
    _check(0 <= gamma < math.inf, f"gamma, the overlap, must be at least 0, got {gamma}")
    _check(shared in SHARED, f"shared must be one of {', '.join(SHARED)}, got {shared!r}")
    _check(modulation in MODULATIONS, f"modulation must be {', '.join(MODULATIONS)}, got {modulation!r}")
    _check(0 <= atom <= 1, f"atom must be in [0, 1], got {atom}")
    _check(classes >= 0, f"classes must be at least 0, got {classes}")
    _check(0 <= label_dropout < 1, f"label_dropout must be at least 0 and below 1, got {label_dropout}")
    _check(not label_dropout or classes > 0, "label_dropout needs classes")
    counts = split_layers(len(stack), n_blocks, layers)
    _check(1 <= owner <= n_blocks, f"the owner must be a block from 1 to {n_blocks}, got {owner}")
    for index, layer in enumerate(stack, 1):
        refuse_channel_first(layer, f"layer {index} ({type(layer).__name__})", width)
    parts = [
        DenoisingBlock(stack[end - count : end], width, d_condition, classes, modulation, first=end - count + 1)
        for count, end in zip(counts, itertools.accumulate(counts), strict=True)
    ]
    frame = Frame() if frame is None else frame
    _check_parts(parts, frame)
    if shared == "all":
        _copy_frame(parts, frame)
    with torch.device("cpu"):  # the layers may be built on the meta device
        partition = Partition.cut(noise, n_blocks, gamma, uniform)
    blocks = DiffusionBlocks(parts, partition, noise, Precond(sd, mute), None if shared == "all" else frame)
    blocks.owner = owner if shared == "owned" else None
    blocks.classes, blocks.label_dropout, blocks.atom = classes, label_dropout, atom
    return blocks
