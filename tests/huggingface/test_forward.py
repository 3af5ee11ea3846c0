"""The exported model as callers of transformers use it: batches, beams, caches, arguments of forward and generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_checkpoint
from hf_helpers import from_hf, hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recurrent_db
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.huggingface.export import export
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import EVALUATION_STEP, Rng

transformers = pytest.importorskip("transformers", reason="extra `hf` is not installed")

WINDOW, VOCAB = 32, 300
NAMES = ("unrolled", "denoise")

Models = dict[str, tuple[Any, Any, Path]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Models:
    """Ours and the exported model in fp64, and the exported folder. Both start from noise."""
    root, result = tmp_path_factory.mktemp("hf"), {}
    for name in NAMES:
        run = make_checkpoint(root / name, tokenizer, name, WINDOW)
        export(run, root / f"{name}-hf")
        ours, theirs = recurrent_db.load(run, "cpu")[0], from_hf(root / f"{name}-hf")
        result[name] = ours.double(), theirs.double(), root / f"{name}-hf"
    return result


@pytest.fixture(params=NAMES)
def theirs(models: Models, request: pytest.FixtureRequest) -> Any:
    return models[request.param][1]


def some_ids(*shape: int) -> Tensor:
    return torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def our_logits(model: Any, ids: list[int], k: int) -> Tensor:
    tokens = torch.tensor([ids])
    noise = NoiseSource(Rng(0, EVALUATION_STEP), torch.tensor([0]), model.config.max_seq_len)
    [(_, hidden)] = model.recurrence.hidden(model, tokens, model.encode(tokens), [k], noise)
    return model.logits(hidden)[0]


@given(
    st.sampled_from(NAMES),
    st.lists(st.lists(st.integers(4, VOCAB - 1), min_size=1, max_size=WINDOW + 9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, WINDOW),
)
@settings(deadline=None, max_examples=40)
def test_each_row_of_a_batch_gets_our_logits(
    models: Models, name: str, texts: list[list[int]], k: int, left: bool, cut: int
) -> None:
    """With padding on either side, in one pass or in two with a cache."""
    ours, theirs, _ = models[name]
    length = max(map(len, texts))
    padding = [[0] * (length - len(text)) for text in texts]
    ids = torch.tensor([pad + text if left else text + pad for pad, text in zip(padding, texts, strict=True)])
    mask = torch.tensor([[0] * len(p) + [1] * len(t) if left else [1] * len(t) + [0] * len(p)
                         for p, t in zip(padding, texts, strict=True)])  # fmt: skip
    with torch.inference_mode():
        if 0 < cut < length:
            first = theirs(ids[:, :cut], attention_mask=mask[:, :cut], num_recurrence=k, use_cache=True)
            cache = getattr(first, "cache", None) or first.past_key_values
            second = theirs(ids[:, cut:], attention_mask=mask, past_key_values=cache, num_recurrence=k)
            logits = torch.cat((first.logits, second.logits), 1)
        else:
            logits = theirs(ids, attention_mask=mask, num_recurrence=k).logits
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row][mask[row].bool()], our_logits(ours, text, k), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}, {}])
def test_generation_does_not_depend_on_the_batch_or_the_cache(
    models: Models, theirs: Any, options: dict[str, Any]
) -> None:
    hf = hf_tokenizer(models["denoise"][2])
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_recurrence": 2, **options}

    def texts(prompts: list[str], **more: Any) -> list[list[int]]:
        inputs = hf(prompts, return_tensors="pt", padding=True)
        out = theirs.generate(**inputs, **settings, **more)
        return [row.tolist() for row in out[:, inputs["input_ids"].shape[1] :]]

    prompts = ["def main(", "x", "def main("]
    together, count = texts(prompts), options.get("num_return_sequences", 1)
    assert together[:count] == together[2 * count :]
    assert together == texts(prompts, use_cache=False)
    assert together == [row for prompt in prompts for row in texts([prompt])]


def test_hidden_states_are_the_outputs_of_the_blocks(theirs: Any) -> None:
    ids, shape = some_ids(2, 9), theirs.config
    for k in (1, 3):
        plain = theirs(ids, num_recurrence=k)
        out = theirs(ids, num_recurrence=k, output_hidden_states=True)
        assert plain.hidden_states is None
        assert torch.equal(out.logits, plain.logits)
        assert len(out.hidden_states) == 1 + shape.n_prelude + k * shape.n_core + shape.n_coda
        assert {tuple(state.shape) for state in out.hidden_states} == {(2, 9, shape.hidden_size)}
        assert torch.equal(theirs.read_out(out.hidden_states[-1]), out.logits)
        assert torch.equal(out.hidden_states[0], theirs.embedding(ids) * shape.hidden_size**0.5)
    made = theirs.generate(ids, max_new_tokens=2, min_new_tokens=2, output_hidden_states=True, output_logits=True,
                           return_dict_in_generate=True, do_sample=False)  # fmt: skip
    assert len(made.hidden_states) == 2
    assert torch.equal(theirs.read_out(made.hidden_states[1][-1])[:, -1].float(), made.logits[1].float())


def test_forms_of_input_and_output(theirs: Any) -> None:
    ids = some_ids(2, 9)
    full = theirs(ids, labels=ids)
    as_tuple = theirs(ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[0], full.loss)
    assert torch.equal(as_tuple[1], full.logits)
    assert torch.equal(theirs(inputs_embeds=theirs.get_input_embeddings()(ids)).logits, full.logits)
    for keep, where in ((None, slice(None)), (2, slice(-2, None)), (torch.tensor([0, 5]), [0, 5]), (0, slice(None))):
        torch.testing.assert_close(theirs(ids, logits_to_keep=keep).logits, full.logits[:, where])
    torch.testing.assert_close(theirs(ids, labels=ids, num_items_in_batch=4).loss, full.loss * ids[:, 1:].numel() / 4)
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    from_embeds = theirs.generate(inputs_embeds=theirs.get_input_embeddings()(ids), **greedy)
    assert torch.equal(from_embeds, theirs.generate(ids, **greedy)[:, 9:])
    theirs.config.return_dict = False
    try:
        assert isinstance(theirs(ids), tuple)
    finally:
        theirs.config.return_dict = True


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(2, 9, 32)}, "either input_ids or inputs_embeds"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.zeros(2, 0)}, "the input is empty"),
        ({"attention_mask": torch.ones(2, 8)}, r"attention_mask must have shape .*\(2, 9\)"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, "attention_mask must have shape"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "position_ids start anew"),
        ({"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, "DynamicCache.*, got tuple"),
        ({"labels": torch.ones(2, 9).long(), "logits_to_keep": 1}, "labels need the logits of all positions"),
        ({"head_mask": torch.ones(2)}, "no argument head_mask"),
        ({"token_type_ids": torch.ones(2, 9)}, "no argument token_type_ids"),
        ({"num_recurence": 3}, "no argument num_recurence"),
        ({"num_recurrence": 0}, "num_recurrence must be a whole number of 1 or more, got 0"),
        ({"num_recurrence": 2.5}, "num_recurrence must be a whole number of 1 or more, got 2.5"),
        ({"num_recurrence": "two"}, "num_recurrence must be a whole number of 1 or more, got 'two'"),
        ({"logits_to_keep": -1}, "logits_to_keep must be 0 or more"),
        ({"input_ids": torch.ones(9).long()}, r"input_ids need shape \(batch, positions\).*got \(9,\)"),
        ({"position_ids": torch.arange(10)[None]}, "position_ids must have 9 positions as the input has, got 10"),
    ],
)
def test_arguments_that_are_refused(theirs: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        theirs(**{"input_ids": some_ids(2, 9), **given})


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(theirs: Any, reentrant: bool) -> None:
    ids = some_ids(2, 9)

    def gradients() -> list[Tensor]:
        theirs.zero_grad()
        out = theirs(
            ids, labels=ids, num_recurrence=3, output_hidden_states=True, use_cache=theirs.is_gradient_checkpointing
        )
        assert len(out.hidden_states) == 1 + theirs.config.n_prelude + 3 * theirs.config.n_core + theirs.config.n_coda
        out.loss.backward()
        return [parameter.grad.clone() for parameter in theirs.parameters()]

    theirs.train()
    try:
        plain = gradients()
        theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
        runs, forward = [], type(theirs.coda[0]).forward
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(theirs.coda[0]), "forward", lambda *args: runs.append(args[0]) or forward(*args))
            again = gradients()
        assert runs.count(theirs.coda[0]) >= 2  # once more in the backward pass
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="without a cache"):
            theirs(ids, past_key_values=transformers.DynamicCache())
    finally:
        theirs.gradient_checkpointing_disable()
        theirs.eval()


def test_stop_strings_end_a_text(models: Models, theirs: Any) -> None:
    tokenizer = hf_tokenizer(models["unrolled"][2])
    prompt = some_ids(1, 4)
    plain = theirs.generate(prompt, max_new_tokens=6, do_sample=False)[0, 4:]
    words = [tokenizer.decode([index]) for index in plain.tolist()]
    stop = next(word for word in words if word.strip("\ufffd"))
    ended = theirs.generate(prompt, max_new_tokens=6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)[0, 4:]
    assert ended.tolist() == plain[: words.index(stop) + 1].tolist()


def test_caches_of_a_fixed_size_are_refused(theirs: Any) -> None:
    with pytest.raises(ValueError, match="a cache that grows"):
        theirs.generate(some_ids(1, 4), max_new_tokens=2, cache_implementation="static")


def test_a_cache_is_returned_by_default_as_in_transformers(theirs: Any) -> None:
    def cache(**given: Any) -> Any:
        out = theirs(some_ids(1, 3), **given)
        return getattr(out, "cache", None) or out.past_key_values

    assert cache().get_seq_length() == 3
    assert cache(use_cache=False) is None
    theirs.train()
    assert cache() is None
    theirs.eval()


@pytest.mark.parametrize("k", [1, 3])
def test_the_harness_gives_the_same_scores_for_both(tokenizer: Tokenizer, tmp_path: Path, k: int) -> None:
    """lm-eval's own model on the export, and this project's, for a model without noise: also empty contexts and prompts."""
    pytest.importorskip("accelerate", reason="extra `hf` is not installed")
    instance = pytest.importorskip("lm_eval.api.instance", reason="extra `eval` is not installed").Instance
    from lm_eval.models.huggingface import HFLM

    from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM

    export(make_checkpoint(tmp_path / "run", tokenizer, "one_step", WINDOW), tmp_path / "hf", k=k)
    ours = RecurrentDBLM(checkpoint=str(tmp_path / "run"), k=k, device="cpu")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), trust_remote_code=True, device="cpu", batch_size=3)

    def ask(kind: str, asked: list[tuple[Any, ...]]) -> list[Any]:
        requests = [instance(kind, {}, arguments, number) for number, arguments in enumerate(asked)]
        first, second = (getattr(model, kind)(requests, disable_tqdm=True) for model in (ours, theirs))
        return [first, second]

    rolling = ask("loglikelihood_rolling", [("import os\nimport sys\n" * 9,), ("x",), ("def main():\n    return 3",)])
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5)
    pairs = [("", "import os"), ("", "x"), ("def f(x):", " return x"), ("for i in", " range(10)")]
    scores = ask("loglikelihood", pairs)
    assert [s for s, _ in scores[0]] == pytest.approx([s for s, _ in scores[1]], rel=1e-5)
    assert [g for _, g in scores[0]] == [g for _, g in scores[1]]
    options = {"until": ["zzz"], "max_gen_toks": 6}
    for prompts in (["", "def main("], ["", ""], ["x"]):
        first, second = ask("generate_until", [(prompt, options) for prompt in prompts])
        assert first == second
        assert all(first)
