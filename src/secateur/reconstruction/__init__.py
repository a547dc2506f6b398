"""What stays in a block, fitted by gradients to what the dense model gives there: one small file a way, listed here."""

from secateur.options import parse_named
from secateur.reconstruction.base import Reconstruction
from secateur.reconstruction.blockwise import Blockwise
from secateur.reconstruction.fitted import FittedBlock

RECONSTRUCTIONS: dict[str, type[Reconstruction]] = {r.name: r for r in (Blockwise,)}


def reconstruction_from(text: str) -> Reconstruction:
    """The reconstruction that ``"name:option=value,..."`` describes.

    Raises:
        RecipeError: unknown name, option or value; the nearest known one is suggested.
    """
    return parse_named(text, RECONSTRUCTIONS, also=("none",))


__all__ = ["RECONSTRUCTIONS", "FittedBlock", "Reconstruction", "reconstruction_from"]
