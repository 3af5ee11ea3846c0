"""Attention: every back end against loops over the keys that a query sees, how one is chosen, and that packed documents
never meet.

flash-attn runs on no CPU, so a stand-in module that does the same mathematics in its layout and with its alignment is put
in its place.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import MICRO, micro_config, micro_model, with_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from recurrent_db.config import ModelConfig
from recurrent_db.data import Batch
from recurrent_db.errors import UserError
from recurrent_db.evaluation.likelihood import score, token_log_probabilities
from recurrent_db.model import LoopedLM, attention
from recurrent_db.model.attention import (
    SDPA,
    Backend,
    Flash,
    Flex,
    Need,
    Rule,
    Unusable,
    Visible,
    attend,
    choose,
    document_starts,
    import_flash,
)
from recurrent_db.model.layers import Block, rope_table
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import denoise, next_token, one_step, unrolled
from recurrent_db.rng import EVALUATION_STEP, Rng

pytestmark = pytest.mark.fast

CPU = torch.device("cpu")
DOCS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 2, 2]], dtype=torch.int32)
RULES = {
    "causal": Rule(9, 9),
    "fewer queries than keys": Rule(3, 9),
    "one query": Rule(1, 9),
    "documents": Rule(9, 9, DOCS),
    "documents, fewer queries": Rule(3, 9, DOCS),
    "beside": Rule(9, 9, stream="beside"),
    "beside, fewer queries": Rule(3, 9, stream="beside"),
    "documents beside": Rule(9, 9, DOCS, "beside"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Against loops


def seen_keys(rule: Rule, b: int, i: int) -> list[int]:
    """The keys that query i sees, in words of lists."""
    here = rule.positions - rule.queries + i
    keys = []
    for j in range(rule.positions):
        same = rule.docs_BS is None or int(rule.docs_BS[b, j]) == int(rule.docs_BS[b, here])
        if same and j <= here:
            keys.append(j)
    return keys if rule.stream == "own" else [*keys, rule.positions + i]


def reference(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """float64 softmax over the keys that each query sees, one query at a time. (B, H, T, E)."""
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            keys = seen_keys(rule, b, i)
            scores = torch.einsum("he,hne->hn", q[b, :, i], k[b][:, keys]) / math.sqrt(q.shape[-1])
            rows.append(torch.einsum("hn,hne->he", scores.softmax(-1), v[b][:, keys]))
    return torch.stack(rows).view(q.shape[0], q.shape[2], *q.shape[1::2]).transpose(1, 2)


def tensors(rule: Rule, dtype: torch.dtype = torch.float32, gradients: bool = False) -> list[Tensor]:
    """Queries, keys and values of 2 sequences and 3 heads of 16, in the layout that the model makes."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, n, 3, 16, generator=generator, dtype=dtype).transpose(1, 2).detach().requires_grad_(gradients)
        for n in (rule.queries, rule.keys, rule.keys)
    ]


def run(backend: Backend, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, Visible.make(rule, CPU, q.dtype, backend))


@pytest.mark.parametrize("case", RULES)
def test_sdpa_against_loops(case: str) -> None:
    rule = RULES[case]
    q, k, v = tensors(rule, torch.float64, gradients=True)
    ours, theirs = run(SDPA, rule, q, k, v), reference(q, k, v, rule)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", RULES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward_against_loops(case: str) -> None:
    rule = RULES[case]
    q, k, v = tensors(rule)
    ours = run(Flex(flex_attention), rule, q, k, v)
    torch.testing.assert_close(ours.double(), reference(q, k, v, rule), rtol=0, atol=1e-5)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_masks_and_starts_of_any_documents(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    borders = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    docs = torch.tensor(borders).view(batch, length).cumsum(1).int()
    stream = data.draw(st.sampled_from(["own", "beside"]))
    rule = Rule(data.draw(st.integers(1, length)), length, docs, stream)
    mask = rule.mask(CPU)
    for b in range(batch):
        for i in range(rule.queries):
            assert mask[b, 0, i].nonzero()[:, 0].tolist() == seen_keys(rule, b, i)
    starts = document_starts(docs)
    rows = [(b, d) for b in range(batch) for d in docs[b].tolist()]
    assert starts.dtype == torch.int32
    assert starts.diff()[: len(dict.fromkeys(rows))].tolist() == [rows.count(row) for row in dict.fromkeys(rows)]
    assert starts[0] == 0
    assert starts[-1] == batch * length
    assert len(starts) == 16 * batch + 1


def test_more_documents_get_more_room() -> None:
    assert len(document_starts(torch.arange(40)[None])) == 64 + 1
    assert document_starts(torch.arange(40)[None])[:41].tolist() == list(range(41))


def test_visibility_for_other_lengths_is_refused() -> None:
    q, k, v = tensors(Rule(9, 9))
    with pytest.raises(ValueError, match="the attention mask is for 3 queries and 9 keys, got 9 and 9"):
        run(SDPA, Rule(3, 9), q, k, v)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_has_no_gradient_on_the_cpu() -> None:
    q, k, v = tensors(Rule(9, 9), gradients=True)
    with pytest.raises(UserError, match=r"no gradient on the CPU: set run\.attention = sdpa"):
        run(Flex(flex_attention), Rule(9, 9), q, k, v)
    q, k, v = tensors(Rule(9, 9))
    assert run(Flex(flex_attention), Rule(9, 9), q, k, v).shape == (2, 3, 9, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("name", ["sdpa", "flex", "flash"])
def test_back_ends_on_a_gpu_against_loops(name: Any, case: str) -> None:
    rule, device = RULES[case], torch.device("cuda")
    torch._dynamo.reset()
    try:
        backend, _ = choose(name, Need(device, torch.bfloat16, 16, rule.docs_BS is not None, rule.stream != "own"))
    except UserError as reason:
        pytest.skip(str(reason))
    q, k, v = (x.to(device) for x in tensors(rule, torch.bfloat16))
    ours = attend(q, k, v, Visible.make(rule, device, torch.bfloat16, backend))
    torch.testing.assert_close(ours.double().cpu(), reference(q.cpu(), k.cpu(), v.cpu(), rule), rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# flash-attn's stand-in


def flash_dense(alignment: str, returns_lse: bool) -> Callable[..., Any]:
    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
    ) -> Any:
        """(B, T, H, E) queries against (B, S, H, E) keys."""
        scores = torch.einsum("bthe,bshe->bhts", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
        if causal:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
            seen = ones.tril(k.shape[1] - q.shape[1] if alignment == "bottom-right" else 0)
            scores = scores.masked_fill(~seen, -math.inf)
        out = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v)
        return (out, scores.logsumexp(-1)) if returns_lse else out

    return flash_attn_func


def flash_varlen(alignment: str, returns_lse: bool) -> Callable[..., Any]:
    one = flash_dense(alignment, False)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Any:
        """(all queries, H, E) against (all keys, H, E), sequence after sequence."""
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        sizes_q, sizes_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max(sizes_q) <= max_seqlen_q
        assert max(sizes_k) <= max_seqlen_k
        parts = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True)
        out = torch.cat([one(*(x[None] for x in part), softmax_scale, causal)[0] for part in parts if len(part[0])])
        return (out, torch.zeros(len(q))) if returns_lse else out

    return flash_attn_varlen_func


def stand_in(
    monkeypatch: pytest.MonkeyPatch, module: str, returns_lse: bool = False, alignment: str = "bottom-right"
) -> None:
    """Put a module that does flash-attn's mathematics where flash-attn would be, and take any real one away."""

    def empty(name: str) -> ModuleType:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    for name in attention.FLASH_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    found = empty("flash_attn") if module.startswith("flash_attn.") else None  # flash-attn 4 lives in a bare package
    made: Any = empty(module)
    assert found is None or not hasattr(found, "flash_attn_func")
    made.flash_attn_func = flash_dense(alignment, returns_lse)
    made.flash_attn_varlen_func = flash_varlen(alignment, returns_lse)


def on_cpu(module: str) -> Flash:
    """flash from ``module``, allowed the dtypes that the stand-in computes in."""
    return dataclasses.replace(import_flash(module, SDPA), dtypes=(torch.float32, torch.float64))


@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize("module", attention.FLASH_MODULES)
@pytest.mark.parametrize("case", RULES)
def test_flash_equals_sdpa(case: str, module: str, returns_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, module, returns_lse)
    rule, flash = RULES[case], on_cpu(module)
    served = rule.stream == "own" and (rule.docs_BS is None or rule.queries == rule.positions)
    assert flash.serves(rule, torch.float32).name == ("flash" if served else "sdpa")
    q, k, v = tensors(rule, gradients=True)
    outs = [run(backend, rule, q, k, v) for backend in (flash, SDPA)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["causal", "fewer queries than keys"])
def test_another_alignment_would_be_noticed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: aligned top-left, unequal lengths give something else; equal lengths do not."""
    stand_in(monkeypatch, "flash_attn", alignment="top-left")
    rule = RULES[case]
    q, k, v = tensors(rule)
    difference = (run(on_cpu("flash_attn"), rule, q, k, v) - run(SDPA, rule, q, k, v)).abs().max()
    assert (difference < 1e-5) == (case == "causal")


def test_half_precision_and_one_stream_alone_go_to_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn")
    flash = import_flash("flash_attn", SDPA)
    assert flash.serves(Rule(9, 9, DOCS), torch.bfloat16) is flash
    assert flash.serves(Rule(9, 9), torch.float32) is SDPA
    model, _ = micro_model(micro_config("--objective.name", "next_token"))
    model.attention = flash
    assert model.float().visible(9).backend is SDPA
    with torch.autocast("cpu", torch.bfloat16):
        visible = model.visible(9)
    assert visible.backend is flash
    assert visible.beside.backend is SDPA


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def need(**changes: Any) -> Need:
    return dataclasses.replace(Need(torch.device("cuda"), torch.bfloat16, 64, documents=True), **changes)


def forbid(*names: str) -> Callable[[Backend, Need], None]:
    def try_out(backend: Backend, need: Need) -> None:
        if backend.name in names:
            raise Unusable("no kernel image is available")

    return try_out


def test_auto_on_the_cpu() -> None:
    backend, line = choose("auto", need(device=CPU, dtype=torch.float32))
    assert backend is SDPA
    assert line == "attention: sdpa (auto on cpu)"


@pytest.mark.parametrize("module", attention.FLASH_MODULES)
def test_auto_takes_flash_where_it_runs(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, module)
    monkeypatch.setattr(attention, "_try_out", forbid())
    backend, line = choose("auto", need())
    assert backend.name == "flash"
    assert line == "attention: flash, and sdpa for float32 (auto; it runs)"
    backend, line = choose("auto", need(two_stream=True))
    assert isinstance(backend, Flash)
    assert backend.other.name == "flex"
    assert line == "attention: flash, and flex for two streams and float32 (auto; it runs)"
    if module == "flash_attn.cute":
        assert importlib.util.find_spec("flash_attn") is not None  # what can be found need not have the function
        with pytest.raises(Unusable, match="flash_attn does not import"):
            import_flash("flash_attn", SDPA)


def test_auto_goes_on_where_something_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn")
    monkeypatch.setattr(attention, "_try_out", forbid("flash"))
    backend, line = choose("auto", need())
    assert backend.name == "flex"
    assert "no kernel image is available" in line
    assert choose("auto", need(documents=False))[0] is SDPA
    monkeypatch.setattr(attention, "_try_out", forbid("flash", "flex"))
    backend, line = choose("auto", need())
    assert backend is SDPA
    assert line.startswith("attention: sdpa (auto; no flash: ")
    assert "; no flex: no kernel image" in line
    backend, line = choose("auto", need(dtype=torch.float32))
    assert backend is SDPA
    assert "no flash: flash-attn needs run.dtype = bfloat16" in line


@pytest.mark.parametrize("documents", [True, False])
def test_a_kernel_is_tried_out_before_it_is_taken(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn")
    flash = on_cpu("flash_attn")
    asked = need(device=CPU, dtype=torch.float32, two_stream=True, documents=documents)
    attention._try_out(flash, asked)
    # A library that runs and is wrong.
    wrong = dataclasses.replace(
        flash,
        dense=lambda *qkv, causal: flash.dense(*qkv, causal=False),
        varlen=lambda *qkv, causal, **sizes: flash.varlen(*qkv, causal=False, **sizes),
    )
    with pytest.raises(Unusable, match="flash and sdpa disagree on this device"):
        attention._try_out(wrong, asked)


def test_a_library_that_breaks_while_loading_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise OSError("libcudart.so.13: undefined symbol\nand more lines")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UserError) as error:
        choose("flash", need())
    assert "flash_attn does not import (libcudart.so.13: undefined symbol)" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flash", {"device": CPU}, "flash-attn needs a CUDA device, and this one is cpu"),
        ("flash", {"dtype": torch.float32}, "flash-attn needs run.dtype = bfloat16"),
        ("flash", {}, "install it with: pip install flash-attn --no-build-isolation"),
        ("flex", {"device": CPU, "dtype": torch.float32}, "no gradient on the CPU: set run.attention = sdpa"),
    ],
)
def test_a_back_end_that_was_asked_for_and_is_missing_is_one_line(
    name: Any, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in attention.FLASH_MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as error:
        choose(name, need(**changes))
    assert str(error.value).startswith(f"run.attention = {name} cannot be used: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_taken_on_the_cpu_where_no_gradient_is_needed() -> None:
    backend, line = choose("flex", need(device=CPU, dtype=torch.float32, gradients=False))
    assert backend.name == "flex"
    assert line == "attention: flex, as asked"


def test_the_trainer_says_what_it_took_and_refuses_what_is_missing(
    script_here: Callable[..., subprocess.CompletedProcess[str]], data_dir: Path, tmp_path: Path
) -> None:
    words = ["train/pretrain.py", *MICRO, "--data.path", data_dir, "--budget.steps", 1, "--eval.points", 0]
    result = script_here(*words, "--run.dir", tmp_path / "a")
    assert result.returncode == 0
    assert "attention: sdpa (auto on cpu)" in result.stderr.splitlines()
    result = script_here(*words, "--run.dir", tmp_path / "b", "--run.attention", "flash")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: run.attention = flash cannot be used: flash-attn needs a CUDA device, and this one is cpu"
    ]
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Made once, without a look at the device, and compiled once


@pytest.mark.parametrize("stream", ["own", "beside"])
def test_plans_read_no_value_of_the_device(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no values to wait for, so a plan that needed one would fail."""
    stand_in(monkeypatch, "flash_attn")
    for backend in (SDPA, Flex(flex_attention), on_cpu("flash_attn")):
        Visible.make(Rule(9, 9, DOCS, stream), torch.device("meta"), torch.float32, backend)


@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_compiled_block_serves_every_batch(name: str) -> None:
    """One compilation, whatever the documents are: shapes and code stay the same."""
    backend = SDPA if name == "sdpa" else Flex(flex_attention)
    counter = CompileCounter()
    torch._dynamo.reset()
    config = ModelConfig(d_model=16, n_heads=2, d_mlp=24)
    block = with_values(Block(config))
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    rope = rope_table(config, 9, CPU)
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for docs in (DOCS, DOCS.flip(0), torch.arange(18).view(2, 9).int()):
            visible = Visible.make(Rule(9, 9, docs), CPU, torch.float32, backend)
            eager = block(x, rope, Visible.make(Rule(9, 9, docs), CPU, torch.float32))
            torch.testing.assert_close(compiled(x, rope, visible), eager, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------------------------------
# Packed documents

RNG = Rng(0, EVALUATION_STEP)
SPANS = [(0, 5), (5, 12), (12, 16)]
"""Three documents in one window."""
MODELS = {
    "next_token": ["next_token"],
    "unrolled": ["unrolled"],
    "one_step": ["one_step", "--objective.one_step.next_token_share", "0"],
    "denoise": ["denoise"],
    "two-stream": ["denoise", "--objective.denoise.conditioning", "two-stream"],
}


def model_of(case: str) -> tuple[LoopedLM, Any]:
    return micro_model(micro_config("--objective.name", *MODELS[case]))


def packed(seed: int = 0) -> Batch:
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(seed))
    docs = torch.cat([torch.full((2, end - start), n) for n, (start, end) in enumerate(SPANS)], dim=1).int()
    return Batch(ids[:, :-1], ids[:, 1:], docs, torch.arange(2))


def hidden(model: LoopedLM, tokens: Tensor, docs: Tensor | None, k: int, offset: int = 0) -> Tensor:
    noise = NoiseSource(RNG, torch.arange(len(tokens)), 32, offset=offset)
    with torch.no_grad():
        visible = model.visible(tokens.shape[1], docs)
        e = model.encode(tokens, visible)
        [(_, found)] = model.recurrence.hidden(model, tokens, e, [k], noise, visible=visible)
    return found


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("case", MODELS)
def test_a_document_sees_no_other(case: str, k: int) -> None:
    model, _ = model_of(case)
    batch = packed()
    before = hidden(model, batch.tokens_BT, batch.doc_ids_BT, k)
    for start, end in SPANS:
        changed = batch.tokens_BT.clone()
        changed[:, start:end] = (changed[:, start:end] + 7) % 61
        after = hidden(model, changed, batch.doc_ids_BT, k)
        same = (before == after).all(-1).all(0)
        assert same.tolist() == [not start <= i < end for i in range(16)]
    # Positive control: with the mask off, a later document does see an earlier one.
    model.document_mask = False
    changed = batch.tokens_BT.clone()
    changed[:, :5] = (changed[:, :5] + 7) % 61
    assert not torch.equal(*(hidden(model, x, batch.doc_ids_BT, k)[:, 5:] for x in (batch.tokens_BT, changed)))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("case", MODELS)
def test_a_packed_document_is_scored_as_if_alone(case: str, k: int) -> None:
    """Rotary positions are relative, so where in a window a document lies changes nothing."""
    model, _ = model_of(case)
    batch = packed()
    together = hidden(model, batch.tokens_BT, batch.doc_ids_BT, k)
    for start, end in SPANS:
        alone = hidden(model, batch.tokens_BT[:, start:end], None, k, offset=start)
        torch.testing.assert_close(together[:, start:end], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", list(MODELS))
def test_documents_are_apart_in_training(case: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another first document leaves what the objective reads out of the others as it was, where documents are masked."""
    model, objective = model_of(case)
    model.document_mask = masked
    read: list[Tensor] = []
    for module in (next_token, unrolled, one_step, denoise):
        plain = module.cross_entropy
        monkeypatch.setattr(
            module,
            "cross_entropy",
            lambda m, hidden, *rest, plain=plain: read.append(hidden) or plain(m, hidden, *rest),
        )
    batch = packed()
    other = dataclasses.replace(batch, tokens_BT=batch.tokens_BT.clone(), targets_BT=batch.targets_BT.clone())
    other.tokens_BT[:, :5] = (other.tokens_BT[:, :5] + 7) % 61
    other.targets_BT[:, :4] = other.tokens_BT[:, 1:5]
    for each in (batch, other):
        objective(model, each, Rng(0, 3), 0.0)
    assert not torch.equal(read[0][:, :5], read[1][:, :5])
    assert torch.equal(read[0][:, 5:], read[1][:, 5:]) == masked


@pytest.mark.parametrize("case", MODELS)
def test_one_document_each_is_plain_causal_attention(case: str) -> None:
    model, _ = model_of(case)
    tokens = packed().tokens_BT
    docs = torch.tensor([[0], [3]]).expand(2, 16)
    assert torch.equal(hidden(model, tokens, docs, 2), hidden(model, tokens, None, 2))
    # The mask itself says the same; only a CPU leaves it away.
    rule = Rule(16, 16, docs)
    assert torch.equal(rule.mask(CPU).expand(2, 1, 16, 16), torch.ones(2, 1, 16, 16, dtype=torch.bool).tril())


@pytest.mark.parametrize("case", ["next_token", "denoise"])
def test_scores_of_packed_windows_keep_documents_apart(case: str) -> None:
    model, _ = model_of(case)
    batch, k = packed(), 2
    alone = 0.0
    for start, end in SPANS:
        visible = model.visible(end - start)
        tokens = batch.tokens_BT[:, start:end]
        with torch.no_grad():
            e = model.encode(tokens, visible)
            noise = NoiseSource(Rng(0, EVALUATION_STEP), batch.sample_index_B, 32, offset=start)
            [(_, found)] = model.recurrence.hidden(model, tokens, e, [k], noise)
            log_p = model.logits(found).log_softmax(-1)
        alone -= log_p.gather(-1, batch.targets_BT[:, start:end, None]).sum().item()
    byte_lengths = torch.ones(61).numpy()
    assert score(model, [batch], [k], byte_lengths).by_k[k].nll == pytest.approx(alone / 32, rel=1e-5)
    model.document_mask = False
    whole = score(model, [batch], [k], byte_lengths).by_k[k].nll
    assert whole != pytest.approx(alone / 32, rel=1e-3)
    with torch.no_grad():
        plain = token_log_probabilities(
            model, batch.tokens_BT, batch.targets_BT, [k], Rng(0, EVALUATION_STEP), batch.sample_index_B
        )
    assert whole == pytest.approx(-plain[k].mean().item(), rel=1e-5)
