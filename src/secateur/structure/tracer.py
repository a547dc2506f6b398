"""Tracing one block on the meta device: run its forward and watch what every operator does to the labels.

Nothing here knows a model family. A tensor is *tracked* once anything in it comes from a parameter or from the
block's hidden input; every operator that meets a tracked tensor needs a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import StructureError
from secateur.structure.axes import LabelArray, neutral
from secateur.structure.call import Call
from secateur.structure.capture import first_line, on_meta, run_without_weights
from secateur.structure.record import Axes, Mark, Trace
from secateur.structure.rules import find_rule


class OperatorError(StructureError):
    """An operator that cannot be followed; it tells more than that the model could not be run in some way."""


MOVES = {"view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "t", "transpose", "permute", "clone", "_to_copy"}
MOVES |= {"alias", "detach", "expand", "contiguous"}
"""Operators that leave every number as it is."""


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
            else:
                self.trace.aliases[name] = self._names[id(parameter)]
        self.first_derived = len(self.trace.labels)

    @property
    def place(self) -> str:
        """The module that runs, named inside the block."""
        return next((name for name in reversed(self._modules) if name), "the block itself")

    def lookup(self, tensor: Tensor) -> Axes | None:
        known = self._tracked.get(id(tensor))
        return known[1] if known else None

    def follow_hidden(self, tensor: Tensor) -> None:
        """Track the hidden states that enter the block, with labels of their own for their last dimension."""
        labels = self.trace.labels.fresh(tensor.shape[-1])
        axes = [*[neutral(size) for size in tensor.shape[:-1]], labels]
        self._tracked[id(tensor)] = (tensor, Axes(axes, is_weight=False))
        self.trace.marks.append(Mark("residual", labels, "it enters the block"))
        self.trace.hidden = labels

    def follow_constant(self, path: str, tensor: Tensor) -> None:
        """Track a constant, so that what is tied to its entries can take them along."""
        if id(tensor) not in self._tracked and tensor.dim() and tensor.is_floating_point():
            axes = [self.trace.labels.blank(size) if size > 1 else neutral(1) for size in tensor.shape]
            self._tracked[id(tensor)] = (tensor, Axes(axes, is_weight=False))
            self.trace.arguments[path] = axes

    def mark_outputs(self, tensors: list[Tensor], read: set[int]) -> None:
        """Mark everything in the tensors that leave the block and are ``read`` as part of the hidden stream."""
        for number, tensor in enumerate(tensors):
            tracked = self.lookup(tensor) if number in read else None
            for labels in tracked.labels if tracked else []:
                if labels.any():
                    self.trace.marks.append(Mark("residual", labels[labels != 0], "it leaves the block"))
        hidden = self.lookup(tensors[0]) if tensors else None
        table = self.trace.labels
        if hidden is None or not np.array_equal(table.find(hidden.labels[-1]), table.find(self.trace.hidden)):
            self.trace.hidden = neutral(0)  # what leaves is not what entered plus something: no residual stream

    def note_hidden(self, tensor: Tensor) -> None:
        """Note the hidden states that a block is given, while what stands outside the blocks is traced."""
        tracked = self.lookup(tensor)
        if tracked is None:
            raise StructureError("the blocks are given hidden states that come from no parameter")
        if not len(self.trace.hidden):
            self.trace.hidden = tracked.labels[-1]
        self.trace.labels.tie(self.trace.hidden, tracked.labels[-1])

    def watch_modules(self) -> Iterator[Any]:
        """Yield hook handles that keep ``place`` up to date and find out which modules keep the labels they are given."""
        for name, module in self._block.named_modules():
            yield module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name))
            if not next(module.children(), None):
                yield module.register_forward_hook(partial(self._see_norm, name))
            yield module.register_forward_hook(lambda *_: _drop(self._modules))

    def _see_norm(self, name: str, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Note a module that gives back the dimensions it was given; two different uses make it no norm of anything."""
        if not (args and isinstance(args[0], Tensor) and isinstance(result, Tensor)):
            return
        given, returned = self.lookup(args[0]), self.lookup(result)
        if given is None or returned is None or args[0].shape != result.shape:
            return
        labels = given.labels[-1]
        if np.array_equal(self.trace.labels.find(labels), self.trace.labels.find(returned.labels[-1])):
            known = self.trace.norms.setdefault(name, labels)
            if not np.array_equal(self.trace.labels.find(known), self.trace.labels.find(labels)):
                del self.trace.norms[name]

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
            raise OperatorError(
                f"the operator {function} in {self.place} has no rule; units cannot be found past it, so this "
                "model's structure cannot be pruned (weights can still be masked)"
            )
        self._refuse_hidden_writes(function, args)
        try:
            outcome = rule(call)
        except StructureError as error:
            raise OperatorError(
                f"the operator {function} in {self.place} cannot be followed: {error}; units cannot be found "
                "past it, so this model's structure cannot be pruned (weights can still be masked)"
            ) from error
        several = bool(outcome) and isinstance(outcome[0], list)
        is_weight = all(axes.is_weight for axes in tracked) if call.gives_weight is None else call.gives_weight
        values = call.values if call.values is not None else self._values_kept(function, tracked)
        for tensor, labels in zip(call.outputs, outcome if several else [outcome], strict=False):
            if [len(axis) for axis in labels] != list(tensor.shape):
                raise OperatorError(
                    f"the operator {function} in {self.place} is used in a way that its rule does not cover; units cannot be "
                    "found past it, so this model's structure cannot be pruned (weights can still be masked; please report this)"
                )
            if id(tensor) not in self._names:  # in-place on a parameter would make it an activation
                indices = values if not tensor.is_floating_point() else None
                self._tracked[id(tensor)] = (tensor, Axes(list(labels), is_weight, indices))
        return result

    @staticmethod
    def _values_kept(function: Any, tracked: list[Axes]) -> LabelArray | None:
        """Indices stay indices when they are only moved about."""
        moved = function.overloadpacket.__name__ in MOVES
        return tracked[0].values if moved and len(tracked) == 1 else None

    def _refuse_hidden_writes(self, function: Any, args: Any) -> None:
        """Refuse to write tracked values into an untracked buffer: views of that buffer would miss the ties."""
        if function._schema.is_mutable and args and isinstance(args[0], Tensor) and not self.lookup(args[0]):
            raise OperatorError(
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


def trace_block(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], follow_constants: bool = False
) -> tuple[Tracer, Any]:
    """Run ``block`` on meta tensors; return the tracer, and what the block returned.

    ``args`` and ``kwargs`` are the arguments of one call, tensors on the meta device; the first tensor among them is
    the hidden state. ``follow_constants`` gives labels to the others, and to buffers that are computed. Raises
    ``StructureError`` at an operator without a rule and at control flow that depends on data.
    """
    state = on_meta(block)
    stored = block.state_dict(keep_vars=True)
    names = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    names += [name for name, buffer in block.named_buffers() if name in stored and buffer.is_floating_point()]
    tracer = Tracer(block, {name: state[name] for name in names})
    hidden = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if hidden is None:
        raise StructureError("the blocks are called without a tensor; their structure cannot be traced")
    tracer.follow_hidden(hidden)
    if follow_constants:
        for path, argument in (*enumerate(args), *kwargs.items()):
            if isinstance(argument, Tensor):
                tracer.follow_constant(str(path), argument)
        for name in state.keys() - set(names):
            tracer.follow_constant(f"buffer:{name}", state[name])
    with watched(tracer):
        result = run_without_weights(block, state, args, kwargs)
    return tracer, result


@contextmanager
def watched(tracer: Tracer) -> Iterator[None]:
    """While the context lasts ``tracer`` sees every operator. Whatever stops the run becomes a ``StructureError``."""
    handles = list(tracer.watch_modules())
    try:
        with tracer, _LiteralIndices(tracer):
            yield
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
