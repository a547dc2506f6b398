"""The sweep: forward over the blocks, and backward for exact gradients, with one block's weights in memory.

Gradients of each block's own output (``block_local``) and estimates from forward runs (``forward_only``) need no way back.

Forward keeps each block's input only. Backward visits the blocks last to first, brings one in, recomputes it with
gradients on, folds every weight gradient into its statistics, and lets go. Where what autograd keeps of the last blocks
fits in the memory allowed, it is kept and the recomputation skipped; the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from secateur.checkpoint.architecture import named_inputs
from secateur.checkpoint.matrices import BlockMatrices
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import progress
from secateur.errors import ModelError
from secateur.files import full_disk_is_an_error
from secateur.statistics import GradientSource, GradientStatistic, InputStatistic, Statistic, gradient_kinds
from secateur.sweep.block_local import run_with_own_gradients
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls, enter, head
from secateur.sweep.forward_only import Queries, Quotients, estimated
from secateur.sweep.taps import GradientTaps, InputTaps

BlockStatistics = dict[str, dict[type[Statistic], Statistic]]
"""For each matrix of a block, the statistics gathered on it."""

Visit = Callable[[int, nn.Module, BlockStatistics], Mapping[str, torch.Tensor] | None]
"""Called with a block while its weights are in memory; what it returns replaces weights before the block's outputs
are computed anew (pruned propagation)."""


@dataclass(frozen=True)
class SweepSettings:
    """How to walk.

    Attributes:
        micro_batch: windows that run through a block at once.
        memory: bytes allowed for block inputs and kept activations; inputs beyond it go to ``scratch``.
        scratch: a folder for what does not fit.
        gradient: where gradients come from.
        queries: the directions of forward-only gradients.
    """

    micro_batch: int
    memory: int
    scratch: Path
    gradient: GradientSource = "exact"
    queries: Queries = field(default_factory=Queries)


@dataclass
class _Kept:
    """One block's run on one micro-batch with its autograd graph."""

    x_BTD: torch.Tensor
    out_BTD: torch.Tensor
    taps: GradientTaps


class Sweep:
    """Walks over one checkpoint with one set of calibration windows.

    Args:
        checkpoint: the model; its blocks are brought in one at a time.
        ids_NT: token windows ``(N, T)``, int64.
        settings: micro-batch and memory.

    Attributes:
        loss: mean next-token cross-entropy of the dense model over the windows, once a backward walk has run.
    """

    def __init__(self, checkpoint: Checkpoint, ids_NT: torch.Tensor, settings: SweepSettings) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.loss: float | None = None
        require_causal(checkpoint)
        # Where windows would mix inside a block they go one at a time: statistics are means over windows.
        apart = checkpoint.skeleton.keeps_windows_apart
        self._batches = list(ids_NT.split(settings.micro_batch if apart else 1))

    def _inputs(self) -> list[dict[str, torch.Tensor]]:
        return [named_inputs(ids_BT) for ids_BT in self._batches]

    def dense(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        """Gather statistics of the dense model and visit each block of ``blocks`` once.

        Blocks are visited first to last, or last to first where exact gradients are needed.

        Raises:
            ModelError: activations, the loss or gradients are not finite.
        """
        gradients = gradient_kinds(needs)
        if gradients and self.settings.gradient == "exact":
            self._with_gradients(needs, blocks, visit)
        elif gradients and self.settings.gradient == "forward":
            self._forward(needs - gradients, blocks, self._estimating(gradients, blocks, visit), pruned=False)
        else:
            self._forward(needs, blocks, visit, pruned=False)

    def pruned(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        """Visit the blocks first to last; each sees the inputs that the blocks before it give after their visit.

        A block's statistics come from one run with its dense weights (methods §0.1); what ``visit`` returns then
        replaces its weights, and a second run gives the inputs of the next. Of gradients only block-local ones are gathered
        on this walk: the others are the dense model's.
        """
        assert self.settings.gradient == "block" or not gradient_kinds(needs)
        self._forward(needs, blocks, visit, pruned=True)

    def _estimating(self, kinds: frozenset[type[GradientStatistic]], blocks: range, visit: Visit) -> Visit:
        """Measure the loss along every query; return ``visit`` with estimated gradients beside what was gathered."""
        settings, skeleton = self.settings, self.checkpoint.skeleton
        quotients = Quotients(
            self.checkpoint, self._batches, settings.queries, blocks, settings.memory, settings.scratch
        )
        c_QN = quotients.measure_QN()

        def visit_with_gradients(index: int, block: nn.Module, statistics: BlockStatistics) -> Any:
            shapes, prefix = skeleton.block_shapes(index), skeleton.block_prefix(index)
            for name, matrix in skeleton.prunable(index).items():
                shape_OI = matrix.shape(shapes)
                statistics[name] |= estimated(kinds, prefix + name, shape_OI, c_QN, settings.queries)
            return visit(index, block, statistics)

        return visit_with_gradients

    def _forward(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit, pruned: bool) -> None:
        store = BoundaryStore(self.settings.memory, self.settings.scratch)
        with full_disk_is_an_error(self.settings.scratch), progress("Sweeping the blocks", blocks.stop) as advance:
            calls = enter(self.checkpoint, self._inputs(), lambda batch, x_BTD: store.put((0, batch), x_BTD))
            for index in range(blocks.stop):  # what follows the last block asked for is never run
                with resident_block(self.checkpoint, index) as block:
                    self._forward_block(index, block, calls, store, needs, blocks, visit, pruned)
                advance()
        store.clear()

    @torch.no_grad()
    def _forward_block(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        needs: frozenset[type[Statistic]],
        blocks: range,
        visit: Visit,
        pruned: bool,
    ) -> None:
        matrices = self.checkpoint.skeleton.prunable(index) if index in blocks else {}
        statistics = _fresh(matrices, needs)
        last = index == blocks.stop - 1
        again = pruned and index in blocks and not last
        taps = InputTaps(matrices, _of_kind(statistics, InputStatistic))
        own = _of_kind(statistics, GradientStatistic) if gradient_kinds(needs) else None
        for batch in range(len(self._batches)):
            x_BTD = store.pop((index, batch))
            run = partial(calls.run, block, index, batch)
            with taps.watching(block, len(x_BTD)):
                out_BTD = run_with_own_gradients(block, run, x_BTD, matrices, own) if own else run(x_BTD)
            _finite(out_BTD, index)
            if not last:
                store.put((index, batch) if again else (index + 1, batch), x_BTD if again else out_BTD)
        if index not in blocks:
            return
        replaced = visit(index, block, statistics)
        if again:
            if replaced:
                block.load_state_dict(dict(replaced), strict=False, assign=True)
            for batch in range(len(self._batches)):
                out_BTD = calls.run(block, index, batch, store.pop((index, batch)))
                store.put((index + 1, batch), _finite(out_BTD, index))

    def _with_gradients(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        count = len(self.checkpoint.skeleton.blocks)
        gathered: dict[int, BlockStatistics] = {}
        store = BoundaryStore(self.settings.memory, self.settings.scratch)
        kept: dict[tuple[int, int], _Kept] = {}
        with full_disk_is_an_error(self.settings.scratch):
            calls = enter(self.checkpoint, self._inputs(), lambda batch, x_BTD: store.put((0, batch), x_BTD))
            keep_from = self._keep_from(calls, store, blocks.start)
            with progress("Forward over the blocks", count) as advance:
                for index in range(count):
                    with resident_block(self.checkpoint, index) as block:
                        gathered[index] = self._record(index, block, calls, store, kept, needs, blocks, keep_from)
                    advance()
            self._loss_gradients(calls, store, count)
            with progress("Backward over the blocks", count - blocks.start) as advance:
                for index in reversed(range(blocks.start, count)):
                    with resident_block(self.checkpoint, index) as block:
                        self._backward_block(
                            index, block, calls, store, kept, gathered[index], first=index == blocks.start
                        )
                        if index in blocks:
                            visit(index, block, gathered.pop(index))
                    advance()
        store.clear()

    def _record(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        kept: dict[tuple[int, int], _Kept],
        needs: frozenset[type[Statistic]],
        blocks: range,
        keep_from: int,
    ) -> BlockStatistics:
        """Run one block forward, remembering its inputs (or its autograd graph) for the way back."""
        matrices = self.checkpoint.skeleton.prunable(index) if index in blocks else {}
        statistics = _fresh(matrices, needs)
        taps = InputTaps(matrices, _of_kind(statistics, InputStatistic))
        for batch in range(len(self._batches)):
            x_BTD = store.pop((index, batch))
            with taps.watching(block, len(x_BTD)):
                if index >= keep_from:
                    run = self._run_with_graph(index, block, calls, batch, x_BTD, matrices)
                    kept[index, batch] = run
                    out_BTD = run.out_BTD.detach()
                else:
                    with torch.no_grad():
                        out_BTD = calls.run(block, index, batch, x_BTD)
            if keep_from > index >= blocks.start:
                store.put((index, batch), x_BTD)
            store.put((index + 1, batch), _finite(out_BTD, index))
        return statistics

    def _run_with_graph(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        batch: int,
        x_BTD: torch.Tensor,
        matrices: BlockMatrices,
    ) -> _Kept:
        x_BTD = x_BTD.detach().requires_grad_()
        taps = GradientTaps(matrices, len(x_BTD))
        with torch.enable_grad(), taps.watching(block):
            out_BTD = calls.run(block, index, batch, x_BTD)
        return _Kept(x_BTD, out_BTD, taps)

    def _loss_gradients(self, calls: BlockCalls, store: BoundaryStore, count: int) -> None:
        """Replace the last block's outputs by the gradients of each window's own loss; one window's logits at a time."""
        losses = []
        with head(self.checkpoint, calls) as logits, progress("Loss of each window", len(self._batches)) as advance:
            for batch, ids_BT in enumerate(self._batches):
                gradients = []
                for ids_T, hidden_TD in zip(ids_BT, store.pop((count, batch)), strict=True):
                    hidden_1TD = hidden_TD[None].detach().requires_grad_()
                    logits_TV = logits(named_inputs(ids_T[None]), hidden_1TD)[0, :-1]
                    loss = F.cross_entropy(logits_TV, ids_T[1:])
                    (gradient_1TD,) = torch.autograd.grad(loss, hidden_1TD)
                    losses.append(loss.item())
                    gradients.append(gradient_1TD)
                store.put((count, batch), torch.cat(gradients))
                advance()
        self.loss = sum(losses) / len(losses)
        if not torch.isfinite(torch.tensor(self.loss)):
            raise ModelError(
                "the loss of the dense model is not finite on the calibration windows; its weights are damaged"
            )

    def _backward_block(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        kept: dict[tuple[int, int], _Kept],
        statistics: BlockStatistics,
        first: bool,
    ) -> None:
        matrices = self.checkpoint.skeleton.prunable(index) if statistics else {}
        for batch in range(len(self._batches)):
            gradient_BTD = store.pop((index + 1, batch))
            run = kept.pop((index, batch), None)
            if run is None:
                run = self._run_with_graph(index, block, calls, batch, store.pop((index, batch)), matrices)
            run.out_BTD.backward(gradient_BTD)
            run.taps.fold(_of_kind(statistics, GradientStatistic))
            entering_gradient_BTD = run.x_BTD.grad
            assert entering_gradient_BTD is not None
            _finite(entering_gradient_BTD, index)
            if not first:
                store.put((index, batch), entering_gradient_BTD)

    def _keep_from(self, calls: BlockCalls, store: BoundaryStore, start: int) -> int:
        """The first block that may keep what autograd holds; the store is left the memory that this does not take."""
        count = len(self.checkpoint.skeleton.blocks)
        first_BTD = store.pop((0, 0))
        inputs = first_BTD.numel() * first_BTD.element_size() * len(self._batches)
        # Inputs of every block, and the gradients that replace them one block at a time.
        free = self.settings.memory - (count - start + 2) * inputs
        fitting = 0
        if free > 0:
            each = self._graph_bytes(calls, first_BTD)
            fitting = min(count - start, free // each)
            store.memory -= fitting * each
        store.put((0, 0), first_BTD)
        return count - fitting

    def _graph_bytes(self, calls: BlockCalls, first_BTD: torch.Tensor) -> int:
        """Bytes that one block's kept graph holds over all micro-batches, its weights included (measured on block 0)."""
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with resident_block(self.checkpoint, 0) as block:
            weights = sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                run = self._run_with_graph(0, block, calls, 0, first_BTD, self.checkpoint.skeleton.prunable(0))
            return weights + (sum(seen.values()) + run.taps.bytes()) * len(self._batches)


def require_causal(checkpoint: Checkpoint) -> None:
    """Calibration is next-token prediction on text, so it needs a model that does that.

    Raises:
        ModelError: the model is an encoder, reads images, or has another head.
    """
    if not checkpoint.skeleton.is_causal:
        raise ModelError(
            f"{type(checkpoint.skeleton.model).__name__} is not a causal language model, and calibration is text "
            "predicted token by token; choose a criterion that needs none (magnitude, random)"
        )


def _fresh(matrices: BlockMatrices, needs: frozenset[type[Statistic]]) -> BlockStatistics:
    return {name: {kind: kind() for kind in needs} for name in matrices}


def _of_kind(statistics: BlockStatistics, base: type) -> dict[str, list]:
    return {name: [s for s in kinds.values() if isinstance(s, base)] for name, kinds in statistics.items()}


def _finite(x_BTD: torch.Tensor, index: int) -> torch.Tensor:
    if not torch.isfinite(x_BTD).all():
        raise ModelError(
            f"block {index} gives values that are not finite on the calibration windows; the model's weights are damaged "
            "or its numbers overflow"
        )
    return x_BTD
