"""Attention: which keys each query sees, and the back ends that compute it.

`Rule` says which keys a query sees. Once for each forward pass, a back end turns it into what its kernel needs (`Visible`:
a mask, a block mask, the documents' starts). All layers share that, and each calls `attend`. If there are fewer queries
than keys, the queries are the last positions (bottom-right alignment), as when a cache holds the keys before them.

- `sdpa`: PyTorch's fused kernels, on every device; the reference. Its causal flag aligns top-left, so unequal lengths get
  a mask.
- `flex`: PyTorch's FlexAttention, compiled on CUDA; it skips blocks of hidden pairs. On the CPU it has no backward.
- `flash`: flash-attn 2, 3 or 4 on CUDA in half precision, for one stream; documents are its sequences of varying length.
  Other calls (two streams, float32) go to another back end.

Shapes: B sequences, T queries, S positions, N keys (S, or S + T where two streams meet), H heads, E head size.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from recurrent_db.errors import UserError

Stream = Literal["own", "beside"]
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Which keys each query sees


@dataclass(frozen=True, eq=False)
class Rule:
    """Which keys each query sees.

    The queries are the last ``queries`` of ``positions``. A query sees the positions up to its own, of its own document.
    ``beside`` another stream, the keys are that stream's, then the queries' own: position i sees the other stream's
    positions up to i, of its own document, and itself, but no other position of its stream.
    """

    queries: int
    positions: int
    docs_BS: Tensor | None = None
    """int, on the CPU: the document of each position. A document's positions are contiguous. None: one document."""
    stream: Stream = "own"
    causal: bool = True
    """False: a query of its own stream sees all positions of its document, later ones too."""

    @property
    def keys(self) -> int:
        return self.positions + (0 if self.stream == "own" else self.queries)

    def sees(self, device: torch.device) -> Sees:
        """The rule as a function of indices (sequence, head, query, key), which broadcast, to bool; FlexAttention's
        ``mask_mod``."""
        positions, first, stream, causal = self.positions, self.positions - self.queries, self.stream, self.causal
        docs_BS = None if self.docs_BS is None else to_device(self.docs_BS, device)

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            here = i + first
            there = j if stream == "own" else j % positions
            seen = there <= here
            if not causal:
                seen = (here >= 0) & (there >= 0)
            if docs_BS is not None:
                seen = seen & (docs_BS[b, here] == docs_BS[b, there])
            return seen if stream == "own" else (seen & (j < positions)) | (j == positions + i)

        return sees

    def mask(self, device: torch.device) -> Tensor:
        """The rule as a table: bool, (B, 1, T, N) with documents and (T, N) without."""
        b = torch.arange(1 if self.docs_BS is None else len(self.docs_BS), device=device)[:, None, None, None]
        i, j = torch.arange(self.queries, device=device)[:, None], torch.arange(self.keys, device=device)
        return self.sees(device)(b, b, i, j)


def one_document_each(docs_BS: Tensor) -> bool:
    """Whether no sequence has a border between documents. It reads the values, so the ids should be on the CPU."""
    return bool((docs_BS[:, 1:] == docs_BS[:, :-1]).all())


def document_starts(docs_BS: Tensor) -> Tensor:
    """Where each document starts in the flattened batch, then B S: int32, on the CPU, as flash-attn's ``cu_seqlens``.

    Empty documents pad it to 16 for each sequence, or to the next power of two that holds all, so that its shape depends
    only on the batch's.
    """
    starts = torch.ones_like(docs_BS, dtype=torch.bool)
    starts[:, 1:] = docs_BS[:, 1:] != docs_BS[:, :-1]
    starts_N = starts.flatten().nonzero()[:, 0].int()
    room = 16 * len(docs_BS)
    while room < len(starts_N):
        room *= 2
    return F.pad(starts_N, (0, room + 1 - len(starts_N)), value=docs_BS.numel())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on ``device``, without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Back ends


class Backend(Protocol):
    """One way of computing attention."""

    @property
    def name(self) -> str: ...

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        """The back end for this rule and dtype: itself, or another where it has no form for them."""
        ...

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> Any:
        """What `attend` needs to know of a rule, on the device, made without waiting for the device. ``dtype`` is that of
        queries and keys."""
        ...

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: Any) -> Tensor:
        """softmax(q k / sqrt(E)) v over the keys that each query sees, (B, H, T, E)."""
        ...


@dataclass(frozen=True)
class Sdpa:
    """`torch.nn.functional.scaled_dot_product_attention`."""

    name: str = "sdpa"

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        return self

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """A mask, or None if the kernel's causal flag (equal lengths) or no mask at all (one query) does the same."""
        if rule.causal and rule.stream == "own" and rule.docs_BS is None and rule.queries in (1, rule.positions):
            return None
        mask = rule.mask(device)
        if device.type != "cpu":
            return mask
        # The CPU's kernel adds its mask to the scores, and would make these numbers of a bool in every layer.
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: Tensor | None) -> Tensor:
        causal = plan is None and q_BHTE.shape[2] == k_BHNE.shape[2]
        return F.scaled_dot_product_attention(q_BHTE, k_BHNE, v_BHNE, attn_mask=plan, is_causal=causal)


@dataclass(frozen=True)
class Flex:
    """FlexAttention. ``kernel`` is PyTorch's function, compiled on CUDA."""

    kernel: Callable[..., Any]
    name: str = "flex"

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        return self

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> BlockMask:
        batch = None if rule.docs_BS is None else len(rule.docs_BS)
        return create_block_mask(rule.sees(device), batch, None, rule.queries, rule.keys, device=device)

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: BlockMask) -> Tensor:
        if q_BHTE.device.type == "cpu" and any(x.requires_grad for x in (q_BHTE, k_BHNE, v_BHNE)):
            raise UserError("FlexAttention has no gradient on the CPU: train with sdpa there")
        return self.kernel(q_BHTE, k_BHNE, v_BHNE, block_mask=plan)


@dataclass(frozen=True)
class Flash:
    """flash-attn's ``flash_attn_func`` and ``flash_attn_varlen_func``, which take (B, T, H, E) and align bottom-right."""

    dense: Callable[..., Any]
    varlen: Callable[..., Any]
    other: Backend
    """Serves two streams, and dtypes outside ``dtypes``."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    name: str = "flash"

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        equal = rule.docs_BS is None or rule.queries == rule.positions
        return self if rule.causal and rule.stream == "own" and equal and dtype in self.dtypes else self.other

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        return None if rule.docs_BS is None else to_device(document_starts(rule.docs_BS.cpu()), device)

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BHTE, k_BHNE, v_BHNE))
        if plan is None:
            out = self.dense(q, k, v, causal=True)
        else:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            length = q_BHTE.shape[2]
            out = self.varlen(
                q, k, v, cu_seqlens_q=plan, cu_seqlens_k=plan, max_seqlen_q=length, max_seqlen_k=length, causal=True
            )
        if isinstance(out, tuple):  # flash-attn 3 and 4 may return the log-sum-exp as well
            out = out[0]
        return out.view(len(q_BHTE), -1, *out.shape[-2:]).transpose(1, 2)


SDPA: Backend = Sdpa()


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class Past(Protocol):
    """What a pass finds of the positions before its own, and where it leaves its own for later ones. See `cache`."""

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """Rotary tables of the pass's positions, (T, E/2) each, or (B, T, E/2) where rows differ."""
        ...

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far, (B, H, S, E) each, these among them: what the layer's attention sees.
        Called once for each of a layer's visits in a pass."""
        ...


@dataclass(frozen=True, eq=False)
class Visible:
    """A rule, the back end that serves it, and what the back end needs to know of it. One forward pass `make`s one."""

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    asked: Backend
    """The back end that was asked for."""
    backend: Backend
    plan: Any
    compiled: bool = False
    past: Past | None = None
    """The positions before the queries, if there are any."""

    @classmethod
    def make(
        cls,
        rule: Rule,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend = SDPA,
        compiled: bool = False,
        past: Past | None = None,
    ) -> Visible:
        """``dtype`` is that of queries and keys. ``compiled`` code gets the same kind of mask for every batch."""
        # Without borders the mask is the causal one, which a CPU computes faster.
        steady = compiled or device.type != "cpu"
        if not steady and rule.docs_BS is not None and one_document_each(rule.docs_BS):
            rule = replace(rule, docs_BS=None)
        chosen = backend.serves(rule, dtype)
        return cls(rule, device, dtype, backend, chosen, chosen.plan(rule, device, dtype), compiled, past)

    def _other(self, stream: Stream) -> Visible:
        rule = replace(self.rule, stream=stream)
        return self.make(rule, self.device, self.dtype, self.asked, self.compiled)

    @cached_property
    def beside(self) -> Visible:
        """The same for a stream beside this one: each position sees this stream's positions up to its own, and itself."""
        return self._other("beside")

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of these positions, after those of the positions before, where there are any."""
        return (k_BHTE, v_BHTE) if self.past is None else self.past.extend(layer, k_BHTE, v_BHTE)


def attend(q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, visible: Visible) -> Tensor:
    """Attention over the keys that each query sees, (B, H, T, E), by ``visible``'s back end."""
    if (q_BHTE.shape[2], k_BHNE.shape[2]) != (visible.rule.queries, visible.rule.keys):
        raise ValueError(
            f"{q_BHTE.shape[2]} queries and {k_BHNE.shape[2]} keys, but visibility was made for"
            f" {visible.rule.queries} and {visible.rule.keys}"
        )
    return visible.backend.attend(q_BHTE, k_BHNE, v_BHNE, visible.plan)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a back end


@dataclass(frozen=True)
class Need:
    """What a run needs from attention."""

    device: torch.device
    dtype: torch.dtype
    """Of queries and keys."""
    head_size: int
    documents: bool = False
    """Whether packed documents are kept apart."""
    two_stream: bool = False
    """Whether a second stream attends to the first."""
    gradients: bool = True


class Unusable(Exception):
    """The reason, in one line, why a back end cannot serve here."""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _try_out(backend: Backend, need: Need) -> None:
    """Run a back end as it will be used and compare it with `sdpa`, with gradients if they are needed: a kernel may import
    and yet not run on this device. Raises `Unusable`."""
    length, generator = 128, torch.Generator().manual_seed(0)
    docs = (torch.arange(length) >= 50).int()[None] if need.documents else None
    streams: list[Stream] = ["own", "beside"] if need.two_stream else ["own"]
    try:
        for rule in (Rule(length, length, docs, stream) for stream in streams):
            if backend.serves(rule, need.dtype) is not backend:
                continue
            q, k, v = (
                torch.randn(1, 2, n, need.head_size, generator=generator)
                .to(need.device, need.dtype)
                .requires_grad_(need.gradients)
                for n in (rule.queries, rule.keys, rule.keys)
            )
            results: list[tuple[Tensor, ...]] = []
            for each in (backend, SDPA):
                out = each.attend(q, k, v, each.plan(rule, need.device, need.dtype))
                results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))) if need.gradients else (out,))
            for ours, theirs in zip(*results, strict=True):
                if not torch.allclose(ours, theirs, rtol=0.1, atol=0.1):  # the rounding of half precision, and no more
                    raise Unusable(f"{backend.name} and sdpa disagree on this device")
    except Exception as error:
        raise Unusable(_first_line(error)) from None


def _sdpa(need: Need) -> Backend:
    return SDPA


def _flex(need: Need) -> Backend:
    kernel: Any = flex_attention if need.device.type == "cpu" else torch.compile(flex_attention, dynamic=False)
    flex = Flex(kernel)
    _try_out(flex, need)
    return flex


FLASH_MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")
"""Modules of flash-attn 3, 4 and 2, in the order in which they are tried."""


def import_flash(module: str, other: Backend) -> Flash:
    """flash-attn from one of `FLASH_MODULES`. Raises `Unusable` if it does not import: a module that is found may still
    lack the function (flash-attn 4 alone makes ``flash_attn`` importable) or fail to load."""
    try:
        found = importlib.import_module(module)
        return Flash(found.flash_attn_func, found.flash_attn_varlen_func, other)
    except Exception as error:
        raise Unusable(f"{module} does not import ({_first_line(error)})") from None


def _flash(need: Need) -> Backend:
    if need.device.type != "cuda":
        raise Unusable(f"flash-attn needs a CUDA device, and this one is {need.device}")
    if need.dtype not in Flash.dtypes:
        raise Unusable("flash-attn needs run.dtype = bfloat16")
    other, reasons = SDPA, []
    if need.two_stream:
        with contextlib.suppress(Unusable):
            other = _flex(need)
    for module in FLASH_MODULES:
        try:
            flash = import_flash(module, other)
            _try_out(flash, need)
            return flash
        except Unusable as reason:
            reasons.append(str(reason))
    raise Unusable("; ".join(reasons) + "; install it with: pip install flash-attn --no-build-isolation")


BACKENDS: dict[str, Callable[[Need], Backend]] = {"sdpa": _sdpa, "flex": _flex, "flash": _flash}
"""Back ends by name. Each builder raises `Unusable` where its back end cannot serve a need."""


def choose(name: str, need: Need) -> tuple[Backend, str]:
    """The back end called ``name``, and a line that says which was chosen and why.

    ``auto`` always finds one. On CUDA it tries flash, then flex if more than plain causal attention is needed. On other
    devices, and if neither runs, it takes sdpa.

    Raises:
        UserError: there is no back end of this name, or it cannot serve the need.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"there is no attention back end {name!r}; there are auto, {', '.join(BACKENDS)}")
    if name != "auto":
        try:
            backend = BACKENDS[name](need)
        except Unusable as reason:
            raise UserError(f"run.attention = {name} cannot be used: {reason}") from None
        return backend, f"attention: {name}{_aside(backend, need)}, as asked"
    if need.device.type != "cuda":
        return SDPA, f"attention: sdpa (auto on {need.device.type})"
    reasons = []
    for candidate in ("flash", "flex") if need.documents or need.two_stream else ("flash",):
        try:
            backend = BACKENDS[candidate](need)
        except Unusable as reason:
            reasons.append(f"no {candidate}: {reason}")
        else:
            return backend, f"attention: {candidate}{_aside(backend, need)} (auto; {'; '.join([*reasons, 'it runs'])})"
    return SDPA, f"attention: sdpa (auto; {'; '.join(reasons)})"


def _aside(backend: Backend, need: Need) -> str:
    """Which calls of a run another back end serves."""
    if not isinstance(backend, Flash):
        return ""
    return f", and {backend.other.name} for {'two streams and ' if need.two_stream else ''}float32"
