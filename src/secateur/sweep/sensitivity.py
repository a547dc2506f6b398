"""What each block means to the loss: the dense model, and for every block one variant of it that differs there alone.

All of them advance together, so that each block's weights are read once: at block ``j`` the dense model's hidden states
and those of the variants of the blocks before it go through the dense block, and the dense ones once more through the
changed block, where its own variant begins. Every block runs about half as often as there are blocks, which is why this
is for a few windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from secateur.checkpoint.architecture import named_inputs
from secateur.console import Advance, progress
from secateur.errors import ModelError
from secateur.statistics import InputStatistic, Statistic
from secateur.sweep.backward import Logits, tokens_at_once
from secateur.sweep.boundary import BoundaryStore
from secateur.sweep.entrance import BlockCalls, head
from secateur.sweep.taps import InputTaps
from secateur.sweep.walk import Visit, Walk, finite, of_kind

DENSE = 0
"""The way of the dense model; that of the variant of block ``b`` is ``b + 1``."""


@dataclass(frozen=True)
class Change:
    """What one variant comes to, over the windows of all workers.

    Attributes:
        loss: mean next-token cross-entropy, in nats.
        divergence: mean Kullback-Leibler divergence of its predictions from the dense model's, in nats a token.
    """

    loss: float
    divergence: float


class SensitivityWalk(Walk):
    """First block to last, with a variant for every block of a range.

    Attributes:
        loss: the dense model's, once the walk is through.
    """

    loss: float

    @torch.no_grad()
    def run(self, needs: frozenset[type[Statistic]], blocks: range, change: Visit) -> dict[int, Change]:
        """What the variant of every block of ``blocks`` comes to.

        Args:
            needs: statistics of inputs of the dense model that ``change`` is given.
            change: called with each block while its weights are in memory; what it returns replaces tensors of the block
                in the block's variant.

        Raises:
            ModelError: hidden states or a loss are not finite.
        """
        with self.ready():
            store = self.store("sensitivity")
            store.drop(lambda boundary: True)
            calls = self.enter(store)
            count = len(self.checkpoint.skeleton.blocks)
            with progress("Measuring what blocks mean", count, "block", self.tokens) as advance:
                for index in range(count):
                    with self.block(index, ahead=index + 1) as block:
                        self._block(index, block, calls, store, needs, blocks, change, advance)
                    advance()
            sums_WS = self._at_head(store, calls, self._ways(blocks, count))
            store.clear()
        return self._changes(blocks, sums_WS)

    def _at(self, index: int, way: int) -> int:
        """The boundary before block ``index`` on one way."""
        return index * (len(self.checkpoint.skeleton.blocks) + 1) + way

    def _ways(self, blocks: range, index: int) -> list[int]:
        """The ways there are before block ``index``."""
        return [DENSE, *(before + 1 for before in blocks if before < index)]

    def _block(
        self,
        index: int,
        block: nn.Module,
        calls: BlockCalls,
        store: BoundaryStore,
        needs: frozenset[type[Statistic]],
        blocks: range,
        change: Visit,
        advance: Advance,
    ) -> None:
        matrices = self.checkpoint.skeleton.prunable(index) if index in blocks else {}
        statistics = self.fresh(matrices, needs)
        taps = InputTaps(matrices, of_kind(statistics, InputStatistic))
        runs = len(self._ways(blocks, index + 1)) * self.seen(-1)

        def through(way: int, to: int, keep: bool = False, taps: InputTaps | None = None) -> None:
            place = to and to - blocks.start
            for batch, x_BTD in self.stream(store, self._at(index, way), keep):
                with taps.watching(block, len(x_BTD)) if taps else nullcontext():
                    out_BTD = finite(calls.run(block, index, batch, x_BTD), index)
                store.put((self._at(index + 1, to), batch), out_BTD)
                advance.within(place * self.seen(-1) + self.seen(batch), runs)

        through(DENSE, DENSE, keep=index in blocks, taps=taps)
        for way in self._ways(blocks, index)[1:]:
            through(way, way)
        if index in blocks:
            self.merge(statistics)
            replaced = change(index, block, statistics)
            del statistics, taps  # as large as the block's weights may be
            block.load_state_dict(dict(replaced or {}), strict=False, assign=True)
            through(DENSE, index + 1)
        store.drop(lambda boundary: boundary < self._at(index + 1, DENSE))

    def _at_head(self, store: BoundaryStore, calls: BlockCalls, ways: list[int]) -> torch.Tensor:
        """For each way the sums over this worker's windows of loss and divergence, ``(W, 2)`` float64."""
        count, vocabulary = len(self.checkpoint.skeleton.blocks), self.checkpoint.config.get_text_config().vocab_size
        sums_WS = torch.zeros(len(ways), 2, dtype=torch.float64)
        streams = [self._states(store, self._at(count, way)) for way in ways]
        at_head = head(self.checkpoint, calls, placement=self.placement)
        with at_head as logits, progress("Loss of each window", len(self.ids)) as advance:
            for ids_BT in self.ids:
                hidden_WBTD = [next(stream) for stream in streams]
                for window, ids_T in enumerate(ids_BT):
                    hidden_WTD = [hidden_BTD[window] for hidden_BTD in hidden_WBTD]
                    sums_WS += window_changes(logits, ids_T, hidden_WTD, vocabulary)
                advance()
        return sums_WS

    def _states(self, store: BoundaryStore, boundary: int) -> Iterator[torch.Tensor]:
        return (hidden_BTD for _, hidden_BTD in self.stream(store, boundary))

    def _changes(self, blocks: range, sums_WS: torch.Tensor) -> dict[int, Change]:
        means_WS = torch.stack(self.workers.all(sums_WS)).sum(dim=0) / self.windows
        if not torch.isfinite(means_WS).all():
            raise ModelError(
                "the loss of the dense model, or of the model with one block masked, is not finite on the calibration "
                "windows; its weights are damaged, or choose another --allocation"
            )
        self.loss = float(means_WS[DENSE, 0])
        return {index: Change(*mean_S.tolist()) for index, mean_S in zip(blocks, means_WS[1:], strict=True)}


COPIES = 4
"""A piece is so many times smaller than elsewhere: its logarithms are doubles, and those of two ways are compared."""


def window_changes(
    logits: Logits, ids_T: torch.Tensor, hidden_WTD: list[torch.Tensor], vocabulary: int
) -> torch.Tensor:
    """One window's mean next-token cross-entropy and divergence from the first, for each way, ``(W, 2)`` float64.

    The logits of a few tokens of one way exist at once, and those of the first beside them.
    """
    each = tokens_at_once(COPIES * vocabulary)
    sums_WS = torch.zeros(len(hidden_WTD), 2, dtype=torch.float64)
    for start in range(0, len(ids_T) - 1, each):
        piece = slice(start, start + each)
        targets_T = ids_T[1:][piece].to(hidden_WTD[0].device)
        inputs = named_inputs(ids_T[None, piece])
        dense_TV: torch.Tensor | None = None
        for way, hidden_TD in enumerate(hidden_WTD):
            logits_TV = logits(inputs, hidden_TD[None, piece])[0][: len(targets_T)]
            log_TV = logits_TV.double().log_softmax(dim=-1)
            dense_TV = log_TV if dense_TV is None else dense_TV
            sums_WS[way, 0] += F.nll_loss(log_TV, targets_T, reduction="sum").item()
            sums_WS[way, 1] += divergence(dense_TV, log_TV)
    return sums_WS / (len(ids_T) - 1)


def divergence(dense_TV: torch.Tensor, other_TV: torch.Tensor) -> float:
    """The sum over tokens of ``KL(dense || other)`` from log probabilities; what is impossible for the dense adds nothing."""
    share_TV = dense_TV.exp()
    return torch.where(share_TV > 0, share_TV * (dense_TV - other_TV), 0.0).sum().item()
