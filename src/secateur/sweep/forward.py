"""First block to last: statistics gathered, blocks replaced and fitted on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from secateur.checkpoint.reader import Checkpoint
from secateur.console import Advance, progress
from secateur.statistics import (
    BLOCK,
    BlockStatistic,
    BlockStatistics,
    GradientStatistic,
    InputStatistic,
    Statistic,
    gradient_kinds,
)
from secateur.sweep.block_local import run_with_own_gradients
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls
from secateur.sweep.taps import InputTaps
from secateur.sweep.walk import Fit, Passage, SweepSettings, Visit, Walk, finite, of_kind


class ForwardWalk(Walk):
    """First block to last, gathering statistics of inputs; each visited block may be replaced on the way.

    Args:
        pruned: whether what a visit returns changes what the next block sees.
        fit: called after each visit; then the dense model's hidden states walk along, as what to fit to.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids_NT: torch.Tensor,
        settings: SweepSettings,
        name: str,
        pruned: bool = False,
        fit: Fit | None = None,
    ) -> None:
        super().__init__(checkpoint, ids_NT, settings, name)
        assert pruned or fit is None
        self._pruned, self._fit = pruned, fit

    def run(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit, done: int | None = None) -> None:
        """Walk to the end of ``blocks`` and visit each.

        Args:
            done: the first block whose visit is not known to be done; those before it may be left out.
        """
        with self.ready():
            store = self.store("inputs")
            dense = self.store("dense") if self._fit else None
            stores = [store] if dense is None else [store, dense]
            safe = set.intersection(*map(self.common, stores))
            reached = {boundary for boundary in safe if boundary <= (done or blocks.start)}
            start = max(reached, default=0)
            for one in stores:
                one.drop(lambda boundary: boundary != start or not reached)
            calls = self.enter(None if reached else store)
            with progress("Sweeping the blocks", blocks.stop, "block", self.tokens, start) as advance:
                for index in range(start, blocks.stop):  # what follows the last block asked for is never run
                    with self.block(index, ahead=index + 1) as block:
                        if dense is not None and self._fit and index in self._fit.gone:
                            self._gone(index, block, calls, store, dense, blocks)
                        else:
                            self._block(index, block, calls, store, dense, needs, blocks, visit, advance)
                    if index + 1 < blocks.stop:
                        self.commit(index + 1, *stores)
                        for one in stores:
                            one.drop_behind(index + 1, forward=True)
                    advance()
            for one in stores:
                one.clear()

    @torch.no_grad()
    def _block(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        dense: BoundaryStore | None,
        needs: frozenset[type[Statistic]],
        blocks: range,
        visit: Visit,
        advance: Advance,
    ) -> None:
        visited, last = index in blocks, index == blocks.stop - 1
        matrices = self.checkpoint.skeleton.prunable(index) if visited else {}
        statistics = self.fresh(matrices, needs) if visited else {}
        again = self._pruned and visited and not last
        fit = self._fit if visited else None
        done = _Runs(self, advance, 1 + again + (1 + fit.forwards if fit else 0))
        taps = InputTaps(matrices, of_kind(statistics, InputStatistic))
        own = of_kind(statistics, GradientStatistic) if gradient_kinds(needs) else None
        for batch, x_BTD in self.stream(store, index, keep=again or fit is not None):
            run = partial(calls.run, block, index, batch)
            with taps.watching(block, len(x_BTD)):
                out_BTD = run_with_own_gradients(block, run, x_BTD, matrices, own) if own else run(x_BTD)
            _feed_block(statistics, x_BTD, finite(out_BTD, index))
            if not last and not again:
                store.put((index + 1, batch), out_BTD)
            # At the first block nothing before it was pruned, so that what it gives is what the dense model gives.
            if dense is not None and not (fit and fit.follows_dense and index > blocks.start):
                dense.put((index + 1, batch), out_BTD)
            done(batch)
        if not visited:
            return
        self.merge(statistics)
        replaced = visit(index, block, statistics)
        del statistics, taps, own  # as large as the block's weights may be
        if fit is not None and dense is not None:
            if index > blocks.start and fit.follows_dense:
                self._on(dense, index, block, calls, lambda batch: done(batch, runs=1), keep=fit.dense_inputs)
            replaced = fit.block(index, block, self._passage(index, block, calls, store, dense, blocks, done))
        if again:
            if replaced:
                block.load_state_dict(dict(replaced), strict=False, assign=True)
            del replaced
            self._on(store, index, block, calls, lambda batch: done(batch, runs=done.all - 1))

    def _on(
        self,
        store: BoundaryStore,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        done: Callable[[int], None] = lambda batch: None,
        keep: bool = False,
    ) -> None:
        """Run all that stands before the block through it, to stand before the next; ``keep``: and there too."""
        for batch, x_BTD in self.stream(store, index, keep=keep):
            store.put((index + 1, batch), finite(calls.run(block, index, batch, x_BTD), index))
            done(batch)

    @torch.no_grad()
    def _gone(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        dense: BoundaryStore,
        blocks: range,
    ) -> None:
        """A block that has left the pruned model: its inputs go on, and only the dense model's go through it."""
        first = index == blocks.start
        for batch, x_BTD in self.stream(store, index):
            store.put((index + 1, batch), x_BTD)
            if first:
                dense.put((index + 1, batch), finite(calls.run(block, index, batch, x_BTD), index))
        if not first:
            self._on(dense, index, block, calls)

    def _passage(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        dense: BoundaryStore,
        blocks: range,
        done: _Runs,
    ) -> Passage:
        before = dense if index > blocks.start else store  # where nothing was pruned yet, both are the same

        def pairs(batches: Sequence[int]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
            entering = store.stream(index, batches, self.placement.arrive, keep=True)
            leaving = dense.stream(index + 1, batches, self.placement.arrive, keep=True)
            for (batch, x_BTD), (_, target_BTD) in zip(entering, leaving, strict=True):
                yield batch, x_BTD, target_BTD

        forwards = self._fit.forwards if self._fit else 0.0
        return Passage(
            batches=self.batches,
            windows=[len(ids_BT) for ids_BT in self.ids],
            run=lambda batch, x_BTD: calls.run(block, index, batch, x_BTD),
            pairs=pairs,
            dense_inputs=lambda batches: before.stream(index, batches, self.placement.arrive, keep=True),
            advance=lambda part: done(-1, runs=1 + part * forwards),
        )


class _Runs:
    """How far the present block is, in runs over all windows.

    Args:
        all: runs there will be.
    """

    def __init__(self, walk: Walk, advance: Advance, all: float) -> None:
        self._walk, self._advance, self.all = walk, advance, all

    def __call__(self, batch: int, runs: float = 0) -> None:
        """``runs`` are over, and in the next one the windows up to ``batch``; after -1 all of them."""
        windows = self._walk.seen(-1)
        self._advance.within(round(windows * runs) + self._walk.seen(batch), round(windows * self.all))


def _feed_block(statistics: BlockStatistics, x_BTD: torch.Tensor, out_BTD: torch.Tensor) -> None:
    """Tell the block's own statistics what entered it and what left it, window by window."""
    for statistic in of_kind(statistics, BlockStatistic).get(BLOCK, []):
        for x_TD, out_TD in zip(x_BTD, out_BTD, strict=True):
            statistic.update(x_TD, out_TD)
