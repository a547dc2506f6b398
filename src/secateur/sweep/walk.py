"""The sweep over the blocks with one block's weights in memory: the forward walk, and what both walks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from secateur.checkpoint.architecture import named_inputs
from secateur.checkpoint.matrices import BlockMatrices
from secateur.checkpoint.placement import HERE, Placement
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import buffers_on, resident_block
from secateur.errors import ModelError
from secateur.files import full_disk_is_an_error
from secateur.finite import all_finite
from secateur.statistics import (
    BLOCK,
    BlockStatistic,
    BlockStatistics,
    GradientSource,
    Statistic,
)
from secateur.sweep.boundary import BoundaryStore, Budget, Committing
from secateur.sweep.entrance import BlockCalls, enter
from secateur.sweep.noise import Queries
from secateur.workers import ALONE, Workers

Visit = Callable[[int, nn.Module, BlockStatistics], Mapping[str, torch.Tensor] | None]
"""Called with a block while its weights are in memory; what it returns replaces weights before the block's outputs
are computed anew (pruned propagation). What it decides has to be on disk when it returns: a run that is killed goes on
after the last block that was visited."""


@dataclass(frozen=True)
class Passage:
    """What goes through one block on a walk over pruned blocks, for whoever fits its weights.

    Attributes:
        batches: the numbers of the micro-batches.
        windows: how many windows each of them holds.
        run: from a micro-batch's number and what enters the block to what the block, as it stands, gives: ``(B, T, D)`` both.
        pairs: streams, for numbers of micro-batches in any order, ``(batch, x_BTD, target_BTD)``: what enters the block
            after the pruned blocks before it, and what it is fitted to.
        dense_inputs: streams ``(batch, x_BTD)``: what enters the block in the dense model; only where the fit asked for it.
        advance: told what part of the fitting is done.
    """

    batches: range
    windows: Sequence[int]
    run: Callable[[int, torch.Tensor], torch.Tensor]
    pairs: Callable[[Sequence[int]], Iterator[tuple[int, torch.Tensor, torch.Tensor]]]
    dense_inputs: Callable[[Sequence[int]], Iterator[tuple[int, torch.Tensor]]]
    advance: Callable[[float], None] = lambda part: None


@dataclass(frozen=True)
class Fit:
    """What is done with a block after its visit.

    Attributes:
        block: called with the block's number, the block and what goes through it. It may change the block's parameters on
            the way; what it returns replaces weights, as what a visit returns does.
        forwards: about what it costs, in plain runs of the block over all windows.
        follows_dense: whether its target is what the dense model gives there; otherwise it is what the dense block gives for
            the inputs that it has.
        dense_inputs: whether it reads what enters the block in the dense model; for those that follow it.
        gone: blocks that have left the pruned model: what enters one goes on as it is, and it is not visited.
    """

    block: Callable[[int, nn.Module, Passage], Mapping[str, torch.Tensor] | None]
    forwards: float
    follows_dense: bool = True
    dense_inputs: bool = False
    gone: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SweepSettings:
    """How to walk.

    Attributes:
        micro_batch: windows that run through a block at once.
        memory: bytes allowed for block inputs and kept activations; what is beyond it goes to ``scratch`` or is computed
            again. It changes no result.
        scratch: a folder for what does not fit, and for what another process needs to go on from.
        placement: where blocks compute.
        workers: the processes that share the windows.
        gradient: where gradients come from.
        queries: the directions of forward-only gradients.
    """

    micro_batch: int
    memory: int
    scratch: Path
    placement: Placement = HERE
    workers: Workers = ALONE
    gradient: GradientSource = "exact"
    queries: Queries = field(default_factory=Queries)


class Walk:
    """One walk's windows, places and stores; forward and backward walks are made of it.

    Args:
        checkpoint: the model; its blocks are brought in one at a time.
        ids_NT: token windows ``(N, T)`` of all workers, int64.
        name: of the folder in ``scratch`` that holds this walk's state.
    """

    def __init__(self, checkpoint: Checkpoint, ids_NT: torch.Tensor, settings: SweepSettings, name: str) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.workers, self.placement = settings.workers, settings.placement
        self.windows = len(ids_NT)
        own = self.workers.share(self.windows)
        # Where windows would mix inside a block they go one at a time: statistics are means over windows.
        apart = checkpoint.skeleton.keeps_windows_apart
        self.ids = list(ids_NT[own.start : own.stop].split(settings.micro_batch if apart else 1))
        self.batches = range(len(self.ids))
        self.tokens = ids_NT[own.start : own.stop].numel()
        self.budget = Budget(settings.memory)
        self.folder = settings.scratch / (name if self.workers.size == 1 else f"{name}-{self.workers.rank}")
        self._committing = Committing()
        self._stores: list[BoundaryStore] = []

    def store(self, name: str) -> BoundaryStore:
        """A store of boundaries that shares this walk's memory."""
        self._stores.append(BoundaryStore(self.budget, self.folder / name))
        return self._stores[-1]

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While the context lasts the model's buffers are on the device, and a full disk is an error for the user."""
        with full_disk_is_an_error(self.settings.scratch), buffers_on(self.checkpoint.skeleton.model, self.placement):
            try:
                yield
            finally:
                for store in self._stores:
                    store.close()

    def enter(self, store: BoundaryStore | None) -> BlockCalls:
        """How the blocks are called; what enters block 0 goes into ``store``, where it is wanted."""

        def take(batch: int, x_BTD: torch.Tensor) -> None:
            if store is not None:
                store.put((0, batch), x_BTD)

        return enter(self.checkpoint, [named_inputs(ids) for ids in self.ids], take, placement=self.placement)

    def block(self, index: int, ahead: int) -> AbstractContextManager[nn.Module]:
        """Block ``index`` with its weights on the device; block ``ahead``, if there is one, is read meanwhile."""
        return resident_block(self.checkpoint, index, self.placement, ahead)

    def stream(self, store: BoundaryStore, boundary: int, keep: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """The micro-batches of a boundary in order, on the device."""
        return store.stream(boundary, self.batches, self.placement.arrive, keep)

    def merge(self, statistics: BlockStatistics) -> None:
        """Add up over workers what each gathered on its own windows."""
        if self.workers.size == 1:
            return
        for kinds in statistics.values():
            for statistic in kinds.values():
                statistic.join(self.workers, self.windows)

    def fresh(self, matrices: BlockMatrices, needs: frozenset[type[Statistic]]) -> BlockStatistics:
        """Statistics that have seen nothing."""
        statistics = fresh(matrices, needs)
        if self.workers.size > 1:
            for kinds in statistics.values():
                for statistic in kinds.values():
                    statistic.remember()
        return statistics

    def seen(self, batch: int) -> int:
        """Windows of this worker that are through after ``batch``; after -1, the last, all."""
        return sum(map(len, self.ids[: batch + 1] if batch >= 0 else self.ids))

    def commit(self, boundary: int, *stores: BoundaryStore) -> None:
        """Make a boundary safe if it is time to and the disk has room to spare, in all workers."""
        if all(self.workers.all(self._committing.due() and all(store.has_room() for store in stores))):
            started = time.monotonic()
            for store in stores:
                store.commit(boundary)
            self.workers.wait()
            self._committing.done(time.monotonic() - started)

    def common(self, store: BoundaryStore) -> set[int]:
        """The boundaries that every worker has committed."""
        return set.intersection(*self.workers.all(store.committed()))


def fresh(matrices: BlockMatrices, needs: frozenset[type[Statistic]]) -> BlockStatistics:
    """Statistics that have seen nothing: of each matrix, and of the block itself."""
    # By name: workers join them one after the other, and a set has another order in every process.
    kinds = sorted(needs, key=lambda kind: kind.name)
    of_block = [kind for kind in kinds if issubclass(kind, BlockStatistic)]
    statistics: BlockStatistics = {name: {kind: kind() for kind in kinds if kind not in of_block} for name in matrices}
    if of_block:
        statistics[BLOCK] = {kind: kind() for kind in of_block}
    return statistics


def of_kind(statistics: BlockStatistics, base: type) -> dict[str, list]:
    """For each matrix the statistics of one kind."""
    return {name: [s for s in kinds.values() if isinstance(s, base)] for name, kinds in statistics.items()}


def finite(x_BTD: torch.Tensor, index: int) -> torch.Tensor:
    """``x_BTD`` itself.

    Raises:
        ModelError: it holds NaN or infinity.
    """
    if not all_finite(x_BTD):
        raise ModelError(
            f"block {index} gives values that are not finite on the calibration windows; the model's weights are damaged "
            "or its numbers overflow"
        )
    return x_BTD
