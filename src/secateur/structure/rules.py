"""One short rule per ATen operator: how the labels of the inputs become the labels of the output.

A rule gets a ``Call`` and returns one list of label arrays for the (first) output, or a list of such lists where
the operator returns several tensors. Operators tagged pointwise by PyTorch share one rule. An operator without a
rule stops the trace: passing over it would lose ties in silence.

The marks that rules leave on labels are explained in ``record.MARKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import StructureError
from secateur.structure.axes import NEUTRAL, LabelArray, neutral

if TYPE_CHECKING:
    from secateur.structure.call import Call

Axes = list[LabelArray]
Rule = Callable[["Call"], Any]
RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Enter a rule for the named ATen operators (without overload)."""

    def enter(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return enter


def find_rule(function: torch._ops.OpOverload) -> Rule | None:
    """Return the rule for an operator, or None."""
    namespace, _, name = str(function.overloadpacket).partition(".")
    if namespace != "aten":
        return None
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in function.tags else None


# --- elementwise -------------------------------------------------------------------------------------------------


@rule("_to_copy", "copy_", "alias", "detach", "lift_fresh", "clone")
@rule("zeros_like", "ones_like", "full_like", "empty_like", "where", "masked_fill")
def pointwise(call: Call) -> Axes:
    """Tie all inputs index by index, after broadcasting."""
    shape = call.output.shape
    tensors = call.tensors()
    axes: Axes = []
    for dim, size in enumerate(shape):
        result = neutral(size)
        first = True
        for tensor in tensors:
            own = dim - (len(shape) - tensor.dim())
            if own < 0 or tensor.shape[own] != size or size == 1 or call.is_uniform(tensor, own):
                continue  # broadcast: says nothing about single indices
            labels = call.axes(tensor)[own]
            if not first:
                call.tie(result, labels)
            result = np.where(result == NEUTRAL, labels, result)
            first = False
        axes.append(result)
    return axes


# --- the same numbers in another shape ---------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "unsqueeze_", "squeeze_")
def view(call: Call) -> Axes:
    source: Tensor = call["self"]
    return regroup(call, call.axes(source), source.shape, call.output.shape)


def regroup(call: Call, axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes:
    """Merge and split dimensions, in the smallest runs of old and new dimensions with equal products."""
    if prod(old) == 0:
        raise StructureError("it reshapes a tensor without entries")
    result: Axes = []
    done_old = done_new = 0
    while done_old < len(old) or done_new < len(new):
        end_old, end_new = min(done_old + 1, len(old)), min(done_new + 1, len(new))
        while (have := prod(old[done_old:end_old])) != (want := prod(new[done_new:end_new])):
            if have < want:
                end_old += 1
            else:
                end_new += 1
        result += _regroup_run(call, axes[done_old:end_old], list(new[done_new:end_new]))
        done_old, done_new = end_old, end_new
    return result


def _regroup_run(call: Call, axes: Axes, sizes: list[int]) -> Axes:
    axes = [axis for axis in axes if len(axis) > 1]
    wide = [size for size in sizes if size > 1]
    if [len(axis) for axis in axes] != wide:
        axes = call.labels.split(call.labels.merge(axes), wide)
    parts = iter(axes)
    return [next(parts) if size > 1 else neutral(1) for size in sizes]


@rule("t", "transpose", "permute", "transpose_", "t_")
def permute(call: Call) -> Axes:
    source: Tensor = call["self"]
    order = list(range(source.dim()))
    if "dims" in call:
        order = [dim % source.dim() for dim in call["dims"]]
    elif source.dim() > 1:
        one, other = (call["dim0"], call["dim1"]) if "dim0" in call else (0, 1)
        order[one], order[other] = order[other], order[one]
    axes = call.axes(source)
    return [axes[dim] for dim in order]


@rule("expand")
def expand(call: Call) -> Axes:
    """Repeat size-1 dimensions: fresh labels, all alike, so that any of the repeats may leave."""
    source: Tensor = call["self"]
    shape = call.output.shape
    axes = [neutral(1)] * (len(shape) - source.dim()) + call.axes(source)
    return [axis if len(axis) == size else call.broadcast(size) for axis, size in zip(axes, shape, strict=True)]


@rule("new_empty", "new_zeros", "new_ones", "new_full")
def blank(call: Call) -> Axes:
    """A new tensor to be written into: labels of its own, tied by what is written."""
    return [call.labels.blank(size) if size > 1 else neutral(size) for size in call.output.shape]


@rule("repeat")
def repeat(call: Call) -> Axes:
    source: Tensor = call["self"]
    repeats: list[int] = call["repeats"]
    axes = [neutral(1)] * (len(repeats) - source.dim()) + call.axes(source)
    return [
        call.labels.merge([call.broadcast(times), axis]) if times > 1 else axis
        for axis, times in zip(axes, repeats, strict=True)
    ]


# --- parts and wholes --------------------------------------------------------------------------------------------


@rule("slice")
def slice_(call: Call) -> Axes:
    axes = list(call.axes(call["self"]))
    dim = call.get("dim", 0) % len(axes)
    part = axes[dim][call.get("start") : call.get("end") : call.get("step", 1)]
    axes[dim] = call.settle(part, "takes one fixed index of")
    return axes


@rule("select")
def select(call: Call) -> Axes:
    axes = list(call.axes(call["self"]))
    dim = call["dim"] % len(axes)
    index = call["index"] % len(axes[dim])
    call.settle(axes.pop(dim)[index : index + 1], "takes one fixed index of")
    return axes


@rule("unbind")
def unbind(call: Call) -> list[Axes]:
    axes = list(call.axes(call["self"]))
    dim = call.get("dim", 0) % len(axes)
    call.mark("frozen", axes.pop(dim), "takes single fixed indices of")
    return [axes for _ in call.outputs]


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def split(call: Call) -> list[Axes]:
    axes = call.axes(call["self"])
    dim = call.get("dim", 0) % len(axes)
    results: list[Axes] = []
    start = 0
    for part in call.outputs:
        size = part.shape[dim]
        piece = call.settle(axes[dim][start : start + size], "takes one fixed index of")
        results.append([*axes[:dim], piece, *axes[dim + 1 :]])
        start += size
    return results


@rule("cat")
def cat(call: Call) -> Axes:
    tensors: list[Tensor] = call["tensors"]
    dim = call.get("dim", 0) % call.output.dim()
    tensors = [tensor for tensor in tensors if tensor.dim() == call.output.dim()]
    axes = list(call.axes(tensors[0]))
    for tensor in tensors[1:]:
        for position, labels in enumerate(call.axes(tensor)):
            if position == dim:
                axes[dim] = np.concatenate([axes[dim], labels])
            else:
                call.tie(axes[position], labels)
                axes[position] = np.where(axes[position] == NEUTRAL, labels, axes[position])
    return axes


@rule("stack")
def stack(call: Call) -> Axes:
    """Stack along a new, neutral dimension (interleaved rotary pairs)."""
    tensors: list[Tensor] = call["tensors"]
    dim = call.get("dim", 0) % call.output.dim()
    axes = list(call.axes(tensors[0]))
    for tensor in tensors[1:]:
        for position, labels in enumerate(call.axes(tensor)):
            call.tie(axes[position], labels)
            axes[position] = np.where(axes[position] == NEUTRAL, labels, axes[position])
    return [*axes[:dim], neutral(len(tensors)), *axes[dim:]]


@rule("index")
def index(call: Call) -> Axes:
    """Index by constants: of one dimension by known indices, or of neutral dimensions by whatever."""
    source: Tensor = call["self"]
    axes = list(call.axes(source))
    used = [dim for dim, entry in enumerate(call["indices"]) if entry is not None]
    if len(used) == 1 and call["indices"][used[0]].dim() == 1:
        dim = used[0]
        known = call.constant(call["indices"][dim])
        if known is not None:
            axes[dim] = axes[dim][known]
            call.mark("frozen", axes[dim], "takes fixed indices of")
            if len(axes[dim]) == 1:
                axes[dim] = neutral(1)
            return axes
        if not axes[dim].any():
            return [*axes[:dim], neutral(call.output.shape[dim]), *axes[dim + 1 :]]
        chosen = call.values_of(call["indices"][dim])
        if chosen is not None:
            return _picked(call, axes, dim, chosen)
    raise StructureError("it picks indices that are not known while tracing")


def _picked(call: Call, axes: Axes, dim: int, chosen: LabelArray) -> Axes:
    """Take the entries of a weight that a router chose: entry and choice leave together."""
    call.mark("picked", axes[dim])
    call.tie(axes[dim], chosen)
    call.gives_weight = call.is_weight(call["self"])
    return [*axes[:dim], neutral(call.output.shape[dim]), *axes[dim + 1 :]]


# --- choices -----------------------------------------------------------------------------------------------------


@rule("topk")
def topk(call: Call) -> list[Axes]:
    """Choose the best of a dimension: the choice has no labels left, and its indices know among what they choose."""
    axes = list(call.axes(call["self"]))
    dim = call.get("dim", -1) % len(axes)
    call.mark("chosen", axes[dim], "chooses among", call["k"])
    call.values = axes[dim]
    axes[dim] = neutral(call["k"])
    return [axes, axes]


@rule("gather")
def gather(call: Call) -> Axes:
    """Read the values at chosen indices; they have to be indices into this very dimension."""
    axes, at = list(call.axes(call["self"])), call["index"]
    dim = call["dim"] % len(axes)
    chosen = call.values_of(at)
    if axes[dim].any():
        if chosen is None or len(chosen) != len(axes[dim]):
            raise StructureError("it reads at indices that are not known while tracing")
        call.tie(axes[dim], chosen)
    return [*axes[:dim], neutral(at.shape[dim]), *axes[dim + 1 :]]


@rule("scatter_", "scatter")
def scatter(call: Call) -> Axes:
    """Write at chosen indices into a dimension, which thereby stands for what was chosen from."""
    axes = list(call.axes(call["self"]))
    dim = call["dim"] % len(axes)
    chosen = call.values_of(call["index"])
    if chosen is None or len(chosen) != len(axes[dim]):
        raise StructureError("it writes to indices that are not known while tracing")
    if axes[dim].any():
        call.tie(axes[dim], chosen)
    axes[dim] = chosen
    return axes


@rule("embedding")
def embedding(call: Call) -> Axes:
    """Look rows of a table up by tokens or positions: the rows stay, whatever leaves."""
    rows, features = call.axes(call["weight"])
    call.mark("frozen", rows, "looks up rows by")
    call.mark("produced", features)
    call.gives_weight = False
    return [*[neutral(size) for size in call["indices"].shape], features]


# --- contractions ------------------------------------------------------------------------------------------------


@rule("mm", "addmm")
def matrix_product(call: Call) -> Axes:
    left, right = (call["mat1"], call["mat2"]) if "mat1" in call else (call["self"], call["mat2"])
    axes = call.contract(left, right)
    return _added(call, axes) if "mat1" in call else axes


@rule("bmm", "baddbmm")
def batched_product(call: Call) -> Axes:
    left, right = (call["batch1"], call["batch2"]) if "batch1" in call else (call["self"], call["mat2"])
    axes = call.contract(left, right)
    return _added(call, axes) if "batch1" in call else axes


def _added(call: Call, axes: Axes) -> Axes:
    """Tie what a product is added to (a bias, ALiBi) to the product."""
    addend: Tensor = call["self"]
    for labels, own in zip(reversed(axes), range(addend.dim() - 1, -1, -1), strict=False):
        if addend.shape[own] == len(labels) > 1 and not call.is_uniform(addend, own):
            call.tie(call.axes(addend)[own], labels)
    return axes


@rule("convolution")
def convolution(call: Call) -> Axes:
    """A convolution over positions: channels are contracted and produced, positions stay neutral."""
    source, weight, bias = call["input"], call["weight"], call["bias"]
    if call["groups"] != 1 or call["transposed"]:
        raise StructureError("grouped and transposed convolutions have no rule")
    axes, (out, into, *_) = call.axes(source), call.axes(weight)
    call.tie(axes[1], into)
    call.mark("produced", out)
    call.mark("consumed", into)
    if bias is not None:
        call.tie(call.axes(bias)[0], out)
    call.gives_weight = False
    return [axes[0], out, *[neutral(size) for size in call.output.shape[2:]]]


# --- reductions --------------------------------------------------------------------------------------------------


@rule("mean", "sum", "var", "amax", "amin", "prod", "any", "all", "linalg_vector_norm", "norm", "std", "logsumexp")
def reduce(call: Call) -> Axes:
    source: Tensor = call["self"]
    axes = list(call.axes(source))
    dims = call.get("dim")
    dims = list(range(source.dim())) if dims in (None, []) else ([dims] if isinstance(dims, int) else list(dims))
    gone = {dim % source.dim() for dim in dims}
    for dim in gone:
        call.mark("reduced", axes[dim], "takes statistics over")
        axes[dim] = neutral(1)
    if call.output.dim() == source.dim():
        return axes
    return [axis for dim, axis in enumerate(axes) if dim not in gone]


@rule("max", "min")
def extreme(call: Call) -> Any:
    """The largest along a dimension, and where it stands."""
    axes = reduce(call)
    return [axes, axes] if "dim" in call else axes


@rule("view_as_complex")
def as_complex(call: Call) -> Axes:
    """Take pairs for complex numbers (rotary): the two of a pair stay together."""
    *axes, pair = call.axes(call["self"])
    call.mark("frozen", pair, "takes pairs of")
    return axes


@rule("view_as_real")
def as_real(call: Call) -> Axes:
    return [*call.axes(call["self"]), neutral(2)]


@rule("_softmax", "_log_softmax", "cumsum")
def normalise(call: Call) -> Axes:
    axes = call.axes(call["self"])
    call.mark("normalised", axes[call["dim"] % len(axes)], "normalises over")
    return axes


@rule("native_layer_norm", "_fused_rms_norm")
def norm(call: Call) -> list[Axes]:
    axes = call.axes(call["input"])
    width = len(call["normalized_shape"])
    for position in range(1, width + 1):
        call.mark("reduced", axes[-position], "takes statistics over")
        for parameter in (call.get("weight"), call.get("bias")):
            if parameter is not None:
                call.tie(call.axes(parameter)[-position], axes[-position])
    statistics = [*axes[:-width], *[neutral(1)] * width]
    return [axes, *([statistics] * (len(call.outputs) - 1))]
