"""Where a parameter is the weight of a matrix product: seen while the model runs, whatever module it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# For each product, the place and the keyword of its two factors, and whether the second one is transposed.
_Factor = tuple[int, str]
_FACTORS: dict[Any, tuple[_Factor, _Factor, bool]] = {
    F.linear: ((0, "input"), (1, "weight"), True),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), ((1, "mat1"), (2, "mat2"), False)),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), ((1, "batch1"), (2, "batch2"), False)),
    **dict.fromkeys((torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm), ((0, "input"), (1, "mat2"), False)),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), ((0, "input"), (1, "other"), False)),
}


@dataclass(frozen=True)
class Product:
    """One product of a parameter with activations.

    Attributes:
        parameter: its name.
        expert: which matrix of a packed parameter; None for a plain one, and for all of a packed one at once.
        x: the activations, ``(..., inputs)``; of all experts at once ``(experts, tokens, inputs)``.
        out: the product, ``(..., outputs)``, as the model goes on with it.
    """

    parameter: str
    expert: int | None
    x: torch.Tensor
    out: torch.Tensor


def is_product(function: Any) -> bool:
    """Whether ``function`` multiplies matrices in a form that is understood."""
    return function in _FACTORS


def factors(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The two factors of a product, and whether the second is transposed."""
    *places, transposed = _FACTORS[function]
    left, right = (args[place] if place < len(args) else kwargs[name] for place, name in places)
    return left, right, transposed


class Products(TorchFunctionMode):
    """While active, tells of every product of one of the given parameters, as it happens.

    A factor is recognised as a parameter, as its transpose, or as one expert of a packed one by the memory it shares.
    """

    def __init__(self, parameters: Iterable[tuple[str, torch.Tensor]], tell: Callable[[Product], None]) -> None:
        super().__init__()
        self._tell = tell
        self._by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in parameters:
            self._by_storage.setdefault(_storage(parameter), []).append((name, parameter))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in _FACTORS:
            left, right, transposed = factors(function, args, kwargs or {})
            found = self._find(right if transposed else right.mT) if right.dim() >= 2 else None
            if found is not None:
                self._tell(Product(*found, left, out))
        return out

    def _find(self, weight: torch.Tensor) -> tuple[str, int | None] | None:
        """The parameter that ``weight`` is a view of, whole or one expert, possibly transposed."""
        for name, parameter in self._by_storage.get(_storage(weight), ()):
            kept = parameter.mT if weight.stride()[-2:] != parameter.stride()[-2:] else parameter
            if weight.shape[-2:] != kept.shape[-2:] or weight.stride()[-2:] != kept.stride()[-2:]:
                continue
            offset = int(weight.storage_offset() - parameter.storage_offset())
            if weight.dim() == parameter.dim():
                if offset == 0 and weight.shape == kept.shape:
                    return name, None
            elif weight.dim() == 2 and parameter.dim() == 3:
                expert, rest = divmod(offset, parameter.stride(0))
                if not rest and 0 <= expert < len(parameter):
                    return name, expert
        return None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
