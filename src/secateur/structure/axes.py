"""Labels: what every index of every tensor dimension stands for.

A dimension of size n carries an int64 array of n labels. Label 0 is neutral (a batch or token position, nothing
that could leave). Any other label is an *atom*, or a *product* of atoms such as (group, repeat, dim), which leaves as
soon as one of its atoms does. A union-find ties labels that must leave together. No size is ever matched: slices,
chunks, fused projections and rotary halves are plain indexing of the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secateur.errors import StructureError

LabelArray = NDArray[np.int64]
NEUTRAL = 0


def neutral(size: int) -> LabelArray:
    """Return ``size`` neutral labels."""
    return np.zeros(size, dtype=np.int64)


class LabelTable:
    """All labels of one trace: union-find over them, and what each product is made of.

    Every method that cannot go on without guessing raises ``StructureError``; the tracer adds where it happened.
    """

    def __init__(self) -> None:
        self._parents = np.zeros(1024, dtype=np.int64)
        self._count = 1  # label 0 is neutral
        self._factors: dict[int, tuple[int, ...]] = {}  # root of a product -> its factors, outermost first
        self._products: dict[tuple[int, ...], int] = {}
        self._blank: set[int] = set()

    def blank(self, size: int) -> LabelArray:
        """Return ``size`` new labels that become whatever they are tied to first, neutral included."""
        labels = self.fresh(size)
        self._blank.update(labels.tolist())
        return labels

    def settled(self, labels: LabelArray) -> LabelArray:
        """Return ``labels`` with those that have become neutral as such."""
        return np.where(self.find(labels) == NEUTRAL, NEUTRAL, labels) if self._blank else labels

    def fresh(self, size: int) -> LabelArray:
        """Return ``size`` new atoms."""
        first, last = self._count, self._count + size
        if last > len(self._parents):
            grown = np.zeros(max(last, 2 * len(self._parents)), dtype=np.int64)
            grown[:first] = self._parents[:first]
            self._parents = grown
        self._parents[first:last] = np.arange(first, last)
        self._count = last
        return np.arange(first, last)

    def __len__(self) -> int:
        return self._count

    def find(self, labels: LabelArray) -> LabelArray:
        """Return the root of every label, in the shape of ``labels``."""
        roots = self._parents[labels]
        while True:
            above = self._parents[roots]
            if np.array_equal(above, roots):
                self._parents[labels] = roots
                return roots
            roots = above

    def is_product(self, root: int) -> bool:
        return root in self._factors

    def atoms(self, label: int) -> tuple[int, ...]:
        """Return the atoms (as roots) of one label, outermost first; nothing for a neutral label."""
        root = self._root(label)
        factors = self._factors.get(root)
        if factors is not None:
            return tuple(atom for factor in factors for atom in self.atoms(factor))
        return () if root == NEUTRAL else (root,)

    def all_atoms(self, labels: LabelArray) -> set[int]:
        """Return every atom that occurs in ``labels``."""
        roots = np.unique(self.find(labels))
        return {atom for root in roots.tolist() for atom in self.atoms(root)}

    def tie(self, left: LabelArray, right: LabelArray) -> LabelArray:
        """Tie two equally long dimensions index by index; return the labels that met a neutral index."""
        roots_left, roots_right = self.find(left), self.find(right)
        different = roots_left != roots_right
        if not different.any():
            return neutral(0)
        roots_left, roots_right = roots_left[different], roots_right[different]
        fixed = (roots_left == NEUTRAL) | (roots_right == NEUTRAL)
        if self._blank and fixed.any():
            met = np.maximum(roots_left, roots_right)
            becomes = fixed & np.array([label in self._blank for label in met.tolist()])
            self._parents[met[becomes]] = NEUTRAL
            roots_left, roots_right, fixed = roots_left[~becomes], roots_right[~becomes], fixed[~becomes]
        for one, other in zip(roots_left[~fixed].tolist(), roots_right[~fixed].tolist(), strict=True):
            self._unify(one, other)
        return np.maximum(roots_left[fixed], roots_right[fixed])

    def merge(self, axes: Sequence[LabelArray]) -> LabelArray:
        """Flatten several dimensions into one, row-major: each label is the product of theirs."""
        sizes = [len(axis) for axis in axes]
        grids = [
            np.broadcast_to(axis.reshape([-1 if i == j else 1 for j in range(len(axes))]), sizes).reshape(-1)
            for i, axis in enumerate(axes)
            if (axis != NEUTRAL).any()
        ]
        if not grids:
            return neutral(int(np.prod(sizes)))
        if len(grids) == 1:
            return grids[0].copy()
        rows = np.stack(grids, axis=1).tolist()
        return np.array([self._product(tuple(row)) for row in rows], dtype=np.int64)

    def split(self, axis: LabelArray, sizes: Sequence[int]) -> list[LabelArray]:
        """Undo ``merge``: see one dimension as several, row-major; unsplit atoms become products of fresh ones."""
        parts: list[LabelArray] = []
        for position, size in enumerate(sizes[:-1]):
            head, axis = self._split_in_two(axis, size, int(np.prod(sizes[position + 1 :])))
            parts.append(head)
        return [*parts, axis]

    def _split_in_two(self, axis: LabelArray, rows: int, columns: int) -> tuple[LabelArray, LabelArray]:
        grid = self.find(axis).reshape(rows, columns)
        unresolved = axis.reshape(rows, columns)  # a parameter's own labels say which parameter they came from
        if (grid == grid[:1]).all():
            return neutral(rows), unresolved[0]
        if (grid == grid[:, :1]).all():
            return unresolved[:, 0], neutral(columns)
        atoms = [self.atoms(label) for label in grid.reshape(-1).tolist()]
        depths = {len(entry) for entry in atoms}
        if len(depths) != 1 or 0 in depths:
            raise StructureError("a dimension made of unlike parts is seen as several dimensions")
        if depths == {1}:
            if len(set(atoms)) != len(atoms):
                raise StructureError("a dimension whose entries are tied to each other is seen as several")
            head, tail = self.fresh(rows), self.fresh(columns)
            pairs = ((row, column) for row in head.tolist() for column in tail.tolist())
            for label, pair in zip(grid.reshape(-1).tolist(), pairs, strict=True):
                self._factors[label] = pair
            return head, tail
        return self._split_products(np.array(atoms, dtype=np.int64).reshape(rows, columns, -1))

    def _split_products(self, grid: LabelArray) -> tuple[LabelArray, LabelArray]:
        """Split products (rows, columns, factors) between two of their factors, or inside one of them."""
        heads: list[LabelArray] = []
        tails: list[LabelArray] = []
        rows, columns, _ = grid.shape
        for factor in np.moveaxis(grid, 2, 0):
            if (factor == factor[:, :1]).all() and not tails:
                heads.append(factor[:, 0])
            elif (factor == factor[:1]).all():
                tails.append(factor[0])
            elif tails:
                raise StructureError("a dimension is seen as several in an order unlike the one it was made in")
            else:
                outer_head, inner_tail = self._split_factor(factor)
                heads.append(outer_head)
                tails.append(inner_tail)
        return self._zip_products(heads, rows), self._zip_products(tails, columns)

    def _split_factor(self, factor: LabelArray) -> tuple[LabelArray, LabelArray]:
        """Split one factor (rows, columns) that changes along both, and may repeat whole or entry by entry."""
        rows, columns = factor.shape
        values = len(np.unique(factor))
        inner = int(np.argmax(factor[0] != factor[0, 0])) or columns  # length of the first run
        outer = rows * columns // (inner * values)
        if outer and rows % outer == 0 and columns % inner == 0 and outer * inner * values == rows * columns:
            core = factor.reshape(outer, rows // outer, columns // inner, inner)[0, :, :, 0]
            if np.array_equal(np.tile(np.repeat(core, inner, axis=1), (outer, 1)), factor):
                head, tail = self._split_in_two(core.reshape(-1), *core.shape)
                return np.tile(head, outer), np.repeat(tail, inner)
        raise StructureError("a dimension is seen as several across the bounds of its parts")

    def _zip_products(self, factors: list[LabelArray], size: int) -> LabelArray:
        if not factors:
            return neutral(size)
        if len(factors) == 1:
            return factors[0]
        return np.array([self._product(tuple(row)) for row in np.stack(factors, 1).tolist()], dtype=np.int64)

    def _product(self, labels: tuple[int, ...]) -> int:
        labels = tuple(label for label in labels if label != NEUTRAL)
        if len(labels) < 2:
            return labels[0] if labels else NEUTRAL
        known = self._products.get(labels)
        if known is None:
            known = int(self.fresh(1)[0])
            self._products[labels] = known
            self._factors[known] = labels
        return known

    def _root(self, label: int) -> int:
        parents = self._parents
        root = int(parents[label])
        while root != parents[root]:
            root = int(parents[root])
        return root

    def _unify(self, left: int, right: int) -> None:
        left, right = self._root(left), self._root(right)
        if left == right:
            return
        if right in self._blank or left in self._blank:
            blank, other = (right, left) if right in self._blank else (left, right)
            self._parents[blank] = other
            return
        left_factors, right_factors = self._factors.get(left), self._factors.get(right)
        if left_factors is None or right_factors is None:
            if left_factors is None and right_factors is None:
                self._parents[right] = left
                return
            atom, product = (left, right) if left_factors is None else (right, left)
            if self.atoms(product) == (atom,):  # its other factors have become neutral
                self._parents[product] = atom
                return
            if atom in self.atoms(product):
                raise StructureError("an index is tied to a product of itself")
            self._parents[atom] = product
            return
        left_atoms, right_atoms = self.atoms(left), self.atoms(right)
        if len(left_atoms) != len(right_atoms):
            raise StructureError("two dimensions that were split differently are tied together")
        self._parents[right] = left
        self._factors.pop(right)
        for one, other in zip(left_atoms, right_atoms, strict=True):
            self._unify(one, other)
