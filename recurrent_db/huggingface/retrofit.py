"""Cuts a pretrained transformer into prelude, core and coda (as in retrofitted recurrence, arXiv 2511.07384).

The adapter starts as [0, I]: the core sees the context and not the state. If no layer is dropped, the looped model's logits
are the source's, for any number of iterations. Training then makes it use the state.

The source's computation is kept. Three parts are written in another form that gives the same numbers:

- Rotary embeddings of these models rotate component i of a head with component i + R/2. This project rotates neighbours, so
  the rows of queries and keys change places.
- Projections of queries, keys and values become one, and so do gate and up.
- Queries and keys get a bias of zero if the source has none.

Shapes: D width, H heads, G heads of keys and values, E head size, M hidden width of the MLP, R rotated components of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from recurrent_db.config import Config, ModelConfig, resolve, validate
from recurrent_db.errors import UserError
from recurrent_db.huggingface.source_folder import Weights, whole_number
from recurrent_db.model import LoopedLM, build_model
from recurrent_db.objective_config import FLAT

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
"""Values of ``model_type`` that can be imported. SmolLM and others have the type llama, Pythia has gpt_neox."""

_UNUSED = r"\.rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$"
"""Pattern of the names of tensors that older versions of transformers saved beside the weights: rotary rates and masks."""

# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Cut:
    """Which layers become which part."""

    prelude: int | None = None
    """Number of layers in the prelude; None for a quarter of the layers."""
    core: int | None = None
    """Number of layers in the core; None for those that are left."""
    coda: int | None = None
    """Number of layers in the coda; None for a quarter of the layers."""
    drop: str = ""
    """Layers to leave out, counted from 0, such as ``3,12-15``."""

    def dropped(self, count: int) -> set[int]:
        """The layers to leave out of ``count``. Raises `UserError` for layers that do not exist."""
        found: set[int] = set()
        for part in self.drop.split(",") if self.drop.strip() else []:
            match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last < count:
                raise UserError(f"--drop {self.drop!r} must list layers from 0 to {count - 1}, such as 3,12-15")
            found.update(range(first, last + 1))
        return found

    def parts(self, kept: int) -> tuple[int, int, int]:
        """Numbers of layers in prelude, core and coda. Raises `UserError` if they are not ``kept`` in all."""
        prelude = kept // 4 if self.prelude is None else self.prelude
        coda = kept // 4 if self.coda is None else self.coda
        core = kept - prelude - coda if self.core is None else self.core
        if prelude < 0 or coda < 0 or core < 1 or prelude + core + coda != kept:
            left = " after --drop" if self.drop else ""
            raise UserError(
                f"prelude {prelude} + core {core} + coda {coda} must be the model's {kept} layers{left}, with 1 or more in"
                " the core"
            )
        return prelude, core, coda


def _number(values: dict[str, Any], key: str, source: str, default: float) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{source}: {key} must be a number, got {str(value)[:80]!r}")
    return float(value)


def _check_supported(values: dict[str, Any], source: str) -> None:
    """Raise `UserError` for settings that this model cannot compute."""
    neox, kind = values["model_type"] == "gpt_neox", values["model_type"]
    if values.get("quantization_config"):
        raise UserError(
            f"{source}: the weights are quantised, which is not supported: use the weights in half precision"
        )
    fixed: dict[str, Any] = {"hidden_act": "gelu" if neox else "silu", "attention_bias": neox, "mlp_bias": False}
    if neox:
        fixed = {"hidden_act": "gelu", "attention_bias": True, "use_parallel_residual": True}
    elif kind == "qwen2":
        del fixed["attention_bias"]  # it always has one
    for key, expected in fixed.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{source}: {key} = {repr(values[key])[:80]} is not supported, only {expected!r}")
    kinds = values.get("layer_types") or []
    window = values.get("sliding_window")
    slides = kind == "mistral" or (kind != "llama" and not neox and values.get("use_sliding_window", False))
    if slides and window is not None and not (isinstance(window, int) and _positions(values, source) <= window):
        raise UserError(
            f"{source}: sliding window attention is not supported; texts of up to {str(window)[:20]} tokens do not need it:"
            f" set max_position_embeddings to that"
        )
    if not slides and (not isinstance(kinds, list) or any(each != "full_attention" for each in kinds)):
        raise UserError(f"{source}: layer_types must all be full_attention: sliding window attention is not supported")


def _positions(values: dict[str, Any], source: str) -> int:
    return whole_number(values, "max_position_embeddings", source)


def _set_rope(model: ModelConfig, values: dict[str, Any], source: str) -> None:
    """Set the rotary embedding's base and size. Raises `UserError` for scaled ones."""
    neox = values["model_type"] == "gpt_neox"
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{source}: rotary scaling {str(kind)[:80]!r} is not supported, only 'default'")
    base = {"rope_theta": values.get("rope_theta", values.get("rotary_emb_base", 10_000.0)), **rope}
    model.rope_base = _number(base, "rope_theta", source, 0)
    share = {"partial_rotary_factor": values.get("rotary_pct", 0.25) if neox else 1.0, **values, **rope}
    factor = _number(share, "partial_rotary_factor", source, 1.0)
    if not 0 < factor <= 1 or (factor != 1 and not neox):
        raise UserError(f"{source}: partial_rotary_factor = {factor:g} is not supported")
    size = int(model.d_head * factor)
    model.rope_size = size if size < model.d_head else 0


def retrofit_config(values: dict[str, Any], cut: Cut, source: str) -> tuple[Config, list[int | None]]:
    """The configuration of the looped model, and for each layer of the source its place in the looped model.

    Args:
        values: ``config.json``.
        cut: which layers become which part.
        source: where ``values`` come from, for error messages.

    Returns:
        The configuration, and for each layer of the source its number among the kept layers, or None if it is dropped.

    Raises:
        UserError: this model cannot compute the same, or the layers do not add up.
    """
    _check_supported(values, source)
    neox, kind = values["model_type"] == "gpt_neox", values["model_type"]
    count = whole_number(values, "num_hidden_layers", source)
    if not 1 <= count <= 4096:
        raise UserError(f"{source}: num_hidden_layers must be from 1 to 4096, got {count}")
    dropped = cut.dropped(count)
    kept = [layer for layer in range(count) if layer not in dropped]
    config = Config()
    model = config.model
    model.n_prelude, model.n_core, model.n_coda = cut.parts(len(kept))
    model.layer = "neox" if neox else "llama"
    for ours, theirs in (("d_model", "hidden_size"), ("n_heads", "num_attention_heads"), ("d_mlp", "intermediate_size"),
                         ("vocab_size", "vocab_size")):  # fmt: skip
        setattr(model, ours, whole_number(values, theirs, source))
    model.max_seq_len = config.data.sequence_length = _positions(values, source)
    if not neox:
        for ours, theirs in (("n_kv_heads", "num_key_value_heads"), ("head_size", "head_dim")):
            if values.get(theirs) is not None:
                setattr(model, ours, whole_number(values, theirs, source))
        if kind == "qwen3" and "head_dim" not in values:
            model.head_size = 128  # the default of transformers
        if min(model.n_heads, model.d_model) > 0 and model.head_size == model.d_model / model.n_heads:
            model.head_size = 0
    model.v_bias, model.qk_norm = kind == "qwen2", kind == "qwen3"
    key, default = ("layer_norm_eps", 1e-5) if neox else ("rms_norm_eps", 1e-6)
    model.norm_eps = _number(values, key, source, default)
    model.tied = values.get("tie_word_embeddings", False) is True
    config.objective.name = FLAT
    try:
        resolve(config)
        validate(config)
        _set_rope(model, values, source)
        validate(config)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None
    return config, [kept.index(layer) if layer in kept else None for layer in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class Piece:
    """A tensor of the source that fills a parameter, or a part of it."""

    name: str
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """From the tensor to the part's numbers, in the parameter's order."""


Pieces = dict[str, list[Piece]]
"""For each of our parameters, the pieces that follow each other in it. Parameters without pieces are zero."""


def _neighbours(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Reorders the first axis, heads times E, from rotating component i with i + R/2 to rotating neighbours."""
    half, size = (config.rope_size or config.d_head) // 2, config.d_head
    turned = torch.arange(2 * half).view(2, half).T.flatten()
    order = torch.cat((turned, torch.arange(2 * half, size)))
    return lambda tensor: tensor.unflatten(0, (-1, size))[:, order].flatten(0, 1)


def _llama_layer(config: ModelConfig, theirs: str) -> Pieces:
    """The weights of one layer of Llama, Mistral, Qwen2 or Qwen3, by our names within the layer."""
    width, hidden, size = config.d_model, config.d_mlp, config.d_head
    queries, keys, turn = config.n_heads * size, config.kv_heads * size, _neighbours(config)
    attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
    pieces = {
        "norm_1.weight": [Piece(f"{theirs}input_layernorm.weight", (width,))],
        "norm_3.weight": [Piece(f"{theirs}post_attention_layernorm.weight", (width,))],
        "attn.qkv.weight": [
            Piece(f"{attention}q_proj.weight", (queries, width), turn),
            Piece(f"{attention}k_proj.weight", (keys, width), turn),
            Piece(f"{attention}v_proj.weight", (keys, width)),
        ],
        "attn.proj.weight": [Piece(f"{attention}o_proj.weight", (width, queries))],
        "mlp.fc.weight": [Piece(f"{mlp}{name}_proj.weight", (hidden, width)) for name in ("gate", "up")],
        "mlp.proj.weight": [Piece(f"{mlp}down_proj.weight", (width, hidden))],
    }
    if config.v_bias:
        pieces["attn.qk_bias"] = [
            Piece(f"{attention}q_proj.bias", (queries,), turn),
            Piece(f"{attention}k_proj.bias", (keys,), turn),
        ]
        pieces["attn.v_bias"] = [Piece(f"{attention}v_proj.bias", (keys,))]
    if config.qk_norm:
        for name in ("q_norm.weight", "k_norm.weight"):
            pieces[f"attn.{name}"] = [Piece(f"{attention}{name}", (size,), turn)]
    return pieces


def _neox_layer(config: ModelConfig, theirs: str) -> Pieces:
    """The weights of one layer of GPT-NeoX. Its fused projection holds queries, keys and values of a head side by side."""
    width, hidden, size, turn = config.d_model, config.d_mlp, config.d_head, _neighbours(config)
    fused = f"{theirs}attention.query_key_value."

    def part(index: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor.unflatten(0, (-1, 3, size))[:, index].flatten(0, 1)

    def queries_keys(tensor: Tensor) -> Tensor:
        return torch.cat((turn(part(0)(tensor)), turn(part(1)(tensor))))

    bias = f"{fused}bias", (3 * config.n_heads * size,)
    pieces = {
        "attn.qkv.weight": [
            Piece(
                f"{fused}weight", (3 * config.n_heads * size, width), lambda t: torch.cat((queries_keys(t), part(2)(t)))
            )
        ],
        "attn.qk_bias": [Piece(*bias, queries_keys)],
        "attn.v_bias": [Piece(*bias, part(2))],
    }
    for ours, name, shape in (
        ("norm_1", "input_layernorm", (width,)),
        ("norm_3", "post_attention_layernorm", (width,)),
        ("attn.proj", "attention.dense", (width, config.n_heads * size)),
        ("mlp.fc", "mlp.dense_h_to_4h", (hidden, width)),
        ("mlp.proj", "mlp.dense_4h_to_h", (width, hidden)),
    ):
        pieces[f"{ours}.weight"] = [Piece(f"{theirs}{name}.weight", shape)]
        pieces[f"{ours}.bias"] = [Piece(f"{theirs}{name}.bias", shape[:1])]
    return pieces


def _layer_name(config: ModelConfig, place: int) -> str:
    """Our name of kept layer number ``place``."""
    core = place - config.n_prelude
    if core < 0:
        return f"prelude.{place}."
    return f"core.blocks.{core}." if core < config.n_core else f"coda.{core - config.n_core}."


def _pieces(config: ModelConfig, layers: list[int | None]) -> Iterator[tuple[str | None, list[Piece]]]:
    """Our parameters with the pieces that fill them. The name is None for layers that are dropped."""
    neox = config.layer == "neox"
    stem, embedding, norm = (
        ("gpt_neox.", "embed_in", "final_layer_norm") if neox else ("model.", "embed_tokens", "norm")
    )
    table = config.vocab_size, config.d_model
    yield "embedding.weight", [Piece(f"{stem}{embedding}.weight", table)]
    yield "final_norm.weight", [Piece(f"{stem}{norm}.weight", (config.d_model,))]
    if neox:
        yield "final_norm.bias", [Piece(f"{stem}{norm}.bias", (config.d_model,))]
    if not config.tied:
        yield "head.weight", [Piece(_head_name(config), table)]
    for layer, place in enumerate(layers):
        pieces = (_neox_layer if neox else _llama_layer)(config, f"{stem}layers.{layer}.")
        for name, parts in pieces.items():
            yield (None if place is None else _layer_name(config, place) + name), parts


def _head_name(config: ModelConfig) -> str:
    return "embed_out.weight" if config.layer == "neox" else "lm_head.weight"


def _check_names(weights: Weights, config: ModelConfig, pieces: list[Piece], table: str) -> None:
    """Raise `UserError` unless the folder holds exactly the ``pieces``, each in its shape. A tied head may be stored twice;
    ``table`` is the embedding's name."""
    what = f"{weights.folder}, by its config.json,"
    for piece in pieces:
        if piece.name not in weights.shapes:
            raise UserError(f"{what} lacks the weight {piece.name}")
        if weights.shapes[piece.name] != piece.shape:
            raise UserError(f"{what} has {piece.name} in shape {weights.shapes[piece.name]} instead of {piece.shape}")
    known = {piece.name for piece in pieces}
    head = _head_name(config)
    if config.tied and head in weights.shapes:
        known.add(head)
        same = weights.shapes[head] == weights.shapes[table]
        if not same or not torch.equal(weights.read(head), weights.read(table)):
            raise UserError(f"{weights.folder}: {head} differs from the embedding, but config.json ties them")
    for name in sorted(weights.shapes.keys() - known):
        raise UserError(f"{what} has an unknown weight: {name[:120]}")


@torch.no_grad()
def retrofit(folder: Path, config: ModelConfig, layers: list[int | None]) -> LoopedLM:
    """The looped model with the folder's weights, fp32. Names and shapes are checked before memory is allocated.

    Args:
        folder: folder with the safetensors files.
        config, layers: from `retrofit_config`.

    Raises:
        UserError: a tensor is missing, unknown, has another shape or type, or is not finite.
    """
    weights = Weights(folder, _UNUSED)
    plan = list(_pieces(config, layers))
    _check_names(weights, config, [piece for _, pieces in plan for piece in pieces], plan[0][1][0].name)
    model = build_model(config, seed=None)
    sources = dict(plan)
    for name, parameter in tqdm(list(model.named_parameters()), "weights", leave=False, disable=None):
        if name == "core.injection.adapter.weight":  # [0, I]: e alone
            parameter.copy_(torch.eye(config.d_model).repeat(1, 2))
            parameter[:, : config.d_model] = 0
        elif name not in sources:
            parameter.zero_()
        else:
            filled, flat = 0, parameter.view(-1)
            for piece in sources[name]:
                part = piece.change(weights.read(piece.name)).reshape(-1)
                flat[filled : filled + len(part)] = part
                filled += len(part)
    return model
