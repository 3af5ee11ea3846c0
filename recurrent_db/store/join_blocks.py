"""Joins blocks that were trained separately into one model: `recurrent-db blocks join RUN... OUT`.

A run of one block (`train/pretrain.py --blocks.only`) supplies that block. A run of a whole model, such as an earlier join,
supplies the blocks that no other run has, so that one block can be replaced. What the blocks share (the embedding and head)
must be bitwise equal in all runs. If each block has a copy of it, their fixed class embeddings must be. Nothing is trained
or averaged: the result holds the runs' own tensors.
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
from recurrent_db.model.build import build_network
from recurrent_db.objectives import build_objective
from recurrent_db.objectives.block_choice import trains_shared
from recurrent_db.schema import to_dict
from recurrent_db.store.checkpoint import Checkpoint, save_checkpoint
from recurrent_db.store.folder import content_hash, find_checkpoint
from recurrent_db.store.metrics import counted_where, read_metrics
from recurrent_db.store.tensors import load_weights
from recurrent_db.store.train_state import TrainState

ACCOUNT = "blocks.json"
"""Name of the account, a file of a joined run. Its key ``blocks`` holds the source and cost of each block. Its key
``joined`` holds the hash of the joined weights and the counters of the joined run."""
COUNTERS = tuple(TrainState().row())
"""Counters in the account, named as the columns of metrics.jsonl."""


@dataclass
class BlockSource:
    """A run that supplies blocks."""

    path: Path
    checkpoint: Checkpoint
    config: Config
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> BlockSource:
        """Read a run. Raises `UserError` if it is not a run of a model in blocks."""
        checkpoint = Checkpoint(find_checkpoint(path))
        config = checkpoint.config()
        if not config.model.n_blocks:
            raise UserError(f"{path} is not a run of blocks (model.n_blocks is 0)")
        return cls(path, checkpoint, config, checkpoint.weights(averaged=True))

    @property
    def held(self) -> list[int]:
        """Numbers of the blocks that the run holds, from 1."""
        return [self.config.blocks.only] if self.config.blocks.only else list(range(1, self.config.model.n_blocks + 1))

    def shared(self) -> dict[str, Tensor]:
        """The parameters that the blocks share, by name."""
        return {name: value for name, value in self.weights.items() if not name.startswith("blocks.")}

    def targets(self) -> list[Tensor]:
        """The fixed class embeddings in the blocks' own copies of what surrounds them, if they have copies."""
        return [
            value
            for name, value in self.weights.items()
            if name.startswith("blocks.") and name.endswith(".frame.targets")
        ]

    def block(self, number: int) -> dict[str, Tensor]:
        """The parameters of one block, by name."""
        return {name: value for name, value in self.weights.items() if name.startswith(f"blocks.{number}.")}

    def account(self, number: int) -> dict[str, Any]:
        """The source and cost of one block, from its run's counters and metrics up to the checkpoint used."""
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
        if not self.config.blocks.only:  # the run's own counters and memory cover all its blocks
            counted, split = counted_where(rows, f"loss_block_{number}", COUNTERS, before.get("joined")), {}
        if before:  # a joined run that was trained further: add what its blocks cost before the join
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
    """The account (`ACCOUNT`) of a joined run. Empty for any other run.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / ACCOUNT
    if not path.exists():
        return {}
    try:
        account: dict[str, Any] = read_json(path)
        block_keys = {"weights", "steps", *COUNTERS} - {"step"}
        if account["joined"].keys() == {"weights", *COUNTERS} and all(
            block.keys() >= block_keys for block in account["blocks"].values()
        ):
            return account
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is damaged: join the blocks again under another name")


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs of a section of a configuration."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _contradiction(first: BlockSource, other: BlockSource) -> str | None:
    """Why the blocks of two runs do not fit into one model; None if they do."""
    if (name := first.config.objective.name) != (theirs_name := other.config.objective.name):
        return f"objective.name is {name} in {first.path} and {theirs_name} in {other.path}"
    for section in ("model", "objective"):
        ours, theirs = to_dict(getattr(first.config, section)), to_dict(getattr(other.config, section))
        for key, value in _flat(ours):
            if value != (there := dict(_flat(theirs))[key]):
                return f"{section}.{key} is {value} in {first.path} and {there} in {other.path}"
    if first.config.blocks.partition != other.config.blocks.partition:
        return f"blocks.partition differs between {first.path} and {other.path}"
    if first.config.data.document_mask != other.config.data.document_mask:
        return f"data.document_mask differs between {first.path} and {other.path}"
    if first.checkpoint.vocabulary().hash != (vocabulary := other.checkpoint.vocabulary()).hash:
        return f"{first.path} and {other.path} were trained with different {vocabulary.kind}"
    ours, theirs = first.shared(), other.shared()
    if ours.keys() != theirs.keys():
        return (
            f"blocks.shared is {first.config.blocks.shared} in {first.path} and {other.config.blocks.shared} in"
            f" {other.path}: either all blocks or no blocks have copies of what they share"
        )
    if any(not torch.equal(first.targets()[0], table) for table in (*first.targets(), *other.targets())):
        return f"the fixed class embeddings differ between {first.path} and {other.path}: train both with the same seed"
    if any(not torch.equal(ours[name], theirs[name]) for name in ours):
        return (
            f"the shared embedding differs between {first.path} and {other.path}: a block that does not own it must start"
            " with --init.from OWNER, and must be trained again after its owner"
        )
    return None


def choose_sources(sources: list[BlockSource]) -> dict[int, BlockSource]:
    """Choose the run that supplies each block, by block number.

    Raises:
        UserError: a block is missing or given twice, or the runs do not fit together.
    """
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
    """Whether a joined run holds files that `join` did not write, because it was evaluated or trained further."""
    names = {path.name for path in out.iterdir()} - {".lock"}
    return names != {"checkpoints", "config.json", ACCOUNT} or len(list((out / "checkpoints").iterdir())) > 1


def _replace(out: Path, temporary: Path) -> Path | None:
    """Replace an existing joined run by a finished folder.

    An existing run that was evaluated or trained further is renamed. Returns its new path, or None if it was deleted.
    """
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
    """The counters of the joined run: the sums over its blocks, and the largest step.

    If a counter of a block is unknown, the counter of its whole run is used, which is at least as large.
    """
    last, sums = 0, dict.fromkeys(COUNTERS, 0.0)
    for source in {id(p): p for p in chosen.values()}.values():
        state = source.checkpoint.training()[0]
        last, whole = max(last, state.step), state.row()
        for name in set(COUNTERS) - {"step"}:
            given = [blocks[str(number)][name] for number, other in chosen.items() if other is source]
            sums[name] += whole[name] if None in given else sum(given)
    return TrainState(last, int(sums["tokens"]), FlopCount.from_row(sums), sums["seconds"])


def join(paths: list[Path], out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Join the blocks of ``paths`` into a new run directory ``out``. Nothing is trained.

    Args:
        paths: run directories or checkpoints, in any order.
        overwrite: replace an existing joined run once the new one is complete. One with the same blocks is left unchanged.
            One that was evaluated or trained further is renamed instead of deleted.

    Returns:
        The account (`ACCOUNT`) of the joined run.

    Raises:
        UserError: the runs do not fit together, a block is missing, or ``out`` exists, is in use or cannot be written.
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
            print(f"{out} already holds these blocks: left unchanged", file=sys.stderr)
            return older
    owner = next((p for n, p in chosen.items() if trains_shared(p.config, n)), sources[0])
    config, vocabulary = owner.checkpoint.config(), owner.checkpoint.vocabulary()
    config.blocks.only, config.init.from_, config.run.dir = 0, "", str(out)
    validate(config)
    weights = dict(owner.shared())
    states: dict[str, Any] = {}
    for number, source in chosen.items():
        weights |= source.block(number)
        states[str(number)] = source.checkpoint.training()[1].get(str(number), {})
    total = _sum_of_blocks(chosen, account["blocks"])
    model = build_network(config, None)
    load_weights(model, weights, "the joined runs")
    objective = build_objective(config)
    objective.load_state_dict(states if any(states.values()) else {})
    temporary = out.with_name(f".joining-{out.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        optimizer = torch.optim.AdamW(model.parameters())
        save_checkpoint(temporary, config, vocabulary, model, optimizer, None, total, objective.state_dict())
        write_atomic(temporary / "config.json", json.dumps(to_dict(config), indent=1))
        account["joined"] = {"weights": content_hash(find_checkpoint(temporary)), **total.row()}
        write_atomic(temporary / ACCOUNT, json.dumps(account, indent=1))
        if not out.exists():
            temporary.rename(out)
        elif (aside := _replace(out, temporary)) is not None:
            print(f"the existing {out} was evaluated or trained further: moved to {aside}", file=sys.stderr)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return account
