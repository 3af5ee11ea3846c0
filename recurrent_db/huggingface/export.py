"""Exports a run to a folder that Hugging Face transformers loads.

The folder holds the weights (safetensors), the configuration, the tokenizer, and the code from `exported`, so it does not
need this package. ``config.json`` also holds the run's own configuration, so that `import_folder` can restore the run.
Nothing in the folder is pickled.
"""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from recurrent_db.config import Config
from recurrent_db.data.byte_level_tokenizer import unwrap
from recurrent_db.data.tokenizer import Tokenizer
from recurrent_db.errors import UserError
from recurrent_db.files import new_file_mode
from recurrent_db.objectives import Objective
from recurrent_db.recurrence.walk import DenoiseWalk
from recurrent_db.schema import to_dict
from recurrent_db.store.checkpoint import Checkpoint
from recurrent_db.store.folder import find_checkpoint
from recurrent_db.store.loading import trained_objective

MODEL_TYPE = "recurrent_db"
MODEL_CODE = ("configuration_recurrent_db.py", "modeling_recurrent_db.py", "layers_recurrent_db.py")
TOKENIZER_CODE = "tokenization_recurrent_db.py"
"""Code files from `huggingface.exported`. The last is only for sentencepiece models; transformers has classes for others."""


def _walk_keys(walk: DenoiseWalk) -> dict[str, Any]:
    """The keys of ``walk`` in config.json. Raises `UserError` for a walk that the exported code does not implement."""
    config = walk.config
    for name, supported in (("conditioning", ("inject",)), ("sampler", ("euler",)),
                            ("bridge", ("soft", "hard", "state")),
                            ("grid", ("equal-probability", "karras", "log-uniform"))):  # fmt: skip
        if getattr(config, name) not in supported:
            raise UserError(
                f"the walk's {name} = {getattr(config, name)} cannot be exported: the exported model only has"
                f" {' and '.join(supported)}"
            )
    return {
        "sd": walk.precond.sd, "mute": walk.precond.mute, "bridge": config.bridge, "grid": config.grid,
        "sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "p_mean": config.p_mean, "p_std": config.p_std,
    }  # fmt: skip


SHAPE = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "d_mlp", "num_attention_heads": "n_heads",
    "n_prelude": "n_prelude", "n_core": "n_core", "n_coda": "n_coda", "max_position_embeddings": "max_seq_len",
    "injection": "injection", "num_key_value_heads": "kv_heads", "head_dim": "d_head", "layer": "layer",
    "v_bias": "v_bias", "qk_norm": "qk_norm", "norm_eps": "norm_eps", "rope_base": "rope_base", "rope_size": "rope_size",
    "tied": "tied",
}  # fmt: skip
"""Keys of config.json, each with the corresponding field of `config.ModelConfig`."""


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the special tokens. A text begins after an end-of-text token in training, so that is its first token too."""
    return {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def hf_config(config: Config, objective: Objective, tokenizer: Tokenizer, k: int, seed: int) -> dict[str, Any]:
    """``config.json`` of the exported folder, without the key ``run``.

    Raises:
        UserError: the exported code does not implement the denoiser's walk.
    """
    model, walk = config.model, objective.recurrence.walk
    configuration, modeling = (name.removesuffix(".py") for name in MODEL_CODE[:2])
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["RecurrentDBForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{configuration}.RecurrentDBConfig",
            "AutoModelForCausalLM": f"{modeling}.RecurrentDBForCausalLM",
        },
        "dtype": "float32",
        **{theirs: getattr(model, ours) for theirs, ours in SHAPE.items()},
        "noise_features": model.d_condition if model.noise_conditioning else 0,
        "num_recurrence": k or objective.default_k,
        "initial_state": "noise" if walk else objective.recurrence.loop.initial,
        "seed": seed,
        "walk": _walk_keys(walk) if walk else None,
        **_special_ids(tokenizer),
        "use_cache": True,
    }


def _code(name: str) -> bytes:
    """The content of a file of `huggingface.exported`."""
    return (resources.files("recurrent_db.huggingface.exported") / name).read_bytes()


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files: content by name."""
    files: dict[str, bytes] = {}
    settings: dict[str, Any]
    if tokenizer.is_byte_level:
        spec = unwrap(tokenizer.model_bytes)["tokenizer"]
        by_id = {index: token for token, index in spec["model"]["vocab"].items()}
        by_id |= {token["id"]: token["content"] for token in spec["added_tokens"]}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **{name.removesuffix("_id"): by_id[index] for name, index in _special_ids(tokenizer).items()},
        }  # fmt: skip
        files["tokenizer.json"] = json.dumps(spec).encode()
    else:  # the exported class has its settings built in
        auto = [f"{TOKENIZER_CODE.removesuffix('.py')}.RecurrentDBTokenizer", None]
        settings = {"tokenizer_class": "RecurrentDBTokenizer", "auto_map": {"AutoTokenizer": auto}}
        files["tokenizer.model"] = tokenizer.model_bytes
        files[TOKENIZER_CODE] = _code(TOKENIZER_CODE)
    files["tokenizer_config.json"] = json.dumps(settings, indent=1).encode()
    return files


def _without_paths(config: Config) -> dict[str, Any]:
    """The run's configuration, without paths of the machine that trained it."""
    values = to_dict(config)
    values["data"]["path"] = values["data"]["val_path"] = values["run"]["dir"] = values["init"]["from"] = ""
    return values


def export(run: Path, folder: Path, k: int = 0, seed: int = 0) -> Path:
    """Export the newest good checkpoint of ``run`` to ``folder``. An interrupted export leaves no folder.

    Args:
        folder: target; it must be empty or not exist.
        k: default number of core iterations (`num_recurrence`); 0 uses the objective's own.
        seed: seed of the random initial states.

    Returns:
        The exported checkpoint.

    Raises:
        UserError: there is no such run, the folder is not empty or cannot be written, or the model cannot be exported.
    """
    if k < 0:
        raise UserError(f"--k must be 0 (the objective's own) or more, got {k}")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UserError(f"{folder} exists and is not an empty folder: choose a new one")
    checkpoint = Checkpoint(find_checkpoint(run))
    config, tokenizer = checkpoint.config(), checkpoint.tokenizer()
    if config.model.n_blocks:
        raise UserError(f"{run} is a model in blocks, which cannot be exported")
    objective = trained_objective(checkpoint, config)
    values = hf_config(config, objective, tokenizer, k, seed)
    values["run"] = {
        "config": _without_paths(config), "objective": objective.state_dict(), "bos_token_id": tokenizer.bos_id,
    }  # fmt: skip
    files = {
        "config.json": json.dumps(values, indent=1).encode(),
        "generation_config.json": json.dumps(_special_ids(tokenizer), indent=1).encode(),
        **{name: _code(name) for name in MODEL_CODE},
        **_tokenizer_files(tokenizer),
    }
    temporary = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        weights = {name: value.contiguous() for name, value in checkpoint.weights(averaged=True).items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(new_file_mode())  # safetensors creates files for the owner only
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return checkpoint.path
