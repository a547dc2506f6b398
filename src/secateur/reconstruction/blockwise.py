"""Each block fitted to what the dense model gives there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from pydantic import Field

from secateur.options import Options
from secateur.reconstruction.base import FIT_ERRORS, ChooseAgain, Reconstruction
from secateur.reconstruction.errors import ByChannel, Error, mean_error
from secateur.reconstruction.fitted import FittedBlock
from secateur.sweep import Passage

SHARES = (0.75, 0.5, 0.25)
"""Of the way from the weights that the removal left to those the last epoch ended with, where a block is judged too.

On little text a fit goes further than other text wants; part of the way often serves both better (arXiv 2109.01903).
"""


class BlockwiseOptions(Options):
    epochs: int = Field(default=5, ge=0, le=10_000)
    rate: float = Field(default=0.005, gt=0, le=1)
    batch: int = Field(default=1, ge=1, le=1_000_000)
    held_out: float = Field(default=0.125, ge=0, lt=1)
    between: float = Field(default=0.0, ge=0, le=1)


class Blockwise(Reconstruction):
    """Adam on the weights that stay, towards what the dense model gives after this block; ours, of no paper.

    The block sees what the pruned blocks before it give, so it also makes good what they lost. A token's error counts in
    parts of its own size and a channel's in parts of its mean share of that: a few tokens of a language model are a thousand
    times as large as the others, a few channels hold most of every token, and what follows normalises and scales both. A part
    of the windows (``held_out``) is never fitted: after each epoch, and at last part of the way back to where it began, their
    error says whether the weights are better than all before, and the best are kept, so that on them no block ends worse
    than the removal left it. ``rate`` is in units of each matrix's root mean square, falling along a cosine;
    ``batch`` windows make a step.

    What the pruned blocks before it do wrong on these windows is in part theirs alone. With ``between`` every token enters, at
    each step anew, somewhere on the way from what the pruned blocks give to what the dense ones do, up to this part of it;
    at 1 anywhere. What is held out is judged on what the pruned blocks give.
    """

    name = "block"
    options_type = BlockwiseOptions

    @property
    def forwards(self) -> float:
        chosen = self.options
        fitted = 1 - chosen.held_out
        looks = 1 + chosen.epochs + len(SHARES)
        return chosen.epochs * 3 * fitted + looks * chosen.held_out

    @property
    def dense_inputs(self) -> bool:
        return self.options.between > 0

    def fit(
        self, fitted: FittedBlock, passage: Passage, seed: int, choose_again: ChooseAgain | None = None
    ) -> Mapping[str, float]:
        fit, held = self._split(passage)
        if not fit or not fitted.weights:
            return {}
        judged = held or fit  # of a single micro-batch nothing can be held out
        error_of = ByChannel(target_BTD for _, _, target_BTD in passage.pairs(fit))
        best = _Best(fitted, lambda: mean_error(fitted, passage, judged, error_of))
        start, first = best.weights, best.error
        if first == 0:  # nothing has left so far
            return {}
        groups = [
            {"params": [weight], "size": _size(weight, fitted.stays[name])} for name, weight in fitted.weights.items()
        ]
        optimiser = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        generator = torch.Generator().manual_seed(seed)
        steps = _Steps(self.options.epochs * len(_in_steps(passage, fit, self.options.batch)), self.options.rate)
        for epoch in range(self.options.epochs):
            order = [fit[place] for place in torch.randperm(len(fit), generator=generator)]
            self._epoch(fitted, passage, order, optimiser, steps, error_of, generator)
            error = best.look()
            passage.advance((epoch + 1) / self.options.epochs)
            if not math.isfinite(error):
                break
        end = fitted.copy()
        for share in SHARES:
            fitted.restore({name: torch.lerp(start[name], weight, share) for name, weight in end.items()})
            best.look()
        fitted.restore(best.weights)
        return dict(zip(FIT_ERRORS, (first, best.error), strict=True))

    def _split(self, passage: Passage) -> tuple[list[int], list[int]]:
        """The micro-batches that are fitted, and those that are held out: the last ones, at least one of several."""
        batches = list(passage.batches)
        held = max(1, round(len(batches) * self.options.held_out)) if self.options.held_out else 0
        held = min(held, len(batches) - 1)
        return batches[: len(batches) - held], batches[len(batches) - held :]

    def _epoch(
        self,
        fitted: FittedBlock,
        passage: Passage,
        order: Sequence[int],
        optimiser: torch.optim.Optimizer,
        steps: _Steps,
        error_of: Error,
        generator: torch.Generator,
    ) -> None:
        for batches in _in_steps(passage, order, self.options.batch):
            windows = sum(passage.windows[batch] for batch in batches)
            for batch, x_BTD, target_BTD in self._pairs(passage, batches, generator):
                with torch.enable_grad(), fitted.running():
                    loss = error_of(passage.run(batch, x_BTD), target_BTD)
                    (loss * (len(x_BTD) / windows)).backward()
            fitted.mask_gradients()
            steps.set_rates(optimiser)
            optimiser.step()
            optimiser.zero_grad()

    def _pairs(
        self, passage: Passage, batches: Sequence[int], generator: torch.Generator
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The passage's pairs, what enters drawn as ``between`` says."""
        if not self.options.between:
            yield from passage.pairs(batches)
            return
        for (batch, x_BTD, target_BTD), (_, dense_BTD) in zip(
            passage.pairs(batches), passage.dense_inputs(batches), strict=True
        ):
            way_BT1 = self.options.between * torch.rand(*x_BTD.shape[:2], 1, generator=generator)
            yield batch, torch.lerp(x_BTD, dense_BTD, way_BT1.to(x_BTD)), target_BTD


class _Best:
    """The weights of a block with the least error so far, those it starts with included."""

    def __init__(self, fitted: FittedBlock, judge: Callable[[], float]) -> None:
        self._fitted, self._judge = fitted, judge
        self.error, self.weights = judge(), fitted.copy()

    def look(self) -> float:
        """Judge the weights as they are now, and keep them where they are better."""
        error = self._judge()
        if error < self.error:
            self.error, self.weights = error, self._fitted.copy()
        return error


class _Steps:
    """The learning rate along a cosine from ``rate`` to zero, each parameter's in units of its own size."""

    def __init__(self, count: int, rate: float) -> None:
        self._count, self._rate, self._done = max(1, count), rate, 0

    def set_rates(self, optimiser: torch.optim.Optimizer) -> None:
        part = self._rate * (1 + math.cos(math.pi * self._done / self._count)) / 2
        for group in optimiser.param_groups:
            group["lr"] = part * group["size"]
        self._done += 1


def _size(weight: torch.Tensor, stays: torch.Tensor) -> float:
    """The root mean square of what stays of a parameter."""
    return float((weight.detach().square() * stays).sum().div(stays.sum().clamp(min=1)).sqrt())


def _in_steps(passage: Passage, order: Sequence[int], windows: int) -> list[list[int]]:
    """Micro-batches put together until they hold ``windows`` windows."""
    steps: list[list[int]] = []
    room = 0
    for batch in order:
        if room <= 0:
            steps.append([])
            room = windows
        steps[-1].append(batch)
        room -= passage.windows[batch]
    return steps
