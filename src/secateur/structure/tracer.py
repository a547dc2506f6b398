"""Tracing one block on the meta device: run its forward and watch what every operator does to the labels.

Nothing here knows a model family. A tensor is *tracked* once anything in it comes from a parameter or from the
block's hidden input; every operator that meets a tracked tensor needs a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import StructureError
from secateur.structure.axes import neutral
from secateur.structure.call import Call
from secateur.structure.capture import first_line, on_meta, run_without_weights
from secateur.structure.record import Axes, Mark, Trace
from secateur.structure.rules import find_rule


class Tracer(TorchDispatchMode):
    """Follows labels through every operator that runs while it is active."""

    def __init__(self, block: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.trace = Trace()
        self._block = block
        self._tracked: dict[int, tuple[Tensor, Axes]] = {}  # holds the tensors, so that no id is used twice
        self._names: dict[int, str] = {}
        self._modules: list[str] = []
        self.literal_index: list[int] | None = None
        for name, parameter in parameters.items():
            if id(parameter) not in self._names:
                self._names[id(parameter)] = name
                labels = [self.trace.labels.fresh(size) for size in parameter.shape]
                self.trace.parameters[name] = labels
                self._tracked[id(parameter)] = (parameter, Axes(labels, is_weight=True))
        self.first_derived = len(self.trace.labels)

    @property
    def place(self) -> str:
        """The module that runs, named inside the block."""
        return next((name for name in reversed(self._modules) if name), "the block itself")

    def lookup(self, tensor: Tensor) -> Axes | None:
        known = self._tracked.get(id(tensor))
        return known[1] if known else None

    def follow(self, tensor: Tensor, kind: str) -> None:
        """Track an input of the block, with labels of its own for its last dimension."""
        labels = self.trace.labels.fresh(tensor.shape[-1])
        axes = [*[neutral(size) for size in tensor.shape[:-1]], labels]
        self._tracked[id(tensor)] = (tensor, Axes(axes, is_weight=False))
        self.trace.marks.append(Mark(kind, labels, "it enters the block"))

    def mark_outputs(self, tensors: list[Tensor]) -> None:
        """Mark everything in the tensors that leave the block as part of the hidden stream."""
        for tensor in tensors:
            tracked = self.lookup(tensor)
            for labels in tracked.labels if tracked else []:
                if labels.any():
                    self.trace.marks.append(Mark("residual", labels[labels != 0], "it leaves the block"))

    def watch_modules(self) -> Iterator[Any]:
        """Yield hook handles that keep ``place`` up to date."""
        for name, module in self._block.named_modules():
            yield module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name))
            yield module.register_forward_hook(lambda *_: _drop(self._modules))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tracked = []
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            axes = self.lookup(tensor)
            if axes is not None:
                tracked.append(axes)
                if id(tensor) in self._names:
                    self.trace.used.setdefault(self._names[id(tensor)])
        if not tracked:
            return result
        rule = find_rule(function)
        call = Call(self, function, args, kwargs, result)
        if rule is None:
            raise StructureError(
                f"the operator {function} in {self.place} has no rule; units cannot be found past it, so this "
                "model's structure cannot be pruned (weights can still be masked)"
            )
        self._refuse_hidden_writes(function, args)
        try:
            outcome = rule(call)
        except StructureError as error:
            raise StructureError(
                f"the operator {function} in {self.place} cannot be followed: {error}; units cannot be found "
                "past it, so this model's structure cannot be pruned (weights can still be masked)"
            ) from error
        several = bool(outcome) and isinstance(outcome[0], list)
        is_weight = all(axes.is_weight for axes in tracked)
        for tensor, labels in zip(call.outputs, outcome if several else [outcome], strict=False):
            if [len(axis) for axis in labels] != list(tensor.shape):
                raise AssertionError(f"the rule for {function} gave wrong shapes")  # a defect of the rule
            if id(tensor) not in self._names:  # in-place on a parameter would make it an activation
                self._tracked[id(tensor)] = (tensor, Axes(list(labels), is_weight))
        return result

    def _refuse_hidden_writes(self, function: Any, args: Any) -> None:
        """Refuse to write tracked values into an untracked buffer: views of that buffer would miss the ties."""
        if function._schema.is_mutable and args and isinstance(args[0], Tensor) and not self.lookup(args[0]):
            raise StructureError(
                f"the operator {function} in {self.place} writes into a buffer whose origin is not known; units "
                "cannot be found past it, so this model's structure cannot be pruned (weights can still be masked)"
            )


class _LiteralIndices(TorchFunctionMode):
    """Keeps ``x[:, [-2]]`` readable: on the meta device the list's values are gone when the operator runs."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            entries = args[1] if isinstance(args[1], tuple) else (args[1],)
            lists = [entry for entry in entries if isinstance(entry, list)]
            self._tracer.literal_index = lists[0] if len(lists) == 1 else None
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self._tracer.literal_index = None


def _drop(modules: list[str]) -> None:
    modules.pop()


def trace_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tracer, list[Tensor]]:
    """Run ``block`` on meta tensors; return the tracer, and the tensors that the block returned.

    ``args`` and ``kwargs`` are the arguments of one call, tensors on the meta device; the first tensor among them is
    the hidden state. Raises ``StructureError`` at an operator without a rule and at control flow that depends on
    data.
    """
    state = on_meta(block)
    tracer = Tracer(block, {name: state[name] for name, _ in block.named_parameters(remove_duplicate=False)})
    hidden = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if hidden is None:
        raise StructureError("the blocks are called without a tensor; their structure cannot be traced")
    tracer.follow(hidden, "residual")
    handles = list(tracer.watch_modules())
    try:
        with tracer, _LiteralIndices(tracer):
            result = run_without_weights(block, state, args, kwargs)
    except (StructureError, AssertionError):
        raise
    except Exception as error:
        raise StructureError(
            f"tracing stopped in {tracer.place} ({first_line(error)}); its control flow may depend on data, so this "
            "model's structure cannot be pruned (weights can still be masked)"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return tracer, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
