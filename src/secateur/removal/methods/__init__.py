"""How weights leave: one small file a removal, listed here and nowhere else."""

from secateur.options import parse_named
from secateur.removal.methods.alps import ALPS
from secateur.removal.methods.base import Removal, Removed, Task
from secateur.removal.methods.bias import Bias
from secateur.removal.methods.dsnot import DSnoT, PublishedDSnoT
from secateur.removal.methods.mask import Mask
from secateur.removal.methods.sparsegpt import SparseGPT

REMOVALS: dict[str, type[Removal]] = {r.name: r for r in (Mask, Bias, SparseGPT, ALPS, DSnoT, PublishedDSnoT)}


def removal_from(text: str) -> Removal:
    """The removal that ``"name:option=value,..."`` describes.

    Raises:
        RecipeError: unknown name, option or value; the nearest known one is suggested.
    """
    return parse_named(text, REMOVALS)


__all__ = ["REMOVALS", "Removal", "Removed", "Task", "removal_from"]
