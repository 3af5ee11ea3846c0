"""Several processes that train one model, on PyTorch's own engine: torch.distributed, DDP, FSDP2.

The trainer knows several processes only as a `Team`; a team of one does nothing. Several processes give the same run as
one, because

- each reads its own part of every batch, and noise depends on a sample's place in the run, not on who draws it;
- a micro-batch's loss has the weight of its sequences in the whole batch, and gradients, losses, metrics and what an
  objective learns are summed over processes;
- gradients are clipped by their norm over all processes, so all agree on whether a step is skipped;
- the first process decides when to stop and what is on the disk, and tells the others.

`ddp`: every process holds the model, and gradients are averaged during the backward. `fsdp`: parameters, gradients and
optimizer state are sharded (FSDP2, DTensor). Its units are each block of prelude and coda; the whole core with its adapter,
which is gathered once for all K iterations and kept until their backward; and the rest: embedding, final norm, noise
embedding.

A process that stops answering ends the run with an error that names it: see `watchdog`.
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
    """This process's part of a sharded tensor; any other tensor as it is."""
    return cast(Tensor, tensor.to_local()) if hasattr(tensor, "to_local") else tensor


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, laid out as ``like``: if that is sharded, each process keeps its part."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    mesh, placements = cast(Any, like).device_mesh, like.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)  # nothing is sent


class _Unit(nn.Module):
    """The model with a forward that runs any function of it. DDP and FSDP hook in here; they do not see the function's
    arguments, so they neither move nor cast them."""

    def __init__(self, model: LoopedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class Team:
    """This process among those that train one model. ``rank`` counts from 0, ``device`` is its own."""

    def __init__(self, mode: str, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.mode, self.device, self.rank, self.world = mode, device, rank, world
        self.control: Any = None
        """A gloo group for small CPU tensors that the host reads: no wait for the device."""
        self.saving: Any = None
        """Another gloo group, which checkpoints use from their own thread."""
        self.watchdog: Watchdog | None = None
        self.shard_size = world
        self._unit: Any = None
        self._doing = "starting"
        self._asked: tuple[Any, Tensor] | None = None

    # -- joining and leaving -------------------------------------------------------------------------------------------

    @classmethod
    def join(cls, config: ParallelConfig, device: torch.device) -> Team:
        """Connect to the processes that torchrun started.

        Raises:
            UserError: the others cannot be reached, or the settings contradict their number.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        mode = config.mode
        if mode == "auto":
            mode = "ddp" if world > 1 else "none"
        if mode == "none":
            if world > 1:
                raise UserError(f"parallel.mode = none is one process, and there are {world}: take ddp or fsdp")
            return cls("none", device)
        shard_size = config.shard_size or world
        if mode != "fsdp" and config.shard_size:
            raise UserError(f"parallel.shard_size belongs to parallel.mode = fsdp, not {mode}")
        if world % shard_size:
            raise UserError(f"parallel.shard_size = {shard_size} does not divide {world} processes")
        if device.type == "cuda":
            place = int(os.environ.get("LOCAL_RANK", "0"))
            if place >= torch.cuda.device_count():
                raise UserError(f"process {rank} would need GPU {place}; this machine has {torch.cuda.device_count()}")
            device = torch.device("cuda", place if device.index is None or world > 1 else device.index)
            torch.cuda.set_device(device)
        # The watchdog speaks first: it knows who is missing.
        timeout = timedelta(seconds=config.timeout + 60)
        options: dict[str, Any] = {"rank": rank, "world_size": world, "timeout": timeout}
        if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise UserError("several processes are started by torchrun, which tells them where to meet")
        try:
            options["store"] = rendezvous_store(rank == 0, timeout) if world > 1 else dist.HashStore()
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **options)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot reach the other processes: {error}") from None
        # Left open until the interpreter is gone, gloo's threads now and then end the process with an abort.
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
        team = cls(mode, device, rank, world)
        team.shard_size = shard_size
        team.control, team.saving = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        if world > 1:
            team.watchdog = Watchdog(rank, world, config.timeout)
        return team

    def __str__(self) -> str:
        shards = f" in shards of {self.shard_size}" if self.shard_size < self.world else ""
        many = f"{self.world} processes, {self.mode}{shards}, each on " if self.world > 1 else ""
        return many + (self.device.type if self.world > 1 else str(self.device))

    def leave(self) -> None:
        """End a run that went well: wait for the others."""
        if self.mode == "none":
            return
        if self._asked is not None:
            self._asked[0].wait()
        self.beat("leaving")
        dist.barrier(group=self.control)
        if self.watchdog is not None:
            self.watchdog.stop()
        dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def processes(self) -> Processes:
        """The same processes, as those that divide a list of work."""
        return Processes(self.rank, self.world, self.control)

    def sequences_per_process(self, batch_size: int) -> int:
        """How many of a batch's sequences each process gets. Raises `UserError` if they do not divide."""
        if batch_size % self.world:
            raise UserError(f"data.batch_size = {batch_size} does not divide among {self.world} processes")
        return batch_size // self.world

    # -- agreeing ------------------------------------------------------------------------------------------------------

    def decide(self, action: Callable[[], T]) -> T:
        """Run ``action`` on the first process, and return its result (or raise its `UserError`) on all."""
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
        """The largest ``number`` that any process gave at the previous call; 0 at the first. Called at every step, so that
        no process waits for the answer."""
        if self.world == 1:
            return number
        answer = 0
        if self._asked is not None:
            self._asked[0].wait()
            answer = int(self._asked[1])
        asked = torch.tensor([number])
        self._asked = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.control, async_op=True), asked
        return answer

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over processes. The host does not wait if the tensor is on the device."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.control if tensor.device.type == "cpu" else None)
        return tensor

    def sum_all(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`sum` of small tensors in one message, as fp32 on the device."""
        if self.world == 1:
            return tensors
        flat = torch.cat(
            [t.detach().to(self.device, torch.float32, non_blocking=True).view(-1) for t in tensors.values()]
        )
        parts = self.sum(flat).split([t.numel() for t in tensors.values()])
        return {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}

    def beat(self, what: str) -> None:
        """Tell the watchdog that this process makes progress, and what it does next."""
        self._doing = what
        if self.watchdog is not None:
            self.watchdog.beat(what)

    def _beat_within(self, part: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(f"{self._doing}, {part}")

    def beating(self, work: Iterable[T]) -> Iterator[T]:
        """The items of long work; the watchdog is told after each."""
        for number, item in enumerate(work, 1):
            yield item
            self.beat(f"past item {number} of what it is evaluating")

    # -- the model -----------------------------------------------------------------------------------------------------

    def wrap(self, model: LoopedLM, config: Config, bfloat16: bool) -> None:
        """Wrap ``model``, which is the same on every process, in DDP or FSDP. FSDP shards its parameters in place."""
        if self.mode == "none":
            return
        if config.model.n_blocks:
            raise UserError(
                f"parallel.mode = {self.mode}: a model in blocks trains each block in a process of its own,"
                " which share nothing (train/launch/blocks.sh)"
            )
        unit = _Unit(model)
        if self.mode == "ddp":
            # The graph is the same at every step: how often the core is run does not change who gets a gradient.
            self._unit = nn.parallel.DistributedDataParallel(unit, static_graph=True, gradient_as_bucket_view=True)
            return
        if config.optim.name == "muon":
            raise UserError("optim.name = muon needs whole matrices: take parallel.mode = ddp, or adamw")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        warnings.filterwarnings(
            "ignore", message="FSDP2-wrapped module"
        )  # of keys and values as views; nothing is in place
        hybrid = self.shard_size < self.world
        shape = (self.world // self.shard_size, self.shard_size) if hybrid else (self.world,)
        names = ("replicate", "shard") if hybrid else ("shard",)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        # Blocks are gathered in the dtype of their products and gradients summed in fp32. The rest stays fp32: noise levels,
        # norms and the head's table are rounded where they always are.
        half = torch.bfloat16 if bfloat16 else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in (*model.prelude, *model.coda):
            fully_shard(block, mesh=mesh, mp_policy=policy)
            register_fsdp_forward_method(block, "keys_values")
        fully_shard(model.core, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        for name in ("contexts", "inject"):
            register_fsdp_forward_method(model.core, name)
        self._unit = fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        # Two streams run the core twice, and the second backward needs what the first would have let go of.
        cast(Any, model.core).set_reshard_after_backward(False)

    def forward(self, function: Callable[[], T]) -> T:
        """Run ``function``, which calls the model's parts, as one forward pass."""
        self._beat_within("in the forward pass")
        return cast(T, function() if self._unit is None else self._unit(function))

    def rehearse(self, model: LoopedLM, forward: Callable[[], tuple[Tensor, Any]]) -> None:
        """Run one pass, always the same one, and discard its gradients.

        In its first pass DDP learns in which order gradients come and how to pack them. If that were a training step, a
        resumed run would add up its first step in another order than an uninterrupted run.
        """
        self.beat("rehearsing a pass")
        self.forward(forward)[0].backward()
        model.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def micro_batch(self, model: LoopedLM, last: bool) -> Iterator[None]:
        """Context of a micro-batch's forward and backward: gradients are exchanged only in the step's ``last`` one."""
        if self.mode == "ddp" and not last:
            with self._unit.no_sync():
                yield
            return
        if self.mode == "fsdp":
            self._unit.set_requires_gradient_sync(last)
            self._unit.set_is_last_backward(last)
            # What the next micro-batch needs again is kept.
            self._unit.set_reshard_after_backward(last)
            core = cast(Any, model.core)
            core.set_reshard_after_backward(False)
            yield
            if last:
                core.reshard()
            return
        yield

    def backward(self, loss: Tensor) -> None:
        """Backward of this process's part of a loss that is a sum over processes. It is scaled by their number, because DDP
        and FSDP average gradients."""
        self._beat_within("in the backward pass")
        (loss * self.world if self.world > 1 else loss).backward()

    def clip(self, model: LoopedLM, max_norm: float) -> Tensor:
        """Clip gradients to a global norm of ``max_norm``. Returns the norm before, 0-dimensional, the same on all."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm

    @contextlib.contextmanager
    def whole(self, model: LoopedLM) -> Iterator[LoopedLM]:
        """The model with all parameters on every process. Each may call it as often as it likes; nothing is exchanged."""
        if self.mode != "fsdp":
            yield model
            return
        from torch.distributed.fsdp import FSDPModule

        units = [module for module in self._unit.modules() if isinstance(module, FSDPModule)]
        self._unit.set_reshard_after_forward(False)
        for unit in units:
            unit.unshard()
        try:
            yield model
        finally:
            for unit in units:
                unit.reshard()
            for block in (*model.prelude, *model.coda):
                cast(Any, block).set_reshard_after_forward(True)
