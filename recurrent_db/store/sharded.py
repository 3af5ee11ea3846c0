"""Checkpoints of several processes, through torch.distributed.checkpoint (DCP).

Each process writes its part, and any number of processes can read it. The folder is an ordinary checkpoint (see `folder`)
with shards in place of whole files:

    shard-0000R-model-00001-of-00003.safetensors   process R's part of the weights
                       00002                       of their EMA
                       00003                       of the optimizer's state, and what the objective keeps for its slots

DCP's usual storage keeps its index in a pickle file, which can execute code. This module uses DCP's safetensors storage
instead: it keeps a shard's position within its tensor in the file's header, as JSON.

After all processes have written and hashed their parts, the first process seals the checkpoint: it writes the manifest,
flushes to disk and renames the folder. An interrupted save therefore never looks like a checkpoint. With
``parallel.async_checkpoints`` a thread does all of this on a copy of the state while training continues.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from recurrent_db.config import Config
from recurrent_db.data.vocabulary import Vocabulary
from recurrent_db.distributed.team import Team
from recurrent_db.errors import UserError
from recurrent_db.optim.ema import EMA
from recurrent_db.store.folder import (
    begin_checkpoint,
    cannot_write,
    discard,
    flush_file,
    manifest_entry,
    prune,
    seal_checkpoint,
    step_folder,
    write_small_files,
)
from recurrent_db.store.tensors import optimizer_tensors
from recurrent_db.store.train_state import TrainState

KINDS = {"weights": 1, "average": 2, "optimizer": 3, "slots": 3}
"""Prefix of a tensor's name -> number of the file that holds it."""

Listing = dict[str, dict[str, Any]]
"""Manifest entries by file name."""


class _Writer(HuggingFaceStorageWriter):
    """DCP's safetensors storage. At the end the first process calls ``seal`` with the manifest entries of all shards."""

    def __init__(self, folder: Path, names: list[str], seal: Callable[[Listing], None]) -> None:
        mapping = {name: KINDS[name.split("/")[0]] for name in names}
        super().__init__(str(folder), fqn_to_index_mapping=mapping, save_distributed=True)
        self.folder, self.seal = folder, seal

    def _split_by_storage_plan(self, storage_plan: Any, items: list[Any]) -> Any:
        # The plan comes from the first process, which does not know the slots of the others.
        return super()._split_by_storage_plan({i.index.fqn: KINDS[i.index.fqn.split("/")[0]] for i in items}, items)

    def write_data(self, plan: Any, planner: Any) -> Any:
        results = super().write_data(plan, planner).value()
        listing: Listing = {}
        for name in {result.storage_data.relative_path for result in results}:
            flush_file(self.folder / name)
            listing[name] = manifest_entry(self.folder / name)
        future: Any = torch.futures.Future()
        future.set_result([replace(r, storage_data=(r.storage_data.relative_path, listing)) for r in results])
        return future

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        listing: Listing = {}
        for process_results in results:
            for result in process_results[:1]:
                listing.update(result.storage_data[1])
        self.seal(listing)


def _live_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, without copying them."""
    tensors = {f"weights/{name}": p.detach() for name, p in model.named_parameters()}
    if ema is not None:
        tensors |= {f"average/{name}": shadow for name, shadow in ema.shadow.items()}
    return tensors | {f"optimizer/{name}": t for name, t in optimizer_tensors(model, optimizer).items()}


class ShardedSaver:
    """Writes the checkpoints of a run of several processes. All processes must call its methods in the same order."""

    def __init__(self, team: Team, run_dir: Path, config: Config, vocabulary: Vocabulary) -> None:
        self.team, self.run_dir, self.config, self.vocabulary = team, run_dir, config, vocabulary
        self._pending: tuple[Path, Path, Future[Any]] | None = None  # hidden folder, checkpoint, result of writing it

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        state: TrainState,
        objective_state: dict[str, Any],
        slot_tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the checkpoint of step ``state.step``, with the state at the time of the call.

        With ``parallel.async_checkpoints`` it returns before the checkpoint is complete.

        Raises:
            UserError: this checkpoint or the previous one cannot be written. Older checkpoints stay intact.
        """
        self.finish()
        team, config, step = self.team, self.config, state.step
        temporary = team.decide(lambda: begin_checkpoint(self.run_dir, step))
        if temporary is None:
            if team.first:
                prune(self.run_dir, config.run.keep)
            return
        if team.first:
            averages = ema.updates if ema is not None else 0
            write_small_files(temporary, config, self.vocabulary, state, objective_state, averages)

        def seal(listing: Listing) -> None:
            seal_checkpoint(self.run_dir, temporary, step, self.vocabulary, config.run.keep, listing)

        tensors = _live_tensors(model, optimizer, ema)
        tensors |= {f"slots/{name}": tensor.contiguous() for name, tensor in (slot_tensors or {}).items()}
        writer = _Writer(temporary, list(tensors), seal)
        if config.parallel.async_checkpoints:
            future: Any = dcp.async_save(tensors, storage_writer=writer, process_group=team.saving)
        else:
            future = Future()
            try:
                dcp.save(tensors, storage_writer=writer, process_group=team.saving)
                future.set_result(None)
            except dcp.CheckpointException as error:
                future.set_exception(error)
        self._pending = temporary, step_folder(self.run_dir, step), future
        if not config.parallel.async_checkpoints:
            self.finish()

    def finish(self) -> None:
        """Wait until the pending checkpoint is complete. Raises `UserError` if it could not be written."""
        if self._pending is None:
            return
        (temporary, target, future), self._pending = self._pending, None
        try:
            future.result()
        except dcp.CheckpointException as error:
            if self.team.first:
                discard(temporary)
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UserError(cannot_write(target, cause, f" (process {rank})")) from None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _contents(folder: Path) -> dict[str, Any]:
    """Shape and dtype of every tensor by name, read from the shards' headers."""
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def _fill(tensors: dict[str, Tensor], folder: Path, alone: bool) -> None:
    """Fill tensors in place, sharded or not. ``alone``: only this process reads."""
    if not tensors:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
        except dcp.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise UserError(f"checkpoint {folder} cannot be read: {cause}") from None


def read_shards(folder: Path, kind: str, keep: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read the whole tensors of one of `KINDS` by name, on the CPU, in this process alone. Empty if there are none.

    ``keep`` selects tensors by name; None selects all.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _contents(folder).items()
        if name.startswith(kind + "/") and (keep is None or keep(name))
    }
    _fill(tensors, folder, alone=True)
    return {name.split("/", 1)[1]: tensor for name, tensor in tensors.items()}


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> None:
    """Fill the model, the optimizer and the EMA in place.

    Each process reads only the part that it holds. Another number of processes may have written the checkpoint.

    Raises:
        UserError: the shards lack a tensor of this model, or cannot be read.
    """
    contents = _contents(folder)
    parameters = dict(model.named_parameters())
    has_average = any(name.startswith("average/") for name in contents)
    tensors = {f"weights/{name}": p.detach() for name, p in parameters.items()}
    if ema is not None and has_average:
        tensors |= {f"average/{name}": shadow for name, shadow in ema.shadow.items()}
    states: dict[str, Tensor] = {}
    for name, entry in contents.items():
        if name.startswith("optimizer/"):
            parameter = parameters[name.split("/", 2)[2]]
            like_parameter = entry.size == parameter.shape
            states[name] = (
                torch.zeros_like(parameter, dtype=entry.properties.dtype)
                if like_parameter
                else torch.zeros(entry.size, dtype=entry.properties.dtype, device=parameter.device)
            )
    for name in tensors:
        if name not in contents:
            raise UserError(f"{folder} has no {name}: it holds a model of another shape")
    with torch.no_grad():
        _fill(tensors | states, folder, alone=not dist.is_initialized())
        if ema is not None and not has_average:
            for name, shadow in ema.shadow.items():
                shadow.copy_(parameters[name])
    for key, value in states.items():
        _, entry_name, name = key.split("/", 2)
        optimizer.state.setdefault(parameters[name], {})[entry_name] = value
