"""Labels: splitting, merging and tying, on plain arrays."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.errors import StructureError
from secateur.structure.axes import LabelTable, neutral


def test_merge_undoes_split_and_split_undoes_merge() -> None:
    table = LabelTable()
    axis = table.fresh(24)
    parts = table.split(axis, [2, 3, 4])
    assert [len(part) for part in parts] == [2, 3, 4]
    table.tie(table.merge(parts), axis)
    for index in range(24):
        expected = [parts[0][index // 12], parts[1][index // 4 % 3], parts[2][index % 4]]
        assert table.atoms(int(axis[index])) == tuple(expected)
    again = table.split(axis, [2, 3, 4])
    assert all(np.array_equal(table.find(a), table.find(b)) for a, b in zip(parts, again, strict=True))


def test_a_split_can_be_refined_later() -> None:
    table = LabelTable()
    axis = table.fresh(24)
    heads, features = table.split(axis, [4, 6])
    groups, repeats, same = table.split(axis, [2, 2, 6])
    assert np.array_equal(table.find(same), table.find(features))
    assert table.atoms(int(heads[3])) == (groups[1], repeats[1])
    assert table.atoms(int(axis[23])) == (groups[1], repeats[1], features[5])


def test_tying_products_ties_their_factors() -> None:
    table = LabelTable()
    left, right = table.fresh(6), table.fresh(6)
    rows_left, _ = table.split(left, [2, 3])
    rows_right, _ = table.split(right, [2, 3])
    assert len(table.tie(left, right)) == 0
    assert np.array_equal(table.find(rows_left), table.find(rows_right))


def test_tying_an_atom_to_a_product_makes_it_one() -> None:
    table = LabelTable()
    heads, groups, repeats = table.fresh(4), table.fresh(2), table.fresh(2)
    table.tie(heads, table.merge([groups, repeats]))
    assert [table.atoms(int(head)) for head in heads] == [(g, r) for g in groups for r in repeats]


def test_neutral_indices_are_reported_not_tied() -> None:
    table = LabelTable()
    axis = table.fresh(3)
    fixed = table.tie(axis, np.array([0, axis[1], 0]))
    assert fixed.tolist() == [axis[0], axis[2]]
    assert table.find(axis).tolist() == axis.tolist()


def test_neutral_dimensions_vanish_in_products_and_come_back() -> None:
    table = LabelTable()
    heads = table.fresh(3)
    merged = table.merge([neutral(2), heads, neutral(4)])
    batch, same, tokens = table.split(merged, [2, 3, 4])
    assert same.tolist() == heads.tolist()
    assert not batch.any()
    assert not tokens.any()


def test_what_cannot_be_split_is_refused() -> None:
    table = LabelTable()
    axis = table.fresh(12)
    table.tie(axis[:1], axis[5:6])
    with pytest.raises(StructureError, match="tied to each other"):
        table.split(axis, [3, 4])
    other = table.fresh(12)
    table.split(other, [3, 4])
    with pytest.raises(StructureError, match="across the bounds"):
        table.split(other, [4, 3])
    with pytest.raises(StructureError, match="unlike parts"):
        table.split(np.concatenate([other[:6], table.fresh(6)]), [2, 6])


def test_circles_are_refused() -> None:
    table = LabelTable()
    rows, columns = table.fresh(2), table.fresh(2)
    product = table.merge([rows, columns])
    with pytest.raises(StructureError, match="product of itself"):
        table.tie(product[:2], rows)
