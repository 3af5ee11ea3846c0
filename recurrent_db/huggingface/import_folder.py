"""Makes a run from a folder of Hugging Face transformers, for scoring, generation or further training.

``model_type`` in ``config.json`` names the format:

- ``recurrent_db``: written by `export`, or saved again by transformers;
- ``huginn_raven``: Huginn (arXiv:2502.05171), as in tomg-group-umd/huginn-0125. Its model computes the same as this
  project's: fused projections in the same order (queries, keys, values; gate half first), q/k bias before interleaved
  RoPE, sandwich norms, an adapter on [state, e], one final norm used twice, embeddings times sqrt(D), and a random
  initial state with standard deviation sqrt(2/5). Only the parameters' names and one shape differ.
- ``llama`` and others: a pretrained transformer, which `retrofit` cuts into prelude, core and coda.

The folder is untrusted. Its code is neither run nor read, weights are read from safetensors only, and every shape is
compared with the configuration before memory is allocated.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tqdm import tqdm

from recurrent_db.config import Config, ModelConfig, config_from_json, resolve, validate
from recurrent_db.data.byte_level_tokenizer import wrap
from recurrent_db.data.sentencepiece_tokenizer import SPACE_MARK, with_tokens
from recurrent_db.data.tokenizer import Tokenizer, check_lossless
from recurrent_db.errors import UserError
from recurrent_db.files import write_atomic
from recurrent_db.huggingface.export import MODEL_TYPE, SHAPE, hf_config
from recurrent_db.huggingface.retrofit import FAMILIES, Cut, retrofit, retrofit_config
from recurrent_db.huggingface.source_folder import Weights, check_size, read_json, whole_number
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.model.layers import rope_table
from recurrent_db.objectives import build_objective, load_objective_state, unrolled
from recurrent_db.optim.optimizer import build_optimizer
from recurrent_db.schema import to_dict
from recurrent_db.store.checkpoint import save_checkpoint
from recurrent_db.store.train_state import TrainState

# ---------------------------------------------------------------------------------------------------------------------
# Configuration

# Keys of a huginn_raven configuration that determine its computation, with the only values that this model supports.
_HUGINN_FIXED: dict[str, Any] = {
    "architecture_class_name": "RecurrentGPT", "block_class_name": "SandwichBlock", "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP", "nonlin_name": "SiLU", "injection_type": "linear", "state_init": "like-init",
    "bias": False, "tie_embeddings": True, "test_time_noise": 0, "rope_base": ModelConfig.rope_base,
    "norm_eps": ModelConfig.norm_eps,
}  # fmt: skip
_HUGINN_SHAPE = {
    "d_model": "n_embd", "n_heads": "n_heads", "d_mlp": "intermediate_size", "n_prelude": "n_layers_in_prelude",
    "n_core": "n_layers_in_recurrent_block", "n_coda": "n_layers_in_coda", "max_seq_len": "block_size",
}  # fmt: skip


def huginn_config(values: dict[str, Any], source: str) -> Config:
    """Convert the configuration of a Huginn checkpoint to a run's. Raises `UserError`, naming ``source``, for one that this
    model cannot compute."""
    for key, expected in _HUGINN_FIXED.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{source}: {key} = {str(values[key])[:80]!r} differs from Huginn's {expected!r}")
    config = Config()
    model, depth = config.model, config.objective.unrolled
    for ours, theirs in _HUGINN_SHAPE.items():
        setattr(model, ours, whole_number(values, theirs, source))
    rows = "padded_vocab_size" if "padded_vocab_size" in values else "vocab_size"
    model.vocab_size = whole_number(values, rows, source)
    if values.get("num_key_value_heads", model.n_heads) != model.n_heads:
        raise UserError(f"{source}: num_key_value_heads differs from n_heads: grouped queries are not supported")
    config.objective.name = unrolled.NAME
    depth.mean_depth = model.expected_depth = whole_number(values, "mean_recurrence", source, 32)
    depth.truncation = whole_number(values, "mean_backprop_depth", source, 8)
    config.data.sequence_length = model.max_seq_len
    resolve(config)
    validate(config)
    for key, expected in (("embed_scale", math.sqrt(model.d_model)), ("std", math.sqrt(2 / (5 * model.d_model)))):
        scales = values.get("init_values", {})
        given = scales.get(key, expected) if isinstance(scales, dict) else None
        if not isinstance(given, int | float) or not math.isclose(given, expected, rel_tol=1e-3):
            raise UserError(f"{source}: init_values.{key} is not Huginn's for this width ({expected:.6g})")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _huginn_name(name: str) -> str:
    """Huginn's name for one of our parameters."""
    fixed = {
        "embedding.weight": "transformer.wte.weight",
        "final_norm.weight": "transformer.ln_f.weight",
        "core.injection.adapter.weight": "transformer.adapter.weight",
    }
    return fixed.get(name) or "transformer." + name.replace("core.blocks.", "core_block.").replace(".qkv.", ".Wqkv.")


def _check_extras(weights: Weights, config: ModelConfig) -> None:
    """Check the other tensors that a Huginn file may hold: a copy of the tied embedding, and rotary tables (position, pair,
    [cos, sin]). Raises `UserError` if they differ from what this model uses."""
    if "lm_head.weight" in weights.files:
        shape = (config.vocab_size, config.d_model)
        wte = weights.read("transformer.wte.weight")
        if weights.shapes["lm_head.weight"] != shape or not torch.equal(weights.read("lm_head.weight"), wte):
            raise UserError(f"{weights.folder}: lm_head.weight differs from the embedding, but Huginn ties them")
    if "freqs_cis" in weights.files:
        length, head_size = config.max_seq_len, config.d_model // config.n_heads
        if weights.shapes["freqs_cis"] != (1, length, 1, head_size // 2, 2):
            raise UserError(f"{weights.folder}: freqs_cis has shape {weights.shapes['freqs_cis']}, not Huginn's")
        table = torch.stack(rope_table(config, length, torch.device("cpu")), dim=-1)
        # Huginn's tables are computed from fp32 angles, and may be stored in half precision.
        if not torch.allclose(weights.read("freqs_cis").float()[0, :, 0], table, rtol=0, atol=1e-2):
            raise UserError(f"{weights.folder}: freqs_cis is not the rotary table of rope_base = {config.rope_base:g}")


@torch.no_grad()
def load_model(weights: Weights, config: ModelConfig, huginn: bool, qk_bias: bool = True) -> LoopedLM:
    """A model with the folder's weights, fp32. For a Huginn without ``qk_bias`` the bias is zero.

    Raises:
        UserError: a tensor is missing, unknown or has another shape; the message names the first one.
    """
    with torch.device("meta"):
        wanted = dict(LoopedLM(config).named_parameters())
    names = {name: _huginn_name(name) if huginn else name for name in wanted}
    zeros = {name for name in names if huginn and not qk_bias and name.endswith("qk_bias")}
    extras = {"lm_head.weight", "freqs_cis"} if huginn else set()
    what = f"{weights.folder}, by its config.json,"
    for name, theirs in names.items():
        shape = tuple(wanted[name].shape)
        if huginn and name.endswith("qk_bias"):
            shape = (2, 1, shape[0] // 2, shape[1])
        if name not in zeros and theirs not in weights.shapes:
            raise UserError(f"{what} lacks the weight {theirs}")
        if name not in zeros and weights.shapes[theirs] != shape:
            raise UserError(f"{what} has {theirs} in shape {weights.shapes[theirs]} instead of {shape}")
    for name in sorted(weights.shapes.keys() - {names[name] for name in names.keys() - zeros} - extras):
        raise UserError(f"{what} has an unknown weight: {name[:120]}")
    if huginn:
        _check_extras(weights, config)
    model = build_model(config, seed=None)
    for name, parameter in tqdm(list(model.named_parameters()), "weights", leave=False, disable=None):
        if name in zeros:
            parameter.zero_()
        else:
            parameter.copy_(weights.read(names[name]).view(parameter.shape))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def _content(token: Any) -> Any:
    """The text of a token in a tokenizer's settings."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(plain: Tokenizer, settings: dict[str, Any], source: str) -> list[tuple[str, bool]]:
    """Tokens that transformers added to a sentencepiece model: name, and whether it is special.

    Raises:
        UserError: the tokens do not follow the model's, or this project's tokenizer cannot do the same with a text.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=plain.model_bytes)
    entries = settings.get("added_tokens_decoder", {})
    if not isinstance(entries, dict) or not all(
        re.fullmatch("[0-9]{1,9}", index) and isinstance(entry, dict) and isinstance(_content(entry), str)
        for index, entry in entries.items()
    ):
        raise UserError(f"{source}: added_tokens_decoder does not map ids to tokens")
    eos = _content(settings.get("eos_token", model.id_to_piece(plain.eos_id)))
    if eos != model.id_to_piece(plain.eos_id):
        said = f"{source}: the end-of-text token was changed to {str(eos)[:80]!r}"
        raise UserError(f"{said}, but the model's own is {model.id_to_piece(plain.eos_id)!r}: import needs the latter")
    added: list[tuple[str, bool]] = []
    for index, entry in sorted((int(index), entry) for index, entry in entries.items()):
        name, special = entry["content"], bool(entry.get("special"))
        shown = f"{source}: the added token {name[:80]!r} (id {index})"
        if index < plain.vocab_size:
            if model.id_to_piece(index) != name or not plain.decode_bytes([index]) == b"":
                raise UserError(f"{shown} replaces a token of the vocabulary, which cannot be imported")
        elif index != plain.vocab_size + len(added):
            raise UserError(f"{shown} does not follow the last token, {plain.vocab_size + len(added) - 1}")
        elif not special and (any(entry.get(key) for key in ("lstrip", "rstrip", "single_word")) or SPACE_MARK in name):
            raise UserError(f"{shown} needs lstrip, rstrip, single_word or U+2581, which cannot be imported")
        else:
            added.append((name, special))
    return added


def read_tokenizer(folder: Path, values: dict[str, Any], rows: int = 0) -> Tokenizer:
    """The tokenizer of a folder: ``tokenizer.model`` if it exists, else ``tokenizer.json``. The latter's special tokens are
    named in ``tokenizer_config.json`` or in ``config.json`` (``values``). Special tokens are added until there are ``rows``
    tokens. Raises `UserError` if there is no usable tokenizer."""
    model, fast = folder / "tokenizer.model", folder / "tokenizer.json"
    source = folder / "tokenizer_config.json"
    settings = read_json(source) if source.exists() else {}
    if model.exists():
        check_size(model)
        plain = Tokenizer(model)
        added = _added_tokens(plain, settings, str(source))
        added += [(f"<row {index}>", True) for index in range(plain.vocab_size + len(added), rows)]
        return Tokenizer.from_bytes(with_tokens(plain.model_bytes, added), str(model)) if added else plain
    if not fast.exists():
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json")
    spec = read_json(fast)

    def find(name: str) -> int | None:
        token = _content(settings.get(f"{name}_token"))
        if isinstance(token, str):
            added = spec.get("added_tokens")
            for entry in added if isinstance(added, list) else []:
                if isinstance(entry, dict) and entry.get("content") == token and isinstance(entry.get("id"), int):
                    return int(entry["id"])
            vocabulary = spec["model"].get("vocab") if isinstance(spec.get("model"), dict) else None
            index = vocabulary.get(token) if isinstance(vocabulary, dict) else None
            if isinstance(index, int):
                return index
        index = values.get(f"{name}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        return index if isinstance(index, int) else None

    eos = find("eos")
    if eos is None:
        raise UserError(f"{folder}: neither tokenizer_config.json nor config.json names the end-of-text token")
    exported = values.get("run")  # the exported bos token is the end-of-text token
    bos = exported.get("bos_token_id") if isinstance(exported, dict) else None
    ids = eos, bos if isinstance(bos, int) else find("bos"), find("pad")
    tokenizer = Tokenizer.from_bytes(wrap(spec, *ids), str(fast))
    if tokenizer.vocab_size < rows:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        spec["added_tokens"] += [
            {"id": index, "content": f"<row {index}>", "special": True, **flags}
            for index in range(tokenizer.vocab_size, rows)
        ]
        tokenizer = Tokenizer.from_bytes(wrap(spec, *ids), str(fast))
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------


def _exported_config(values: dict[str, Any], source: str) -> tuple[Config, dict[str, Any], int]:
    """The run's configuration, the objective's state, and the number of embedding rows if transformers added some (else 0),
    from the ``config.json`` of an exported folder."""
    kept = values.get("run")
    if not isinstance(kept, dict) or not isinstance(kept.get("config"), dict):
        raise UserError(f"{source} has no run.config: was it written by recurrent-db export?")
    config, state, resized = config_from_json(json.dumps(kept["config"]), source), kept.get("objective", {}), 0
    rows = whole_number(values, "vocab_size", source, config.model.vocab_size)
    if rows > config.model.vocab_size:  # transformers added rows for new tokens
        config.model.vocab_size = resized = rows
    for theirs, ours in SHAPE.items():  # transformers leaves some keys out when it saves a folder again
        if values.get(theirs, getattr(config.model, ours)) != getattr(config.model, ours):
            said = f"{source}: {theirs} is {str(values[theirs])[:80]!r}"
            raise UserError(f"{said}, but run.config.model.{ours} is {getattr(config.model, ours)!r}")
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return config, state, resized


def _check_vocabulary(tokenizer: Tokenizer, rows: int, source: str, kind: object) -> None:
    """Raise `UserError` unless the embedding's rows fit the tokenizer. Other projects pad an embedding by a few rows."""
    tokens = tokenizer.vocab_size
    if rows < tokens:
        raise UserError(f"{source}: the embedding has {rows} rows for {tokens} tokens")
    if kind in FAMILIES and rows - tokens > max(1024, rows // 16):
        raise UserError(
            f"{source}: the embedding has {rows} rows for {tokens} tokens: is the tokenizer another model's?"
        )


def import_folder(folder: Path, run: Path, cut: Cut | None = None) -> LoopedLM:
    """Import ``folder`` as the new run directory ``run``, with its configuration and one checkpoint at step 0.

    Args:
        folder: folder with config.json, *.safetensors and the tokenizer.
        run: run directory to create.
        cut: which layers of a model that is not looped become prelude, core and coda.

    Returns:
        The model, with its recurrence.

    Raises:
        UserError: the folder is invalid or not supported, or the run directory is not empty.
    """
    if run.is_symlink() or (run.exists() and (not run.is_dir() or any(run.iterdir()))):
        raise UserError(f"{run} exists and is not an empty folder: choose a new one")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    source = str(folder / "config.json")
    values = read_json(folder / "config.json")
    kind, resized = values.get("model_type"), 0
    state: dict[str, Any] = {}
    known = f"{MODEL_TYPE}, huginn_raven, or with --as looped {', '.join(FAMILIES)}"
    if kind not in (MODEL_TYPE, "huginn_raven", *FAMILIES):
        raise UserError(f"{source}: model_type must be {known}, got {str(kind)[:80]!r}")
    if (kind in FAMILIES) != (cut is not None):
        what = "is not looped: add --as looped" if cut is None else "is looped already: leave out --as"
        raise UserError(f"{source}: a model of type {kind} {what}")
    layers: list[int | None] = []
    if kind == "huginn_raven":
        config = huginn_config(values, source)
    elif cut is not None:
        config, layers = retrofit_config(values, cut, source)
    else:
        config, state, resized = _exported_config(values, source)
    tokenizer = read_tokenizer(folder, values, resized)
    _check_vocabulary(tokenizer, config.model.vocab_size, source, kind)
    if kind != MODEL_TYPE and tokenizer.vocab_size < config.model.vocab_size:  # padding rows can be drawn, too
        tokenizer = read_tokenizer(folder, values, config.model.vocab_size)
    objective = build_objective(config)
    load_objective_state(objective, state, source)
    if kind == MODEL_TYPE:
        expected = hf_config(config, objective, tokenizer, 0, 0)
        for key in ("initial_state", "noise_features", "walk"):
            if values.get(key, expected[key]) != expected[key]:
                said = f"{source}: {key} is {str(values[key])[:80]!r}"
                raise UserError(f"{said}, but the exported run needs {str(expected[key])[:80]!r}")
    if cut is not None:
        model = retrofit(folder, config.model, layers)
    else:
        huginn, qk_bias = kind == "huginn_raven", values.get("qk_bias", True) is not False
        model = load_model(Weights(folder), config.model, huginn, qk_bias)
    model.recurrence, model.document_mask = objective.recurrence, config.data.document_mask
    config.run.dir = str(run)
    run.mkdir(parents=True, exist_ok=True)
    optimizer = build_optimizer(model, config.optim)
    save_checkpoint(run, config, tokenizer, model, optimizer, None, TrainState(), objective.state_dict())
    write_atomic(run / "config.json", json.dumps(to_dict(config), indent=1))
    if tokenizer.is_byte_level:
        try:
            check_lossless(tokenizer)
        except RuntimeError as error:
            print(f"warning: {error}: bits per byte count other bytes than those of the text", file=sys.stderr)
    return model
