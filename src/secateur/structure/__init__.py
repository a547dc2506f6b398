"""What must be removed together: units found by tracing, and how they are cut out."""

from secateur.structure.cutting import ModelCut, cut_shapes, cut_tensors, kept_indices, mask_tensors
from secateur.structure.masking import masked_out, masked_out_of
from secateur.structure.trace import find_all_units, find_units
from secateur.structure.units import (
    OUTSIDE,
    Argument,
    Member,
    Norm,
    Refusal,
    Structure,
    UnitGroup,
    parameters_per_unit,
)

__all__ = [
    "OUTSIDE",
    "Argument",
    "Member",
    "ModelCut",
    "Norm",
    "Refusal",
    "Structure",
    "UnitGroup",
    "cut_shapes",
    "cut_tensors",
    "find_all_units",
    "find_units",
    "kept_indices",
    "mask_tensors",
    "masked_out",
    "masked_out_of",
    "parameters_per_unit",
]
