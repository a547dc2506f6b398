"""The entry: find the units of one block, or of a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.errors import StructureError
from secateur.structure.capture import (
    BlockCall,
    capture_calls,
    on_meta,
    outputs_read,
    run_without_weights,
    traceable,
    ways_to_call,
)
from secateur.structure.grouping import group_units
from secateur.structure.hidden import hidden_units
from secateur.structure.record import Trace
from secateur.structure.tracer import OperatorError, Tracer, trace_block, watched
from secateur.structure.units import OUTSIDE, Refusal, Structure, UnitGroup


def find_units(model: nn.Module, blocks_name: str, block_index: int) -> list[UnitGroup]:
    """Return the unit groups of one block of ``model``; parameters may live on the meta device.

    Raises ``StructureError`` where the block cannot be traced.
    """
    blocks = _blocks(model, blocks_name)
    if not 0 <= block_index < len(blocks):
        raise StructureError(f"{blocks_name} has {len(blocks)} blocks; there is no block {block_index}")
    with traceable(model):
        _, _, traces = _traced(model, blocks, [block_index])
    return group_units(traces[block_index], block_index).units


def find_all_units(model: nn.Module, blocks_name: str) -> Structure:
    """Return all units of a model, and what was refused. Blocks that are alike share one trace.

    Raises ``StructureError`` where a block cannot be traced.
    """
    blocks = _blocks(model, blocks_name)
    first_alike: dict[Any, int] = {}
    like = [first_alike.setdefault(_signature(block), index) for index, block in enumerate(blocks)]
    with traceable(model):
        inputs, calls, traces = _traced(model, blocks, sorted(set(like)))
        found = {index: group_units(trace, index) for index, trace in traces.items()}
        structure = Structure([], [])
        for index, source in enumerate(like):
            structure.units.extend(replace(group, block=index) for group in found[source].units)
            structure.refused.extend(replace(refusal, block=index) for refusal in found[source].refused)
        try:
            outside = _trace_outside(model, blocks, blocks_name, inputs, returns_tuple=_returns_tuple(calls))
            structure.units.extend(hidden_units(outside, [traces[source] for source in like]))
        except StructureError as error:
            structure.refused.append(Refusal("hidden", OUTSIDE, "", str(error)))
    if len(blocks) > 1:
        structure.units.append(UnitGroup("block", OUTSIDE, blocks_name, len(blocks), 1, ()))
    return structure


def _traced(
    model: nn.Module, blocks: nn.ModuleList, wanted: list[int]
) -> tuple[dict[str, Any], dict[int, list[Any]], dict[int, Trace]]:
    """Trace the ``wanted`` blocks; return also what the model was called with, and what each block returned."""
    problem: StructureError | None = None
    for inputs in ways_to_call(model):
        try:
            calls = capture_calls(model, blocks, wanted, inputs)
            returned: dict[int, Any] = {}
            traces = {index: _trace(model, blocks, index, calls[index], inputs, returned) for index in wanted}
            return inputs, returned, traces
        except StructureError as error:
            # The first way is the usual one: its problem tells most, but for an operator that no way can avoid.
            if problem is None or (isinstance(error, OperatorError) and not isinstance(problem, OperatorError)):
                problem = error
    assert problem is not None
    raise problem


def _trace(
    model: nn.Module,
    blocks: nn.ModuleList,
    index: int,
    call: BlockCall,
    inputs: dict[str, Any],
    results: dict[int, Any],
) -> Trace:
    """Trace one block; where units are tied to constants, once more with labels on the constants too."""
    try:
        tracer, result = trace_block(blocks[index], *call)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        read = {0} | (outputs_read(model, blocks, index, inputs) if len(outputs) > 1 else set())
        tracer.mark_outputs(outputs, read)
        if any("constant" in refusal.obstacles for refusal in group_units(tracer.trace, index).refused):
            tracer = _trace_with_constants(blocks[index], call, read) or tracer
    except StructureError as error:
        raise type(error)(f"block {index}: {error}") from error
    results[index] = result
    return tracer.trace


def _trace_with_constants(block: nn.Module, call: BlockCall, read: set[int]) -> Tracer | None:
    """Trace with labels on constants, or None where an operator on them has no rule."""
    try:
        tracer, result = trace_block(block, *call, follow_constants=True)
    except StructureError:
        return None
    tracer.mark_outputs([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)], read)
    return tracer


def _returns_tuple(results: dict[int, Any]) -> bool:
    return any(isinstance(result, tuple) for result in results.values())


def _trace_outside(
    model: nn.Module, blocks: nn.ModuleList, blocks_name: str, inputs: dict[str, Any], returns_tuple: bool
) -> Trace:
    """Trace what precedes and follows the blocks, which hand their hidden states through."""
    state = on_meta(model)
    stored = model.state_dict(keep_vars=True)
    outer = [
        name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(blocks_name + ".")
    ]
    tracer = Tracer(model, {name: state[name] for name in outer if name in stored})

    def pass_through(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        tracer.note_hidden(hidden)
        return (hidden, None, None) if returns_tuple else hidden

    with _handed_through(blocks, pass_through), watched(tracer):
        run_without_weights(model, state, (), inputs)
    return tracer.trace


@contextmanager
def _handed_through(blocks: nn.ModuleList, forward: Any) -> Iterator[None]:
    """While the context lasts every block's forward is ``forward(args, kwargs)``."""
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: forward(args, kwargs)
        yield
    finally:
        for block in blocks:
            del block.forward


def _blocks(model: nn.Module, blocks_name: str) -> nn.ModuleList:
    try:
        blocks = model.get_submodule(blocks_name)
    except AttributeError as error:
        raise StructureError(f"the model has no module {blocks_name}") from error
    if not isinstance(blocks, nn.ModuleList):
        raise StructureError(f"{blocks_name} is no list of blocks")
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name and any(part.startswith(f"{blocks_name}.") for part in (first, name)):
            raise StructureError(
                f"{first} and {name} are one parameter; cutting one would cut the other, so this model's structure "
                "cannot be pruned (weights can still be masked)"
            )
    return blocks


def _signature(block: nn.Module) -> Any:
    """What makes two blocks run alike: their modules, shapes, and switches (not numbers: each has its index)."""
    modules = []
    for name, part in block.named_modules():
        switches = sorted(
            (key, value) for key, value in vars(part).items() if isinstance(value, bool | str) and key != "training"
        )
        modules.append((name, type(part), tuple(switches)))
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
    return tuple(modules), shapes
