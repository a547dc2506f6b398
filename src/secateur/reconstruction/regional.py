"""Wanda++'s regional optimisation: a few light steps on some windows, and the mask chosen anew after each round."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from secateur.options import Options
from secateur.reconstruction.base import FIT_ERRORS, ChooseAgain, Reconstruction
from secateur.reconstruction.errors import mean_error, squared_error
from secateur.reconstruction.fitted import FittedBlock
from secateur.sweep import Passage


class RegionalOptions(Options):
    rounds: int = Field(default=5, ge=1, le=10_000)
    rate: float = Field(default=3e-7, gt=0, le=1)
    share: float = Field(default=0.25, gt=0, le=1)


class Regional(Reconstruction):
    """RMSprop towards what the dense block gives for the same inputs (arXiv 2503.04992; methods §12).

    In each of ``rounds`` rounds a ``share`` of the windows, drawn anew, is gone through once, a step a micro-batch, on the mean
    squared difference between the block as it was and as it is; then the criterion chooses the mask again, by the weights
    as they have become. Weights outside the mask wait with the numbers they left with.
    """

    name = "regional"
    options_type = RegionalOptions
    follows_dense = False
    rechooses = True

    @property
    def forwards(self) -> float:
        return 3 * self.options.rounds * self.options.share + 2

    def fit(
        self, fitted: FittedBlock, passage: Passage, seed: int, choose_again: ChooseAgain | None = None
    ) -> Mapping[str, float]:
        everything = list(passage.batches)
        if not fitted.weights:
            return {}
        first = mean_error(fitted, passage, everything, squared_error)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.RMSprop(list(fitted.weights.values()), lr=self.options.rate)
        some = max(1, round(len(everything) * self.options.share))
        for number in range(self.options.rounds):
            drawn = torch.randperm(len(everything), generator=generator)[:some].tolist()
            for batch, x_BTD, target_BTD in passage.pairs([everything[place] for place in drawn]):
                with torch.enable_grad(), fitted.running():
                    squared_error(passage.run(batch, x_BTD), target_BTD).backward()
                fitted.mask_gradients()
                optimiser.step()
                optimiser.zero_grad()
            if choose_again is not None:
                fitted.choose_again(choose_again)
            passage.advance((number + 1) / self.options.rounds)
        last = mean_error(fitted, passage, everything, squared_error)
        return dict(zip(FIT_ERRORS, (first, last), strict=True))
