"""Pretrained transformers become looped models with the source's logits; what does not fit is one line."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_helpers import VOCAB, bpe, from_hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import recurrent_db
from recurrent_db.cli import run
from recurrent_db.config import resolve
from recurrent_db.data import prepare
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.generation.cache import Cache
from recurrent_db.huggingface.export import export
from recurrent_db.huggingface.import_folder import import_folder
from recurrent_db.huggingface.retrofit import Cut
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint

pytest.importorskip("transformers", reason="extra `hf` is not installed")

from source_models import LAYERS, SHAPE, SOURCES, save_source

FOUR = Cut(1, 3, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, tuple[Any, Path]]:
    """Each source model, and its folder."""
    root = tmp_path_factory.mktemp("sources")
    return {name: (save_source(name, root / name, texts), root / name) for name in SOURCES}


@pytest.fixture
def llama(folders: dict[str, tuple[Any, Path]], tmp_path: Path) -> Path:
    """A folder with a Llama, to be changed."""
    return Path(shutil.copytree(folders["llama"][1], tmp_path / "llama"))


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_logits_are_the_sources(folders: dict[str, tuple[Any, Path]], name: str, tmp_path: Path) -> None:
    """Without a cache, over a long context, with left padding, for any K, and again after an export."""
    source, folder = folders[name]
    import_folder(folder, tmp_path / "run", FOUR)
    model, _ = recurrent_db.load(tmp_path / "run", "cpu")
    ids = some_ids(2, 700)
    expected = source(ids).logits
    close(model(ids, 1), expected)
    close(model(ids[:, :20], 3), expected[:, :20])

    padding, short = [7, 0], ids[:, :24].clone()
    short[0, :7] = 0
    mask = torch.ones_like(short)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = source(short, attention_mask=mask, position_ids=positions).logits
    cache = Cache(model, 2, 24, padding)
    for start, stop in ((0, 16), (16, 24)):
        visible = cache.grow(stop - start)
        e_BTD = model.encode(short[:, start:stop], visible)
        ours = model.logits(model.decode(model.iterate(torch.zeros_like(e_BTD), e_BTD, visible=visible), visible))
        close(ours[1], expected[1, start:stop])
        close(ours[0, max(0, 7 - start) :], expected[0, max(start, 7) : stop])

    export(tmp_path / "run", tmp_path / "exported")
    exported = from_hf(tmp_path / "exported")
    assert torch.equal(exported(short).logits, model(short, 1))
    close(exported(short, attention_mask=mask).logits[0, 7:], expected[0, 7:])
    import_folder(tmp_path / "exported", tmp_path / "back")
    back, _ = recurrent_db.load(tmp_path / "back", "cpu")
    assert torch.equal(back(short, 2), model(short, 2))


def by_the_paper(weights: dict[str, Tensor], config: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Llama's logits (T, V) in float64 NumPy: one head after another, rotations as 2 x 2 matrices."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    base = config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10_000.0))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[f"{name}.weight"]

    def rotate(rows: np.ndarray) -> np.ndarray:
        out = np.empty_like(rows)
        for position, row in enumerate(rows):
            for i in range(size // 2):
                angle = position * base ** (-2 * i / size)
                a, b = row[i], row[i + size // 2]
                out[position, i] = a * math.cos(angle) - b * math.sin(angle)
                out[position, i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = w["model.embed_tokens.weight"][ids]
    for layer in (f"model.layers.{index}" for index in range(config["num_hidden_layers"])):
        h = norm(x, f"{layer}.input_layernorm")
        mixed = []
        for head in range(heads):
            group = head * groups // heads
            q = rotate(h @ w[f"{layer}.self_attn.q_proj.weight"][head * size : (head + 1) * size].T)
            k = rotate(h @ w[f"{layer}.self_attn.k_proj.weight"][group * size : (group + 1) * size].T)
            v = h @ w[f"{layer}.self_attn.v_proj.weight"][group * size : (group + 1) * size].T
            scores = np.where(np.tril(np.ones((len(ids), len(ids)))) > 0, q @ k.T / math.sqrt(size), -np.inf)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(shares / shares.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(mixed, -1) @ w[f"{layer}.self_attn.o_proj.weight"].T
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (h @ w[f"{layer}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def test_llama_in_float64(folders: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    folder = folders["llama"][1]
    import_folder(folder, tmp_path / "run", Cut())
    model, _ = recurrent_db.load(tmp_path / "run", "cpu")
    ids = some_ids(1, 40)
    config = json.loads((folder / "config.json").read_text())
    expected = by_the_paper(load_file(folder / "model.safetensors"), config, ids[0].tolist())
    with torch.no_grad():
        np.testing.assert_allclose(model.double()(ids, 1)[0].numpy(), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_dropped_layers_are_left_out(folders: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    source, folder = folders["qwen2"]
    import_folder(folder, tmp_path / "run", Cut(1, None, 1, "1, 2-2"))
    model, _ = recurrent_db.load(tmp_path / "run", "cpu")
    assert (model.config.n_prelude, model.config.n_core, model.config.n_coda) == (1, 1, 1)
    layers, ids = source.model.layers, some_ids(1, 20)
    source.model.layers = torch.nn.ModuleList(layers[index] for index in (0, 3, 4))
    source.config.num_hidden_layers = 3
    try:
        close(model(ids, 1), source(ids, use_cache=False).logits)
    finally:
        source.model.layers, source.config.num_hidden_layers = layers, LAYERS


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def refused(folder: Path, match: str, cut: Cut | None = FOUR) -> None:
    """An import that ends in one line and leaves no run."""
    run_dir = folder.parent / "refused"
    with pytest.raises(UserError, match=match) as error:
        import_folder(folder, run_dir, cut)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "gpt2"}, "llama, mistral, qwen2, qwen3, gpt_neox, got 'gpt2'"),
        ({"model_type": ["llama"]}, "model_type must be"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "rotary scaling 'llama3'"),
        ({"rope_parameters": {"type": "yarn"}}, "rotary scaling 'yarn'"),
        ({"rope_parameters": "linear"}, "rotary scaling 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary scaling"),
        ({"rope_parameters": {"rope_theta": "many"}}, "rope_theta must be a number"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_base"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 128}, "up to 128 tokens"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"layer_types": 3}, "layer_types"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"num_hidden_layers": 6}, "must be the model's 6 layers"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a whole number"),
        ({"num_key_value_heads": 4}, "not divisible by model.n_kv_heads = 4"),
        ({"num_key_value_heads": 3}, "k_proj.weight in shape"),
        ({"num_attention_heads": 0}, "n_heads"),
        ({"head_dim": 7}, "head size 7"),
        ({"hidden_size": 96, "head_dim": None}, "in shape"),
        ({"hidden_size": 1 << 40}, "d_model"),
        ({"vocab_size": VOCAB + 1}, "embed_tokens.weight in shape"),
        ({"vocab_size": VOCAB - 1}, "319 rows for 320 tokens"),
        ({"vocab_size": 1 << 20}, "another model's"),
        ({"intermediate_size": 10}, "gate_proj.weight in shape"),
        ({"rms_norm_eps": 0}, "norm_eps"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
        ({"model_type": "qwen2"}, "lacks the weight .*q_proj.bias"),
        ({"model_type": "qwen3"}, "lacks the weight .*q_norm.weight"),
        ({"max_position_embeddings": 0}, "max_seq_len"),
        ({"eos_token_id": []}, None),
    ],
)
def test_configurations_that_do_not_fit(llama: Path, changes: dict[str, Any], match: str | None) -> None:
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if match is None:  # the tokenizer's own settings name the token
        import_folder(llama, llama.parent / "run", FOUR)
    else:
        refused(llama, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act"),
        ({"use_parallel_residual": False}, "use_parallel_residual"),
        ({"attention_bias": False}, "attention_bias"),
        ({"rope_parameters": None, "rotary_pct": 0.2}, "rope_size"),
        ({"rope_parameters": None, "rotary_pct": 1.5}, "partial_rotary_factor = 1.5"),
    ],
)
def test_neox_configurations_that_do_not_fit(
    folders: dict[str, tuple[Any, Path]], tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    folder = Path(shutil.copytree(folders["pythia"][1], tmp_path / "pythia"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(folder, match)


@pytest.mark.parametrize(
    ("cut", "match"),
    [
        (Cut(2, 2, 2), "prelude 2 \\+ core 2 \\+ coda 2 must be the model's 5 layers"),
        (Cut(2, 2, 1, "4"), "the model's 4 layers after --drop"),
        (Cut(3, None, 2), "with 1 or more in the core"),
        (Cut(-1, 5, 1), "prelude -1"),
        (Cut(drop="0-4"), "the model's 0 layers"),
        (Cut(drop="3-5"), "--drop '3-5' must list layers from 0 to 4"),
        (Cut(drop="3-2"), "--drop '3-2'"),
        (Cut(drop="x"), "--drop 'x'"),
        (Cut(drop="1,,2"), "--drop '1,,2'"),
        (None, "is not looped: add --as looped"),
    ],
)
def test_layers_that_do_not_add_up(llama: Path, cut: Cut | None, match: str) -> None:
    refused(llama, match, cut)


def _set(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights.pop(name, None)
        if value is not None:
            weights[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("model.norm.weight", None), "lacks the weight model.norm.weight"),
        (_set("model.layers.5.mlp.up_proj.weight", torch.ones(2)), "unknown weight: model.layers.5"),
        (_set("model.norm.weight", torch.ones(3)), "model.norm.weight in shape"),
        (_set("model.norm.weight", torch.full((48,), torch.nan)), "contains NaN"),
        (_set("model.norm.weight", torch.ones(48, dtype=torch.int8)), "type I8"),
        (_set("model.norm.weight", torch.ones(48, dtype=torch.float8_e4m3fn)), "type F8_E4M3"),
    ],
)
def test_weights_that_do_not_fit(llama: Path, change: Callable[[dict[str, Tensor]], None], match: str) -> None:
    weights = load_file(llama / "model.safetensors")
    change(weights)
    save_file(weights, llama / "model.safetensors")
    refused(llama, match)


def test_forms_that_weights_come_in(folders: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """Half precision, several files, a tied head that is stored, and rotary rates and masks of older versions."""
    source, folder = folders["smollm"]
    copy = Path(shutil.copytree(folder, tmp_path / "smollm"))
    weights = load_file(copy / "model.safetensors")
    weights = {name: value.bfloat16() for name, value in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: weights[name] for name in names if places[name] == file}, copy / file)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    import_folder(copy, tmp_path / "run", FOUR)
    model, _ = recurrent_db.load(tmp_path / "run", "cpu")
    ids = some_ids(1, 20)
    with torch.no_grad():
        rounded = copy_of(source)
        for parameter in rounded.parameters():  # not the rotary rates
            parameter.copy_(parameter.bfloat16())
        close(model(ids, 1), rounded(ids).logits)
    (copy / "model-00002-of-00002.safetensors").unlink()
    refused(copy, "model-00002-of-00002.safetensors is missing")


def test_files_that_do_not_fit(llama: Path, texts: list[str]) -> None:
    (llama / "tokenizer.json").rename(llama / "kept.json")
    refused(llama, "has no tokenizer")
    (llama / "tokenizer.json").write_text(json.dumps(bpe(texts) | {"decoder": None}))
    refused(llama, "not byte-level")
    (llama / "kept.json").replace(llama / "tokenizer.json")
    (llama / "model.safetensors").rename(llama / "kept")
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(llama, "pickled weights are not read")
    (llama / "model.safetensors").write_bytes(b"not safetensors")
    refused(llama, "damaged")


def test_a_looped_folder_is_not_cut(folders: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    import_folder(folders["llama"][1], tmp_path / "run", FOUR)
    export(tmp_path / "run", tmp_path / "exported")
    refused(tmp_path / "exported", "is looped already: leave out --as")


def test_the_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["import", str(llama), str(tmp_path / "run")]
    assert run([*words, "--as", "looped", "--prelude", "1", "--coda", "1", "--drop", "2"]) == 0
    model, tokenizer = recurrent_db.load(tmp_path / "run", "cpu")
    assert (model.config.n_prelude, model.config.n_core, model.config.n_coda) == (1, 2, 1)
    assert tokenizer.vocab_size == SHAPE["vocab_size"]
    for more, match in ((["--core", "3"], "need --as looped"), ([], "add --as looped")):
        with pytest.raises(UserError, match=match):
            run(["import", str(llama), str(tmp_path / "other"), *more])
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["qwen3", "pythia"])
def test_every_way_of_decoding_gives_the_text_of_transformers(
    folders: dict[str, tuple[Any, Path]], name: str, tmp_path: Path
) -> None:
    source, folder = folders[name]
    import_folder(folder, tmp_path / "run", FOUR)
    model, tokenizer = recurrent_db.load(tmp_path / "run", "cpu")
    ids = torch.tensor([tokenizer.encode("def main(")])
    new = source.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
    for options in ({"k": 1}, {"k": 3}, {"k": 4, "sampler": "speculative:1"}, {"k": 4, "sampler": "diagonal:2"},
                    {"k": 3, "exit": "kl"}, {"k": 3, "cache_policy": "last"}):  # fmt: skip
        text = recurrent_db.generate(model, tokenizer, "def main(", max_new_tokens=12, temperature=0, **options)
        assert text == tokenizer.decode(new), options


def test_padding_rows_of_an_embedding_stand_for_no_text(llama: Path, tmp_path: Path, texts: list[str]) -> None:
    weights = load_file(llama / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = torch.cat((weights[key], 3 * weights[key][:30]))
    save_file(weights, llama / "model.safetensors")
    path = llama / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": VOCAB + 30}))
    import_folder(llama, tmp_path / "run", FOUR)
    model, tokenizer = recurrent_db.load(tmp_path / "run", "cpu")
    assert tokenizer.vocab_size == VOCAB + 30
    assert tokenizer.decode_bytes(range(VOCAB, VOCAB + 30)) == b""
    assert max(tokenizer.encode("".join(texts[:3]))) < VOCAB
    for seed in range(3):
        recurrent_db.generate(model, tokenizer, "def ", k=1, max_new_tokens=30, temperature=9.0, seed=seed)


@pytest.mark.parametrize(("name", "objective"), [("llama", "one_step"), ("pythia", "unrolled"), ("smollm", "denoise")])
def test_training_continues_from_a_retrofitted_run(
    folders: dict[str, tuple[Any, Path]], name: str, objective: str, tmp_path: Path, texts: list[str]
) -> None:
    import_folder(folders[name][1], tmp_path / "run", FOUR)
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts[:6]):
        (tmp_path / "text" / f"{number}.txt").write_bytes(text.encode())
    kept = find_checkpoint(tmp_path / "run")
    prepare([str(tmp_path / "text")], Tokenizer(kept / "tokenizer.model"), tmp_path / "data", workers=1)
    config = Checkpoint(kept).config()
    config.objective.name, config.objective.one_step.next_token_share = objective, 0.0
    config.objective.unrolled.mean_depth, config.data.sequence_length, config.data.batch_size = 2, 32, 4
    config.data.path, config.run.dir, config.init.from_ = (str(tmp_path / part) for part in ("data", "tuned", "run"))
    config.budget.steps, config.eval.points, config.run.device, config.run.threads = 4, 0, "cpu", 1
    resolve(config)
    recurrent_db.train(config)
    before, after = (load_file(find_checkpoint(tmp_path / part) / "model.safetensors") for part in ("run", "tuned"))
    assert before.keys() <= after.keys()
    for key, value in before.items():
        assert torch.isfinite(after[key]).all(), key
        assert not torch.equal(value, after[key]), key
