"""Gradients from forward runs alone: SPSA (methods §4.3, after MeZO), one block in memory.

A query is a direction z, a standard normal number for every weight of the prunable matrices in range. The model runs at
theta + eps z and at theta - eps z, and of each window s one number stays: c[q, s] = (L_s(+) - L_s(-)) / (2 eps). The
gradient of a window is then taken to be the mean over queries of c[q, s] z_q, which is right on average.

Noise is never kept: each chunk of rows is drawn anew from (seed, query, matrix, chunk), so neither order nor grouping
changes a bit of it. The blocks are walked once for as many queries as have room for what crosses between blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from secateur.checkpoint.architecture import ModelInputs, named_inputs
from secateur.checkpoint.matrices import BlockMatrices
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.residency import resident_block
from secateur.console import progress
from secateur.errors import ModelError
from secateur.files import full_disk_is_an_error
from secateur.statistics import GradientStatistic, Statistic
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls, enter, head

CHUNK = 1 << 16
"""Numbers drawn from one seed: of a matrix as many whole rows as hold about so many."""
AT_ONCE = 64
"""Queries whose noise for one chunk is held at once."""


@dataclass(frozen=True)
class Queries:
    """Along which directions the loss is measured.

    Attributes:
        count: how many.
        perturbation: the step along them, MeZO's epsilon.
        seed: from which all directions follow.
    """

    count: int = 16
    perturbation: float = 1e-3
    seed: int = 0

    def noise_RI(self, query: int, name: str, chunk: int, shape_RI: tuple[int, int]) -> torch.Tensor:
        """What ``query`` draws for one chunk of rows of the matrix called ``name`` in full."""
        digest = hashlib.sha256(f"{self.seed}:{query}:{name}:{chunk}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(shape_RI, generator=generator)


def row_chunks(shape_OI: tuple[int, int]) -> list[range]:
    """The rows of a matrix in chunks; where they end follows from its shape alone."""
    outputs, inputs = shape_OI
    rows = max(1, CHUNK // inputs)
    return [range(start, min(start + rows, outputs)) for start in range(0, outputs, rows)]


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


class Quotients:
    """The numbers c[q, s] of all queries and windows of one model.

    Args:
        checkpoint: the model.
        batches: token windows ``(B, T)``, micro-batch by micro-batch.
        queries: the directions.
        blocks: the blocks whose matrices are perturbed, all at once.
        memory: bytes for what crosses from one block to the next; it says how many queries walk together.
        scratch: where goes what does not fit.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: Sequence[torch.Tensor],
        queries: Queries,
        blocks: range,
        memory: int,
        scratch: Path,
    ) -> None:
        self.checkpoint, self.queries, self.blocks = checkpoint, queries, blocks
        self._batches = batches
        self._scratch = scratch
        # Under (0, batch) what enters the first perturbed block, the same for all; under (1 + way, batch) each way's own.
        self._store = BoundaryStore(memory, scratch)

    @torch.no_grad()
    def measure_QN(self) -> torch.Tensor:
        """Walk the blocks and return ``c``, ``(queries, windows)`` float64.

        Raises:
            ModelError: a loss is not finite.
        """
        with full_disk_is_an_error(self._scratch):
            inputs = [named_inputs(ids_BT) for ids_BT in self._batches]
            calls = enter(self.checkpoint, inputs, lambda batch, x_BTD: self._store.put((0, batch), x_BTD))
            for index in range(self.blocks.start):
                with resident_block(self.checkpoint, index) as block:
                    self._run(index, block, calls, 0, 0)
            groups = self._groups()
            steps = len(groups) * (len(self.checkpoint.skeleton.blocks) - self.blocks.start)
            with progress("Forward runs for gradients", steps) as advance:
                parts = [self._of_group(group, calls, advance) for group in groups]
        self._store.clear()
        return torch.cat(parts)

    def _groups(self) -> list[range]:
        """The queries, as many at a time as leave the memory for what enters the blocks; at least one."""
        shared = 0
        for batch in range(len(self._batches)):
            x_BTD = self._store.pop((0, batch))
            shared += x_BTD.numel() * x_BTD.element_size()
            self._store.put((0, batch), x_BTD)
        size = max(1, (self._store.memory - shared) // (2 * shared))
        return [range(start, min(start + size, self.queries.count)) for start in range(0, self.queries.count, size)]

    def _of_group(self, group: range, calls: BlockCalls, advance: Callable[[], None]) -> torch.Tensor:
        """``c`` of some queries, ``(Q, N)``: one walk over the blocks, two ways a query."""
        ways = [(query, sign) for query in group for sign in (1, -1)]
        for index in range(self.blocks.start, len(self.checkpoint.skeleton.blocks)):
            matrices = self.checkpoint.skeleton.prunable(index) if index in self.blocks else {}
            prefix = self.checkpoint.skeleton.block_prefix(index)
            with resident_block(self.checkpoint, index) as block:
                for way, (query, sign) in enumerate(ways, start=1):
                    before = 0 if index == self.blocks.start else way
                    with perturbed(block, matrices, prefix, self.queries, query, sign):
                        self._run(index, block, calls, before, way)
            advance()
        with head(self.checkpoint, calls) as logits:
            losses_WN = torch.stack([self._losses(way, logits) for way in range(1, len(ways) + 1)])
        if not torch.isfinite(losses_WN).all():
            raise ModelError(
                "the loss of the perturbed model is not finite on the calibration windows; give a smaller --perturbation, or "
                "mend the model's weights"
            )
        return (losses_WN[::2] - losses_WN[1::2]) / (2 * self.queries.perturbation)

    def _run(self, index: int, block: nn.Module, calls: BlockCalls, before: int, after: int) -> None:
        """Run one block on every micro-batch of one way; what all ways share is put back."""
        for batch in range(len(self._batches)):
            x_BTD = self._store.pop((before, batch))
            out_BTD = calls.run(block, index, batch, x_BTD)
            if before != after:
                self._store.put((before, batch), x_BTD)
            self._store.put((after, batch), out_BTD)

    def _losses(self, way: int, logits: Callable[[ModelInputs, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Each window's mean next-token cross-entropy, ``(N,)`` float64; one window's logits at a time."""
        losses = []
        for batch, ids_BT in enumerate(self._batches):
            for ids_T, hidden_TD in zip(ids_BT, self._store.pop((way, batch)), strict=True):
                logits_TV = logits(named_inputs(ids_T[None]), hidden_TD[None])[0, :-1]
                # In float64: the difference of two nearly equal losses is divided by a small number.
                losses.append(F.cross_entropy(logits_TV.double(), ids_T[1:]).item())
        return torch.tensor(losses, dtype=torch.float64)


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
