"""Gradients from forward runs alone: SPSA (methods §4.3, after MeZO), one block in memory.

A query is a direction z, a standard normal number for every weight of the prunable matrices in range. The model runs at
theta + eps z and at theta - eps z, and of each window s one number stays: c[q, s] = (L_s(+) - L_s(-)) / (2 eps). The
gradient of a window is then taken to be the mean over queries of c[q, s] z_q, which is right on average.

Noise is never kept: each chunk of rows is drawn anew from (seed, query, matrix, chunk), so neither order nor grouping
changes a bit of it. The blocks are walked once for as many queries as have room for what crosses between blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from secateur.checkpoint.architecture import named_inputs
from secateur.checkpoint.matrices import BlockMatrices
from secateur.checkpoint.reader import Checkpoint
from secateur.console import Advance, progress
from secateur.errors import ModelError
from secateur.files import write_json
from secateur.statistics import GradientStatistic, Statistic
from secateur.sweep.backward import Logits, tokens_at_once
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls, head
from secateur.sweep.noise import Queries, row_chunks
from secateur.sweep.walk import SweepSettings, Walk

AT_ONCE = 64
"""Queries whose noise for one chunk is held at once."""


@contextmanager
def perturbed(
    block: nn.Module, matrices: BlockMatrices, prefix: str, queries: Queries, query: int, sign: int
) -> Iterator[None]:
    """While the context lasts the matrices of ``block`` stand ``sign * eps`` along ``query``'s direction.

    They are copies; afterwards the very tensors that were there are back.
    """
    parameters = dict(block.named_parameters())
    originals = {name: parameters[name].data for name in {matrix.parameter for matrix in matrices.values()}}
    copies = {name: tensor.clone() for name, tensor in originals.items()}
    for name, matrix in matrices.items():
        weight_OI = matrix.of(copies)
        outputs, inputs = weight_OI.shape
        for number, rows in enumerate(row_chunks((outputs, inputs))):
            noise_RI = queries.noise_RI(query, prefix + name, number, (len(rows), inputs))
            weight_OI[rows.start : rows.stop].add_(noise_RI.to(weight_OI.device), alpha=sign * queries.perturbation)
    try:
        for name, tensor in copies.items():
            parameters[name].data = tensor
        yield
    finally:
        for name, tensor in originals.items():
            parameters[name].data = tensor


class ForwardOnlyWalk(Walk):
    """Measures the numbers c[q, s] of all queries and windows, walking the blocks once for each group of queries.

    It computes in float32 everywhere: a step of 1e-3 along z is less than bfloat16 can tell of many weights.
    """

    def __init__(self, checkpoint: Checkpoint, ids_NT: torch.Tensor, settings: SweepSettings) -> None:
        exact = replace(settings.placement, dtype=torch.float32)
        super().__init__(checkpoint, ids_NT, replace(settings, placement=exact), "queries")

    def measure_QN(self, blocks: range) -> torch.Tensor:
        """``c`` of all workers' windows, ``(queries, windows)`` float64; what an earlier process measured is kept.

        Args:
            blocks: the blocks whose matrices are perturbed, all at once.

        Raises:
            ModelError: a loss is not finite.
        """
        queries = self.settings.queries
        with torch.no_grad(), self.ready():
            measured = self._measured()
            missing = [query for query in range(queries.count) if query not in measured]
            groups = self._groups(missing)
            store = self.store("inputs")
            store.drop(lambda boundary: True)
            calls = self._enter_first(store, blocks.start) if groups else None
            steps = len(groups) * (self._blocks - blocks.start)
            with progress("Forward runs for gradients", steps, "block") as advance:
                for group in groups:
                    assert calls is not None
                    measured |= dict(zip(group, self._of_group(group, calls, store, blocks, advance), strict=True))
                    write_json(self._kept, {str(query): losses for query, losses in measured.items()}, durable=True)
            store.clear()
        own_QN = torch.tensor([measured[query] for query in range(queries.count)], dtype=torch.float64)
        return torch.cat(self.workers.all(own_QN), dim=1)

    def _enter_first(self, store: BoundaryStore, first: int) -> BlockCalls:
        """Bring what enters the first perturbed block, the same for all ways, under its boundary."""
        calls = self.enter(store)
        for index in range(first):
            with self.block(index, ahead=index + 1) as block:
                for batch, x_BTD in self.stream(store, index):
                    store.put((index + 1, batch), calls.run(block, index, batch, x_BTD))
            store.drop(lambda boundary, index=index: boundary == index)  # type: ignore[misc]
        return calls

    def forget(self) -> None:
        """Every block has been visited: what was measured is not needed again."""
        self._kept.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    @property
    def _kept(self) -> Path:
        queries = self.settings.queries
        return self.folder / f"quotients-{queries.seed}-{queries.perturbation!r}.json"

    @property
    def _blocks(self) -> int:
        return len(self.checkpoint.skeleton.blocks)

    def _measured(self) -> dict[int, list[float]]:
        """By query what is known of this worker's windows; only what all workers know."""
        try:
            found = {str(query): list(losses) for query, losses in json.loads(self._kept.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):  # not there, or damaged: measured again
            found = {}
        common = set.intersection(*self.workers.all(set(found)))
        return {int(query): found[query] for query in common}

    def _groups(self, missing: list[int]) -> list[list[int]]:
        """The queries, as many at a time as there is memory for what enters the blocks; at least one."""
        hidden = self.checkpoint.config.get_text_config().hidden_size
        shared = self.tokens * hidden * self.placement.dtype.itemsize
        size = self.workers.first(max(1, (self.budget.limit - shared) // (2 * shared)))
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def _of_group(
        self, group: list[int], calls: BlockCalls, store: BoundaryStore, blocks: range, advance: Advance
    ) -> list[list[float]]:
        """``c`` of some queries by window: one walk over the blocks, two ways a query.

        What enters the first perturbed block is the same for all ways, and stays for the next group.
        """
        first, ways = blocks.start, [(query, sign) for query in group for sign in (1, -1)]

        def at(index: int, way: int) -> int:
            return first if index == first else first + 1 + (index - first - 1) * len(ways) + way

        for index in range(first, self._blocks):
            matrices = self.checkpoint.skeleton.prunable(index) if index in blocks else {}
            prefix = self.checkpoint.skeleton.block_prefix(index)
            with self.block(index, ahead=index + 1) as block:
                for way, (query, sign) in enumerate(ways):
                    with perturbed(block, matrices, prefix, self.settings.queries, query, sign):
                        for batch, x_BTD in self.stream(store, at(index, way), keep=index == first):
                            store.put((at(index + 1, way), batch), calls.run(block, index, batch, x_BTD))
            store.drop(lambda boundary, index=index: first < boundary < at(index + 1, 0))  # type: ignore[misc]
            advance()
        with head(self.checkpoint, calls, placement=self.placement) as logits:
            losses = [self._losses(store, at(self._blocks, way), logits) for way in range(len(ways))]
        store.drop(lambda boundary: boundary > first)
        losses_WN = torch.tensor(losses, dtype=torch.float64)
        if not torch.isfinite(losses_WN).all():
            raise ModelError(
                "the loss of the perturbed model is not finite on the calibration windows; give a smaller --perturbation, or "
                "mend the model's weights"
            )
        return ((losses_WN[::2] - losses_WN[1::2]) / (2 * self.settings.queries.perturbation)).tolist()

    def _losses(self, store: BoundaryStore, boundary: int, logits: Logits) -> list[float]:
        """Each window's mean next-token cross-entropy, in float64; one window's logits at a time."""
        vocabulary = self.checkpoint.config.get_text_config().vocab_size
        return [
            window_loss(logits, ids_T, hidden_TD, vocabulary)
            for batch, hidden_BTD in self.stream(store, boundary)
            for ids_T, hidden_TD in zip(self.ids[batch], hidden_BTD, strict=True)
        ]


def window_loss(logits: Logits, ids_T: torch.Tensor, hidden_TD: torch.Tensor, vocabulary: int) -> float:
    """One window's mean next-token cross-entropy, summed in float64: of two nearly equal losses the difference counts."""
    each, total = tokens_at_once(vocabulary), 0.0
    for start in range(0, len(ids_T) - 1, each):
        piece = slice(start, start + each)
        logits_TV = logits(named_inputs(ids_T[None, piece]), hidden_TD[None, piece])[0]
        targets_T = ids_T[1:][piece].to(hidden_TD.device)
        total += F.cross_entropy(logits_TV[: len(targets_T)].double(), targets_T, reduction="sum").item()
    return total / (len(ids_T) - 1)


def estimated(
    kinds: frozenset[type[GradientStatistic]],
    name: str,
    shape_OI: tuple[int, int],
    c_QN: torch.Tensor,
    queries: Queries,
) -> dict[type[Statistic], Statistic]:
    """The statistics of one matrix, of the gradients that ``c_QN`` and the noise drawn anew estimate.

    A chunk of rows at a time: of every window at once where a kind wants windows apart, of their sum otherwise.

    Args:
        kinds: statistics that treat each row by itself, as moments of single weights do.
        name: the matrix's full name.
    """
    apart = any(kind.per_window for kind in kinds)
    c_QS = (c_QN if apart else c_QN.sum(dim=1, keepdim=True)) / len(c_QN)
    windows = c_QN.shape[1]
    parts: dict[type[GradientStatistic], list[torch.Tensor]] = {kind: [] for kind in kinds}
    for number, rows in enumerate(row_chunks(shape_OI)):
        gradient_SRI = _gradients(queries, name, number, (len(rows), shape_OI[1]), c_QS.float())
        for kind, totals in parts.items():
            statistic = kind()
            if kind.per_window:
                for gradient_RI in gradient_SRI:
                    statistic.update(gradient_RI)
            else:
                statistic.update(gradient_SRI.sum(dim=0), windows)
            totals.append(statistic.state()["total"])
    return {
        kind: kind.from_state({"total": torch.cat(totals), "windows": torch.tensor(windows)})
        for kind, totals in parts.items()
    }


def _gradients(queries: Queries, name: str, chunk: int, shape_RI: tuple[int, int], c_QS: torch.Tensor) -> torch.Tensor:
    """Sum over queries of ``c[q, s] z_q`` for one chunk of rows, ``(S, R, I)``."""
    gradient_SC = torch.zeros(c_QS.shape[1], shape_RI[0] * shape_RI[1])
    for start in range(0, len(c_QS), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(c_QS)))
        noise_QC = torch.stack([queries.noise_RI(query, name, chunk, shape_RI).flatten() for query in some])
        gradient_SC += c_QS[start : some.stop].T @ noise_QC
    return gradient_SC.unflatten(1, shape_RI)
