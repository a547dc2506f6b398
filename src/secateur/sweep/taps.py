"""Feeding statistics while a block runs, by watching the products its matrices are the weights of.

Statistics are means over windows, so what flows into a matrix has to keep windows apart. An expert sees the tokens that
are routed to it and nothing else; a window of which none is adds nothing to its sums and counts all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from secateur.checkpoint.matrices import BlockMatrices
from secateur.checkpoint.products import Product, Products
from secateur.errors import ModelError
from secateur.statistics import GradientStatistic, InputStatistic

ALL = -1
"""Stands for all windows of a micro-batch at once."""


class InputTaps:
    """Folds what flows into each matrix into the matrix's statistics, one window at a time."""

    def __init__(self, matrices: BlockMatrices, statistics: Mapping[str, Iterable[InputStatistic]]) -> None:
        self._statistics = {name: kinds for name in matrices if (kinds := list(statistics.get(name, ())))}
        self._matrices = {name: matrix for name, matrix in matrices.items() if name in self._statistics}

    @contextmanager
    def watching(self, block: nn.Module, windows: int) -> Iterator[None]:
        """While the context lasts ``block`` runs once, on ``windows`` windows."""
        if not self._statistics:
            yield
            return
        watch, shared = _Watched(self._matrices, block), _Shared()

        def tell(product: Product) -> None:
            for name, expert in watch.matrices_in(product):
                x = product.x if expert is None else product.x[expert]
                x_BTI = _windows_of(x, windows, name)
                for statistic in self._statistics[name]:
                    if not statistic.per_window:
                        statistic.fold(shared.term(statistic, ALL, x, x_BTI.flatten(0, 1)), windows)
                        continue
                    for window, x_TI in enumerate(x_BTI):
                        statistic.fold(shared.term(statistic, window, x, x_TI))

        with Products(watch.parameters.items(), tell):
            yield
        for name in watch.idle():
            nothing_TI = torch.zeros(0, watch.shape(name)[1], device=watch.device)
            for statistic in self._statistics[name] * windows:
                statistic.update(nothing_TI)


class _Shared:
    """What statistics make of the inputs last seen: queries, keys and values are fed the very same tensor."""

    def __init__(self) -> None:
        self._x: torch.Tensor | None = None
        self._terms: dict[tuple[type, int], torch.Tensor] = {}

    def term(self, statistic: InputStatistic, window: int, x: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """The statistic's term of one window of ``x``."""
        if x is not self._x:
            self._x, self._terms = x, {}
        key = type(statistic), window
        if key in self._terms:
            return self._terms[key]
        term = self._terms[key] = statistic.term(x_TI)  # a vector for every window, or one matrix for all
        return term


@dataclass(frozen=True)
class _Use:
    """A matrix's input ``(windows, tokens, I)``, and the gradient of its output once it has come."""

    x_BTI: torch.Tensor
    caught: list[torch.Tensor]
    expert: int | None

    def gradient_BTO(self) -> torch.Tensor:
        gradient = self.caught[0] if self.expert is None else self.caught[0][self.expert]
        return gradient.reshape(*self.x_BTI.shape[:2], gradient.shape[-1])


class GradientTaps:
    """Catches what a weight's gradient is made of: the matrix's input and the gradient of its output.

    The weights themselves need no gradient, so autograd never holds a weight's gradient, let alone a block's:
    the gradient of one window exists for one matrix at a time, is folded, and is gone.
    """

    def __init__(self, matrices: BlockMatrices, windows: int) -> None:
        self._matrices = matrices
        self._windows = windows
        self._uses: dict[str, list[_Use]] = defaultdict(list)
        self._shapes: dict[str, tuple[int, int]] = {}
        self._device: torch.device | None = None

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """While the context lasts ``block`` runs once; what is caught stays for ``fold``."""
        watch = _Watched(self._matrices, block)

        def tell(product: Product) -> None:
            caught: list[torch.Tensor] = []
            product.out.requires_grad_()  # it has to where it does not come from the block's input: positions
            product.out.register_hook(caught.append)
            for name, expert in watch.matrices_in(product):
                x = product.x if expert is None else product.x[expert]
                self._uses[name].append(_Use(_windows_of(x, self._windows, name), caught, expert))

        with Products(watch.parameters.items(), tell):
            yield
        self._shapes, self._device = {name: watch.shape(name) for name in watch.idle()}, watch.device

    def bytes(self) -> int:
        """How much the caught inputs hold."""
        return sum(use.x_BTI.numel() * use.x_BTI.element_size() for uses in self._uses.values() for use in uses)

    def fold(self, statistics: Mapping[str, Iterable[GradientStatistic]]) -> None:
        """After the backward pass: fold each matrix's gradients into its statistics, and let go."""
        for name, shape_OI in self._shapes.items():
            for statistic in statistics.get(name, ()):
                statistic.update_without(shape_OI, self._windows, self._device)
        for name in list(self._uses):
            uses = [(use.x_BTI, use.gradient_BTO()) for use in self._uses.pop(name) if use.caught]
            kinds = list(statistics.get(name, ()))
            if not uses or not kinds:
                continue
            if any(statistic.per_window for statistic in kinds):
                for window in range(self._windows):
                    gradient_OI = _weight_gradient([(x[window], g[window]) for x, g in uses])
                    for statistic in kinds:
                        statistic.update(gradient_OI)
            else:
                gradient_OI = _weight_gradient(uses)
                for statistic in kinds:
                    statistic.update(gradient_OI, self._windows)


@dataclass
class Kept:
    """One block's run on one micro-batch with its autograd graph."""

    x_BTD: torch.Tensor
    out_BTD: torch.Tensor
    taps: GradientTaps


def run_with_graph(
    block: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x_BTD: torch.Tensor, matrices: BlockMatrices
) -> Kept:
    """Run ``block`` on a micro-batch so that a backward pass from what it gives can be folded into statistics."""
    x_BTD = x_BTD.detach().requires_grad_()
    taps = GradientTaps(matrices, len(x_BTD))
    with torch.enable_grad(), taps.watching(block):
        return Kept(x_BTD, run(x_BTD), taps)


class _Watched:
    """The matrices of a block during one run: which parameters they are, and which of them have been in a product."""

    def __init__(self, matrices: BlockMatrices, block: nn.Module) -> None:
        self._matrices = matrices
        wanted = {matrix.parameter for matrix in matrices.values()}
        self.parameters = {name: parameter for name, parameter in block.named_parameters() if name in wanted}
        self._names = {(matrix.parameter, matrix.expert): name for name, matrix in matrices.items()}
        self._seen: set[str] = set()

    def matrices_in(self, product: Product) -> list[tuple[str, int | None]]:
        """The matrices that ``product`` multiplies with; of all experts at once, each with its place among them."""
        parameter = self.parameters[product.parameter]
        if product.expert is None and parameter.dim() == 3:
            found: list[tuple[str, int | None]] = [
                (self._names[product.parameter, expert], expert) for expert in range(len(parameter))
            ]
        else:
            found = [(self._names[product.parameter, product.expert], None)]
        self._seen.update(name for name, _ in found)
        return found

    def shape(self, name: str) -> tuple[int, int]:
        """``(O, I)``"""
        outputs, inputs = self._matrices[name].of(self.parameters).shape
        return outputs, inputs

    @property
    def device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.parameters.values()), None)

    def idle(self) -> list[str]:
        """Experts to which no token went.

        Raises:
            ModelError: a parameter was in no product at all; something other than routing has kept it out of sight.
        """
        used = {self._matrices[name].parameter for name in self._seen}
        for parameter in self.parameters:
            if parameter not in used:
                raise ModelError(
                    f"the products of '{parameter}' cannot be watched while the model runs, so it cannot be scored by "
                    "activations or gradients; choose a criterion that needs none (magnitude, random)"
                )
        return [name for name in self._matrices if name not in self._seen]


def _windows_of(x: torch.Tensor, windows: int, name: str) -> torch.Tensor:
    """A matrix's inputs as ``(windows, tokens, features)``; some modules flatten windows and tokens into one."""
    x, features = x.detach(), x.shape[-1]
    if x.dim() == 3 and len(x) == windows:
        return x
    flat = x.dim() == 2 and len(x) % windows == 0
    if flat or windows == 1 or (x.dim() > 3 and len(x) == windows):
        return x.reshape(windows, x.numel() // features // windows, features)
    raise ModelError(
        f"'{name}' is fed {list(x.shape)} instead of (windows, tokens, features); "
        "this model mixes windows and cannot be scored"
    )


def _weight_gradient(uses: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Sum over a matrix's uses of (output gradient)^T (input): exactly what autograd forms for ``x @ weight.T``."""
    terms = [g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]) for x, g in uses]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum(dim=0)
