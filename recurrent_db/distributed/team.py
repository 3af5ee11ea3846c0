"""Several processes that train one model, through torch.distributed, DDP and FSDP2.

The trainer calls the methods of a `Team`. In a team of one process they do nothing. Several processes compute the same run
as one process, because

- each reads its own part of every batch, and noise depends only on a sample's position in the run;
- the loss of a micro-batch is weighted by its share of the batch's sequences, and gradients, losses and metrics are summed
  over processes;
- gradients are clipped by their norm over all processes, so all agree on whether a step is skipped;
- the first process reads the clock and manages the files, and the others follow its decisions.

`ddp`: every process holds the whole model, and gradients are averaged during the backward pass. `fsdp`: parameters,
gradients and optimizer state are sharded (FSDP2, DTensor). The sharding units are:

- each block of prelude and coda;
- the whole core with its adapter, gathered once for all K iterations and kept until their backward pass is done;
- the rest: embedding, final norm, noise embedding.

A process that stops responding ends the run with an error that names it: see `watchdog`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recurrent_db.config import Config, ParallelConfig
from recurrent_db.distributed.rendezvous import rendezvous_store
from recurrent_db.distributed.watchdog import Watchdog
from recurrent_db.distributed.work_sharing import Processes
from recurrent_db.errors import UserError
from recurrent_db.model.looped import LoopedLM

T = TypeVar("T")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor. Any other tensor is returned unchanged."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """Shard ``whole`` as ``like`` is sharded; return it unchanged if ``like`` is not sharded.

    ``whole`` must be the same on every process. Each process keeps its own part.
    """
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    mesh, placements = cast(Any, like).device_mesh, like.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)  # nothing is sent


class _Unit(nn.Module):
    """A module that holds the model and whose forward calls a given function.

    DDP and FSDP hook into this forward. They do not see the function's arguments, so they neither move nor cast them.
    """

    def __init__(self, model: LoopedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def _plain(model: LoopedLM) -> LoopedLM:
    """A model for inference, without hooks, that shares the gathered parameters of ``model``."""
    with torch.device("meta"):
        plain = LoopedLM(model.config)
    # Not model.state_dict(): it would shard the parameters again.
    plain.load_state_dict({**dict(model.named_parameters()), **dict(model.named_buffers())}, assign=True)
    plain.recurrence, plain.attention, plain.document_mask = model.recurrence, model.attention, model.document_mask
    return plain.train(model.training).requires_grad_(False)


class Team:
    """The processes that train one model, seen from one of them.

    Args:
        mode: "none", "ddp" or "fsdp".
        device: device of this process.
        rank: number of this process, from 0.
        world: number of processes.
    """

    def __init__(self, mode: str, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.mode, self.device, self.rank, self.world = mode, device, rank, world
        self.control: Any = None
        """gloo group for small CPU tensors that the host reads without waiting for the device."""
        self.saving: Any = None
        """gloo group for checkpoints, which are written in a thread of their own."""
        self.watchdog: Watchdog | None = None
        self.shard_size = world
        self._unit: Any = None
        self._activity = "starting"
        self._pending_maximum: tuple[Any, Tensor] | None = None

    # -- joining and leaving -------------------------------------------------------------------------------------------

    @classmethod
    def join(cls, config: ParallelConfig, device: torch.device) -> Team:
        """Connect to the processes that torchrun started.

        Raises:
            UserError: the other processes cannot be reached, the settings do not fit the number of processes, or this
                process has no GPU.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        mode = config.mode
        if mode == "auto":
            mode = "ddp" if world > 1 else "none"
        if mode == "none":
            if world > 1:
                raise UserError(f"parallel.mode = none runs one process, but there are {world}: use ddp or fsdp")
            return cls("none", device)
        shard_size = config.shard_size or world
        if mode != "fsdp" and config.shard_size:
            raise UserError(f"parallel.shard_size needs parallel.mode = fsdp, not {mode}")
        if world % shard_size:
            raise UserError(f"parallel.shard_size = {shard_size} does not divide {world} processes")
        if device.type == "cuda":
            place = int(os.environ.get("LOCAL_RANK", "0"))
            if place >= torch.cuda.device_count():
                raise UserError(
                    f"process {rank} needs GPU {place}, but this machine has {torch.cuda.device_count()} GPUs"
                )
            device = torch.device("cuda", place if device.index is None or world > 1 else device.index)
            torch.cuda.set_device(device)
        # The watchdog must report first, because it knows which process is missing.
        timeout = timedelta(seconds=config.timeout + 60)
        options: dict[str, Any] = {"rank": rank, "world_size": world, "timeout": timeout}
        if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError("several processes must be started by torchrun, which sets MASTER_ADDR and MASTER_PORT")
        try:
            options["store"] = rendezvous_store(rank == 0, timeout) if world > 1 else dist.HashStore()
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **options)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot reach the other processes: {error}") from None
        # If the group is still open when the interpreter exits, gloo's threads sometimes abort the process.
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
        team = cls(mode, device, rank, world)
        team.shard_size = shard_size
        team.control, team.saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        if world > 1:
            team.watchdog = Watchdog(rank, world, config.timeout)
        return team

    def __str__(self) -> str:
        shards = f" in shards of {self.shard_size}" if self.shard_size < self.world else ""
        processes = f"{self.world} processes, {self.mode}{shards}, each on " if self.world > 1 else ""
        return processes + (self.device.type if self.world > 1 else str(self.device))

    def leave(self) -> None:
        """Wait for the others and disconnect, at the end of a successful run."""
        if self.mode == "none":
            return
        if self._pending_maximum is not None:
            self._pending_maximum[0].wait()
        self.beat("leaving")
        dist.barrier(group=self.control)
        if self.watchdog is not None:
            self.watchdog.stop()
        dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the first process, which prints and writes files."""
        return self.rank == 0

    @property
    def processes(self) -> Processes:
        """These processes as `Processes`, which divide a list of work."""
        return Processes(self.rank, self.world, self.control)

    def sequences_per_process(self, batch_size: int) -> int:
        """Sequences of a batch per process. Raises `UserError` unless ``batch_size`` is a multiple of the processes."""
        if batch_size % self.world:
            raise UserError(f"data.batch_size = {batch_size} is not a multiple of {self.world} processes")
        return batch_size // self.world

    def slots(self, batch_size: int) -> range:
        """The slots (places in the batch) that this process computes."""
        share = self.sequences_per_process(batch_size)
        return range(self.rank * share, (self.rank + 1) * share)

    # -- agreement between processes -----------------------------------------------------------------------------------

    def decide(self, action: Callable[[], T]) -> T:
        """Run ``action`` on the first process. Returns its result, or raises its `UserError`, on all processes."""
        if self.world == 1:
            return action()
        answer: list[Any] = [None, ""]
        if self.first:
            try:
                answer[0] = action()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, group=self.control)
        if answer[1]:
            raise UserError(answer[1])
        return cast(T, answer[0])

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` holds on every process."""
        if self.world == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MIN, group=self.control)
        return bool(flags)

    def largest(self, number: int) -> int:
        """The largest ``number`` that any process passed at the previous call; 0 at the first call.

        It returns the previous call's result so that no process waits. Call it at every step on all processes.
        """
        if self.world == 1:
            return number
        answer = 0
        if self._pending_maximum is not None:
            self._pending_maximum[0].wait()
            answer = int(self._pending_maximum[1])
        value = torch.tensor([number])
        self._pending_maximum = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control, async_op=True), value
        return answer

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over processes. The host does not wait for a tensor on the device."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def sum_all(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`sum` of several small tensors in one message. The sums are fp32, on the device."""
        if self.world == 1:
            return tensors
        flat = torch.cat(
            [t.detach().to(self.device, torch.float32, non_blocking=True).view(-1) for t in tensors.values()]
        )
        parts = self.sum(flat).split([t.numel() for t in tensors.values()])
        return {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}

    def beat(self, what: str) -> None:
        """Report progress to the watchdog. ``what`` is what this process does next."""
        self._activity = what
        if self.watchdog is not None:
            self.watchdog.beat(what)

    def _beat_within(self, part: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(f"{self._activity}, {part}")

    def beating(self, work: Iterable[T]) -> Iterator[T]:
        """Iterate over ``work``, and report progress to the watchdog after each item."""
        for number, item in enumerate(work, 1):
            yield item
            self.beat(f"evaluating, after item {number}")

    # -- the model -----------------------------------------------------------------------------------------------------

    def wrap(self, model: LoopedLM, config: Config, bfloat16: bool) -> None:
        """Wrap ``model``, which must be the same on every process, in DDP or FSDP. FSDP shards its parameters in place.

        Args:
            bfloat16: FSDP gathers the blocks in bfloat16.

        Raises:
            UserError: the model is in blocks, or FSDP is used with Muon or a network for images.
        """
        if self.mode == "none":
            return
        if config.model.n_blocks:
            raise UserError(
                f"parallel.mode = {self.mode} does not train a model in blocks: train each block in its own process"
                " with train/launch/blocks.sh"
            )
        unit = _Unit(model)
        if self.mode == "ddp":
            # The same parameters get a gradient at every step, however often the core runs: the graph is static.
            self._unit = nn.parallel.DistributedDataParallel(unit, static_graph=True, gradient_as_bucket_view=True)
            return
        if config.model.network != "language":
            raise UserError("parallel.mode = fsdp does not shard networks for images: use parallel.mode = ddp")
        if config.optim.name == "muon":
            raise UserError("optim.name = muon does not run on sharded matrices: use parallel.mode = ddp or adamw")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # FSDP warns that keys and values are returned as views. They are not changed in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        hybrid = self.shard_size < self.world
        shape = (self.world // self.shard_size, self.shard_size) if hybrid else (self.world,)
        names = ("replicate", "shard") if hybrid else ("shard",)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        # Blocks are gathered in the dtype of their matrix products, and gradients are summed in fp32. The rest stays fp32:
        # noise levels, norms and the head's table are then rounded at the same places as in one process.
        half = torch.bfloat16 if bfloat16 else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in (*model.prelude, *model.coda):
            fully_shard(block, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(block, "keys_values")
        fully_shard(model.core, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for name in ("contexts", "inject"):
            register_fsdp_forward_method(model.core, name)
        self._unit = fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        # Two streams run the core twice, so the parameters must stay gathered for the second backward pass.
        cast(Any, model.core).set_reshard_after_backward(False)

    def forward(self, function: Callable[[], T]) -> T:
        """Run ``function``, which calls parts of the model, as one forward pass of DDP or FSDP."""
        self._beat_within("in the forward pass")
        return cast(T, function() if self._unit is None else self._unit(function))

    def rehearse(self, model: LoopedLM, forward: Callable[[], tuple[Tensor, Any]]) -> None:
        """Run one forward and backward pass, always the same one, and discard its gradients.

        In its first pass DDP learns the order of the gradients and how to pack them. If that pass were a training step, a
        resumed run would sum the gradients of its first step in another order than an uninterrupted run.
        """
        self.beat("rehearsing a pass")
        self.forward(forward)[0].backward()
        model.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_batch(self, model: LoopedLM, last: bool) -> Iterator[None]:
        """Context of a micro-batch's forward and backward pass. Gradients are exchanged only in the ``last`` of a step."""
        if self.mode == "ddp" and not last:
            with self._unit.no_sync():
                yield
            return
        if self.mode == "fsdp":
            self._unit.set_requires_gradient_sync(last)
            self._unit.set_is_last_backward(last)
            # Parameters stay gathered for the next micro-batch.
            self._unit.set_reshard_after_backward(last)
            core = cast(Any, model.core)
            core.set_reshard_after_backward(False)
            yield
            if last:
                core.reshard()
            return
        yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass of this process's part of a loss that is summed over processes.

        The loss is multiplied by the number of processes, because DDP and FSDP average gradients.
        """
        self._beat_within("in the backward pass")
        (loss * self.world if self.world > 1 else loss).backward()

    def clip(self, model: LoopedLM, max_norm: float) -> Tensor:
        """Clip the gradients to a global norm of ``max_norm``. Returns the norm before clipping, 0-dimensional."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm

    @contextlib.contextmanager
    def whole(self, model: LoopedLM) -> Iterator[LoopedLM]:
        """Yield a model for inference that holds all parameters on every process and needs no communication.

        With FSDP it is a plain model that shares the gathered parameters. FSDP's hooks do not run in it, so the processes
        may call it a different number of times. Every process must enter the context.
        """
        if self.mode != "fsdp":
            yield model
            return
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in self._unit.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.unshard()
        try:
            yield _plain(model)
        finally:
            for unit in units:
                unit.reshard()
