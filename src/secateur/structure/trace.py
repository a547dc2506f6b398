"""The entry: find the units of one block, or of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from secateur.errors import StructureError
from secateur.structure.capture import BlockCall, capture_calls, eager_attention, outputs_read, ways_to_call
from secateur.structure.grouping import group_units
from secateur.structure.tracer import trace_block
from secateur.structure.units import Structure, UnitGroup


def find_units(model: nn.Module, blocks_name: str, block_index: int) -> list[UnitGroup]:
    """Return the unit groups of one block of ``model``; parameters may live on the meta device.

    Raises ``StructureError`` where the block cannot be traced.
    """
    blocks = _blocks(model, blocks_name)
    if not 0 <= block_index < len(blocks):
        raise StructureError(f"{blocks_name} has {len(blocks)} blocks; there is no block {block_index}")
    return _find(model, blocks, [block_index])[block_index].units


def find_all_units(model: nn.Module, blocks_name: str) -> Structure:
    """Return the units of all blocks, and what was refused. Blocks that are alike share one trace."""
    blocks = _blocks(model, blocks_name)
    first_alike: dict[Any, int] = {}
    representative = [first_alike.setdefault(_signature(block), index) for index, block in enumerate(blocks)]
    found = _find(model, blocks, sorted(set(representative)))
    structure = Structure([], [])
    for index, source in enumerate(representative):
        structure.units.extend(replace(group, block=index) for group in found[source].units)
        structure.refused.extend(replace(refusal, block=index) for refusal in found[source].refused)
    return structure


def _find(model: nn.Module, blocks: nn.ModuleList, wanted: list[int]) -> dict[int, Structure]:
    problem: StructureError | None = None
    with eager_attention(model):
        for inputs in ways_to_call(model):
            try:
                calls = capture_calls(model, blocks, wanted, inputs)
                return {index: _find_in_block(model, blocks, index, calls[index], inputs) for index in wanted}
            except StructureError as error:
                problem = problem or error  # the first way is the usual one: its problem tells most
    assert problem is not None
    raise problem


def _find_in_block(
    model: nn.Module, blocks: nn.ModuleList, index: int, call: BlockCall, inputs: dict[str, Any]
) -> Structure:
    try:
        tracer, returned = trace_block(blocks[index], *call)
    except StructureError as error:
        raise StructureError(f"block {index}: {error}") from error
    read = {0}
    if len(returned) > 1:
        read |= outputs_read(model, blocks, index, inputs)
    tracer.mark_outputs([tensor for number, tensor in enumerate(returned) if number in read])
    return group_units(tracer.trace, index)


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
