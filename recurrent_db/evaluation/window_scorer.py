"""Scores many windows of tokens in batches: the log-likelihood of each window's targets.

1. `group_windows` sorts the windows. Windows with a shared prefix form one row (`prefix_tree`) if this saves more than the
   longer row costs: the choices of a question, or questions after the same examples. Shared prefixes are computed once.
2. The processes share the rows. Windows whose result is in the answer cache are left out.
3. Rows of similar length run in one batch. Only the positions of targets are read out.

Order, batching, padding, grouping and the number of processes change results by no more than rounding, because a window's
noise depends only on its own key and on positions.

Shapes: M noise draws, B rows, T positions, D width, N positions that are read out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from recurrent_db.accounting.flops import inference_cost
from recurrent_db.distributed.work_sharing import Processes
from recurrent_db.errors import UserError
from recurrent_db.evaluation.answer_cache import AnswerCache, fingerprint
from recurrent_db.evaluation.likelihood import read_positions
from recurrent_db.evaluation.prefix_tree import PrefixTree, TreeNoise, batch_trees, shared_prefix_length
from recurrent_db.model.looped import LoopedLM
from recurrent_db.rng import Rng

logger = logging.getLogger("lm_eval.recurrent_db")

# Limits of automatic batches: tokens per batch (a CPU is fastest while they fit in its caches), and logits per batch (one
# fp32 copy takes 256 MiB on a CPU, 1 GiB on a GPU).
_TOKENS = {"cpu": 1 << 10, "cuda": 1 << 15}
_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 28}

_LONGEST_ROW = 1 << 12
"""Largest number of tokens in a row of several windows. The row's mask grows with its square."""

Result = tuple[float, bool]
"""Sum of log p over the targets in nats, and whether every target is the most likely token."""


@dataclass(frozen=True)
class Window:
    """Input tokens, and one target for each of the last ``len(targets)`` of them."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    request: int
    """Key of the noise."""


@dataclass
class Group:
    """Windows, in sorted order, that form one row. If inference uses noise, all belong to one request."""

    windows: list[Window]
    tree: PrefixTree

    @classmethod
    def of(cls, windows: list[Window]) -> Group:
        return cls(windows, PrefixTree.of([window.inputs for window in windows]))


@dataclass(frozen=True)
class Costs:
    """Costs that `group_windows` weighs, in FLOPs of one block: per token, and per pair of positions in attention."""

    token: float
    pair: float
    longest: int
    """Largest number of tokens in a row. A single window may be longer."""


# ---------------------------------------------------------------------------------------------------------------------
# Which windows share a row


def group_windows(windows: Sequence[Window], costs: Costs | None, noisy: bool = True) -> list[Group]:
    """Put windows into groups, in order of falling row length.

    Args:
        costs: costs to weigh; None puts each window into a row of its own.
        noisy: whether results depend on noise. If so, only windows of one request share a prefix.
    """
    groups: list[Group] = []
    by_request: dict[int, list[Window]] = {}
    for window in windows:
        by_request.setdefault(window.request if noisy else 0, []).append(window)
    for alike in by_request.values():
        alike.sort(key=lambda window: (window.inputs, window.targets))
        before: tuple[int, ...] = ()
        for window in alike:
            common, before = shared_prefix_length(before, window.inputs), window.inputs
            if costs is not None and common:
                last, own = len(groups[-1].tree.tokens), len(window.inputs)
                joint = last + own - common
                saved = common * costs.token - (joint**2 - last**2 - own**2) * costs.pair
                if saved > 0 and joint <= costs.longest:
                    groups[-1].windows.append(window)
                    groups[-1].tree.add(window.inputs, common)
                    continue
            groups.append(Group.of([window]))
    groups.sort(key=lambda group: (-len(group.tree.tokens), group.tree.tokens, group.windows[0].request))
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class WindowScorer:
    """Scores windows with one model. Only ``k`` and ``answers`` may change between calls."""

    model: LoopedLM
    k: int
    draws: int
    rng: Rng
    pad: int
    """Padding token. Any value gives the same results."""
    batch_size: int | None = None
    """Rows per batch. None: as many as the limits `_TOKENS` and `_LOGITS` allow."""
    max_batch_size: int | None = None
    reuse: bool = True
    processes: Processes = field(default_factory=Processes)
    answers: AnswerCache | None = None
    """Cache of results for this model and this ``k``."""
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    flops: float = 0.0
    """Forward FLOPs of all requests so far, over all processes, including requests answered from the cache. Counts rows
    without padding and attention over all pairs, as `accounting.flops` does."""
    seconds: float = 0.0
    """Seconds spent in `score`."""
    _held: int | None = None
    """Tokens per batch that are assumed to fit, after a batch ran out of memory."""

    @torch.no_grad()
    def score(self, windows: Sequence[Window], show: bool = False) -> dict[Window, Result]:
        """The result of every distinct window; (0, True) for a window without targets. All processes must pass the same
        windows.

        Raises:
            UserError: a single window does not fit in the GPU's memory.
        """
        started = time.perf_counter()
        unique = list(dict.fromkeys(windows))
        scored: dict[Window, Result] = {window: (0.0, True) for window in unique if not window.targets}
        groups = group_windows([w for w in unique if w.targets], self._costs(), self.model.recurrence.stochastic)
        mine: dict[Window, Result] = {}
        self.flops += sum(map(self._cost, groups))
        todo = []
        share = self.processes.my_part(groups)
        for group in share:
            found = {window: result for window in group.windows if (result := self._find(window)) is not None}
            mine.update(found)
            left = [window for window in group.windows if window not in found]
            if left:
                todo.append(group if not found else Group.of(left))
        total = sum(len(group.windows) for group in todo)
        hide = None if show and self.processes.rank == 0 else True
        with tqdm(total=total, desc="scoring", unit="request", leave=False, disable=hide) as bar:
            for batch in self._batches(todo):
                for results in self._attempt(batch):
                    mine.update(results)
                    self._keep(results)
                    bar.update(len(results))
        merged = self.processes.merge([[mine[window] for window in group.windows] for group in share])
        for group, each in zip(groups, merged, strict=True):
            scored.update(
                (window, (log_p, greedy)) for window, (log_p, greedy) in zip(group.windows, each, strict=True)
            )
        self.seconds += time.perf_counter() - started
        return scored

    def _cost(self, group: Group) -> float:
        """Forward FLOPs of a group."""
        config, recurrence, length = self.model.config, self.model.recurrence, len(group.tree.tokens)
        flops = length * inference_cost(config, length, recurrence.passes(self.k))
        # The head of the last read-out runs only at the positions of targets.
        unread = length - sum(len(window.targets) for window in group.windows)
        flops -= unread * 2 * config.vocab_size * config.d_model
        return flops * (self.draws if recurrence.stochastic else 1)

    def _costs(self) -> Costs | None:
        if not self.reuse:
            return None
        config = self.model.config
        token = 8 * config.d_model**2 + 6 * config.d_model * config.d_mlp
        return Costs(token, 4 * config.d_model, min(self._tokens, _LONGEST_ROW))

    # -- the answer cache ----------------------------------------------------------------------------------------------

    def _find(self, window: Window) -> Result | None:
        match self.answers.get(_request(window)) if self.answers else None:
            case [float(total), bool(greedy)]:
                return total, greedy
        return None

    def _keep(self, results: dict[Window, Result]) -> None:
        if self.answers is not None:
            self.answers.add({fingerprint(_request(window)): list(result) for window, result in results.items()})

    # -- batches -------------------------------------------------------------------------------------------------------

    @property
    def _tokens(self) -> int:
        """Tokens per automatic batch."""
        kind = "cuda" if self.model.embedding.weight.device.type == "cuda" else "cpu"
        return max(1, min(_TOKENS[kind], _LOGITS[kind] // self.model.config.vocab_size))

    def _batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Batches of groups with rows of similar length, longest first. All rows of a batch have branches, or none has."""
        groups = sorted(groups, key=lambda group: (group.tree.has_branches, -len(group.tree.tokens)))
        for _, alike in itertools.groupby(groups, lambda group: group.tree.has_branches):
            rest = list(alike)
            while rest:
                size = self.batch_size or self._tokens // len(rest[0].tree.tokens)
                size = min(size, self.max_batch_size or size)
                size = size if self._held is None else min(size, self._held // len(rest[0].tree.tokens))
                size = max(1, size)
                yield rest[:size]
                rest = rest[size:]

    def _attempt(self, batch: list[Group]) -> Iterator[dict[Window, Result]]:
        """Results of a batch. If it does not fit in the GPU's memory, it is split into halves."""
        try:
            results = self._run(batch)
        except torch.OutOfMemoryError:
            results = None
        if results is not None:
            yield results
            return
        count = sum(len(group.windows) for group in batch)
        if count == 1:
            raise UserError(
                f"one sequence of {len(batch[0].tree.tokens)} tokens does not fit in the GPU's memory: try a smaller "
                "max_length, fewer draws, or dtype=bfloat16"
            )
        if self._held is None:
            logger.warning("out of GPU memory with %d sequences in a batch; continuing with fewer", count)
        tokens = len(batch) * max(len(group.tree.tokens) for group in batch) // 2
        self._held = tokens if self._held is None else min(self._held, tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            middle = count // 2
            parts = batch[0].windows[:middle], batch[0].windows[middle:]
            halves = [[Group.of(part)] for part in parts]
        else:
            middle = len(batch) // 2
            halves = [batch[:middle], batch[middle:]]
        for half in halves:
            yield from self._attempt(half)

    def _run(self, batch: list[Group]) -> dict[Window, Result]:
        """Results of the windows in a batch of rows: one forward pass per draw."""
        model, recurrence = self.model, self.model.recurrence
        windows = [window for group in batch for window in group.windows]
        at = [
            (number, position)
            for number, group in enumerate(batch)
            for window, path in zip(group.windows, group.tree.paths, strict=True)
            for position in path[-len(window.targets) :]
        ]
        requests = torch.tensor([group.windows[0].request for group in batch])
        with self.autocast():
            tokens_BT, places_BT, visible = batch_trees(model, [group.tree for group in batch], self.pad)
            rows_N, positions_N = torch.tensor(at, device=tokens_BT.device).T
            e_BTD = model.encode(tokens_BT, visible)
            chosen = []
            for draw in range(self.draws if recurrence.stochastic else 1):
                noise = TreeNoise(self.rng, requests, model.config.max_seq_len, draw, places_BT=places_BT)
                [(_, hidden_BTD)] = recurrence.hidden(model, tokens_BT, e_BTD, [self.k], noise, visible=visible)
                chosen.append(hidden_BTD[rows_N, positions_N])
            targets_N = torch.tensor([target for window in windows for target in window.targets]).to(rows_N)
            log_p_N, greedy_N = read_positions(model, torch.stack(chosen), targets_N)
        counts = [len(window.targets) for window in windows]
        sums = [part.sum().item() for part in log_p_N.double().cpu().split(counts)]
        flags = [bool(part.all()) for part in greedy_N.cpu().split(counts)]
        return dict(zip(windows, zip(sums, flags, strict=True), strict=True))


def _request(window: Window) -> list[Any]:
    return ["score", window.inputs, window.targets, window.request]
