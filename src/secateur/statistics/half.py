"""Statistics in 16 bits, for gradients that wait on disk.

The published code of GBLM-Pruner keeps its gradient norms in fp16 (methods §1.2). Their range is small there, and means
over windows are smaller than its smallest number in many matrices; so every row is scaled by a power of two first, which
changes no bit of a number that fp16 can hold. Eleven significant bits stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

SCALE = "|exponent"
"""What stands behind the name of a tensor that holds its rows' exponents."""

TOP = 14
"""Rows are scaled so that their largest number lies below two to this power plus one, inside fp16's range."""


def halved(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``states`` with every float32 matrix ``(O, I)`` as fp16 and its rows' exponents ``(O,)`` beside it."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in states.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 2:
            result[name] = tensor
            continue
        largest_O = tensor.abs().amax(dim=1)
        _, exponent_O = torch.frexp(largest_O)
        exponent_O = torch.where(largest_O > 0, TOP + 1 - exponent_O, 0).to(torch.int32)
        result[name] = torch.ldexp(tensor, exponent_O[:, None]).half()
        result[name + SCALE] = exponent_O
    return result


def whole(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``halved`` was given, to eleven significant bits."""
    return {
        name: torch.ldexp(tensor.float(), -states[name + SCALE][:, None]) if name + SCALE in states else tensor
        for name, tensor in states.items()
        if not name.endswith(SCALE)
    }
