"""Fuzzing targets: one class for each way in which untrusted text, numbers or files enter the library.

A target is created once, in its own folder, and then runs case after case. Each case is a function of its random generator
and calls the library as the commands do. It may raise only `UserError`. The docstring says what else a case asserts.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from benchmarks.reliability.fuzz_inputs import altered, as_json, damaged, number, text, value
from recurrent_db.accounting.flops import step_cost
from recurrent_db.config import Config, config_from_json, load_config, resolve, validate
from recurrent_db.data import (
    DataWriter,
    ImageLoader,
    Loader,
    document,
    load_tokenizer,
    open_data,
    open_images,
    validation_batches,
)
from recurrent_db.data.holdout import split_documents
from recurrent_db.data.image_shards import ImageWriter
from recurrent_db.data.image_sources import RawImage, decode
from recurrent_db.data.readers import ReadOptions
from recurrent_db.data.sources import read_documents
from recurrent_db.data.tokenizer import Tokenizer, replace_surrogates, train
from recurrent_db.evaluation.answer_cache import HEADER, AnswerCache
from recurrent_db.files import sealed
from recurrent_db.generation.options import GenerationOptions
from recurrent_db.huggingface.export import export
from recurrent_db.huggingface.import_folder import import_folder, load_model
from recurrent_db.huggingface.source_folder import Weights
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.objectives import Objective, build_objective
from recurrent_db.optim.schedule import learning_rate_scale
from recurrent_db.repl.session import ACTIONS, ALIASES, SETTINGS, Session
from recurrent_db.report.runs import merge_baselines, read_run
from recurrent_db.rng import Rng
from recurrent_db.schema import from_dict, read_toml, to_dict
from recurrent_db.store.checkpoint import Checkpoint, save_checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.loading import load as load_run
from recurrent_db.store.tensors import load_optimizer_tensors, load_weights
from recurrent_db.store.train_state import TrainState

# ---------------------------------------------------------------------------------------------------------------------
# Valid files that cases start from


def tiny_tokenizer() -> Tokenizer:
    words = " ".join(f"def f{n}(x): return x + {n}" for n in range(200))
    return Tokenizer.from_bytes(train([words], 280))


def tiny_config(objective: str = "unrolled") -> Config:
    """A model with about 10 thousand parameters."""
    shape = {
        "d_model": 16,
        "n_heads": 2,
        "d_mlp": 24,
        "max_seq_len": 24,
        "d_condition": 8,
        "n_core": 1,
        "vocab_size": 280,
    }
    config = from_dict(Config, {"model": shape, "data": {"sequence_length": 16}, "objective": {"name": objective}})
    config.objective.unrolled.mean_depth, config.objective.unrolled.truncation = 3, 2
    config.optim.ema_decay = 0.5
    resolve(config)
    validate(config)
    return config


def tiny_model(config: Config) -> tuple[LoopedLM, Objective]:
    model, objective = build_model(config.model, seed=0), build_objective(config)
    model.recurrence = objective.recurrence
    return model.eval(), objective


def tiny_run(folder: Path, tokenizer: Tokenizer, objective: str = "unrolled") -> Path:
    """A run with one checkpoint after one optimizer step."""
    config = tiny_config(objective)
    model, law = tiny_model(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_checkpoint(folder, config, tokenizer, model, optimizer, None, TrainState(step=1, tokens=64), law.state_dict())
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


def tiny_data(folder: Path, tokenizer: Tokenizer) -> Path:
    """A data directory with two sources, two shards, and the splits train and validation."""
    with DataWriter(folder, tokenizer, shard_tokens=60) as writer:
        for split in ("train", "validation"):
            for source in ("default", "code"):
                for n in range(4):
                    part = f"def f{n}(x): return {n}\n" * 2
                    writer.add(split, source, str(n), part.encode(), tokenizer.encode(part))
        writer.commit({"sources": ["x"]})
    return folder


def put(path: Path, content: bytes) -> None:
    """Write a new file instead of an existing one, which may be memory-mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def resealed(manifest: Any) -> bytes:
    """A manifest with a correct digest of itself, as an attacker would write it."""
    if isinstance(manifest, dict):
        manifest = {key: value for key, value in manifest.items() if key != "digest"}
        with contextlib.suppress(ValueError, RecursionError):
            return sealed(manifest).encode(errors="surrogatepass")
    return json.dumps(manifest).encode()


def as_toml(tree: Any, rng: random.Random) -> str:
    """Nested values as TOML, with tables as headings or inline. TOML has no null, so these are left out."""

    def inline(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, float):
            return "nan" if item != item else str(item)
        if isinstance(item, list):
            return "[" + ", ".join(inline(part) for part in item if part is not None) + "]"
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in item.items() if v is not None) + "}"
        return json.dumps(item, ensure_ascii=rng.random() < 0.2) if isinstance(item, str) else str(item)

    def lines(table: dict[str, Any], prefix: str) -> list[str]:
        plain, tables = [], []
        for key, item in table.items():
            name = key if key.isidentifier() and key.isascii() else json.dumps(key, ensure_ascii=False)
            if isinstance(item, dict) and rng.random() < 0.9:
                tables += [f"[{prefix}{name}]", *lines(item, f"{prefix}{name}.")]
            elif item is not None:
                plain.append(f"{name} = {inline(item)}")
        return plain + tables

    return "\n".join(lines(tree, "")) if isinstance(tree, dict) else inline(tree)


def said(rng: random.Random, tree: Any, share: float = 0.9) -> bytes:
    """A JSON file: usually with altered values, sometimes only with damaged bytes."""
    return as_json(rng, altered(rng, tree)) if rng.random() < share else damaged(rng, json.dumps(tree).encode())


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


class ConfigFiles:
    """Configurations as TOML and as a checkpoint's JSON. An accepted one can be written and read again, and used: its
    objective, FLOPs, learning rates and, if it is small, its network."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.toml"
        self.bases = [to_dict(tiny_config(name)) for name in ("unrolled", "one_step", "denoise", "next_token")]
        self.bases.append({"objective": {"name": "denoise_paper"}, "budget": {"steps": 10}})

    def case(self, rng: random.Random) -> None:
        tree = altered(rng, rng.choice(self.bases))
        if rng.random() < 0.5:
            raw = as_toml(tree, rng).encode("utf-8", errors="surrogatepass")
            put(self.path, damaged(rng, raw) if rng.random() < 0.2 else raw)
            config = from_dict(Config, read_toml(self.path))
            resolve(config)
            validate(config)
        else:
            config = config_from_json(as_json(rng, tree).decode("utf-8", errors="replace"), "config.json")
        again = config_from_json(json.dumps(to_dict(config)), "again")
        assert to_dict(again) == to_dict(config), "written and read, it is another configuration"
        objective = build_objective(config)
        passes = objective.passes(Rng(config.seed, 0), 0.5)
        objective.recurrence.passes(2)
        if config.model.vocab_size:
            assert step_cost(config, passes).total > 0
        assert 0 <= learning_rate_scale(config.schedule, rng.random()) <= 1
        model = config.model
        if model.n_prelude + model.n_core + model.n_coda <= 6 and model.vocab_size and rng.random() < 0.05:
            build_model(model, None, "meta")


FORMS = (
    "1e3",
    "1_000",
    "2.0",
    "1.5",
    "1,4",
    "[1, 4]",
    "1 4",
    "a=1,b=2",
    "nan",
    "-inf",
    "1e400",
    "None",
    "~/x",
    "99999999999999999999",
)
"""Values as a user may write them."""


class Overrides:
    """Dotted options of the trainer, and options of other commands."""

    def __init__(self, folder: Path) -> None:
        self.options: list[str] = []

        def walk(tree: dict[str, Any], prefix: str) -> None:
            for key, item in tree.items():
                if isinstance(item, dict) and item:
                    walk(item, f"{prefix}{key}.")
                else:
                    self.options.append(f"--{prefix}{key}")

        walk(to_dict(Config()), "")

    def case(self, rng: random.Random) -> None:
        words: list[str] = []
        for _ in range(rng.randrange(1, 4)):
            option = rng.choice(self.options)
            if rng.random() < 0.15:
                option = text(rng) if rng.random() < 0.3 else option[: rng.randrange(len(option))]
            words.append(option)
            for _ in range(rng.choice((0, 1, 1, 1, 1, 2))):
                words.append(
                    text(rng) if rng.random() < 0.4 else rng.choice((*FORMS, str(number(rng)), str(number(rng))))
                )
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                config = load_config(None, words)
            except SystemExit as stop:
                assert not stop.code and {"-h", "--help"} & set(words), f"left with {stop.code}"
                return
        assert to_dict(config_from_json(json.dumps(to_dict(config)), "again")) == to_dict(config)


# ---------------------------------------------------------------------------------------------------------------------
# Data directories


class Manifests:
    """``manifest.json`` of a data directory. An accepted one gives batches of tokens inside its vocabulary."""

    def __init__(self, folder: Path) -> None:
        self.data = tiny_data(folder / "data", tiny_tokenizer())
        (folder / "secret.bin").write_bytes(bytes(240))
        (self.data / "link.bin").symlink_to(folder / "secret.bin")
        self.manifest = json.loads((self.data / "manifest.json").read_text())
        self.outside = ("../secret.bin", "link.bin", str(folder / "secret.bin"), "a/../../secret.bin", ".", "")

    def case(self, rng: random.Random) -> None:
        raw = said(rng, self.manifest)
        if rng.random() < 0.1:  # names that lead out of the folder
            tree = json.loads(json.dumps(self.manifest))
            shard = rng.choice(tree["splits"]["train"]["default"]["shards"])
            rng.choice((shard, shard, tree["tokenizer"]))[rng.choice(("file", "offsets_file"))] = rng.choice(
                self.outside
            )
            raw = resealed(tree)
        elif rng.random() < 0.7:  # correct the digest, so that the content is read
            with contextlib.suppress(ValueError, RecursionError):
                raw = resealed(json.loads(raw))
        put(self.data / "manifest.json", raw)
        use_data(self.data, rng)


def use_data(folder: Path, rng: random.Random) -> None:
    """Use a data directory as the trainer and the scorers do."""
    verify = rng.random() < 0.5
    train_split = open_data(folder, "train", verify=verify)
    for source in train_split.sources.values():
        for array in source.arrays:
            base = getattr(array, "path", None)
            assert base is None or Path(base).resolve().is_relative_to(folder.resolve()), f"opened {base}"
    loader = Loader(train_split, 8, 2, seed=rng.randrange(3))
    batch = loader.batch(rng.randrange(5))
    assert int(batch.targets_BT.min()) >= 0 and int(batch.targets_BT.max()) < train_split.vocab_size
    source = rng.choice(list(train_split.sources.values()))
    if source.documents:
        ids = document(source, rng.randrange(source.documents))
        assert len(ids) <= source.tokens
    next(validation_batches(open_data(folder, "validation", verify=verify), 8, 2, 16))
    if rng.random() < 0.2:
        load_tokenizer(folder)


class Shards:
    """Damaged token files and offsets (NumPy headers), with the manifest's old checksums or with checksums that fit, as an
    attacker would write them."""

    def __init__(self, folder: Path) -> None:
        self.data = tiny_data(folder / "data", tiny_tokenizer())
        self.manifest = json.loads((self.data / "manifest.json").read_text())
        self.good = {path.name: path.read_bytes() for path in self.data.iterdir()}
        self.changed: set[str] = set()
        archive = io.BytesIO()
        np.savez(archive, a=np.zeros(3))
        self.others = [archive.getvalue(), b"\x93NUMPY\x01\x00", b"\x80\x04\x95", b""]

    def case(self, rng: random.Random) -> None:
        for name in self.changed:
            put(self.data / name, self.good[name])
        manifest = json.loads(self.good["manifest.json"])
        shards = [s for split in manifest["splits"].values() for source in split.values() for s in source["shards"]]
        shard = rng.choice(shards)
        key = rng.choice(("file", "offsets_file", "offsets_file", "offsets_file"))
        name = shard[key]
        if rng.random() < 0.7 and key == "offsets_file":
            raw = self._offsets(rng, self.good[name])
        else:
            raw = damaged(rng, self.good[name]) if rng.random() < 0.95 else rng.choice(self.others)
        put(self.data / name, raw)
        self.changed = {name, "manifest.json"}
        if rng.random() < 0.8:
            shard["sha256" if key == "file" else "offsets_sha256"] = hashlib.sha256(raw).hexdigest()
            if key == "file" and rng.random() < 0.8:
                shard["tokens"] = len(raw) // 2
            if rng.random() < 0.2:
                shard["documents"] = rng.choice((0, 1, 2, 3, 2**31, 2**60, 2**63 - 1, 2**64))
        put(self.data / "manifest.json", resealed(manifest))
        use_data(self.data, rng)

    @staticmethod
    def _offsets(rng: random.Random, good: bytes) -> bytes:
        """A NumPy file with another header, or with a valid header and other offsets."""
        if rng.random() < 0.5:
            values = np.frombuffer(good[128:], dtype=np.int64).copy()
            for _ in range(rng.randrange(1, 3)):
                values[rng.randrange(len(values))] = rng.choice((0, 1, -1, 5, 40, 2**31, 2**62, -(2**62)))
            return good[:128] + values.tobytes()
        descr = rng.choice(("<i8", "|O", "<f8", "<i8, <i8", "V8", "<U4", ">i8", text(rng)))
        shape = rng.choice(
            ("(3,)", "(2**60,)", f"({2**60},)", f"({2**31}, {2**31}, {2**31})", "()", "(-1,)", "3", "(3,)*9")
        )
        header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
        if rng.random() < 0.2:
            header = damaged(rng, header.encode()).decode("latin1")
        raw = header.encode("latin1", errors="replace")[:4000]
        raw += b" " * (-len(raw) % 64) + b"\n"
        return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + good[128:]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoints:
    """Damaged files of a checkpoint, with the old manifest or one that fits. Loaded for use and for further training."""

    NAMES = (
        "config.json",
        "state.json",
        "manifest.json",
        "tokenizer.model",
        "model.safetensors",
        "optimizer.safetensors",
    )

    def __init__(self, folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        self.folders = [
            Checkpoint(find_checkpoint(tiny_run(folder / name, tokenizer, name))).path
            for name in ("unrolled", "denoise")
        ]
        self.good = [{p.name: p.read_bytes() for p in path.iterdir()} for path in self.folders]
        self.changed: list[set[str]] = [set(), set()]

    def case(self, rng: random.Random) -> None:
        which = rng.randrange(2)
        folder, good = self.folders[which], self.good[which]
        for name in self.changed[which]:
            put(folder / name, good[name])
        name = rng.choice((*self.NAMES[:3], *self.NAMES))
        if name.endswith(".json"):
            raw = said(rng, json.loads(good[name]))
        elif name.endswith(".safetensors"):
            raw = other_header(rng, good[name])
        else:
            raw = damaged(rng, good[name])
        put(folder / name, raw)
        self.changed[which] = {name, "manifest.json"}
        if name != "manifest.json" and rng.random() < 0.9:
            manifest = json.loads(good["manifest.json"])
            manifest["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            put(folder / "manifest.json", resealed(manifest))
        with contextlib.redirect_stderr(io.StringIO()):
            model, tokenizer = load_run(folder.parent.parent if rng.random() < 0.5 else folder, "cpu")
        tokenizer.encode("def f(x)")
        # Further training, as in train/pretrain.py.
        checkpoint = Checkpoint(folder)
        state, _, _ = checkpoint.training()
        assert state.step >= 0 and state.tokens >= 0 and math.isfinite(state.seconds)
        load_optimizer_tensors(model, torch.optim.AdamW(model.parameters()), checkpoint.optimizer())


def other_header(rng: random.Random, good: bytes) -> bytes:
    """A safetensors file with an altered header, or with damage anywhere."""
    if rng.random() < 0.15:
        return damaged(rng, good)
    size = int.from_bytes(good[:8], "little")
    header = altered(rng, json.loads(good[8 : 8 + size]), times=2)
    if rng.random() < 0.3 and isinstance(header, dict) and header:  # impossibly large sizes
        entry = header[rng.choice(list(header))]
        if isinstance(entry, dict):
            entry["shape"] = rng.choice(([2**60], [2**32, 2**32], [0, 2**63], [2**31, 2**31, 0], [1] * 300))
            if rng.random() < 0.5:
                entry["data_offsets"] = rng.choice(([0, 2**62], [2**63, 2**64], [0, 0], [5, 1], [0, 2**60 * 4]))
    raw = (
        as_json(rng, header)
        if rng.random() < 0.2
        else json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    )
    claimed = len(raw) if rng.random() < 0.9 else int(rng.choice((0, 1, 2**20, 2**40, 2**63, 2**64 - 1)))
    return claimed.to_bytes(8, "little") + raw + good[8 + size :]


class Safetensors:
    """Headers of weights and optimizer state. Accepted tensors have the model's shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run = Checkpoint(find_checkpoint(tiny_run(folder / "run", tiny_tokenizer())))
        self.config = run.config()
        self.good = {name: (run.path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
        self.model, _ = tiny_model(self.config)
        # Only names and shapes matter here, so a small model gives more cases.
        parameters = dict(self.model.named_parameters())
        assert load(self.good["model.safetensors"]).keys() == parameters.keys()
        self.small = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16), "c": torch.zeros(())})

    def case(self, rng: random.Random) -> None:
        kind = rng.randrange(10)
        name = "optimizer.safetensors" if kind == 0 else "model.safetensors"
        good = self.good[name] if kind <= 2 else self.small
        raw = other_header(rng, good)
        put(self.folder / name, raw)
        checkpoint = Checkpoint(self.folder)
        if kind == 0:
            load_optimizer_tensors(self.model, torch.optim.AdamW(self.model.parameters()), checkpoint.optimizer())
        elif kind == 1:
            load_weights(self.model, checkpoint.weights(), "model.safetensors")
        elif kind == 2:
            load_model(Weights(self.folder), self.config.model, huginn=False)
        elif kind <= 5:
            load_weights(self.model, checkpoint.weights(), "model.safetensors")
        else:
            weights = Weights(self.folder)
            for key in weights.files:
                assert tuple(weights.read(key).shape) == weights.shapes[key]


class Tokenizers:
    """Damaged tokenizer models of sentencepiece and of the library ``tokenizers``. Accepted ones encode and decode."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_tokenizer().model_bytes
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
        spec: dict[str, Any] = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [{"id": 256, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": False,
                              "normalized": False, "special": True}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": {letter: n for n, letter in enumerate(letters)}, "merges": []},
        }  # fmt: skip
        from recurrent_db.data.byte_level_tokenizer import FORMAT

        self.wrapped = {"format": FORMAT, "eos_id": 256, "bos_id": 256, "pad_id": 256, "tokenizer": spec}

    def case(self, rng: random.Random) -> None:
        if rng.random() < 0.8:
            raw = damaged(rng, self.model)
        else:
            tree = dict(self.wrapped)
            if rng.random() < 0.5:
                tree |= altered(rng, {key: tree[key] for key in ("eos_id", "bos_id", "pad_id")}, 2) or {}
            else:
                spec = dict(self.wrapped["tokenizer"])  # type: ignore[call-overload]
                part = rng.choice(list(spec))
                spec[part] = (
                    altered(rng, spec[part])
                    if part != "model"
                    else {**spec[part], **{rng.choice(list(spec[part])): value(rng)}}
                )
                tree["tokenizer"] = spec
            raw = json.dumps(tree).encode()
        tokenizer = Tokenizer.from_bytes(raw)
        ids = tokenizer.encode(text(rng))
        tokenizer.decode(ids)
        assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size


class Imports:
    """Folders for ``recurrent-db import``: configurations of both formats, the index, and the tokenizer's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder / "hf", folder / "made"
        export(tiny_run(folder / "run", tiny_tokenizer()), self.folder)
        self.good = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.config = json.loads(self.good["config.json"])
        weights = list(load(self.good["model.safetensors"]))
        self.index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
        self.huginn = {
            "model_type": "huginn_raven", "n_embd": 16, "n_heads": 2, "intermediate_size": 24, "n_layers_in_prelude": 1,
            "n_layers_in_recurrent_block": 1, "n_layers_in_coda": 1, "block_size": 24, "vocab_size": 280, "rope_base": 50000,
            "norm_eps": 1e-6, "mean_recurrence": 3, "mean_backprop_depth": 2,
            "init_values": {"embed_scale": 4.0, "std": math.sqrt(1 / 40)},
            "architecture_class_name": "RecurrentGPT", "eos_token_id": 2,
        }  # fmt: skip

    def case(self, rng: random.Random) -> None:
        kind = rng.randrange(5)
        index = self.folder / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        for name in ("config.json", "model.safetensors"):
            put(self.folder / name, self.good[name])
        if kind <= 1:
            put(self.folder / "config.json", said(rng, self.config))
        elif kind == 2:
            put(self.folder / "config.json", said(rng, self.huginn))
        elif kind == 3:
            put(index, said(rng, self.index))
        else:
            put(self.folder / "model.safetensors", other_header(rng, self.good["model.safetensors"]))
        shutil.rmtree(self.run, ignore_errors=True)
        with contextlib.redirect_stderr(io.StringIO()):
            import_folder(self.folder, self.run)


# ---------------------------------------------------------------------------------------------------------------------
# Text corpora


class Corpora:
    """Text, JSON lines and other JSON, plain and compressed, by name and in a folder. The tokenizer restores every
    document."""

    def __init__(self, folder: Path) -> None:
        self.inner, self.tokenizer = folder / "texts", tiny_tokenizer()
        self.packers: dict[str, Callable[[bytes], bytes]] = {".gz": lambda raw: gzip.compress(raw, 1)}
        with contextlib.suppress(ImportError):
            from zstandard import ZstdCompressor

            self.packers[".zst"] = ZstdCompressor(1).compress

    def case(self, rng: random.Random) -> None:
        options = ReadOptions(
            rng.choice(("text", "text", "text", text(rng))), rng.choice((None, None, "\n\n", "a", "<|endoftext|>"))
        )
        if rng.random() < 0.7:
            rows: list[Any] = [{"text": text(rng), "id": n} for n in range(rng.randrange(1, 5))]
            if rng.random() < 0.5:
                rows = altered(rng, rows, 2)
            lines = [
                json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in (rows if isinstance(rows, list) else [rows])
            ]
            raw = rng.choice(("\n", "\n", "", " \r\n")).join(lines).encode("utf-8", errors="surrogatepass")
            suffix = rng.choice((".jsonl", ".ndjson", ".json", ".JSON"))
            if suffix.lower() == ".json" and rng.random() < 0.5:
                raw = json.dumps(rows, indent=rng.choice((None, 1))).encode()
        else:
            raw, suffix = text(rng, 400).encode("utf-8", errors="surrogatepass"), rng.choice((".txt", ".md", ".py", ""))
        if rng.random() < 0.4:
            raw = damaged(rng, raw)
        if rng.random() < 0.2:
            packed, pack = rng.choice(sorted(self.packers.items()))
            raw, suffix = pack(raw), suffix + packed
            raw = damaged(rng, raw, 1) if rng.random() < 0.5 else raw
        shutil.rmtree(self.inner, ignore_errors=True)
        self.inner.mkdir()
        path = self.inner / f"{rng.choice(('corpus', 'a*b', '[c]', 'x::y'))}{suffix}"
        put(path, raw)
        documents = read_documents(str(path if rng.random() < 0.8 else self.inner), options)
        for _, found in split_documents(str(path), documents, rng.choice((0.0, 0.05, 0.5))):
            clean = replace_surrogates(found.text)
            assert self.tokenizer.decode(self.tokenizer.encode(clean)) == clean, "the tokenizer loses text"


class Tables:
    """Parquet, Arrow and JSON tables."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.folder = folder
        self.parquet, self.arrow = [], []
        for columns in (
            {"text": ["a", "b c", None]},
            {"text": [["a"], ["b"], None]},
            {"text": [1, 2, 3]},
            {"other": ["x"] * 3},
        ):
            for compression in ("none", "zstd", "snappy"):
                sink = io.BytesIO()
                pq.write_table(pa.table(columns), sink, compression=compression)
                self.parquet.append(sink.getvalue())
            for make in (pa.ipc.new_stream, pa.ipc.new_file):
                sink, table = io.BytesIO(), pa.table(columns)
                with make(sink, table.schema) as writer:
                    writer.write_table(table, max_chunksize=2)
                self.arrow.append(sink.getvalue())

    def case(self, rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.4:
            raw, name = damaged(rng, rng.choice(self.parquet)), "table.parquet"
        elif kind < 0.8:
            raw, name = damaged(rng, rng.choice(self.arrow)), "table.arrow"
        else:
            raw, name = said(rng, [{"text": text(rng)}, {"text": "b"}]), "table.json"
        put(self.folder / name, raw)
        for found in read_documents(str(self.folder / name), ReadOptions()):
            assert isinstance(found.text, str)


# ---------------------------------------------------------------------------------------------------------------------
# Requests to a model


class Repl:
    """Lines of the REPL, as from a pipe. A session must not raise any exception."""

    MOST_TOKENS, MOST_K = 3, 6

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, tiny_tokenizer()
        self.sessions = []
        for name in ("unrolled", "one_step", "denoise", "next_token"):
            model, _ = tiny_model(tiny_config(name))
            self.sessions.append(Session(model, self.tokenizer, self._start(), name))
        self.words = [
            f"/{word}" for word in (*SETTINGS, *ACTIONS, *ALIASES) if word not in ("save", "quit", "exit", "q")
        ]

    def _start(self) -> GenerationOptions:
        return GenerationOptions(k=2, max_new_tokens=2, temperature=0.0)

    def line(self, rng: random.Random) -> str:
        kind = rng.randrange(8)
        if kind <= 4:
            word = rng.choice(self.words) if rng.random() < 0.95 else "/" + text(rng, 8)
            rest = rng.choice(
                (
                    "",
                    str(number(rng)),
                    text(rng, 12),
                    "2 3",
                    "off",
                    "on",
                    "full",
                    "last",
                    "modulo-2",
                    "kl:1e-3",
                    "speculative:1:3",
                    "diagonal:1",
                )
            )
            return f"{word} {rest}"
        if kind == 5:  # paths stay inside the folder, because a user who types another path means it
            names = (
                "out.txt",
                "out.json",
                "no/such/out.txt",
                "",
                ".",
                "\x00",
                "~nobody/x",
                text(rng, 12).replace("/", "_"),
            )
            return f"/save {rng.choice(names).replace('..', '_')}"
        return text(rng)

    def case(self, rng: random.Random) -> None:
        session = rng.choice(self.sessions)
        if rng.random() < 0.3:
            session.options = self._start()
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for _ in range(rng.randrange(1, 3)):
                    # Large values are valid requests that take long, so they are capped.
                    if session.options.max_new_tokens > self.MOST_TOKENS or session.options.k > self.MOST_K:
                        session.options = self._start()
                    line = self.line(rng)
                    if line.startswith("/compare") and any(
                        len(word) > 1 for word in line.replace(",", " ").split()[1:]
                    ):
                        line = "/compare 1 3"
                    session.answer(line)
        finally:
            os.chdir(before)
        del session.replies[:-4]
        if rng.random() < 0.02:
            for path in self.folder.iterdir():
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


class Harness:
    """Requests of the lm-eval harness, and model arguments. Log-likelihoods are at most 0, and texts are strings."""

    def __init__(self, folder: Path) -> None:
        from recurrent_db.evaluation.lm_eval_model import RecurrentDBLM

        tokenizer = tiny_tokenizer()
        self.kind = RecurrentDBLM
        self.runs = [tiny_run(folder / name, tokenizer, name) for name in ("unrolled", "denoise")]
        self.models = [RecurrentDBLM(str(run), k=2, device="cpu") for run in self.runs]
        self.folder = folder

    def case(self, rng: random.Random) -> None:
        from lm_eval.api.instance import Instance

        def ask(kind: str, *arguments: Any) -> Instance:
            return Instance(kind, {}, arguments, 0)

        kind = rng.randrange(20)
        model = rng.choice(self.models)
        if kind == 0:
            self._arguments(rng)
        elif kind <= 8:
            requests = [ask("loglikelihood", text(rng), text(rng)) for _ in range(rng.randrange(1, 4))]
            for likelihood, greedy in model.loglikelihood(requests, disable_tqdm=True):
                assert likelihood <= 0 and isinstance(greedy, bool), likelihood
        elif kind <= 12:
            for likelihood in model.loglikelihood_rolling([ask("loglikelihood_rolling", text(rng))], disable_tqdm=True):
                assert likelihood <= 0, likelihood
        else:
            options: dict[str, Any] = {
                "max_gen_toks": rng.choice((1, 2, 3, 3, 3, "2", 0, -1, 2.5, None, "x", math.nan, math.inf, True))
            }
            for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "until"):
                if rng.random() < 0.25:
                    options[name] = rng.choice((value(rng), number(rng), text(rng), True, [text(rng), text(rng)]))
            if options["max_gen_toks"] is None:  # the harness's default would take long
                del options["max_gen_toks"]
                options[rng.choice(("max_tokens", "max_new_tokens"))] = 2
            for made in model.generate_until([ask("generate_until", text(rng), options)], disable_tqdm=True):
                assert isinstance(made, str)

    def _arguments(self, rng: random.Random) -> None:
        given: dict[str, Any] = {"checkpoint": str(self.runs[0]), "device": "cpu"}
        for name in ("k", "sigma", "draws", "batch_size", "max_batch_size", "max_length", "dtype", "seed", "prefix_reuse",
                     "sampler", "exit", "device", "checkpoint"):  # fmt: skip
            if rng.random() < 0.15:
                given[name] = rng.choice((value(rng), number(rng), text(rng)))
        self.kind(**given)


class AnswerFiles:
    """Files of the answer cache."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.jsonl"
        self.path.unlink(missing_ok=True)
        first = AnswerCache(self.path, {"k": 1})
        self.owner = first.owner
        first.add({"00ff": [-1.5, True], "01ff": "text"})
        self.lines = self.path.read_bytes().splitlines()

    def case(self, rng: random.Random) -> None:
        rows = [json.loads(line) for line in self.lines]
        if rng.random() < 0.8:
            rows = [HEADER, *(altered(rng, row, 2) if rng.random() < 0.6 else row for row in rows[1:])]
        raw = b"\n".join(as_json(rng, row) if rng.random() < 0.5 else json.dumps(row).encode() for row in rows)
        put(self.path, damaged(rng, raw) if rng.random() < 0.3 else raw + b"\n")
        kept = AnswerCache(self.path, {"k": 1})
        kept.get(["text", [1, 2], {"until": []}, 0])
        kept.add({"02ff": "new"})
        assert AnswerCache(self.path, {"k": 1}).answers["02ff"] == "new"


class RunFiles:
    """Files of a run directory that the report reads."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        (self.run / "eval").mkdir(parents=True)
        config = tiny_config("denoise")
        config.budget.steps = 4.0
        rows = [
            {"step": n, "tokens": 64 * n, "flops": 1e6 * n, "seconds": float(n), "loss": 5.0 - n, "lr": 0.003,
             "eval/nll_k1": 4.0, "eval/bits_per_byte_k1": 2.0, "loss_sigma_max": 4.5}
            for n in (1, 2, 3, 4)
        ]  # fmt: skip
        by_k = {"1": {"nll": 4.0, "bits_per_byte": 2.0, "stderr": 0.1, "flops_per_token": 1e5}, "2": {"nll": 3.9}}
        self.good: dict[str, Any] = {
            "config.json": to_dict(config),
            "environment.json": {"python": "3.11", "packages": {"torch": "2"}, "command": ["x"], "peak_note": "y"},
            "eval/depth_curve.json": {"by_k": by_k, "tokens": 100, "draws": 1, "state_rms_by_iteration": [1.0, 2.0]},
            "eval/denoiser_report.json": {"nll_by_sigma": {"0.1": 1.0}, "sigma_star": 0.2},
            "eval/lm_eval.json": {"by_k": {"1": {"results": {"piqa": {"acc,none": 0.5}}}}},
            "eval/samples.json": [{"prompt": "a", "k": 1, "text": "b"}],
        }
        self.rows = rows
        for name, tree in self.good.items():
            (self.run / name).write_text(json.dumps(tree))
        self.changed = ""

    def case(self, rng: random.Random) -> None:
        if self.changed:
            put(
                self.run / self.changed,
                json.dumps(self.good[self.changed]).encode()
                if self.changed in self.good
                else b"\n".join(json.dumps(row).encode() for row in self.rows),
            )
        self.changed = rng.choice((*self.good, "metrics.jsonl", "metrics.jsonl"))
        if self.changed == "metrics.jsonl":
            lines = [said(rng, row) if rng.random() < 0.5 else json.dumps(row).encode() for row in self.rows]
            put(self.run / self.changed, b"\n".join(lines) + rng.choice((b"", b"\n")))
        else:
            put(self.run / self.changed, said(rng, self.good[self.changed]))
        run = read_run(self.run, "run")
        for column in ("loss", "flops"):
            run.last(column)
            run.series("flops", column)
        assert run.progress is None or isinstance(run.progress, float | int)
        run.own_columns()
        if run.config.model.n_prelude + run.config.model.n_core + run.config.model.n_coda < 8 and rng.random() < 0.02:
            run.parameters()
        merge_baselines([self.run], None)


# ---------------------------------------------------------------------------------------------------------------------
# Images


class Images:
    """Damaged PNG, JPEG, WebP, BMP and PPM files. An accepted one gives RGB pixels."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
        self.good: dict[str, bytes] = {}
        for kind in ("PNG", "JPEG", "WEBP", "BMP", "PPM"):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, kind)
            self.good[kind] = stream.getvalue()

    def case(self, rng: random.Random) -> None:
        kind = rng.choice(list(self.good))
        raw = damaged(rng, self.good[kind])
        found = decode(RawImage("image", raw, 0, None), convert=rng.random() < 0.5)
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


class ImageDirectories:
    """``manifest.json`` and shards of a data directory of images. An accepted one gives batches of labels inside its
    classes."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        images = np.random.default_rng(0).integers(0, 256, (8, 5, 7, 3), np.uint8)
        with ImageWriter(self.data, shard_images=3) as writer:
            for number, image in enumerate(images):
                writer.add("train", image.tobytes(), number % 2)
            writer.commit((5, 7), ("even", "odd"), {})
        self.good = {path.name: path.read_bytes() for path in self.data.iterdir()}
        self.manifest = json.loads(self.good["manifest.json"])

    def case(self, rng: random.Random) -> None:
        for name, raw in self.good.items():
            put(self.data / name, raw)
        name = rng.choice(("manifest.json", rng.choice(list(self.good))))
        if name == "manifest.json":
            raw = said(rng, self.manifest)
            if rng.random() < 0.7:  # correct the digest, so that the content is read
                with contextlib.suppress(ValueError, RecursionError):
                    raw = resealed(json.loads(raw))
        else:
            raw = damaged(rng, self.good[name])
        put(self.data / name, raw)
        train_split = open_images(self.data, "train", verify=rng.random() < 0.5)
        batch = ImageLoader(train_split, 2, rng.randrange(3), flip=True, crop_padding=1).batch(rng.randrange(5))
        assert int(batch.labels_B.min()) >= 0 and int(batch.labels_B.max()) < len(train_split.classes)


TARGETS: dict[str, Callable[[Path], Any]] = {
    "config": ConfigFiles,
    "overrides": Overrides,
    "manifest": Manifests,
    "shards": Shards,
    "checkpoint": Checkpoints,
    "safetensors": Safetensors,
    "tokenizer": Tokenizers,
    "import": Imports,
    "corpus": Corpora,
    "tables": Tables,
    "repl": Repl,
    "lm_eval": Harness,
    "answers": AnswerFiles,
    "run_files": RunFiles,
    "images": Images,
    "image_data": ImageDirectories,
}
"""Targets by name. The class is called with the folder that it may write to."""
