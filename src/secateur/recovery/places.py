"""Where training may change a model: found by type and place, never by name."""

from __future__ import annotations

from torch import nn

from secateur.checkpoint.uneven import largest_module_list
from secateur.errors import StructureError


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks.

    Raises:
        StructureError: there are none.
    """
    try:
        return largest_module_list(model)
    except ValueError as error:
        raise StructureError(f"{type(model).__name__} has no list of like blocks to recover") from error


def block_linears(model: nn.Module, title: str = "LoRA") -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` in the decoder blocks by its qualified name.

    Raises:
        StructureError: there are no blocks, or none holds an ``nn.Linear``, without which ``title`` cannot be.
    """
    inside = set(blocks_of(model).modules())
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside
    }
    if not linears:
        raise StructureError(
            f"the blocks of {type(model).__name__} hold no nn.Linear, so {title} cannot recover it; "
            "give --method full, or another model"
        )
    return linears


def block_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of the decoder blocks by its qualified name; one that several names share once.

    Raises:
        StructureError: there are no blocks.
    """
    inside = set(blocks_of(model).parameters())
    return {name: p for name, p in model.named_parameters() if p in inside and p.is_floating_point()}
