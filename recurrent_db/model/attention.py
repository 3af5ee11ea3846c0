"""Attention: which keys each query sees, and the back ends that compute it.

A `Rule` defines which keys a query sees. Once per forward pass, a back end turns the rule into the form that its kernel
needs: a mask, a block mask, or the starts of documents. The result is a `Visible`, which all layers share.

If there are fewer queries than keys, the queries are the last positions (bottom-right alignment), as with a key-value cache.

- `sdpa`: PyTorch's fused kernels, on every device. This is the reference. Its causal flag aligns top-left, so unequal
  lengths need a mask.
- `flex`: PyTorch's FlexAttention, compiled on CUDA. It skips blocks of hidden pairs. It has no backward on the CPU.
- `flash`: flash-attn 2, 3 or 4, on CUDA in half precision, for one stream. Packed documents become sequences of varying
  length. Other cases (two streams, float32) use another back end.

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

    The queries are the last ``queries`` of ``positions``. In stream ``own`` a query sees the positions of its document up to
    its own. In stream ``beside`` the keys are those of another stream, followed by those of the queries. Position i then
    sees the other stream's positions <= i of its document, and itself, but no other position of its own stream.
    """

    queries: int
    """Number of queries T."""
    positions: int
    """Number of positions S, including those before the queries."""
    docs_BS: Tensor | None = None
    """Document of each position, int, on the CPU. The positions of a document are contiguous. None: a single document."""
    stream: Stream = "own"
    """``own``: attention within one stream. ``beside``: attention to another stream (two-stream attention)."""
    causal: bool = True
    """False: in stream ``own`` a query sees all positions of its document, also later ones."""

    @property
    def keys(self) -> int:
        """Number of keys N."""
        return self.positions + (0 if self.stream == "own" else self.queries)

    def sees(self, device: torch.device) -> Sees:
        """The rule as a function from index tensors (sequence, head, query, key), which broadcast, to bool. It serves as
        FlexAttention's ``mask_mod``."""
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
        """The rule as a bool mask, true where a query sees a key: (B, 1, T, N) with documents, (T, N) without."""
        b = torch.arange(1 if self.docs_BS is None else len(self.docs_BS), device=device)[:, None, None, None]
        i, j = torch.arange(self.queries, device=device)[:, None], torch.arange(self.keys, device=device)
        return self.sees(device)(b, b, i, j)


def one_document_each(docs_BS: Tensor) -> bool:
    """Whether each sequence has a single document. The ids should be on the CPU, because their values are read."""
    return bool((docs_BS[:, 1:] == docs_BS[:, :-1]).all())


def document_starts(docs_BS: Tensor) -> Tensor:
    """Start of each document in the flattened batch, followed by B S: flash-attn's ``cu_seqlens``, int32, on the CPU.

    Empty documents pad the result to 16 documents per sequence, or twice, four times, ... as many. The shape thus rarely
    depends on the data.
    """
    starts = torch.ones_like(docs_BS, dtype=torch.bool)
    starts[:, 1:] = docs_BS[:, 1:] != docs_BS[:, :-1]
    starts_N = starts.flatten().nonzero()[:, 0].int()
    size = 16 * len(docs_BS)
    while size < len(starts_N):
        size *= 2
    return F.pad(starts_N, (0, size + 1 - len(starts_N)), value=docs_BS.numel())


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to ``device`` without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# Back ends


class Backend(Protocol):
    """An implementation of attention."""

    @property
    def name(self) -> str: ...

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        """The back end to use for this rule and dtype: itself, or another one if it does not support them."""
        ...

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> Any:
        """The rule in the form that `attend` needs, made without waiting for the device. ``dtype``: of queries and keys."""
        ...

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: Any) -> Tensor:
        """softmax(q k / sqrt(E)) v over the keys that each query sees, (B, H, T, E). ``plan`` comes from `plan`. Fewer
        heads of keys and values serve a group of neighbouring query heads each."""
        ...


@dataclass(frozen=True)
class Sdpa:
    """`torch.nn.functional.scaled_dot_product_attention`."""

    name: str = "sdpa"

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        return self

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """A mask, or None if the kernel's causal flag (equal lengths) or no mask (a single query) gives the same result."""
        if rule.causal and rule.stream == "own" and rule.docs_BS is None and rule.queries in (1, rule.positions):
            return None
        mask = rule.mask(device)
        if device.type != "cpu":
            return mask
        # The CPU kernel adds its mask to the scores. It would convert a bool mask in every layer; this converts it once.
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: Tensor | None) -> Tensor:
        causal, grouped = plan is None and q_BHTE.shape[2] == k_BHNE.shape[2], q_BHTE.shape[1] != k_BHNE.shape[1]
        return F.scaled_dot_product_attention(
            q_BHTE, k_BHNE, v_BHNE, attn_mask=plan, is_causal=causal, enable_gqa=grouped
        )


@dataclass(frozen=True)
class Flex:
    """PyTorch's FlexAttention. ``kernel`` is its function ``flex_attention``, compiled on CUDA."""

    kernel: Callable[..., Any]
    name: str = "flex"

    def serves(self, rule: Rule, dtype: torch.dtype) -> Backend:
        return self

    def plan(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> BlockMask:
        batch = None if rule.docs_BS is None else len(rule.docs_BS)
        return create_block_mask(rule.sees(device), batch, None, rule.queries, rule.keys, device=device)

    def attend(self, q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, plan: BlockMask) -> Tensor:
        if q_BHTE.device.type == "cpu" and any(x.requires_grad for x in (q_BHTE, k_BHNE, v_BHNE)):
            raise UserError("FlexAttention has no gradient on the CPU: set run.attention = sdpa")
        grouped = q_BHTE.shape[1] != k_BHNE.shape[1]
        return self.kernel(q_BHTE, k_BHNE, v_BHNE, block_mask=plan, enable_gqa=grouped)


@dataclass(frozen=True)
class Flash:
    """flash-attn. Its functions take (B, T, H, E) and align bottom-right."""

    dense: Callable[..., Any]
    """``flash_attn_func``."""
    varlen: Callable[..., Any]
    """``flash_attn_varlen_func``."""
    other: Backend
    """Back end for cases that flash-attn does not support: two streams, masks that are not causal, other dtypes."""
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
    """Access of a forward pass to a key-value cache: it reads earlier positions and stores its own. See
    `generation.cache`."""

    @property
    def rope(self) -> tuple[Tensor, Tensor]:
        """Rotary tables of the pass's positions, (T, E/2) each, or (B, T, E/2) if sequences differ."""
        ...

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of this pass, and return those of all positions so far, (B, H, S, E) each. Called
        once each time the pass runs the layer."""
        ...


@dataclass(frozen=True, eq=False)
class Visible:
    """The attention mask of one forward pass: a rule, its back end, and the back end's form of the rule. Made by `make`."""

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    """Dtype of queries and keys."""
    asked: Backend
    """The back end chosen for the model."""
    backend: Backend
    """The back end used for this rule: ``asked``, or another if it does not support the rule."""
    plan: Any
    """The back end's form of the rule."""
    compiled: bool = False
    past: Past | None = None
    """The key-value cache; None without one."""

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
        """Prepare a rule for one forward pass. ``device`` and ``dtype`` are those of queries and keys.

        ``compiled`` code gets the same kind of mask for every batch, so that it is not compiled again.
        """
        # If each sequence is one document, the mask is plain causal, which is faster on a CPU.
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
        """The mask of a second stream that attends to this one: position i sees this stream's positions <= i, and itself."""
        return self._other("beside")

    def extend(self, layer: nn.Module, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, preceded by those in the cache if there is one; see `Past.extend`."""
        return (k_BHTE, v_BHTE) if self.past is None else self.past.extend(layer, k_BHTE, v_BHTE)


def attend(q_BHTE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, visible: Visible) -> Tensor:
    """Attention over the keys that each query sees, (B, H, T, E). Raises ValueError if shapes do not match the mask."""
    if (q_BHTE.shape[2], k_BHNE.shape[2]) != (visible.rule.queries, visible.rule.keys):
        raise ValueError(
            f"the attention mask is for {visible.rule.queries} queries and {visible.rule.keys} keys,"
            f" got {q_BHTE.shape[2]} and {k_BHNE.shape[2]}"
        )
    return visible.backend.attend(q_BHTE, k_BHNE, v_BHNE, visible.plan)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing a back end


@dataclass(frozen=True)
class Need:
    """What a run requires of attention, for the choice of a back end."""

    device: torch.device
    dtype: torch.dtype
    """Dtype of queries and keys."""
    head_size: int
    documents: bool = False
    """Whether attention must stay within packed documents."""
    two_stream: bool = False
    """Whether a second stream attends to the first."""
    gradients: bool = True


class Unusable(Exception):
    """A back end cannot be used here. The message gives the reason in one line."""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _try_out(backend: Backend, need: Need) -> None:
    """Run a back end as it will be used, and compare it with `sdpa`. Raises `Unusable` if it fails or gives other results: a
    kernel may import and still not run on this device."""
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
                if not torch.allclose(ours, theirs, rtol=0.1, atol=0.1):  # allows the rounding of half precision only
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
"""Modules of flash-attn 3, 4 and 2, in the order of preference."""


def import_flash(module: str, other: Backend) -> Flash:
    """Import flash-attn from one of `FLASH_MODULES`. Raises `Unusable` if that fails. A module may be found and still lack
    the functions: flash-attn 4 alone makes ``flash_attn`` importable."""
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
"""Builders of the back ends, by name. A builder raises `Unusable` if its back end cannot meet a need."""


def choose(name: str, need: Need) -> tuple[Backend, str]:
    """Choose a back end.

    ``name`` is ``auto`` or a name in `BACKENDS`. On CUDA ``auto`` tries flash, then flex if documents or two streams are
    needed. On other devices, or if neither runs, it takes sdpa.

    Returns:
        The back end, and a line that says which one was chosen and why.

    Raises:
        UserError: there is no back end of this name, or it cannot be used.
    """
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"the attention back end must be auto or one of {', '.join(BACKENDS)}, got {name!r}")
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
    """The part of the line that names the back end for cases that flash-attn does not support."""
    if not isinstance(backend, Flash):
        return ""
    return f", and {backend.other.name} for {'two streams and ' if need.two_stream else ''}float32"
