"""Huginn checkpoints come in with the numbers that Huginn's published description gives; what does not fit is one line."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from hf_helpers import VOCAB, bpe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import recurrent_db
from recurrent_db.config import ModelConfig, load_config
from recurrent_db.data import prepare
from recurrent_db.data.tokenizer import HOSTILE_TEXTS, Tokenizer, check_lossless, replace_surrogates
from recurrent_db.errors import UserError
from recurrent_db.huggingface.export import export
from recurrent_db.huggingface.import_folder import huginn_config, import_folder
from recurrent_db.model import build_model
from recurrent_db.model.recurrence import NoiseSource
from recurrent_db.rng import Rng
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint

tokenizers = pytest.importorskip("tokenizers", reason="extra `hf` is not installed")

Script = Callable[..., "CompletedProcess[str]"]

D, HEADS, MLP, WINDOW = 24, 2, 40, 32
PRELUDE, CORE, CODA = 2, 3, 1

CONFIG: dict[str, Any] = {
    "architectures": ["RavenForCausalLM"], "model_type": "huginn_raven",
    "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
    "architecture_class_name": "RecurrentGPT", "block_class_name": "SandwichBlock", "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "injection_type": "linear", "state_init": "like-init",
    "bias": False, "tie_embeddings": True, "qk_bias": True, "n_embd": D, "n_heads": HEADS, "num_key_value_heads": HEADS,
    "head_dim": D // HEADS, "intermediate_size": MLP, "n_layers": PRELUDE + CORE + CODA, "n_layers_in_prelude": PRELUDE,
    "n_layers_in_recurrent_block": CORE, "n_layers_in_coda": CODA, "block_size": WINDOW, "vocab_size": VOCAB,
    "padded_vocab_size": VOCAB, "padding_multiple": 4096, "mean_recurrence": 6, "mean_backprop_depth": 2,
    "norm_eps": 1e-6, "rope_base": 50_000, "sampling_scheme": "poisson-lognormal-filling", "torch_dtype": "float32",
    "init_values": {"embed_scale": math.sqrt(D), "std": math.sqrt(2 / (5 * D))}, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
"""The keys of tomg-group-umd/huginn-0125's config.json, at another shape."""


def huginn_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under Huginn's names, large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, around: float = 0.0, spread: float = 0.0) -> Tensor:
        return around + (spread or 1 / math.sqrt(shape[-1])) * torch.randn(*shape, generator=generator)

    weights = {
        "transformer.wte.weight": draw(VOCAB, D),
        "transformer.adapter.weight": draw(D, 2 * D),
        "transformer.ln_f.weight": draw(D, around=1, spread=0.2),
    }
    for part, count in (("prelude", PRELUDE), ("core_block", CORE), ("coda", CODA)):
        for prefix in (f"transformer.{part}.{index}" for index in range(count)):
            weights[f"{prefix}.attn.Wqkv.weight"] = 2 * draw(3 * D, D)
            weights[f"{prefix}.attn.qk_bias"] = draw(2, 1, HEADS, D // HEADS, spread=0.5)
            weights[f"{prefix}.attn.proj.weight"] = draw(D, D)
            weights[f"{prefix}.mlp.fc.weight"] = draw(2 * MLP, D)
            weights[f"{prefix}.mlp.proj.weight"] = draw(D, MLP)
            for number in (1, 2, 3, 4):
                weights[f"{prefix}.norm_{number}.weight"] = draw(D, around=1, spread=0.2)
    angles = np.outer(np.arange(WINDOW), 50_000.0 ** -(np.arange(0, D // HEADS, 2) / (D // HEADS)))
    table = torch.tensor(np.stack([np.cos(angles), np.sin(angles)], -1), dtype=torch.float32)
    return {**weights, "freqs_cis": table[None, :, None]}


def by_the_paper(weights: dict[str, Tensor], ids: list[int], state: np.ndarray, k: int) -> np.ndarray:
    """Huginn's logits (T, V) in float64 NumPy, from its description (arXiv 2502.05171, sections 3.1 and 3.2): one sequence,
    one position after another, a loop over heads, RoPE as multiplication of complex numbers."""
    w = {name.removeprefix("transformer."): value.double().numpy() for name, value in weights.items()}
    size = D // HEADS
    turn = 50_000.0 ** (-2 * np.arange(size // 2) / size)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]

    def rotate(vector: np.ndarray, position: int) -> np.ndarray:
        turned = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * position * turn)
        return np.stack([turned.real, turned.imag], -1).ravel()

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        q_all, k_all, v_all = np.split(x @ w[f"{name}.Wqkv.weight"].T, 3, axis=-1)
        q_bias, k_bias = w.get(f"{name}.qk_bias", np.zeros((2, 1, HEADS, size)))[:, 0]
        out = np.zeros_like(x)
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            q = np.stack([rotate(row[own] + q_bias[head], i) for i, row in enumerate(q_all)])
            keys = np.stack([rotate(row[own] + k_bias[head], i) for i, row in enumerate(k_all)])
            for i in range(len(x)):
                scores = keys[: i + 1] @ q[i] / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                out[i, own] = shares / shares.sum() @ v_all[: i + 1, own]
        return out @ w[f"{name}.proj.weight"].T

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        gate, up = np.split(x @ w[f"{name}.fc.weight"].T, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.proj.weight"].T

    def block(x: np.ndarray, name: str) -> np.ndarray:
        x = norm(attention(norm(x, f"{name}.norm_1"), f"{name}.attn") + x, f"{name}.norm_2")
        return norm(mlp(norm(x, f"{name}.norm_3"), f"{name}.mlp") + x, f"{name}.norm_4")

    e = w["wte.weight"][ids] * math.sqrt(D)
    for index in range(PRELUDE):
        e = block(e, f"prelude.{index}")
    for _ in range(k):
        state = np.concatenate([state, e], -1) @ w["adapter.weight"].T
        for index in range(CORE):
            state = block(state, f"core_block.{index}")
    x = norm(state, "ln_f")
    for index in range(CODA):
        x = block(x, f"coda.{index}")
    return norm(x, "ln_f") @ w["wte.weight"].T


@pytest.fixture(scope="module")
def huginn(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Huginn-format folder, with code in it that must not run."""
    folder = tmp_path_factory.mktemp("huginn")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(huginn_weights(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(bpe(texts)))
    specials = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|begin|>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    (folder / "raven_modeling_minimal.py").write_text("raise SystemExit('this code was run')")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return folder


@pytest.fixture
def copy(huginn: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(huginn, tmp_path / "huginn"))


def noise_of(model: Any) -> NoiseSource:
    return NoiseSource(Rng(0, -1), torch.tensor([0]), model.config.max_seq_len)


def state_of(model: Any, length: int) -> np.ndarray:
    """The initial state that our inference starts from, float64 (T, D), found by running no iteration of it."""
    seen: list[Tensor] = []
    iterate = model.iterate
    model.iterate = lambda state, e, *args, **kwargs: seen.append(state) or iterate(state, e, *args, **kwargs)
    list(
        model.recurrence.hidden(
            model, None, torch.zeros(1, length, D, dtype=model.embedding.weight.dtype), [1], noise_of(model)
        )
    )
    model.iterate = iterate
    return seen[0][0].double().numpy()


def our_logits(model: Any, ids: list[int], k: int) -> np.ndarray:
    with torch.inference_mode():
        tokens = torch.tensor([ids])
        [(_, hidden)] = model.recurrence.hidden(model, tokens, model.encode(tokens), [k], noise_of(model))
        return np.asarray(model.logits(hidden)[0].double().numpy())


IDS = [5, 300, 17, 17, 0, 88, 254, 3, 3, 3, 199, 42]


@pytest.mark.parametrize("k", [1, 2, 6])
def test_logits_are_those_of_the_published_description(huginn: Path, tmp_path: Path, k: int) -> None:
    import_folder(huginn, tmp_path / "run")
    model, _ = recurrent_db.load(tmp_path / "run", "cpu")
    weights = huginn_weights()
    expected = by_the_paper(weights, IDS, state_of(model, len(IDS)), k)
    assert expected.std() > 0.3
    np.testing.assert_allclose(our_logits(model, IDS, k), expected, rtol=0, atol=2e-4)  # fp32 rounding, K times
    np.testing.assert_allclose(our_logits(model.double(), IDS, k), expected, rtol=0, atol=1e-9)


def test_every_weight_matters_to_that_comparison() -> None:
    """A control: were two weights exchanged or one left out, the comparison above would see it."""
    weights, state = huginn_weights(), np.random.default_rng(0).normal(size=(len(IDS), D))
    expected = by_the_paper(weights, IDS, state, 2)
    for name in weights.keys() - {"freqs_cis"}:
        changed = {**weights, name: weights[name].flip(-1)}
        assert np.abs(by_the_paper(changed, IDS, state, 2) - expected).max() > 1e-2, name


def test_the_run_has_huginns_settings(huginn: Path, tmp_path: Path) -> None:
    import_folder(huginn, tmp_path / "run")
    config = Checkpoint(find_checkpoint(tmp_path / "run")).config()
    assert config.objective.name == "unrolled"
    assert (config.objective.unrolled.mean_depth, config.objective.unrolled.truncation) == (6, 2)
    assert (config.model.n_prelude, config.model.n_core, config.model.n_coda) == (PRELUDE, CORE, CODA)
    assert config.model.max_seq_len == WINDOW
    released = {"n_embd": 5280, "n_heads": 55, "num_key_value_heads": 55, "intermediate_size": 17920, "block_size": 4096,
                "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 4, "n_layers_in_coda": 2, "vocab_size": 65536,
                "padded_vocab_size": 65536, "mean_recurrence": 32, "mean_backprop_depth": 8,
                "init_values": {"embed_scale": 72.6636084983398, "std": 0.008703882797784892}}  # fmt: skip
    ours = load_config(Path(__file__).parents[2] / "train/configs/huginn-3.5b.toml")
    theirs = huginn_config({**CONFIG, **released}, "huginn-0125").model
    assert theirs == replace(ours.model, vocab_size=65536, noise_conditioning=False, d_condition=128)
    # metadata.total_size of its index: fp32, with a copy of the tied table and the rotary tables.
    parameters = sum(p.numel() for p in build_model(theirs, None, "meta").parameters())
    assert 4 * (parameters + 65536 * 5280 + 4096 * 48 * 2) == 15_645_600_384


def test_forms_that_weights_come_in(copy: Path, tmp_path: Path) -> None:
    """Several files and an index; a copy of the tied table; half precision; no q/k bias; a name without padding."""
    import_folder(copy, tmp_path / "plain")
    model = recurrent_db.load(tmp_path / "plain", "cpu")[0]
    weights, plain = huginn_weights(), our_logits(model, IDS, 2)
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"model-{1 + index % 3:05d}-of-00003.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    import_folder(copy, tmp_path / "shards")
    assert np.array_equal(our_logits(recurrent_db.load(tmp_path / "shards", "cpu")[0], IDS, 2), plain)

    (copy / "model.safetensors.index.json").unlink()
    half = {name: value.bfloat16() for name, value in weights.items()}
    save_file({**half, "lm_head.weight": half["transformer.wte.weight"].clone()}, copy / "model.safetensors")
    import_folder(copy, tmp_path / "half")
    model = recurrent_db.load(tmp_path / "half", "cpu")[0]
    exact = {name: value.float() for name, value in half.items()}
    expected = by_the_paper(exact, IDS, state_of(model, len(IDS)), 2)
    np.testing.assert_allclose(our_logits(model, IDS, 2), expected, rtol=0, atol=3e-5)

    unbiased = {name: value for name, value in weights.items() if not name.endswith("qk_bias") and name != "freqs_cis"}
    save_file(unbiased, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps({**CONFIG, "qk_bias": False}))
    import_folder(copy, tmp_path / "unbiased")
    model = recurrent_db.load(tmp_path / "unbiased", "cpu")[0]
    expected = by_the_paper(unbiased, IDS, state_of(model, len(IDS)), 2)
    np.testing.assert_allclose(our_logits(model, IDS, 2), expected, rtol=0, atol=3e-5)


def test_an_imported_run_is_scored_and_trained_on(
    huginn: Path, texts: list[str], tmp_path: Path, script_here: Script
) -> None:
    import_folder(huginn, tmp_path / "run")
    model, tokenizer = recurrent_db.load(tmp_path / "run", "cpu")
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts[:12]):
        (tmp_path / "text" / f"{number}.txt").write_bytes(text.encode())
    kept = find_checkpoint(tmp_path / "run") / "tokenizer.model"
    prepare([str(tmp_path / "text")], Tokenizer(kept), tmp_path / "data", workers=1)

    def nll(run_dir: Path) -> float:
        out = tmp_path / "scores.json"
        done = script_here("eval/depth_curve.py", run_dir, "--data", tmp_path / "data", "--k", "2", "--json", out)
        assert done.returncode == 0, done.stderr
        return float(json.loads(out.read_text())["by_k"]["2"]["nll"])

    shape = {"d_model": D, "n_heads": HEADS, "d_mlp": MLP, "n_prelude": PRELUDE, "n_core": CORE, "n_coda": CODA,
             "max_seq_len": WINDOW}  # fmt: skip
    (tmp_path / "config.toml").write_text(
        "[model]\n" + "".join(f"{key} = {value}\n" for key, value in shape.items())
        + '[objective]\nname = "unrolled"\n[objective.unrolled]\nmean_depth = 3\ntruncation = 2\n'
        + f"[data]\nsequence_length = {WINDOW}\nbatch_size = 8\n[optim]\nlr = 1e-2\n[eval]\npoints = 0\n"
    )  # fmt: skip
    done = script_here(
        "train/pretrain.py", tmp_path / "config.toml", "--data.path", tmp_path / "data", "--run.dir", tmp_path / "more",
        "--init.from", tmp_path / "run", "--budget.steps", "8", "--run.device", "cpu", "--run.threads", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert nll(tmp_path / "more") < nll(tmp_path / "run") - 0.3
    assert recurrent_db.generate(model, tokenizer, "def ", k=2, max_new_tokens=4, temperature=0)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of the Hugging Face library

TEXT = st.text(st.one_of(st.characters(exclude_categories=[]), st.sampled_from(" \n\t<|end>aeiou0123")), max_size=200)


@pytest.fixture(scope="module")
def kept(huginn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """The tokenizer of an imported run, and of the folder that the run is exported to."""
    transformers = pytest.importorskip("transformers", reason="extra `hf` is not installed")
    root = tmp_path_factory.mktemp("kept")
    import_folder(huginn, root / "run")
    export(root / "run", root / "out")
    import_folder(root / "out", root / "back")
    tokenizer = recurrent_db.load(root / "run", "cpu")[1]
    assert recurrent_db.load(root / "back", "cpu")[1].hash == tokenizer.hash
    # Its classes are the library's own: no code of the folder is needed.
    return tokenizer, transformers.AutoTokenizer.from_pretrained(root / "out")


@given(st.one_of(TEXT, st.lists(st.one_of(TEXT, st.sampled_from(["<|end|>", "<|pad|>"]))).map("".join)))
@example("".join(HOSTILE_TEXTS))
@settings(deadline=None, max_examples=200)
def test_a_byte_level_tokenizer_loses_nothing_and_is_exported(kept: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, exported = kept
    ids, shown = tokenizer.encode(text), replace_surrogates(text)
    assert tokenizer.decode(ids) == shown
    assert exported(shown, split_special_tokens=True)["input_ids"] == ids
    assert tokenizer.byte_lengths()[np.array(ids, dtype=np.int64)].sum() == len(tokenizer.decode_bytes(ids))
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} & set(ids)


def test_its_special_tokens_are_those_of_the_folder(kept: tuple[Tokenizer, Any], texts: list[str]) -> None:
    tokenizer, exported = kept
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (0, 1, 2)
    assert (exported.eos_token_id, exported.bos_token_id, exported.pad_token_id) == (0, 0, 2)
    check_lossless(tokenizer)
    backend = tokenizers.Tokenizer.from_str(json.dumps(bpe(texts)))
    assert tokenizer.encode(texts[3]) == backend.encode(texts[3], add_special_tokens=False).ids
    assert tokenizer.decode([0, *tokenizer.encode("a"), 1, 2]) == "a"
    assert len(exported) == tokenizer.vocab_size


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted folders


def refused(folder: Path, match: str) -> None:
    """An import that ends in one line and leaves no run."""
    run_dir = folder.parent / "refused"
    with pytest.raises(UserError, match=match) as error:
        import_folder(folder, run_dir)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "model_type must be .*'gpt2'"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "recurrent_db"}, "no run.config"),
        ({"nonlin_name": "GELU"}, "nonlin_name"),
        ({"injection_type": "add"}, "injection_type"),
        ({"state_init": "zero"}, "state_init"),
        ({"tie_embeddings": False}, "tie_embeddings"),
        ({"bias": True}, "bias"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"test_time_noise": 0.1}, "test_time_noise"),
        ({"init_values": {"embed_scale": 1.0}}, "init_values.embed_scale"),
        ({"init_values": [1]}, "init_values"),
        ({"n_embd": "24"}, "n_embd must be a whole number"),
        ({"n_embd": 24.5}, "n_embd must be a whole number"),
        ({"n_embd": -24}, "d_model must be above 0"),
        ({"n_embd": True}, "n_embd must be a whole number"),
        ({"n_heads": 5, "num_key_value_heads": 5}, "not divisible"),
        ({"n_heads": 24, "num_key_value_heads": 24}, "must be even"),
        ({"n_layers_in_recurrent_block": 10**9}, "n_core must be at most"),
        ({"n_embd": 1 << 40, "init_values": {}}, "d_model must be at most"),
        ({"padded_vocab_size": 1 << 50}, "vocab_size must be at most"),
        ({"rope_base": 1e309}, "rope_base = 'inf' differs from Huginn's"),
        ({"rope_base": 10_000}, "rope_base = '10000' differs from Huginn's"),
        ({"norm_eps": float("nan")}, "norm_eps = 'nan' differs from Huginn's"),
        ({"mean_recurrence": 0}, "expected_depth must be above 0|mean_depth must be above 0"),
        ({"n_layers_in_coda": 2}, "lacks the weight transformer.coda.1"),
        ({"n_layers_in_coda": 0}, "an unknown weight: transformer.coda.0"),
        ({"intermediate_size": 41}, r"mlp.fc.weight in shape \(80, 24\) instead of \(82, 24\)"),
        ({"padded_vocab_size": 300}, "the embedding has 300 rows for 320 tokens"),
        ({"qk_bias": False}, "an unknown weight: .*qk_bias"),
        ({"block_size": 64}, "freqs_cis has shape"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(copy: Path, changes: dict[str, Any], match: str) -> None:
    (copy / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    refused(copy, match)


def _lack(weights: dict[str, Tensor]) -> None:
    del weights["transformer.core_block.1.norm_3.weight"]


def _rename(weights: dict[str, Tensor]) -> None:
    weights["transformer.h.0.weight"] = weights.pop("transformer.adapter.weight")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_lack, "lacks the weight transformer.core_block.1.norm_3.weight"),
        (_rename, "lacks the weight transformer.adapter.weight"),
        (lambda w: w.update({"extra": torch.zeros(1)}), "an unknown weight: extra"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(VOCAB, D)}), "lm_head.weight differs from"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(1)}), "lm_head.weight differs from"),
        (lambda w: w["freqs_cis"].mul_(-1), "freqs_cis is not the rotary table of rope_base = 50000"),
        (lambda w: w["transformer.ln_f.weight"].fill_(float("nan")), "transformer.ln_f.weight contains NaN"),
        (lambda w: w.update({"transformer.ln_f.weight": torch.ones(D, dtype=torch.int8)}), "has type I8"),
        (lambda w: w.update({"transformer.adapter.weight": torch.zeros(2 * D, D)}), "adapter.weight in shape"),
    ],
)
def test_weights_that_do_not_fit(copy: Path, change: Callable[[dict[str, Tensor]], Any], match: str) -> None:
    weights = {name: value.clone() for name, value in load_file(copy / "model.safetensors").items()}
    change(weights)
    save_file(weights, copy / "model.safetensors")
    refused(copy, match)


def test_files_that_do_not_fit(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-10])
    refused(copy, "model.safetensors: not safetensors, or damaged")
    (copy / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    refused(copy, "model.safetensors: not safetensors, or damaged")
    (copy / "model.safetensors").unlink()
    refused(copy, "pickled weights are not read")
    index = copy / "model.safetensors.index.json"
    for file, match in (("../a.safetensors", "not a plain"), ("/etc/passwd", "not a plain"), ("a.bin", "not a plain"),
                        (3, "not a plain"), ("gone.safetensors", "gone.safetensors is missing")):  # fmt: skip
        index.write_text(json.dumps({"weight_map": {"x": file}}))
        refused(copy, match)
    (copy / "a.safetensors").write_bytes(whole)
    (copy / "model.safetensors").write_bytes(whole)
    refused(copy, "has both model.safetensors and model.safetensors.index.json")
    (copy / "model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    refused(copy, "disagree on where")
    index.write_text("[]")
    refused(copy, "does not hold a JSON object")
    index.write_text('{"weight_map": {}}')
    refused(copy, "has no weight_map")
    (copy / "config.json").write_text("[" * 100_000)
    refused(copy, "config.json is not valid JSON")
    (copy / "config.json").write_bytes(b"\xff\xfe")
    refused(copy, "config.json is not valid JSON")
    (copy / "config.json").write_text('{"n_embd": ' + "9" * 5000 + "}")
    refused(copy, "config.json is not valid JSON")
    (copy / "config.json").unlink()
    refused(copy, "config.json: No such file")


def test_tokenizers_that_do_not_fit(copy: Path, texts: list[str], tmp_path: Path) -> None:
    spec = bpe(texts)

    def write(changes: dict[str, Any], match: str) -> None:
        (copy / "tokenizer.json").write_text(json.dumps({**spec, **changes}))
        refused(copy, match)

    write({"decoder": None}, "only byte-level")
    write({"pre_tokenizer": {"type": "Whitespace"}}, "only byte-level")
    write({"model": {"type": "BPE", "vocab": 3}}, "not a tokenizer of this project, or damaged")
    few = {token: index for token, index in spec["model"]["vocab"].items() if token != "a"}
    merges = [pair for pair in spec["model"]["merges"] if all(p in few for p in (*pair, "".join(pair)))]
    write({"model": {**spec["model"], "vocab": few, "merges": merges}}, "some bytes have no token")
    (copy / "tokenizer_config.json").write_text('{"eos_token": "nothing"}')
    (copy / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": VOCAB}))
    write({}, "special token ids .* are outside its vocabulary of 320")
    (copy / "config.json").write_text(json.dumps({key: CONFIG[key] for key in CONFIG if key != "eos_token_id"}))
    write({}, "names the end-of-text token")
    (copy / "tokenizer.json").unlink()
    refused(copy, "has no tokenizer")


JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**30)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), JUNK, min_size=1, max_size=2))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_configuration_ends_in_anything_but_a_line(huginn: Path, changes: dict[str, Any]) -> None:
    try:
        config = huginn_config({**CONFIG, **changes}, "config.json")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        sizes = [field.name for field in fields(ModelConfig) if type(field.default) is int]
        assert len(sizes) >= 10
        assert all(isinstance(getattr(config.model, name), int) for name in sizes)


@given(st.sampled_from(["config", "objective"]), st.sampled_from(["model", "objective", "data", "seed", ""]), JUNK)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_exported_folder_does_either(
    tmp_path_factory: pytest.TempPathFactory, huginn: Path, part: str, section: str, junk: Any
) -> None:
    root = tmp_path_factory.getbasetemp() / "exported"
    if not root.exists():
        import_folder(huginn, root / "run")
        export(root / "run", root / "good")
    folder = Path(shutil.copytree(root / "good", root / "bad", dirs_exist_ok=True))
    values = json.loads((folder / "config.json").read_text())
    if part == "config" and section:
        values["run"]["config"][section] = junk
    else:
        values["run"][part] = junk
    (folder / "config.json").write_text(json.dumps(values))
    shutil.rmtree(root / "back", ignore_errors=True)
    try:
        import_folder(folder, root / "back")
    except UserError:
        assert not (root / "back").exists()
