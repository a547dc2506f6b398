"""The contract of a statistic: update with one window, merge, state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal, Self

import torch

from secateur.workers import Workers

GradientSource = Literal["exact", "block", "forward"]
"""How gradients are come by: backpropagation of the loss, backpropagation of each block's own output, or forward runs."""


class Statistic(ABC):
    """A mean over calibration windows of something measured at one matrix.

    Attributes:
        name: what it is called in stored states.
        windows: how many windows have been folded in.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.windows = 0
        self.total: torch.Tensor | None = None

    def _add(self, term: torch.Tensor, windows: int = 1) -> None:
        """Add ``term``, the sum over ``windows`` windows; the first one becomes the sum."""
        self.total = term if self.total is None else self.total.add_(term)
        self.windows += windows

    def to(self, device: torch.device) -> Self:
        """This statistic on ``device``; where it is there already, itself."""
        if self.total is None or self.total.device == device:
            return self
        return self._with(self.total.to(device))

    def as_sum(self) -> torch.Tensor:
        """A tensor that adds up with those of other workers, its own to change."""
        return self.known().clone()

    def set_sum(self, summed: torch.Tensor, windows: int) -> None:
        """Become the statistic of all ``windows`` windows, from what ``as_sum`` gave, added up over workers."""
        self.total, self.windows = summed, windows

    def remember(self) -> None:  # noqa: B027 - most have nothing to remember
        """Told before the first window when other workers have windows too."""

    def join(self, workers: Workers, windows: int) -> None:
        """Become the statistic of all ``windows`` windows of all workers."""
        summed = self.as_sum()
        workers.add_up([summed])
        self.set_sum(summed, windows)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything needed to store this statistic and to go on from it."""
        return {"total": self.known(), "windows": torch.tensor(self.windows)}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Self:
        """The statistic that ``state`` was taken from."""
        statistic = cls()
        statistic.total, statistic.windows = state["total"], int(state["windows"])
        return statistic

    def known(self) -> torch.Tensor:
        """What has been gathered.

        Raises:
            ValueError: nothing has.
        """
        if self.total is None:
            raise ValueError(f"{self.name} has seen no window")
        return self.total

    def _with(self, total: torch.Tensor) -> Self:
        return type(self).from_state({"total": total, "windows": torch.tensor(self.windows)})

    def mean(self) -> torch.Tensor:
        """The mean over windows, float32."""
        return (self.known() / self.windows).float()


class InputStatistic(Statistic):
    """Measured on what goes into a matrix.

    Attributes:
        per_window: each window has to come alone; otherwise the tokens of several windows may come together.
    """

    per_window: ClassVar[bool] = True

    @abstractmethod
    def term(self, x_TI: torch.Tensor) -> torch.Tensor:
        """What windows add: of their inputs ``(tokens, input features)``; of an expert the tokens that go to it."""

    @abstractmethod
    def fold(self, term: torch.Tensor, windows: int = 1) -> None:
        """Fold in the term of one window, or of several; it stays the caller's, who may have it for several matrices."""

    def select(self, columns: torch.Tensor) -> Self:
        """The same of some of the inputs."""
        return self._with(self.known()[columns])

    def update(self, x_TI: torch.Tensor) -> None:
        """Fold in the inputs of one window."""
        self.fold(self.term(x_TI))


class BlockStatistic(Statistic):
    """Measured on the residual stream around one block; it belongs to the block, not to a matrix.

    The row of every window is kept, so that several workers' stand in the order of the windows and give the bits of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[torch.Tensor] = []

    @abstractmethod
    def row(self, x_TD: torch.Tensor, out_TD: torch.Tensor) -> torch.Tensor:
        """What one window gives: of the hidden states ``(tokens, D)`` that enter the block and of those that leave it."""

    def update(self, x_TD: torch.Tensor, out_TD: torch.Tensor) -> None:
        """Take in one window."""
        self.rows.append(self.row(x_TD, out_TD).cpu())
        self.windows += 1

    def each(self) -> torch.Tensor:
        """The rows of all windows, ``(N, ...)``.

        Raises:
            ValueError: there are none.
        """
        if not self.rows:
            raise ValueError(f"{self.name} has seen no window")
        return torch.stack(self.rows)

    def join(self, workers: Workers, windows: int) -> None:
        self.rows = [row for part in workers.all(self.each()) for row in part]
        self.windows = windows

    def state(self) -> dict[str, torch.Tensor]:
        return {"rows": self.each(), "windows": torch.tensor(self.windows)}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Self:
        statistic = cls()
        statistic.rows, statistic.windows = list(state["rows"]), int(state["windows"])
        return statistic

    def mean(self) -> torch.Tensor:
        return self.each().mean(dim=0)


class GradientStatistic(Statistic):
    """Measured on a window's gradient with respect to a matrix: of its mean next-token cross-entropy, or what stands for it.

    Attributes:
        per_window: each window has to come alone; otherwise the sum over several windows will do.
    """

    per_window: ClassVar[bool] = True

    @abstractmethod
    def update(self, gradient_OI: torch.Tensor, windows: int = 1) -> None:
        """Fold in one window's gradient, or the sum over ``windows`` of them; it stays the caller's."""

    def update_without(self, shape_OI: tuple[int, int], windows: int, device: torch.device | None = None) -> None:
        """Fold in ``windows`` windows whose loss does not depend on the matrix: no token went to this expert."""
        if self.total is None:
            self.total = torch.zeros(shape_OI, device=device)
        self.windows += windows


def gradient_kinds(kinds: Iterable[type[Statistic]]) -> frozenset[type[GradientStatistic]]:
    """Those of ``kinds`` that are measured on gradients."""
    return frozenset(kind for kind in kinds if issubclass(kind, GradientStatistic))
