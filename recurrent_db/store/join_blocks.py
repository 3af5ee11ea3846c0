"""`recurrent-db blocks join RUN... OUT`: one model of blocks that were trained apart.

A run of one block (`train/pretrain.py --blocks.only`) gives that block. A run of a whole model, such as an earlier join,
gives the blocks that no other run has; so one block can be replaced. The embedding and head that blocks share must have the
same bits in all runs. Nothing is trained and nothing averaged: the result holds the runs' own tensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurrent_db.accounting.flop_count import FlopCount
from recurrent_db.accounting.memory_split import tensor_bytes
from recurrent_db.config import Config, validate
from recurrent_db.errors import UserError
from recurrent_db.files import locked, read_json, write_atomic
from recurrent_db.model import build_model
from recurrent_db.model.blocks_lm import BlocksLM
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.block_choice import trains_shared
from recurrent_db.schema import to_dict
from recurrent_db.store.checkpoint import Checkpoint, save_checkpoint
from recurrent_db.store.folder import content_hash, find_checkpoint
from recurrent_db.store.metrics import counted_where, read_metrics
from recurrent_db.store.tensors import load_weights
from recurrent_db.store.train_state import TrainState

ACCOUNT = "blocks.json"
"""File of a joined run: under ``blocks`` where each block is from and what it cost, under ``joined`` the hash of the joined
weights and the joined run's counters."""
COUNTERS = tuple(TrainState().row())
"""Counters in the account, named as the columns of metrics.jsonl."""


@dataclass
class BlockSource:
    """A run that gives blocks."""

    path: Path
    checkpoint: Checkpoint
    config: Config
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> BlockSource:
        checkpoint = Checkpoint(find_checkpoint(path))
        config = checkpoint.config()
        if not config.model.n_blocks:
            raise UserError(f"{path} is not a run of blocks (model.n_blocks is 0)")
        return cls(path, checkpoint, config, checkpoint.weights(averaged=True))

    @property
    def held(self) -> list[int]:
        return [self.config.blocks.only] if self.config.blocks.only else list(range(1, self.config.model.n_blocks + 1))

    def shared(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.weights.items() if not name.startswith("blocks.")}

    def block(self, number: int) -> dict[str, Tensor]:
        return {name: value for name, value in self.weights.items() if name.startswith(f"blocks.{number}.")}

    def account(self, number: int) -> dict[str, Any]:
        """What a block cost, from its run's own counters and metrics, up to the checkpoint that is taken."""
        state, weights = self.checkpoint.training()[0], content_hash(self.checkpoint.path)
        before = {} if self.config.blocks.only else read_account(self.run_dir)
        if before and before["joined"]["weights"] == weights:
            return dict(before["blocks"][str(number)])
        metrics, column = self.run_dir / "metrics.jsonl", f"eval/loss_block_{number}"
        rows = [row for row in (read_metrics(metrics) if metrics.exists() else []) if row["step"] <= state.step]
        split = {
            name.removeprefix("memory/"): max(row.get(name, 0) for row in rows)
            for name in (rows[-1] if rows else {})
            if name.startswith("memory/")
        }
        counted: dict[str, Any] = dict(state.row())
        if not self.config.blocks.only:  # the run's counters and memory are of all its blocks
            counted, split = counted_where(rows, f"loss_block_{number}", COUNTERS, before.get("joined")), {}
        if before:  # a joined run that was trained further: add what its blocks took before
            own = before["blocks"][str(number)] | {"step": before["blocks"][str(number)]["steps"]}
            counted = {name: None if None in (own[name], more) else own[name] + more for name, more in counted.items()}
        measured: dict[str, Any] = next((row for row in reversed(rows) if column in row), {})
        return {
            "run": str(self.path), "checkpoint": self.checkpoint.path.name, "weights": weights,
            "alone": bool(self.config.blocks.only), "layers": self.config.model.block_layers[number - 1],
            "seed": self.config.seed, "steps": counted.pop("step"), **counted,
            "budget_spent": min(state.spent(self.config.budget), 1.0),
            "parameters": sum(value.numel() for value in self.block(number).values()),
            "trains_shared": trains_shared(self.config, number),
            "memory": split, "peak_memory_bytes": max((row["peak_memory_bytes"] or 0 for row in rows), default=None),
            "bytes_read_before_training": tensor_bytes(self.shared().values()) if self.config.init.from_ else 0,
            "loss": measured.get(column),
            "loss_by_sigma": {name.removeprefix("eval/loss_sigma_"): value for name, value in measured.items()
                              if name.startswith("eval/loss_sigma_")},
        }  # fmt: skip

    @property
    def run_dir(self) -> Path:
        return self.checkpoint.path.parent.parent


def read_account(run_dir: Path) -> dict[str, Any]:
    """The account of a joined run; empty for any other run.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / ACCOUNT
    if not path.exists():
        return {}
    try:
        account: dict[str, Any] = read_json(path)
        of_block = {"weights", "steps", *COUNTERS} - {"step"}
        if account["joined"].keys() == {"weights", *COUNTERS} and all(
            block.keys() >= of_block for block in account["blocks"].values()
        ):
            return account
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is damaged: join the blocks anew, under another name")


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a section of a configuration, dotted."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contradiction(first: BlockSource, other: BlockSource) -> str | None:
    """What keeps two runs' blocks from being of one model."""
    for section in ("model", "objective"):
        ours, theirs = to_dict(getattr(first.config, section)), to_dict(getattr(other.config, section))
        for key, value in _flat(ours):
            if value != (there := dict(_flat(theirs))[key]):
                return f"{section}.{key} is {value} in {first.path} and {there} in {other.path}"
    if first.config.blocks.partition != other.config.blocks.partition:
        return f"blocks.partition differs between {first.path} and {other.path}"
    if first.config.data.document_mask != other.config.data.document_mask:
        return f"data.document_mask differs between {first.path} and {other.path}"
    if first.checkpoint.tokenizer().hash != other.checkpoint.tokenizer().hash:
        return f"{first.path} and {other.path} were trained with different tokenizers"
    ours, theirs = first.shared(), other.shared()
    if any(not torch.equal(ours[name], theirs[name]) for name in ours):
        return (
            f"the shared embedding differs between {first.path} and {other.path}: a block that does not train it must take"
            " its owner's with --init.from, and be trained again where the owner was"
        )
    return None


def choose_sources(sources: list[BlockSource]) -> dict[int, BlockSource]:
    """Which run gives which block. Raises `UserError` where a block is missing or given twice, or runs do not fit."""
    for other in sources[1:]:
        if (problem := _contradiction(sources[0], other)) is not None:
            raise UserError(f"cannot join: {problem}")
    chosen: dict[int, BlockSource] = {}
    for source in sorted(sources, key=lambda source: source.config.blocks.only == 0):  # single blocks first
        for number in source.held:
            before = chosen.get(number)
            if before is None:
                chosen[number] = source
            elif bool(before.config.blocks.only) == bool(source.config.blocks.only):
                raise UserError(f"cannot join: both {before.path} and {source.path} hold block {number}")
    missing = [number for number in range(1, sources[0].config.model.n_blocks + 1) if number not in chosen]
    if missing:
        raise UserError(f"cannot join: no run given holds block {', '.join(map(str, missing))}")
    return dict(sorted(chosen.items()))


def _has_more(out: Path) -> bool:
    """Whether a joined run holds what `join` did not write: it was evaluated, or trained further."""
    names = {path.name for path in out.iterdir()} - {".lock"}
    return names != {"checkpoints", "config.json", ACCOUNT} or len(list((out / "checkpoints").iterdir())) > 1


def _replace(out: Path, temporary: Path) -> Path | None:
    """Put a finished folder in the place of an older joined run. Returns where that went if it held more than a join."""
    aside = None
    with locked(out):
        if _has_more(out):
            aside = next(path for n in count(1) if not (path := out.with_name(f"{out.name}-before-{n}")).exists())
        doomed = aside or out.with_name(f".deleting-{out.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        out.rename(doomed)
        temporary.rename(out)
    if aside is None:
        shutil.rmtree(doomed, ignore_errors=True)
    return aside


def _sum_of_blocks(chosen: dict[int, BlockSource], blocks: dict[str, dict[str, Any]]) -> TrainState:
    """The joined run's counters: the sums over its blocks, and the last step. A block whose own counter is unknown counts
    as its whole run, which took at least as much."""
    last, sums = 0, dict.fromkeys(COUNTERS, 0.0)
    for source in {id(p): p for p in chosen.values()}.values():
        state = source.checkpoint.training()[0]
        last, whole = max(last, state.step), state.row()
        for name in set(COUNTERS) - {"step"}:
            given = [blocks[str(number)][name] for number, giver in chosen.items() if giver is source]
            sums[name] += whole[name] if None in given else sum(given)
    return TrainState(last, int(sums["tokens"]), FlopCount.from_row(sums), sums["seconds"])


def join(paths: list[Path], out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the run directory ``out`` with the whole model; returns the account of its blocks.

    With ``overwrite`` an older joined run is replaced, once the new one is complete. One that has the same blocks stays as
    it is. One that holds more than a join, such as evaluations or further training, is moved aside and not deleted.

    Raises:
        UserError: runs do not fit together, a block is missing, or ``out`` exists, is in use or cannot be written.
    """
    if out.exists() and not (overwrite and (out / ACCOUNT).exists()):
        why = "and is not a joined run" if overwrite else "; replace it with --overwrite"
        raise UserError(f"{out} exists{'' if why[0] == ';' else ' '}{why}")
    sources = [BlockSource.read(path) for path in paths]
    chosen = choose_sources(sources)
    account: dict[str, Any] = {"blocks": {str(number): source.account(number) for number, source in chosen.items()}}
    if out.exists():
        older, wanted = read_account(out), {number: block["weights"] for number, block in account["blocks"].items()}
        same = wanted == {number: block["weights"] for number, block in older["blocks"].items()}
        if same and content_hash(find_checkpoint(out)) == older["joined"]["weights"]:
            print(f"{out} has these blocks already: left as it is", file=sys.stderr)
            return older
    owner = next((p for n, p in chosen.items() if trains_shared(p.config, n)), sources[0])
    config, tokenizer = owner.checkpoint.config(), owner.checkpoint.tokenizer()
    config.blocks.only, config.init.from_, config.run.dir = 0, "", str(out)
    validate(config)
    weights = dict(owner.shared())
    states: dict[str, Any] = {}
    for number, source in chosen.items():
        weights |= source.block(number)
        states[str(number)] = source.checkpoint.training()[1].get(str(number), {})
    total = _sum_of_blocks(chosen, account["blocks"])
    model = build_model(config.model, None)
    assert isinstance(model, BlocksLM)
    load_weights(model, weights, "the joined runs")
    objective = build_objective(config)
    objective.load_state_dict(states if any(states.values()) else {})
    temporary = out.with_name(f".joining-{out.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        optimizer = torch.optim.AdamW(model.parameters())
        save_checkpoint(temporary, config, tokenizer, model, optimizer, None, total, objective.state_dict())
        write_atomic(temporary / "config.json", json.dumps(to_dict(config), indent=1))
        account["joined"] = {"weights": content_hash(find_checkpoint(temporary)), **total.row()}
        write_atomic(temporary / ACCOUNT, json.dumps(account, indent=1))
        if not out.exists():
            temporary.rename(out)
        elif (aside := _replace(out, temporary)) is not None:
            print(f"the older {out} held more than a join: moved to {aside}", file=sys.stderr)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return account
