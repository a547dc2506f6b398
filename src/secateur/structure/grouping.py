"""From labels to units: which atoms can leave, and which indices of which parameters go with each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from secateur.structure.record import Trace
from secateur.structure.units import Member, Refusal, Role, Structure, UnitGroup

# Marks that forbid removal. Attention contracts and carries features; a head that is itself mixed so is no head.
OBSTACLES = ("reduced", "constant", "frozen", "packed", "contracted", "carried")


@dataclass(frozen=True)
class _Place:
    """One dimension of one parameter."""

    parameter: str
    dim: int
    role: Role | None  # None: it is neither clearly a producer nor clearly a consumer
    is_weight_output: bool


# What leaves with one unit: for every place (by number), the indices in ascending order.
_Indices = dict[int, list[int]]


def group_units(trace: Trace, block: int) -> Structure:
    """Read the units off a finished trace of one block."""
    return _Grouping(trace, block).structure()


class _Grouping:
    def __init__(self, trace: Trace, block: int) -> None:
        self._labels = trace.labels
        self._block = block
        self._marked: dict[str, set[int]] = defaultdict(set)
        self._reasons: dict[tuple[str, int], str] = {}
        raw: dict[str, set[int]] = {"produced": set(), "consumed": set()}
        for mark in trace.marks:
            if mark.kind in raw:
                raw[mark.kind].update(mark.labels.tolist())
                continue
            atoms = self._labels.all_atoms(mark.labels)
            self._marked[mark.kind] |= atoms
            for atom in atoms if mark.kind in OBSTACLES else ():
                self._reasons.setdefault((mark.kind, atom), mark.reason)
        self._places: list[_Place] = []
        self._single: dict[int, _Indices] = defaultdict(dict)  # atom -> where it is the whole label
        self._product: dict[int, _Indices] = defaultdict(dict)  # atom -> where it is one factor
        self._tuples: dict[tuple[int, ...], _Indices] = defaultdict(dict)  # attention factors of a label
        for name in trace.used:
            for dim, labels in enumerate(trace.parameters[name]):
                self._add_place(name, dim, labels, raw)

    def _add_place(self, name: str, dim: int, labels: np.ndarray, raw: dict[str, set[int]]) -> None:
        own = labels.tolist()
        consumed = not raw["consumed"].isdisjoint(own)
        produced = not raw["produced"].isdisjoint(own)
        role: Role | None = "consumer" if consumed else "producer"
        if consumed and produced:
            role = None
        place = len(self._places)
        self._places.append(_Place(name, dim, role, produced))
        residual = self._marked["residual"]
        heads = self._marked["batched"]
        for index, root in enumerate(self._labels.find(labels).tolist()):
            if not self._labels.is_product(root):
                if root not in residual:
                    self._single[root].setdefault(place, []).append(index)
                atoms: tuple[int, ...] = (root,)
            else:
                atoms = self._labels.atoms(root)
                for atom in set(atoms):
                    self._product[atom].setdefault(place, []).append(index)
            if not heads.isdisjoint(atoms):
                own_heads = tuple(atom for atom in atoms if atom in heads)
                self._tuples[own_heads].setdefault(place, []).append(index)

    def structure(self) -> Structure:
        units: list[UnitGroup] = []
        refused: list[Refusal] = []
        for kind, families, candidates in (*self._heads(), *self._queries(), *self._channels()):
            places = [self._places[place] for place in candidates[0][1]]
            roles = {place.role for place in places}
            if len(candidates) < 2 or "consumer" not in roles or not any(p.is_weight_output for p in places):
                continue
            module = _common_module([place.parameter for place in places])
            atoms = {atom for own, _ in candidates for atom in own}
            reason = self._obstacle(atoms, roles, kind)
            if reason is None:
                units.append(self._group(kind, module, families, [indices for _, indices in candidates]))
            else:
                refused.append(Refusal(kind, self._block, module, reason))
        return Structure(units, refused)

    def _heads(self) -> list[tuple[str, int, list[tuple[tuple[int, ...], _Indices]]]]:
        atoms = self._marked["batched"] - self._marked["broadcast"] - self._marked["residual"]
        return [("head", 1, group) for group in self._alike([((a,), self._occurrences(a)) for a in atoms])]

    def _queries(self) -> list[tuple[str, int, list[tuple[tuple[int, ...], _Indices]]]]:
        repeated = self._marked["batched"] & self._marked["broadcast"]
        candidates = [(own, indices) for own, indices in self._tuples.items() if repeated.intersection(own)]
        found = []
        for group in self._alike(candidates):
            # A family is what is left of the label without the repeat: the KV head. Families side by side.
            by_family: dict[tuple[int, ...], list[tuple[tuple[int, ...], _Indices]]] = defaultdict(list)
            for own, indices in group:
                by_family[tuple(atom for atom in own if atom not in repeated)].append((own, indices))
            if len({len(family) for family in by_family.values()}) == 1:
                ordered = [unit for family in by_family.values() for unit in family]
                found.append(("query", len(by_family), ordered))
        return found

    def _channels(self) -> list[tuple[str, int, list[tuple[tuple[int, ...], _Indices]]]]:
        attention = self._marked["batched"] | self._marked["contracted"] | self._marked["carried"]
        return [
            ("channel", 1, group)
            for group in self._alike(
                [
                    ((atom,), indices)
                    for atom, indices in self._single.items()
                    if atom not in attention and atom not in self._product
                ]
            )
        ]

    def _occurrences(self, atom: int) -> _Indices:
        both = {**self._single.get(atom, {}), **self._product.get(atom, {})}
        return {place: both[place] for place in sorted(both)}

    def _alike(
        self, candidates: list[tuple[tuple[int, ...], _Indices]]
    ) -> list[list[tuple[tuple[int, ...], _Indices]]]:
        """Gather candidates that own as many indices of the same places, each list in index order."""
        groups: dict[tuple[tuple[int, int], ...], list[tuple[tuple[int, ...], _Indices]]] = defaultdict(list)
        for own, indices in candidates:
            if indices:
                groups[tuple((place, len(at)) for place, at in indices.items())].append((own, indices))
        for group in groups.values():
            group.sort(key=lambda unit: next(iter(unit[1].values())))
        return sorted(groups.values(), key=lambda group: next(iter(group[0][1])))

    def _obstacle(self, atoms: set[int], roles: set[Role | None], kind: str) -> str | None:
        if None in roles:
            return "one parameter is used both as their producer and as their consumer"
        if kind == "head" and atoms & self._nested_heads():
            return "the heads have two levels, and it is not clear which of them is the head"
        for obstacle in OBSTACLES:
            blocked = atoms & self._marked[obstacle]
            if blocked:
                return self._reasons[obstacle, min(blocked)].format(f"the {kind} units")
        return None

    def _nested_heads(self) -> set[int]:
        own = [[atom for atom in atoms if atom not in self._marked["broadcast"]] for atoms in self._tuples]
        return {atom for atoms in own if len(atoms) > 1 for atom in atoms}

    def _group(self, kind: str, module: str, families: int, units: list[_Indices]) -> UnitGroup:
        members = []
        for number in units[0]:
            place = self._places[number]
            assert place.role is not None  # refused before
            index_UC = np.array([unit[number] for unit in units], dtype=np.int64)
            members.append(Member(place.parameter, place.dim, place.role, index_UC))
        return UnitGroup(kind, self._block, module, len(units), families, tuple(members))


def _common_module(parameters: list[str]) -> str:
    paths = [name.split(".")[:-1] for name in parameters]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
