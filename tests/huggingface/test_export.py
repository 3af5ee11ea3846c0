"""Out to Hugging Face transformers and back: the same numbers, the same ids, the same text."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers import OBJECTIVES, make_checkpoint, micro_config
from hf_helpers import bpe, from_hf, hf_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recurrent_db
from recurrent_db.cli import run
from recurrent_db.data.byte_level_tokenizer import wrap
from recurrent_db.data.tokenizer import HOSTILE_TEXTS, Tokenizer, replace_surrogates
from recurrent_db.errors import UserError
from recurrent_db.huggingface.export import MODEL_CODE, TOKENIZER_CODE, export
from recurrent_db.huggingface.import_folder import import_folder
from recurrent_db.model import LoopedLM
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.objectives import build_objective
from recurrent_db.optim.ema import EMA
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.rng import EVALUATION_STEP, Rng
from recurrent_db.store.checkpoint import Checkpoint, save_checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.train_state import TrainState

transformers = pytest.importorskip("transformers", reason="extra `hf` is not installed")

WINDOW = 32
DENOISE = ("--objective.denoise.grid", "karras", "--objective.denoise.bridge", "hard", "--model.d_condition", "15")
VARIANTS: dict[str, tuple[str, ...]] = {
    **{name: ("--objective.name", name) for name in OBJECTIVES},
    "paper": ("--objective.name", "denoise_paper", "--model.injection", "add"),
    "hard": ("--objective.name", "denoise", *DENOISE),
    "state": ("--objective.name", "denoise", "--objective.denoise.bridge", "state", "--model.injection",
              "diagonal"),
    "levels": ("--objective.name", "denoise", "--objective.denoise.grid", "log-uniform", "--model.n_prelude", "0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, tuple[Path, Path]]:
    """Run and exported folder of each variant."""
    root, result = tmp_path_factory.mktemp("hf"), {}
    for name, options in VARIANTS.items():
        objective = options[1]
        folder = make_checkpoint(root / name, tokenizer, objective, WINDOW, *options[2:])
        export(folder, root / f"{name}-hf")
        result[name] = folder, root / f"{name}-hf"
    return result


@torch.inference_mode()
def logits(model: LoopedLM, ids_BT: Tensor, k: int, seed: int = 0) -> Tensor:
    """Ours, with the noise of request 0 for each sequence."""
    requests = torch.zeros(len(ids_BT), dtype=torch.int64)
    noise = NoiseSource(Rng(seed, EVALUATION_STEP), requests, model.config.max_seq_len)
    [(_, hidden)] = model.recurrence.hidden(model, ids_BT, model.encode(ids_BT), [k], noise)
    return model.logits(hidden)


def some_ids(vocab_size: int, length: int = WINDOW + 8) -> Tensor:
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("name", VARIANTS)
def test_exported_and_imported_again_gives_the_same_logits_bit_for_bit(
    exported: dict[str, tuple[Path, Path]], name: str, tmp_path: Path
) -> None:
    """Also past the window, where the noise is of another page."""
    run_dir, folder = exported[name]
    model, tokenizer = recurrent_db.load(run_dir, "cpu")
    theirs = from_hf(folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "configuration_recurrent_db.py", "generation_config.json", "layers_recurrent_db.py",
        "model.safetensors", "modeling_recurrent_db.py", "tokenization_recurrent_db.py", "tokenizer.model",
        "tokenizer_config.json",
    }  # fmt: skip
    import_folder(folder, tmp_path / "back")
    back, same_tokenizer = recurrent_db.load(tmp_path / "back", "cpu")
    assert same_tokenizer.hash == tokenizer.hash
    before, after = (Checkpoint(find_checkpoint(path)) for path in (run_dir, tmp_path / "back"))
    assert before.config().model == after.config().model
    assert before.config().objective == after.config().objective
    ids = some_ids(tokenizer.vocab_size)
    for k in (1, 2, 5):
        ours = logits(model, ids, k)
        assert torch.equal(ours, logits(back, ids, k))
        with torch.inference_mode():
            assert torch.equal(ours, theirs(ids, num_recurrence=k).logits)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("k", [1, 3])
def test_greedy_generation_equals_ours(exported: dict[str, tuple[Path, Path]], name: str, k: int) -> None:
    """A batch with padding and an empty prompt, and each prompt alone."""
    run_dir, folder = exported[name]
    model, tokenizer = recurrent_db.load(run_dir, "cpu")
    theirs, hf = from_hf(folder), hf_tokenizer(folder)
    prompts = ["def main(", "x", ""]
    new = 16
    assert max(len(tokenizer.encode(p)) for p in prompts) + new <= WINDOW
    ours = recurrent_db.generate_texts(
        model, tokenizer, prompts, requests=[0, 0, 0], k=k, max_new_tokens=new, temperature=0
    )

    def generated(batch: list[str]) -> list[str]:
        inputs = hf(batch, return_tensors="pt", padding=True)
        out = theirs.generate(**inputs, max_new_tokens=new, do_sample=False, num_recurrence=k)
        return hf.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert generated(prompts) == ours
    for prompt, text in zip(prompts, ours, strict=True):
        assert generated([prompt]) == [text]
    from_nothing = theirs.generate(max_new_tokens=new, do_sample=False, num_recurrence=k)
    assert hf.batch_decode(from_nothing, skip_special_tokens=True) == ours[2:]
    assert len(ours[0]) > 4


def test_k_and_seed_have_defaults_that_export_sets(
    exported: dict[str, tuple[Path, Path]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    defaults = {name: build_objective(micro_config("--objective.name", name)).default_k for name in OBJECTIVES}
    assert {name: from_hf(exported[name][1]).config.num_recurrence for name in OBJECTIVES} == defaults
    assert (defaults["unrolled"], defaults["one_step"]) == (4, 3)
    export(exported["unrolled"][0], tmp_path / "x", k=3, seed=7)
    model, theirs, ids = recurrent_db.load(exported["unrolled"][0], "cpu")[0], from_hf(tmp_path / "x"), some_ids(300)
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, logits(model, ids, 3, seed=7))
    assert not torch.equal(logits(model, ids, 3), logits(model, ids, 3, seed=7))


@pytest.mark.parametrize("name", ["unrolled", "denoise", "hard", "levels"])
def test_cached_passes_equal_one_pass(exported: dict[str, tuple[Path, Path]], name: str) -> None:
    """Padded on the left, in chunks; with one K alone."""
    theirs = from_hf(exported[name][1]).double()
    ids = some_ids(300, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.inference_mode():
        whole = theirs(ids, attention_mask=mask, num_recurrence=3).logits
        alone = theirs(ids[:1], num_recurrence=3).logits
        cache = transformers.DynamicCache()
        parts = [
            theirs(ids[:, a:b], attention_mask=mask[:, :b], cache=cache, num_recurrence=3).logits
            for a, b in ((0, 7), (7, 11), (11, 12), (12, 20))
        ]
        for wrong in (1, 2, 4):
            with pytest.raises(ValueError, match=r"another K|one K"):
                theirs(ids[:, :1], cache=cache, num_recurrence=wrong)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-9)
    torch.testing.assert_close(whole[:1], alone, rtol=0, atol=1e-9)


def test_it_trains_under_transformers_and_comes_back(exported: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """The loss is next-token cross-entropy; what transformers saves, in several files, is imported."""
    run_dir, folder = exported["unrolled"]
    theirs, ids = from_hf(folder), some_ids(300)
    loss = theirs(ids, labels=ids, num_recurrence=2).loss
    expected = torch.nn.functional.cross_entropy(
        logits(recurrent_db.load(run_dir, "cpu")[0], ids, 2)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in theirs.parameters())
    torch.optim.SGD(theirs.parameters(), 0.1).step()
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    hf_tokenizer(folder).save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    import_folder(tmp_path / "saved", tmp_path / "back")
    back = recurrent_db.load(tmp_path / "back", "cpu")[0]
    with torch.inference_mode():
        assert torch.equal(logits(back, ids, 2), theirs(ids, num_recurrence=2).logits)
        assert torch.equal(logits(back, ids, 2), from_hf(tmp_path / "saved")(ids, num_recurrence=2).logits)
    assert not torch.equal(back.embedding.weight, recurrent_db.load(run_dir, "cpu")[0].embedding.weight)


def test_the_average_of_the_weights_is_what_is_exported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = Checkpoint(find_checkpoint(make_checkpoint(tmp_path / "plain", tokenizer, "next_token", WINDOW)))
    config, model = source.config(), recurrent_db.load(tmp_path / "plain", "cpu")[0]
    config.optim.ema_decay = 0.9
    ema = EMA(model, 0.9)
    ema.shadow = {name: value + 1 for name, value in ema.shadow.items()}
    save_checkpoint(
        tmp_path / "run", config, tokenizer, model, build_optimizer(model, config.optim), ema, TrainState(), {}
    )
    export(tmp_path / "run", tmp_path / "out")
    assert torch.equal(from_hf(tmp_path / "out").embedding.weight, model.embedding.weight + 1)


@pytest.mark.parametrize("name", [*MODEL_CODE, TOKENIZER_CODE])
def test_the_code_in_a_folder_needs_nothing_of_this_package(exported: dict[str, tuple[Path, Path]], name: str) -> None:
    tree = ast.parse((exported["denoise"][1] / name).read_text(encoding="utf-8"))
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported_from = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {f"{node.module}.py" for node in imported_from if node.level} <= set(MODEL_CODE)  # files of the folder
    imports |= {node.module or "." for node in imported_from if not node.level}
    assert {name.split(".")[0] for name in imports} <= {
        "__future__", "collections", "dataclasses", "functools", "hashlib", "itertools", "math", "numpy", "pathlib", "re",
        "sentencepiece", "torch", "transformers", "typing",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXT = st.text(
    st.one_of(st.characters(exclude_categories=[]), st.sampled_from(" \n\t\r\u2581\x00<>|s/_aeiou0123456789")),
    max_size=200,
)
PARTS = st.sampled_from([
    "</s>", "<s>", "<unk>", "<pad>", "<0x41>", "<|end|>", "\u2581", "    ", "\n\n", "\U0001f468\u200d\U0001f469",
    "e\u0301", "\ufb01", "\x00\x1b", "aaaa",
])  # fmt: skip
HOSTILE = st.one_of(TEXT, st.lists(st.one_of(PARTS, TEXT), max_size=6).map("".join))


@pytest.fixture(scope="module")
def tokenizers(
    exported: dict[str, tuple[Path, Path]],
    tokenizer: Tokenizer,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Tokenizer, Any]]:
    """Ours and the exported one, of a model trained here, and of one whose own normalisation folds and collapses."""
    model, root = io.BytesIO(), tmp_path_factory.mktemp("foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].splitlines()),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        minloglevel=3,
    )
    foreign = Tokenizer.from_bytes(model.getvalue())
    export(make_checkpoint(root / "run", foreign, "next_token", WINDOW), root / "out")
    return [(tokenizer, hf_tokenizer(exported["next_token"][1])), (foreign, hf_tokenizer(root / "out"))]


@pytest.fixture(scope="module")
def byte_level_export(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run with a byte-level tokenizer whose own file puts a token before each text."""
    root, spec = tmp_path_factory.mktemp("byte-level"), bpe(texts)
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing", "pair": [piece],
        "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, piece],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [1], "tokens": ["<|begin|>"]}},
    }  # fmt: skip
    tokenizer = Tokenizer.from_bytes(wrap(spec, 0, 1, 2))
    export(make_checkpoint(root / "run", tokenizer, "next_token", WINDOW), root / "out")
    return root / "out"


@given(HOSTILE)
@settings(deadline=None, max_examples=300)
def test_the_exported_tokenizer_gives_our_ids(tokenizers: list[tuple[Tokenizer, Any]], text: str) -> None:
    for ours, hf in tokenizers:
        ids = ours.encode(text)
        assert hf(text, split_special_tokens=True)["input_ids"] == ids
        assert hf.encode(text, split_special_tokens=True) == ids
        assert hf.decode(ids) == ours.decode(ids)
        if not any(token in text for token in hf.all_special_tokens):
            assert hf(text)["input_ids"] == ids
        shown = replace_surrogates(text)
        assert hf.decode(hf(text)["input_ids"]) == shown


def test_the_exported_tokenizer_on_listed_texts_and_special_tokens(
    exported: dict[str, tuple[Path, Path]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hf = hf_tokenizer(exported["next_token"][1])
    texts = [*HOSTILE_TEXTS, "\ud800 lone", "line of text\n" * 15_000]
    # One by one: in lists transformers 4 forgets split_special_tokens.
    assert [hf(text, split_special_tokens=True)["input_ids"] for text in texts] == tokenizer.encode_batch(texts)
    assert hf("<unk><s>")["input_ids"] == tokenizer.encode("<unk><s>")
    assert hf("a</s>")["input_ids"] == [*tokenizer.encode("a"), tokenizer.eos_id]
    assert (hf.eos_token_id, hf.pad_token_id, hf.bos_token_id) == (tokenizer.eos_id, tokenizer.pad_id, tokenizer.eos_id)
    assert len(hf) == hf.vocab_size == tokenizer.vocab_size
    ids = [*tokenizer.encode("a"), tokenizer.eos_id]
    assert (hf.decode(ids), hf.decode(ids, skip_special_tokens=True)) == ("a</s>", "a")
    every = range(tokenizer.vocab_size)
    assert hf.decode(list(every), skip_special_tokens=True) == tokenizer.decode(every)
    hf.save_pretrained(tmp_path / "again")
    assert hf_tokenizer(tmp_path / "again")(texts)["input_ids"] == hf(texts)["input_ids"]


@pytest.mark.parametrize("byte_level", [False, True])
def test_tokens_that_a_user_adds_are_found_in_texts(
    exported: dict[str, tuple[Path, Path]], byte_level_export: Path, byte_level: bool, tmp_path: Path
) -> None:
    """Also in a chat template, after saving, and as another end-of-text token."""
    hf = hf_tokenizer(byte_level_export if byte_level else exported["next_token"][1])
    size, eos = len(hf), hf.eos_token
    assert hf.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]}) == 2
    assert hf.add_tokens(["zorbl"]) == 1
    hf.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    hi = hf("hi")["input_ids"]
    wanted = [size, *hi, hf.eos_token_id, size + 1, size + 2, *hi, hf.eos_token_id]
    chat = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "zorblhi"}]
    hf.save_pretrained(tmp_path / "saved")
    for each in (hf, hf_tokenizer(tmp_path / "saved")):
        assert len(each) == size + 3
        assert each(f"<|user|>hi{eos}<|bot|>zorblhi{eos}")["input_ids"] == wanted
        assert each.apply_chat_template(chat, return_dict=True)["input_ids"] == wanted
        assert each.decode(wanted) == f"<|user|>hi{eos}<|bot|>zorblhi{eos}"
        assert each.decode(wanted, skip_special_tokens=True) == "hizorblhi"
        assert size not in each("<|user|>", split_special_tokens=True)["input_ids"]
    hf.add_special_tokens({"eos_token": "<|stop|>"})
    assert hf("hi<|stop|>")["input_ids"] == [*hi, size + 3] == [*hi, hf.eos_token_id]


# ---------------------------------------------------------------------------------------------------------------------
# Folders that transformers changed


@pytest.mark.parametrize("byte_level", [False, True])
def test_a_model_with_added_tokens_comes_back(
    exported: dict[str, tuple[Path, Path]], byte_level_export: Path, byte_level: bool, tmp_path: Path
) -> None:
    """Special ones, an ordinary one, and rows that fill up to a multiple of 8. Then once more, out and back."""
    folder = byte_level_export if byte_level else exported["next_token"][1]
    theirs, hf = from_hf(folder), hf_tokenizer(folder)
    size = len(hf)
    hf.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    hf.add_tokens(["zorbl", "\u00e9" * 80])  # the latter's name has more than 127 bytes
    theirs.resize_token_embeddings(len(hf), pad_to_multiple_of=8)
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    hf.save_pretrained(tmp_path / "saved")
    import_folder(tmp_path / "saved", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "again")
    import_folder(tmp_path / "again", tmp_path / "back")
    models = [recurrent_db.load(tmp_path / name, "cpu") for name in ("run", "back")]
    rows = theirs.config.vocab_size
    assert rows == size + 8
    ids = torch.randint(rows, (2, 20), generator=torch.Generator().manual_seed(0))
    text = "a zorbl import" + "\u00e9" * 80
    for model, tokenizer in models:
        assert tokenizer.vocab_size == model.config.vocab_size == rows
        assert tokenizer.hash == models[0][1].hash
        assert tokenizer.encode(text) == hf(text)["input_ids"]
        assert {size + 2, size + 3} < set(tokenizer.encode(text))
        assert tokenizer.decode([*tokenizer.encode(text), size, size + 1, rows - 1]) == text
        assert size not in tokenizer.encode("<|user|>")  # a text cannot hold a special token here
        assert tokenizer.decode(tokenizer.encode("<|user|>")) == "<|user|>"
        with torch.inference_mode():
            assert torch.equal(logits(model, ids, 1), theirs(ids).logits)
        assert isinstance(recurrent_db.generate(model, tokenizer, "zorbl", max_new_tokens=20, temperature=9), str)
    again = hf_tokenizer(tmp_path / "again")
    assert again("<|user|>zorbl")["input_ids"] == [size, size + 2]
    assert again.decode([size, size + 2], skip_special_tokens=True) == "zorbl"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_model_of_another_dtype_comes_back(
    exported: dict[str, tuple[Path, Path]], dtype: str, tmp_path: Path
) -> None:
    theirs = from_hf(exported["denoise"][1]).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "saved")
    hf_tokenizer(exported["denoise"][1]).save_pretrained(tmp_path / "saved")
    import_folder(tmp_path / "saved", tmp_path / "run")
    back = recurrent_db.load(tmp_path / "run", "cpu")[0]
    assert all(torch.equal(value, theirs.state_dict()[name].float()) for name, value in back.state_dict().items())


def _other_end(theirs: Any, hf: Any) -> None:
    hf.add_special_tokens({"eos_token": "<|stop|>"})
    theirs.resize_token_embeddings(len(hf))


def _stripping(theirs: Any, hf: Any) -> None:
    hf.add_tokens([transformers.AddedToken("zorbl", lstrip=True)])
    theirs.resize_token_embeddings(len(hf))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_other_end, r"the end-of-text token was changed to '<\|stop\|>'"),
        (_stripping, "the added token 'zorbl' .* needs lstrip"),
        (lambda theirs, hf: hf.add_tokens(["zorbl"]), "the embedding has 512 rows for 513 tokens"),
        (lambda theirs, hf: hf.add_special_tokens({"additional_special_tokens": ["e"]}),
         "the added token 'e' .* replaces a token"),
        (lambda theirs, hf: theirs.resize_token_embeddings(500), "vocab_size is '500', but run.config.model.vocab_size"),
        (lambda theirs, hf: setattr(theirs.config, "initial_state", "zeros"), "initial_state is 'zeros', but"),
        (lambda theirs, hf: theirs.config.walk.update(bridge="state"), "walk is .*, but the exported run needs"),
        (lambda theirs, hf: theirs.register_parameter("extra", torch.nn.Parameter(torch.zeros(1))), "unknown weight: extra"),
    ],
)  # fmt: skip
def test_changes_that_cannot_come_back_are_one_line(
    exported: dict[str, tuple[Path, Path]], change: Callable[[Any, Any], Any], match: str, tmp_path: Path
) -> None:
    theirs, hf = from_hf(exported["denoise"][1]), hf_tokenizer(exported["denoise"][1])
    change(theirs, hf)
    theirs.save_pretrained(tmp_path / "saved")
    hf.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=match) as error:
        import_folder(tmp_path / "saved", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_the_commands(exported: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    assert run(["export", str(exported["unrolled"][0]), "--to", "hf", str(tmp_path / "out"), "--k", "2"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_recurrence"] == 2
    assert run(["import", str(tmp_path / "out"), str(tmp_path / "run")]) == 0
    for words in (["export", str(exported["unrolled"][0]), "--to", "hf", str(tmp_path / "out")],
                  ["import", str(tmp_path / "out"), str(tmp_path / "run")]):  # fmt: skip
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            run(words)
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in (
        ("hidden_size", -1),
        ("vocab_size", 10),
        ("injection", "x"),
        ("max_position_embeddings", 10**12),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UserError, match=f"{key} is .*, but run.config.model"):
            run(["import", str(tmp_path / "out"), str(tmp_path / "run2")])
    assert not (tmp_path / "run2").exists()
    with pytest.raises(UserError, match="no run directory"):
        run(["export", str(tmp_path / "nowhere"), "--to", "hf", str(tmp_path / "b")])
    with pytest.raises(UserError, match="--k must be"):
        run(["export", str(exported["unrolled"][0]), "--to", "hf", str(tmp_path / "b"), "--k", "-1"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("option", ["conditioning=two-stream", "sampler=heun", "sampler=ancestral", "bridge=sample"])
def test_walks_that_the_exported_code_lacks_are_refused(option: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    key, value = option.split("=")
    folder = make_checkpoint(tmp_path / "run", tokenizer, "denoise", WINDOW, f"--objective.denoise.{key}", value)
    with pytest.raises(UserError, match=f"the walk's {key} = {value} cannot be exported"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_configuration_names_no_place_of_this_machine(
    exported: dict[str, tuple[Path, Path]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = make_checkpoint(
        tmp_path / "run", tokenizer, "next_token", WINDOW, "--data.path", "/secret/a", "--data.val_path", "/secret/b",
        "--run.dir", "/secret/c", "--init.from", "/secret/d",
    )  # fmt: skip
    export(folder, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        assert "secret" not in path.read_text(), path.name
