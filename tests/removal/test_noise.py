"""``noise`` is what inputs with independent noise of that part of their power would give."""

from __future__ import annotations

import pytest
import torch

from secateur.removal.amount import Amount
from secateur.removal.methods import removal_from
from secateur.removal.methods.base import Task
from secateur.statistics import InputSecondMoment

NOISE = 0.3


def inputs(noise: float = 0.0) -> torch.Tensor:
    """Tokens of unequal channels ``(T, I)``; with noise, of each 64 copies by whose signs no two channels go together."""
    generator = torch.Generator().manual_seed(5)
    x_TI = torch.randn(200, 60, generator=generator) @ torch.randn(60, 60, generator=generator)
    x_TI *= torch.logspace(-1, 1, 60)
    signs_CI = torch.ones(1, 1)
    for _ in range(6):  # Hadamard's: all columns orthogonal, the first of ones
        signs_CI = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs_CI)
    signs_CI = signs_CI[:, 1:61]
    return (x_TI[:, None] * (1 + noise**0.5 * signs_CI)).reshape(-1, 60) if noise else x_TI


def moment(x_TI: torch.Tensor, copies: int = 1) -> InputSecondMoment:
    found = InputSecondMoment()
    found.fold(found.term(x_TI) / copies)
    return found


@pytest.mark.parametrize("method", ["alps:steps=12", "sparsegpt:block_size=16"])
@pytest.mark.parametrize("what", ["chosen", "given", "cut"])
def test_noise_is_noisy_inputs(method, what):
    weight_OI = torch.randn(16, 60, generator=torch.Generator().manual_seed(6))
    given_OI = torch.rand(weight_OI.shape, generator=torch.Generator().manual_seed(7)) > 0.5

    def removed(removal, moment):
        statistics = {InputSecondMoment: moment}
        if what == "cut":
            return removal.refit("m", weight_OI.clone(), torch.arange(0, 60, 2), statistics).weight_OI
        amount = Amount(480, "layer") if what == "chosen" else None
        return removal.remove(
            Task("m", weight_OI.clone(), statistics, amount, lambda: given_OI, bool(amount))
        ).weight_OI

    with_option = removed(removal_from(f"{method},noise={NOISE}"), moment(inputs()))
    noisy = removed(removal_from(method), moment(inputs(NOISE), copies=64))
    plain = removed(removal_from(method), moment(inputs()))
    assert torch.allclose(with_option, noisy, atol=1e-3)
    assert not torch.allclose(plain, noisy, atol=0.05)
