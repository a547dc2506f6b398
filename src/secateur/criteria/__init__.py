"""What each weight, or each whole block, is worth: one small file a criterion, listed here and nowhere else."""

from secateur.criteria.angular import Angular
from secateur.criteria.base import BlockCriterion, Criterion
from secateur.criteria.flap import FLAP
from secateur.criteria.fms import FMS
from secateur.criteria.gblm import GBLM
from secateur.criteria.influence import Influence
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.random import Random
from secateur.criteria.ria import RIA
from secateur.criteria.sparsegpt import SparseGPT
from secateur.criteria.taylor import Taylor
from secateur.criteria.wanda import Wanda
from secateur.criteria.wanda_plus_plus import WandaPlusPlus
from secateur.options import parse_named

CRITERIA: dict[str, type[Criterion]] = {
    criterion.name: criterion
    for criterion in (
        Random,
        Magnitude,
        Wanda,
        GBLM,
        Taylor,
        FMS,
        SparseGPT,
        RIA,
        WandaPlusPlus,
        FLAP,
        Influence,
        Angular,
    )
}


def criterion_from(text: str) -> Criterion:
    """The criterion that ``"name:option=value,..."`` describes.

    Raises:
        RecipeError: unknown name, option or value; the nearest known one is suggested.
    """
    return parse_named(text, CRITERIA)


__all__ = ["CRITERIA", "BlockCriterion", "Criterion", "criterion_from"]
