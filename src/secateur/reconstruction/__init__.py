"""What stays in a block, fitted by gradients to what the dense model gives there: one small file a way, listed here."""

from secateur.options import parse_named
from secateur.reconstruction.base import ChooseAgain, Reconstruction
from secateur.reconstruction.blockwise import Blockwise
from secateur.reconstruction.fitted import FittedBlock
from secateur.reconstruction.regional import Regional

RECONSTRUCTIONS: dict[str, type[Reconstruction]] = {r.name: r for r in (Blockwise, Regional)}


def reconstruction_from(text: str) -> Reconstruction:
    """The reconstruction that ``"name:option=value,..."`` describes.

    Raises:
        RecipeError: unknown name, option or value; the nearest known one is suggested.
    """
    return parse_named(text, RECONSTRUCTIONS, also=("none",))


__all__ = ["RECONSTRUCTIONS", "ChooseAgain", "FittedBlock", "Reconstruction", "reconstruction_from"]
