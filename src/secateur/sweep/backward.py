"""Exact gradients with one block's weights in memory.

Forward keeps each block's input only. Backward visits the blocks last to first, brings one in, recomputes it with
gradients on, folds every weight gradient into its statistics, and lets go. Where what autograd keeps of the last blocks
fits in the memory allowed, it is kept and the recomputation skipped; the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from secateur.blockstore import BlockStore
from secateur.checkpoint.architecture import named_inputs
from secateur.checkpoint.matrices import BlockMatrices
from secateur.checkpoint.residency import resident_block
from secateur.console import Advance, progress
from secateur.errors import ModelError
from secateur.statistics import BlockStatistics, GradientStatistic, InputStatistic, Statistic, add_states, as_states
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls, head
from secateur.sweep.taps import InputTaps, Kept, run_with_graph
from secateur.sweep.walk import Visit, Walk, finite, fresh, of_kind

LOGITS = 64 << 20
"""Bytes of float32 logits that exist at once; a window whose logits are larger goes through the head in pieces."""


class BackwardWalk(Walk):
    """Forward to the loss, and back.

    Attributes:
        loss: mean next-token cross-entropy over the windows of all workers, once the walk has come to it; None where an
            earlier process had.
    """

    loss: float | None = None

    def run(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        """Visit the blocks of ``blocks`` last to first, with statistics of the dense model."""
        count = len(self.checkpoint.skeleton.blocks)
        with self.ready():
            inputs, gradients = self.store("inputs"), self.store("gradients")
            from_inputs = frozenset(kind for kind in needs if issubclass(kind, InputStatistic))
            states = BlockStore(self.folder, "statistics", {"needs": sorted(kind.name for kind in from_inputs)})
            top = min((b for b in self.common(gradients) if b >= blocks.stop), default=None)
            gradients.drop(lambda boundary: boundary != top)
            start = self._start(inputs, blocks)
            entering = start == 0 and 0 not in inputs.committed()
            calls = self.enter(inputs if entering else None)
            if entering:
                self.commit(0, inputs)
            kept: dict[tuple[int, int], Kept] = {}
            fresh_start = top is None and start == 0
            keep_from = self._keep_from(calls, inputs, blocks.start) if fresh_start else count
            goal = count if top is None else top - 1  # the last input that is needed
            self._forward(calls, inputs, kept, states, from_inputs, blocks, range(start, goal), keep_from)
            if top is None:
                self._loss_gradients(calls, inputs, gradients)
                top = count
            self._backward(calls, inputs, gradients, kept, states, needs, blocks, top, visit)
            inputs.clear()
            gradients.clear()
            states.clear()

    def _start(self, inputs: BoundaryStore, blocks: range) -> int:
        """Where the forward walk has to begin: after the inputs that an earlier process has made safe."""
        common = self.common(inputs)
        start = 0
        if blocks.start in common:
            start = blocks.start
            while start + 1 in common:
                start += 1
        inputs.drop(lambda boundary: boundary not in common or not blocks.start <= boundary <= start)
        return start

    # -- forward

    def _forward(
        self,
        calls: BlockCalls,
        inputs: BoundaryStore,
        kept: dict[tuple[int, int], Kept],
        states: BlockStore,
        from_inputs: frozenset[type[Statistic]],
        blocks: range,
        walk: range,
        keep_from: int,
    ) -> None:
        """Run each block forward, remembering its inputs (or its autograd graph) for the way back."""
        if not walk:
            return
        with progress("Forward over the blocks", walk.stop, "block", self.tokens, walk.start) as advance:
            for index in walk:
                matrices = self.checkpoint.skeleton.prunable(index) if index in blocks else {}
                statistics = self.fresh(matrices, from_inputs)
                with self.block(index, ahead=index + 1) as block:
                    taps = InputTaps(matrices, of_kind(statistics, InputStatistic))
                    for batch, x_BTD in self.stream(inputs, index, keep=keep_from > index >= blocks.start):
                        with taps.watching(block, len(x_BTD)):
                            out_BTD = self._run(index, block, calls, batch, x_BTD, matrices, kept, index >= keep_from)
                        inputs.put((index + 1, batch), finite(out_BTD, index))
                        advance.within(self.seen(batch), self.seen(-1))
                if from_inputs and index in blocks:
                    self.merge(statistics)
                    states.put(index, as_states(statistics))
                self.commit(index + 1, inputs)
                if not keep_from > index >= blocks.start:
                    inputs.drop(lambda boundary, index=index: boundary == index)  # type: ignore[misc]
                advance()

    def _run(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        batch: int,
        x_BTD: torch.Tensor,
        matrices: BlockMatrices,
        kept: dict[tuple[int, int], Kept],
        keep: bool,
    ) -> torch.Tensor:
        if keep:
            kept[index, batch] = run = self._with_graph(index, block, calls, batch, x_BTD, matrices)
            return run.out_BTD.detach()
        with torch.no_grad():
            return calls.run(block, index, batch, x_BTD)

    def _with_graph(
        self, index: int, block: nn.Module, calls: BlockCalls, batch: int, x_BTD: torch.Tensor, matrices: BlockMatrices
    ) -> Kept:
        return run_with_graph(block, partial(calls.run, block, index, batch), x_BTD, matrices)

    # -- the loss

    def _loss_gradients(self, calls: BlockCalls, inputs: BoundaryStore, gradients: BoundaryStore) -> None:
        """From the last block's outputs the gradients of each window's own loss, and their mean."""
        count = len(self.checkpoint.skeleton.blocks)
        vocabulary = self.checkpoint.config.get_text_config().vocab_size
        losses: list[float] = []
        at_head = head(self.checkpoint, calls, placement=self.placement)
        with at_head as logits, progress("Loss of each window", len(self.ids)) as advance:
            for batch, hidden_BTD in self.stream(inputs, count):
                found = []
                for ids_T, hidden_TD in zip(self.ids[batch], hidden_BTD, strict=True):
                    loss, gradient_1TD = window_gradient(logits, ids_T, hidden_TD, vocabulary)
                    losses.append(loss)
                    found.append(gradient_1TD)
                gradients.put((count, batch), torch.cat(found))
                advance()
        self.loss = sum(loss for part in self.workers.all(losses) for loss in part) / self.windows
        if not torch.isfinite(torch.tensor(self.loss)):
            raise ModelError(
                "the loss of the dense model is not finite on the calibration windows; its weights are damaged"
            )
        self.commit(count, gradients)

    # -- backward

    def _backward(
        self,
        calls: BlockCalls,
        inputs: BoundaryStore,
        gradients: BoundaryStore,
        kept: dict[tuple[int, int], Kept],
        states: BlockStore,
        needs: frozenset[type[Statistic]],
        blocks: range,
        top: int,
        visit: Visit,
    ) -> None:
        count = len(self.checkpoint.skeleton.blocks)
        from_inputs = frozenset(kind for kind in needs if issubclass(kind, InputStatistic))
        with progress("Backward over the blocks", count - blocks.start, "block", self.tokens, count - top) as advance:
            for index in reversed(range(blocks.start, top)):
                matrices = self.checkpoint.skeleton.prunable(index) if index in blocks else {}
                statistics = fresh(matrices, needs - from_inputs)
                with self.block(index, ahead=index - 1) as block:
                    self._backward_block(index, block, calls, inputs, gradients, kept, matrices, statistics, advance)
                    if index in blocks:
                        self.merge(statistics)
                        self._add_inputs(statistics, states, index, from_inputs)
                        visit(index, block, statistics)
                    del statistics  # as large as the block's weights
                self.commit(index, gradients)
                gradients.drop_behind(index, forward=False)
                safe = min(gradients.committed(), default=count)
                inputs.drop(lambda boundary, safe=safe: boundary >= safe)  # type: ignore[misc]
                advance()

    def _backward_block(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        inputs: BoundaryStore,
        gradients: BoundaryStore,
        kept: dict[tuple[int, int], Kept],
        matrices: BlockMatrices,
        statistics: BlockStatistics,
        advance: Advance,
    ) -> None:
        again = None if (index, 0) in kept else self.stream(inputs, index)
        for batch, gradient_BTD in self.stream(gradients, index + 1):
            if again is None:
                run = kept.pop((index, batch))
            else:
                run = self._with_graph(index, block, calls, batch, next(again)[1], matrices)
            run.out_BTD.backward(gradient_BTD)
            run.taps.fold(of_kind(statistics, GradientStatistic))
            entering_gradient_BTD = run.x_BTD.grad
            assert entering_gradient_BTD is not None
            gradients.put((index, batch), finite(entering_gradient_BTD, index))
            advance.within(self.seen(batch), self.seen(-1))

    def _add_inputs(
        self, statistics: BlockStatistics, states: BlockStore, index: int, kinds: frozenset[type[Statistic]]
    ) -> None:
        if kinds:
            own: BlockStatistics = {name: {} for name in statistics}
            add_states(own, states.get(index), kinds)
            for name, found in own.items():
                statistics[name] |= found

    # -- how much autograd may keep

    def _keep_from(self, calls: BlockCalls, inputs: BoundaryStore, start: int) -> int:
        """The first block that may keep what autograd holds; the stores are left the memory that this does not take."""
        count = len(self.checkpoint.skeleton.blocks)
        first_BTD = next(iter(inputs.stream(0, self.batches[:1], self.placement.arrive, keep=True)))[1]
        entering = first_BTD.numel() * first_BTD.element_size() * len(self.ids)
        # Inputs of every block, and the gradients that replace them one block at a time.
        free = self.budget.limit - (count - start + 2) * entering
        fitting = 0
        if free > 0:
            each = self._graph_bytes(calls, first_BTD)
            fitting = min(count - start, free // each)
            self.budget.limit -= fitting * each
        return count - fitting

    def _graph_bytes(self, calls: BlockCalls, first_BTD: torch.Tensor) -> int:
        """Bytes that one block's kept graph holds over all micro-batches, its weights included (measured on block 0)."""
        with resident_block(self.checkpoint, 0, self.placement) as block:
            weights = sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
            matrices = self.checkpoint.skeleton.prunable(0)
            each = bytes_kept(block, lambda: self._with_graph(0, block, calls, 0, first_BTD, matrices))
            return weights + len(self.ids) * each


def bytes_kept(block: nn.Module, run: Callable[[], Kept]) -> int:
    """Bytes that autograd and the taps keep of one run until its backward pass, without the block's weights."""
    seen: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    return sum(seen.values()) + kept.taps.bytes()


Logits = Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


def window_gradient(
    logits: Logits, ids_T: torch.Tensor, hidden_TD: torch.Tensor, vocabulary: int
) -> tuple[float, torch.Tensor]:
    """One window's mean next-token cross-entropy, and its gradient for the hidden states, ``(1, T, D)``.

    The head works on each token apart, so that a long window can go through it in pieces of tokens.
    """
    tokens = len(ids_T)
    each = tokens_at_once(vocabulary)
    loss, gradients = 0.0, []
    for start in range(0, tokens, each):
        piece = slice(start, start + each)
        hidden_1TD = hidden_TD[None, piece].detach().requires_grad_()
        logits_TV = logits(named_inputs(ids_T[None, piece]), hidden_1TD)[0]
        targets_T = ids_T[1:][piece].to(hidden_TD.device)
        part = F.cross_entropy(logits_TV[: len(targets_T)], targets_T, reduction="sum") / (tokens - 1)
        (gradient_1TD,) = torch.autograd.grad(part, hidden_1TD)
        loss += part.item()
        gradients.append(gradient_1TD)
    return loss, torch.cat(gradients, dim=1)


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens go through the head together."""
    return max(1, LOGITS // (4 * vocabulary))
