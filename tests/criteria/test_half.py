"""Gradients that wait on disk in 16 bits keep eleven significant bits, however small they are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_methods import eleven_bits

from secateur.statistics.half import halved, whole


@given(st.integers(0, 1000), st.integers(-100, 80))
@settings(max_examples=50)
def test_rows_of_any_size(seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    total_OI = torch.ldexp(torch.rand(5, 7, generator=generator) + 0.01, torch.tensor(exponent))
    total_OI[2] = 0
    states = halved({"w|gradient_abs|total": total_OI, "w|gradient_abs|windows": torch.tensor(4)})
    assert states["w|gradient_abs|total"].dtype == torch.float16
    found = whole(states)
    assert torch.equal(found["w|gradient_abs|total"], eleven_bits(total_OI))
    assert int(found["w|gradient_abs|windows"]) == 4
    assert set(found) == {"w|gradient_abs|total", "w|gradient_abs|windows"}


def test_what_is_far_below_its_row_goes_to_nothing():
    total = torch.tensor([[1.0, 2.0**-20, 2.0**-45]])
    assert whole(halved({"t": total}))["t"].tolist() == [[1.0, 2.0**-20, 0.0]]
