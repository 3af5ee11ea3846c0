"""Reads a folder of Hugging Face transformers that is not trusted: JSON files of bounded size, and safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recurrent_db.errors import UserError

MOST_DIMENSIONS = 8
"""Largest number of dimensions of a tensor that is read."""

_MOST_BYTES = 1 << 28
"""Size limit of JSON files and tokenizers, in bytes."""


def check_size(path: Path) -> None:
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"{path} is larger than {_MOST_BYTES >> 20} MiB")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `UserError` for anything else."""
    try:
        check_size(path)
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return values


def whole_number(values: dict[str, Any], key: str, source: str, default: Any = None) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{source}: {key} must be a whole number, got {str(value)[:80]!r}")
    return value


class Weights:
    """The tensors of a folder's safetensors files. Reads the headers at first, and each tensor when it is needed.

    Args:
        folder: the folder.
        unused: pattern of the names of tensors that are left out, whatever they hold.

    Raises:
        UserError: there are no safetensors, the index does not match the files, or a file is damaged.
    """

    def __init__(self, folder: Path, unused: str | None = None) -> None:
        self.folder = folder
        skipped = re.compile(unused or "(?!)")
        index = folder / "model.safetensors.index.json"
        listed: dict[str, Any] | None = None
        files = ["model.safetensors"]
        if index.exists():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise UserError(f"{index} has no weight_map")
            for file in listed.values():
                if not isinstance(file, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", file, re.ASCII):
                    raise UserError(f"{index} names {str(file)[:80]!r}, which is not a plain *.safetensors file name")
            if (folder / files[0]).exists() and files[0] not in listed.values():
                raise UserError(f"{folder} has both {files[0]} and {index.name}: delete the one that is out of date")
            files = sorted(set(listed.values()))
            listed = {name: file for name, file in listed.items() if not skipped.search(name)}
        elif not (folder / files[0]).exists():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            note = "; pickled weights are not read" if pickled else ""
            raise UserError(f"{folder} has neither model.safetensors nor an index of safetensors files{note}")
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, shape, dtype in self._header(folder / file):
                if skipped.search(name):
                    continue
                if name in self.files:
                    raise UserError(f"{folder}: {name} is in {self.files[name].name} and in {file}")
                if len(shape) > MOST_DIMENSIONS:
                    raise UserError(f"{folder / file}: {name} has {len(shape)} dimensions")
                if dtype not in ("F64", "F32", "BF16", "F16"):
                    raise UserError(f"{folder / file}: {name} has type {dtype}; supported are F64, F32, BF16 and F16")
                self.files[name], self.shapes[name] = folder / file, shape
        if listed is not None and listed != {name: path.name for name, path in self.files.items()}:
            odd = min(name for name in listed.keys() | self.files.keys()
                      if name not in self.files or listed.get(name) != self.files[name].name)  # fmt: skip
            raise UserError(f"{index} and the files disagree on where {odd} is")

    @staticmethod
    def _header(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
        if not path.is_file():
            raise UserError(f"{path} is missing")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    part = file.get_slice(name)
                    yield name, tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise UserError(f"{path}: not safetensors, or damaged ({str(error)[:120]})") from None

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored type. Raises `UserError` if it holds NaN or infinity."""
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.files[name]}: damaged ({str(error)[:120]})") from None
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.folder}: {name} contains NaN or infinity")
        return tensor
