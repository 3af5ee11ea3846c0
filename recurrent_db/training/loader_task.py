"""What tasks have in common: batches that a loader makes, addressed by optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic

from recurrent_db.config import Config
from recurrent_db.data import Slots, StepLoader, prefetch
from recurrent_db.data.loader import AnyBatch
from recurrent_db.distributed.team import Team


class LoaderTask(Generic[AnyBatch]):
    """Base of the tasks. A subclass sets ``loader``.

    Args:
        config: the run's configuration.
        team: the processes that share the batches.

    Raises:
        UserError: the batch does not divide evenly among the processes.
    """

    loader: StepLoader[AnyBatch]

    def __init__(self, config: Config, team: Team) -> None:
        self.config, self.team = config, team
        share = team.sequences_per_process(config.data.batch_size)
        self.micro_batch_size = min(config.data.micro_batch_size or share, share)

    def batches(self, step: int, seed: int, slots: Slots) -> Iterator[Iterable[AnyBatch]]:
        self.loader.seed, self.loader.slots = seed, slots
        team = self.team
        return prefetch(self.loader, step, self.micro_batch_size, team.device, rank=team.rank, world=team.world)

    def sample(self) -> AnyBatch:
        first = self.loader.micro_batches(0, self.micro_batch_size, self.team.rank, self.team.world)
        return next(iter(first)).to(self.team.device)
