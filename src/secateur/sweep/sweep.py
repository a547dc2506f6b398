"""One checkpoint, one set of calibration windows: what walks over the blocks there are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import log, track
from secateur.errors import ModelError, ResourceError
from secateur.statistics import BlockStatistics, GradientStatistic, Statistic, gradient_kinds
from secateur.sweep.backward import BackwardWalk
from secateur.sweep.boundary import DamagedBoundaryError
from secateur.sweep.forward import ForwardWalk
from secateur.sweep.forward_only import ForwardOnlyWalk, estimated
from secateur.sweep.walk import Fit, SweepSettings, Visit


class Sweep:
    """Walks over one checkpoint with one set of calibration windows.

    Args:
        checkpoint: the model; its blocks are brought in one at a time.
        ids_NT: token windows ``(N, T)``, int64.
        settings: micro-batch, memory, places.

    Attributes:
        loss: mean next-token cross-entropy of the dense model over the windows, once a gradient pass has run.
    """

    def __init__(self, checkpoint: Checkpoint, ids_NT: torch.Tensor, settings: SweepSettings) -> None:
        self.checkpoint, self.ids_NT, self.settings = checkpoint, ids_NT, settings
        self.loss: float | None = None
        require_causal(checkpoint)

    def dense(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        """Gather statistics of the dense model and visit each block of ``blocks`` once.

        Blocks are visited first to last, or last to first where exact gradients are needed.

        Raises:
            ModelError: activations, the loss or gradients are not finite.
        """
        gradients = gradient_kinds(needs)
        if gradients and self.settings.gradient == "exact":
            self._backward(needs, blocks, visit)
        elif gradients and self.settings.gradient == "forward":
            queries = ForwardOnlyWalk(self.checkpoint, self.ids_NT, self.settings)
            c_QN = queries.measure_QN(blocks)
            estimating = self._estimating(gradients, c_QN, visit)
            if needs - gradients:
                self._forward(needs - gradients, blocks, estimating)
            else:
                self._visit_without_running(blocks, estimating)
            queries.forget()
        else:
            self._forward(needs, blocks, visit)

    def _forward(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        def walk() -> None:
            ForwardWalk(self.checkpoint, self.ids_NT, self.settings, "forward").run(needs, blocks, visit)

        self._again_if_damaged(walk, "forward")

    def _backward(self, needs: frozenset[type[Statistic]], blocks: range, visit: Visit) -> None:
        def walk() -> None:
            backward = BackwardWalk(self.checkpoint, self.ids_NT, self.settings, "backward")
            backward.run(needs, blocks, visit)
            self.loss = backward.loss

        self._again_if_damaged(walk, "backward")

    def _again_if_damaged(self, walk: Callable[[], None], name: str) -> None:
        """Walk; where what an earlier process kept between blocks turns out to be damaged, from the beginning.

        Raises:
            ResourceError: it is damaged, and other workers wait for this one; the next attempt will do without it.
        """
        try:
            walk()
        except DamagedBoundaryError as error:
            for folder in self.settings.scratch.glob(f"{name}*"):
                shutil.rmtree(folder, ignore_errors=True)
            if self.settings.workers.size > 1:
                raise ResourceError(f"{error} was damaged, and has been removed") from error
            log.warning("What was kept between blocks was damaged; it is computed again.")
            walk()

    def _visit_without_running(self, blocks: range, visit: Visit) -> None:
        for index in track(blocks, "Scoring the blocks"):
            with resident_block(self.checkpoint, index, self.settings.placement, index + 1) as block:
                visit(index, block, {name: {} for name in self.checkpoint.skeleton.prunable(index)})

    def _estimating(self, kinds: frozenset[type[GradientStatistic]], c_QN: torch.Tensor, visit: Visit) -> Visit:
        """``visit`` with the gradients that ``c_QN`` estimates beside what was gathered."""
        skeleton, queries = self.checkpoint.skeleton, self.settings.queries

        def visit_with_gradients(index: int, block: nn.Module, statistics: BlockStatistics) -> Any:
            shapes, prefix = skeleton.block_shapes(index), skeleton.block_prefix(index)
            for name, matrix in skeleton.prunable(index).items():
                statistics[name] |= estimated(kinds, prefix + name, matrix.shape(shapes), c_QN, queries)
            return visit(index, block, statistics)

        return visit_with_gradients

    def pruned(
        self,
        needs: frozenset[type[Statistic]],
        blocks: range,
        visit: Visit,
        done: int | None = None,
        fit: Fit | None = None,
    ) -> None:
        """Visit the blocks first to last; each sees the inputs that the blocks before it give after their visit.

        A block's statistics come from one run with its dense weights (methods §0.1); what ``visit`` returns then
        replaces its weights, and a second run gives the inputs of the next. Of gradients only block-local ones are gathered
        on this walk: the others are the dense model's.

        Args:
            done: the first block whose visit is not known to be done and on disk; those before it may be left out.
            fit: called after each visit with what goes through the block, pruned and dense; what it returns then replaces
                weights instead.
        """
        assert self.settings.gradient == "block" or not gradient_kinds(needs)

        def walk() -> None:
            forward = ForwardWalk(self.checkpoint, self.ids_NT, self.settings, "pruned", pruned=True, fit=fit)
            forward.run(needs, blocks, visit, done)

        self._again_if_damaged(walk, "pruned")


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
