"""Helpers for the runs of `quality/compare.py`: options, the settings that make runs comparable, completeness, and limited
corpora."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurrent_db.config import Config
from recurrent_db.data import DataWriter, document, load_tokenizer, open_data
from recurrent_db.errors import UserError
from recurrent_db.schema import to_dict
from recurrent_db.store.folder import list_checkpoints
from recurrent_db.store.metrics import read_metrics


def dotted(text: str) -> list[str]:
    """Convert "a.b=1 c=2" to command-line arguments."""
    words = []
    for pair in text.split():
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--options takes KEY=VALUE pairs separated by spaces, got {pair!r}")
        words += ["--" + key, value]
    return words


def middle_first(rates: Sequence[float]) -> list[float]:
    """Order the rates from the middle outwards, so that a useful table exists early."""
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - (len(rates) - 1) / 2))


def identity(config: Config) -> dict[str, Any]:
    """The part of a configuration that determines a result."""
    whole = to_dict(config)
    kept = {name: whole[name] for name in ("model", "data", "optim", "schedule")}
    kept["data"] = {name: value for name, value in kept["data"].items() if name not in ("path", "val_path", "verify")}
    name = whole["objective"]["name"]
    kept["objective"] = {"name": name, name: to_dict(config.objective.own)}
    return kept


def contradiction(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str | None:
    """The first key that differs, with both values; None if all are equal."""
    for key in dict.fromkeys([*before, *now]):
        if isinstance(before.get(key), dict) and isinstance(now.get(key), dict):
            if (found := contradiction(before[key], now[key], f"{prefix}{key}.")) is not None:
                return found
        elif before.get(key) != now.get(key):
            return f"{prefix}{key} ({before.get(key)}, now {now.get(key)})"
    return None


def complete(directory: Path, budget: float) -> bool:
    """Whether a run has spent its budget and saved its last step."""
    if not (directory / "metrics.jsonl").exists() or not list_checkpoints(directory):
        return False
    rows = read_metrics(directory / "metrics.jsonl")
    return (
        bool(rows)
        and rows[-1]["flops"] >= budget
        and list_checkpoints(directory)[-1].name == f"step-{rows[-1]['step']:08d}"
    )


def limit_corpus(data: Path, out: Path, tokens: int) -> None:
    """Make a data directory from the first ``tokens`` training tokens of ``data``, source by source, without a validation
    split. An existing directory is kept."""
    if out.exists():
        return
    tokenizer, left = load_tokenizer(data), tokens
    with DataWriter(out, tokenizer) as writer:
        for name, source in open_data(data, "train").sources.items():
            for number in range(source.documents):
                if left < 2:
                    break
                ids = document(source, number)[:-1].tolist()[: left - 1]  # the writer adds the separator
                left -= writer.add("train", name, f"{name}-{number}", tokenizer.decode_bytes(ids), ids)
        writer.commit({"first_tokens_of": str(data)})
