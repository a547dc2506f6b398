"""The matrices of a block that masks and scores may touch: found by use, not by module or name.

A parameter is one if, in the model's own forward, it is the weight of a product with activations. Routers, by whose
product experts are chosen, stay out; so do norms, embeddings and convolutions, which are in no such product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from secateur.checkpoint.products import factors, is_product
from secateur.errors import StructureError

# The one import from above: running a model without weights needs nothing of what else is there.
from secateur.structure.capture import on_meta, run_without_weights, traceable, ways_to_call


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix of a block, however the block keeps it.

    Attributes:
        name: what masks, statistics and scores call it: the parameter's name inside the block, of a packed parameter
            with the expert's number behind it, ``mlp.experts.down_proj[3]``.
        parameter: the parameter it is, or is part of.
        expert: which of a packed parameter's matrices; None for a parameter that is one matrix.
        transposed: whether it is kept as (I, O), as some families do.
    """

    name: str
    parameter: str
    expert: int | None = None
    transposed: bool = False

    def of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Its view ``(O, I)`` of the block's tensors; writing to the view writes to them."""
        tensor = tensors[self.parameter]
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.mT if self.transposed else matrix

    def shape(self, shapes: Mapping[str, Any]) -> tuple[int, int]:
        """``(O, I)``, from the shapes of the block's tensors."""
        *_, first, second = shapes[self.parameter]
        return (second, first) if self.transposed else (first, second)


BlockMatrices = Mapping[str, BlockMatrix]


def in_own_layout(matrices: BlockMatrices, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values given for each matrix ``(O, I)``, put together by parameter in the layout that the parameter has."""
    parts: dict[str, list[torch.Tensor]] = {}
    packed = {matrix.parameter for matrix in matrices.values() if matrix.expert is not None}
    for name, matrix in matrices.items():  # experts in order
        if name in values:
            value_OI = values[name]
            parts.setdefault(matrix.parameter, []).append(value_OI.mT if matrix.transposed else value_OI)
    return {name: torch.stack(part) if name in packed else part[0] for name, part in parts.items()}


@dataclass(frozen=True)
class Uses:
    """How a model uses its parameters.

    Attributes:
        transposed: parameters that are weights of products -> whether they are kept as (I, O).
        routers: those whose product something is chosen by.
        unclear: parameters that go into a product of a form that is not understood.
        seen: whether the model could be run without weights; otherwise these are the modules of known kind.
    """

    transposed: Mapping[str, bool]
    routers: frozenset[str]
    unclear: frozenset[str]
    seen: bool


def find_uses(model: Any) -> Uses:
    """Run ``model`` without weights and watch what its parameters are multiplied with."""
    with traceable(model):
        for inputs in _ways(model):
            state = on_meta(model)
            watch = _Watch({id(tensor): name for name, tensor in state.items()})
            try:
                with watch:
                    run_without_weights(model, state, (), inputs)
            except Exception:  # what a model does on values that do not exist is its own; the next way may spare it
                continue
            return Uses(watch.transposed, frozenset(watch.routers), frozenset(watch.unclear), seen=True)
    return _by_kind(model)


def _ways(model: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from ways_to_call(model)
    except StructureError:  # it reads neither tokens nor pixels
        return


def _by_kind(model: nn.Module) -> Uses:
    from transformers.pytorch_utils import Conv1D

    known = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return Uses(known, frozenset(), frozenset(), seen=False)


def block_matrices(model: Any, uses: Uses, prefix: str, block: nn.Module) -> dict[str, BlockMatrix]:
    """The matrices of one block by name.

    Raises:
        StructureError: the block multiplies with a parameter in a way that is not understood, so that masks would
            silently leave it dense.
    """
    convolutions = {id(p) for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    found = {}
    for name, parameter in block.named_parameters():
        full = prefix + name
        if full in uses.unclear or (
            parameter.dim() > 2 and full not in uses.transposed and id(parameter) not in convolutions
        ):
            raise StructureError(
                f"{type(model).__name__} multiplies with '{full}' in a way that is not understood, so it can be neither "
                "masked nor scored; prune another model"
            )
        if full not in uses.transposed or full in uses.routers:
            continue
        transposed = uses.transposed[full]
        if parameter.dim() == 2:
            found[name] = BlockMatrix(name, name, None, transposed)
        else:
            experts = (BlockMatrix(f"{name}[{e}]", name, e, transposed) for e in range(len(parameter)))
            found |= {matrix.name: matrix for matrix in experts}
    return found


_INDICES = (torch.int64, torch.int32)
_OPAQUE = {torch.einsum, torch.tensordot, F.bilinear}


class _Watch(TorchFunctionMode):
    """Follows parameters into products, and what the products give into choices."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.transposed: dict[str, bool] = {}
        self.routers: set[str] = set()
        self.unclear: set[str] = set()
        # Tensors that are a parameter, or a gather of its experts; and whether the last two dimensions are swapped.
        self._weights: dict[int, tuple[str, bool]] = {key: (name, False) for key, name in names.items()}
        self._given: dict[int, frozenset[str]] = {}  # tensors -> parameters whose product they come from, elementwise
        self._alive: list[torch.Tensor] = []  # ids stay unique

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._alive += outputs
        if is_product(function):
            self._multiply(*factors(function, args, kwargs), outputs[0])
        elif function in _OPAQUE:
            self.unclear |= {self._weights[id(tensor)][0] for tensor in inputs if id(tensor) in self._weights}
        elif not self._reshape_weight(function, args, outputs):
            given = frozenset().union(*(self._given.get(id(tensor), frozenset()) for tensor in inputs))
            # What turns numbers into indices chooses: a top-k, an argmax.
            numbers = [tensor for tensor in outputs if tensor.is_floating_point() or tensor.is_complex()]
            if any(tensor.dtype in _INDICES for tensor in outputs):
                self.routers |= given
            self._given |= {id(tensor): given for tensor in numbers if given}
        return result

    def _reshape_weight(self, function: Any, args: Any, outputs: list[torch.Tensor]) -> bool:
        """A transpose of a parameter, a cast, or a choice of experts, is still that parameter."""
        if not args or id(args[0]) not in self._weights or len(outputs) != 1:
            return False
        before, after = args[0], outputs[0]
        name, transposed = self._weights[id(before)]
        own = tuple(before.shape[-2:])
        if before.dim() < 2 or after.dim() < 2:
            return False
        if _name(function) in ("transpose", "t", "T", "mT", "permute", "swapaxes", "adjoint"):
            turned = after.stride()[-2:] == before.stride()[-2:][::-1] and tuple(after.shape[-2:]) == own[::-1]
            self._weights[id(after)] = (name, transposed ^ turned)
            return True
        if tuple(after.shape[-2:]) == own and _name(function) in _STILL_THE_WEIGHT:
            self._weights[id(after)] = (name, transposed)
            return True
        return False

    def _multiply(self, left: torch.Tensor, right: torch.Tensor, right_is_transposed: bool, out: torch.Tensor) -> None:
        weights = [self._weights.get(id(left)), self._weights.get(id(right))]
        if (weights[0] is None) == (weights[1] is None):
            return  # activations with activations, or a weight with a weight
        # The kept order is (O, I) where the contracted dimension is the last one.
        name, turned = weights[1] or weights[0] or ("", False)
        contracted_last = right_is_transposed if weights[1] else True
        transposed = turned ^ (not contracted_last)
        if self.transposed.setdefault(name, transposed) != transposed:
            self.unclear.add(name)
        self._given[id(out)] = frozenset({name})


_STILL_THE_WEIGHT = ("__getitem__", "index_select", "to", "type", "type_as", "float", "bfloat16", "contiguous", "clone")


def _name(function: Any) -> str:
    """A function's name; of a property such as ``Tensor.T`` the property's."""
    name = getattr(function, "__name__", "")
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name
