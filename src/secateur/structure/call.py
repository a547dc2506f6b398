"""One operator call as its rule sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.structure.axes import LabelArray, neutral
from secateur.structure.record import Mark

if TYPE_CHECKING:
    from secateur.structure.tracer import Tracer


class Call:
    """One operator call as its rule sees it: arguments by name, outputs, and the labels of tensors."""

    def __init__(self, tracer: Tracer, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        names = [argument.name for argument in function._schema.arguments]
        self._arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self._tracer = tracer
        self._inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.name = str(function)
        self.labels = tracer.trace.labels
        self.values: LabelArray | None = None  # set by rules whose output is a tensor of indices
        self.gives_weight: bool | None = None  # set by rules that know better than "all it was made from are weights"

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arguments

    def get(self, name: str, default: Any = None) -> Any:
        return self._arguments.get(name, default)

    def tensors(self) -> list[Tensor]:
        return self._inputs

    def axes(self, tensor: Tensor) -> list[LabelArray]:
        """Return the labels of each dimension; a constant's are neutral."""
        tracked = self._tracer.lookup(tensor)
        if tracked is None:
            return [neutral(size) for size in tensor.shape]
        return [self.labels.settled(labels) for labels in tracked.labels]

    def values_of(self, tensor: Tensor) -> LabelArray | None:
        """Return the labels that a tensor of indices chooses among, if it is known to be one."""
        tracked = self._tracer.lookup(tensor)
        return tracked.values if tracked else None

    def is_weight(self, tensor: Tensor) -> bool:
        tracked = self._tracer.lookup(tensor)
        return tracked is not None and tracked.is_weight

    def is_uniform(self, tensor: Tensor, dim: int) -> bool:
        """Whether a constant is the same along ``dim`` (it was expanded), so that it ties nothing."""
        return self._tracer.lookup(tensor) is None and tensor.stride(dim) == 0

    def constant(self, tensor: Tensor) -> LabelArray | None:
        """Return the values of an index tensor, if they can be known."""
        if not tensor.is_meta:
            return tensor.numpy()
        literal = self._tracer.literal_index
        return np.array(literal) if literal is not None and len(literal) == len(tensor) else None

    def mark(self, kind: str, labels: LabelArray, what: str = "", amount: int = 0) -> None:
        if labels.any():
            reason = f"{self._tracer.place} {what} {{}} ({self.name})"
            self._tracer.trace.marks.append(Mark(kind, labels[labels != 0], reason, self._tracer.place, amount))

    def tie(self, left: LabelArray, right: LabelArray) -> None:
        fixed = self.labels.tie(left, right)
        self.mark("constant", fixed, "has a constant with an entry for each of")

    def broadcast(self, size: int) -> LabelArray:
        fresh = self.labels.blank(size)
        self.mark("broadcast", fresh)
        return fresh

    def settle(self, part: LabelArray, what: str) -> LabelArray:
        """Return ``part``; a single fixed index of something loses its label and can never leave."""
        if len(part) != 1:
            return part
        self.mark("frozen", part, what)
        return neutral(1)

    def contract(self, left: Tensor, right: Tensor) -> list[LabelArray]:
        """Tie and mark the dimensions of a (batched) matrix product; return the labels of the product."""
        axes_left, axes_right = self.axes(left), self.axes(right)
        self.tie(axes_left[-1], axes_right[-2])
        batch = axes_left[:-2]
        for labels, own in zip(axes_right[:-2], range(len(batch)), strict=True):
            self.tie(batch[own], labels)
            batch[own] = labels if not batch[own].any() else batch[own]
        weights = [
            (axes, free, contracted)
            for tensor, axes, free, contracted in ((left, axes_left, -2, -1), (right, axes_right, -1, -2))
            if (tracked := self._tracer.lookup(tensor)) and tracked.is_weight
        ]
        if len(weights) == 1:
            axes, free, contracted = weights[0]
            self.mark("produced", axes[free])
            self.mark("consumed", axes[contracted])
            reshaped = axes[contracted].max(initial=0) >= self._tracer.first_derived
            if reshaped or any(labels.any() for labels in axes[:-2]):
                for labels in axes:
                    self.mark("packed", labels, "uses stacked or reshaped weights for")
        else:
            for labels in batch:
                self.mark("batched", labels)
            for kind, labels in (
                ("contracted", axes_left[-1]),
                ("contracted", axes_right[-2]),
                ("carried", axes_left[-2]),
                ("carried", axes_right[-1]),
            ):
                self.mark(kind, labels, "mixes activations across")
        return [*batch, axes_left[-2], axes_right[-1]]
