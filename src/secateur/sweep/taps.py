"""Hooks that feed statistics while a block runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.statistics import GradientStatistic, InputStatistic


@contextmanager
def input_taps(matrices: Mapping[str, nn.Linear], statistics: Mapping[str, Iterable[InputStatistic]]) -> Iterator[None]:
    """While the context lasts, every window that flows into a matrix is folded into the matrix's statistics."""

    def tap(kinds: list[InputStatistic]) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for x_TI in _windows_of(args[0], module):
                for statistic in kinds:
                    statistic.update(x_TI)

        return hook

    handles = [
        module.register_forward_pre_hook(tap(list(statistics[name])))
        for name, module in matrices.items()
        if statistics.get(name)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _windows_of(x_BTI: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A matrix's inputs, which have to keep windows apart: statistics are means over windows."""
    if x_BTI.dim() != 3:
        raise ModelError(
            f"{module} is fed {list(x_BTI.shape)} instead of (windows, tokens, features); "
            "this model mixes windows and cannot be scored"
        )
    return x_BTI.detach()


class GradientTaps:
    """Catches what a weight's gradient is made of: the matrix's input and the gradient of its output.

    The weights themselves need no gradient, so autograd never holds a weight's gradient, let alone a block's:
    the gradient of one window exists for one matrix at a time, is folded, and is gone.
    """

    def __init__(self, matrices: Mapping[str, nn.Linear]) -> None:
        self._uses: dict[str, list[tuple[torch.Tensor, list[torch.Tensor]]]] = defaultdict(list)
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in matrices.items()]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            caught: list[torch.Tensor] = []
            out.register_hook(caught.append)
            self._uses[name].append((_windows_of(args[0], module), caught))

        return hook

    def close(self) -> None:
        """Stop watching; what was caught stays for ``fold``."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def bytes(self) -> int:
        """How much the caught inputs hold."""
        return sum(x.numel() * x.element_size() for uses in self._uses.values() for x, _ in uses)

    def fold(self, statistics: Mapping[str, Iterable[GradientStatistic]]) -> None:
        """After the backward pass: fold each matrix's gradients into its statistics, and let go."""
        for name in list(self._uses):
            uses = [(x, caught[0]) for x, caught in self._uses.pop(name) if caught]
            kinds = list(statistics.get(name, ()))
            if not uses or not kinds:
                continue
            alone = [statistic for statistic in kinds if statistic.per_window]
            together = [statistic for statistic in kinds if not statistic.per_window]
            windows = uses[0][0].shape[0]
            if alone:
                for window in range(windows):
                    gradient_OI = _weight_gradient([(x[window], g[window]) for x, g in uses])
                    for statistic in kinds:
                        statistic.update(gradient_OI)
            elif together:
                gradient_OI = _weight_gradient(uses)
                for statistic in together:
                    statistic.update(gradient_OI, windows)


def _weight_gradient(uses: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Sum over a matrix's uses of (output gradient)^T (input): exactly what autograd forms for ``x @ weight.T``."""
    terms = [g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]) for x, g in uses]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)
