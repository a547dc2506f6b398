from __future__ import annotations

import hashlib
import struct

import pytest
import torch

from secateur.calibration import TokenWindows
from secateur.calibration.windows import cut, draw
from secateur.errors import CalibrationError


def windows(ids: list[list[int]]) -> TokenWindows:
    return TokenWindows(torch.tensor(ids), "given.safetensors", "as given")


def test_the_hash_is_that_of_the_shape_and_the_little_endian_ids() -> None:
    expected = hashlib.sha256(b"2x3:" + struct.pack("<6q", 1, 2, 3, 4, 5, 600)).hexdigest()
    assert windows([[1, 2, 3], [4, 5, 600]]).sha256 == expected


def test_the_hash_knows_the_shape_but_not_how_the_ids_lie_in_memory() -> None:
    tall = windows([[1, 2], [3, 4], [5, 6]])
    assert tall.sha256 != windows([[1, 2, 3], [4, 5, 6]]).sha256
    transposed_NT = torch.tensor([[1, 3, 5], [2, 4, 6]]).T
    assert TokenWindows(transposed_NT, "other", "other").sha256 == tall.sha256


@pytest.mark.parametrize(
    ("ids", "place"), [([[1, 9], [10, 11]], "10 (window 1, position 0)"), ([[1, -1]], "-1 (window 0, position 1)")]
)
def test_the_first_id_outside_the_vocabulary_is_named(ids: list[list[int]], place: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        windows(ids).check_vocabulary(10)
    assert f"token id {place}, outside the model's vocabulary of 10" in str(caught.value)
    assert str(caught.value).startswith("given.safetensors ")


def test_ids_inside_the_vocabulary_pass() -> None:
    windows([[0, 9]]).check_vocabulary(10)


def test_windows_are_int64_matrices() -> None:
    with pytest.raises(ValueError, match="int64"):
        TokenWindows(torch.zeros(2, 3, dtype=torch.int32), "x", "x")


def test_cutting_drops_the_incomplete_last_window() -> None:
    assert cut(list(range(8)), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut([1, 2], 3).shape == (0, 3)


def test_drawing_keeps_the_order_takes_each_once_and_follows_the_seed() -> None:
    all_NT = torch.arange(100).view(50, 2)
    drawn_NT = draw(all_NT, 10, seed=3)
    firsts = drawn_NT[:, 0].tolist()
    assert firsts == sorted(set(firsts))
    assert torch.equal(drawn_NT, draw(all_NT, 10, seed=3))
    assert not torch.equal(drawn_NT, draw(all_NT, 10, seed=4))
    assert torch.equal(draw(all_NT, 50, seed=0), all_NT)
