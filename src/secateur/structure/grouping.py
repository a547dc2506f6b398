"""From labels to units: which atoms can leave, and which indices of which parameters go with each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.structure.capture import BATCH
from secateur.structure.record import Trace
from secateur.structure.units import Argument, Member, Norm, Refusal, Role, Structure, UnitGroup

# Marks that forbid removal. Attention contracts and carries features; a head that is itself mixed so is no head.
OBSTACLES = ("reduced", "constant", "frozen", "packed", "contracted", "carried", "normalised")


@dataclass(frozen=True)
class _Place:
    """One dimension of one parameter, of a norm's input or of a constant."""

    name: str
    dim: int
    sort: Literal["parameter", "norm", "argument"]
    size: int
    role: Role | None = None  # None: it is neither clearly a producer nor clearly a consumer
    is_weight_output: bool = False


# What leaves with one unit: for every place (by number), the indices in ascending order.
_Indices = dict[int, list[int]]
# Units of one kind: how many families they come in, and for each unit its atoms and what it owns.
_Units = tuple[str, int, list[tuple[tuple[int, ...], _Indices]]]


def group_units(trace: Trace, block: int) -> Structure:
    """Read the units off a finished trace of one block."""
    return _Grouping(trace, block).structure()


class _Grouping:
    def __init__(self, trace: Trace, block: int) -> None:
        self._labels = trace.labels
        self._block = block
        self._marked: dict[str, set[int]] = defaultdict(set)
        self._reasons: dict[tuple[str, int], str] = {}
        self._chosen: list[tuple[set[int], int]] = []
        raw: dict[str, set[int]] = {"produced": set(), "consumed": set(), "picked": set()}
        for mark in trace.marks:
            if mark.kind in raw:
                raw[mark.kind].update(mark.labels.tolist())
                continue
            if mark.kind == "reduced" and mark.module in trace.norms:
                continue  # masked out, such a module takes its statistics over the survivors
            atoms = self._labels.all_atoms(mark.labels)
            self._marked[mark.kind] |= atoms
            if mark.kind == "chosen":
                self._chosen.append((atoms, mark.amount))
            for atom in atoms if mark.kind in OBSTACLES else ():
                self._reasons.setdefault((mark.kind, atom), mark.reason)
        self._places: list[_Place] = []
        self._single: dict[int, _Indices] = defaultdict(dict)  # atom -> where it is the whole label
        self._product: dict[int, _Indices] = defaultdict(dict)  # atom -> where it is one factor
        self._tuples: dict[tuple[int, ...], _Indices] = defaultdict(dict)  # attention factors of a label
        self._choices: dict[tuple[int, ...], _Indices] = defaultdict(dict)  # factors of a label that a top-k chooses
        for name in trace.used:
            for dim, labels in enumerate(trace.parameters[name]):
                role, produced = self._role(labels, raw)
                self._add(_Place(name, dim, "parameter", len(labels), role, produced), labels)
        reduced = {mark.module for mark in trace.marks if mark.kind == "reduced"}
        for name in sorted(reduced & trace.norms.keys()):
            self._add(_Place(name, -1, "norm", len(trace.norms[name])), trace.norms[name])
        for path, axes in trace.arguments.items():
            for dim, labels in enumerate(axes):
                self._add(_Place(path, dim, "argument", len(labels)), labels)

    def _role(self, labels: np.ndarray, raw: dict[str, set[int]]) -> tuple[Role | None, bool]:
        """What a parameter's dimension does, and whether it is what a matrix puts out."""
        own = labels.tolist()
        consumed, produced, picked = (not raw[kind].isdisjoint(own) for kind in ("consumed", "produced", "picked"))
        if consumed:
            return (None if produced else "consumer"), produced
        if not picked and not self._labels.all_atoms(labels).isdisjoint(self._marked["chosen"]):
            return "choice", produced
        return "producer", produced

    def _add(self, place: _Place, labels: np.ndarray) -> None:
        number = len(self._places)
        self._places.append(place)
        residual, heads, chosen = (self._marked[kind] for kind in ("residual", "batched", "chosen"))
        for index, root in enumerate(self._labels.find(labels).tolist()):
            if not self._labels.is_product(root):
                if root not in residual:
                    self._single[root].setdefault(number, []).append(index)
                atoms: tuple[int, ...] = (root,)
            else:
                atoms = self._labels.atoms(root)
                for atom in set(atoms):
                    self._product[atom].setdefault(number, []).append(index)
            for marked, tuples in ((heads, self._tuples), (chosen, self._choices)):
                if not marked.isdisjoint(atoms):
                    tuples[tuple(atom for atom in atoms if atom in marked)].setdefault(number, []).append(index)

    def structure(self) -> Structure:
        units: list[UnitGroup] = []
        refused: list[Refusal] = []
        for kind, families, candidates in (*self._heads(), *self._queries(), *self._experts(), *self._channels()):
            places = [place for number in candidates[0][1] if (place := self._places[number]).sort == "parameter"]
            roles = {place.role for place in places}
            reads = "choice" if kind == "expert" else "consumer"
            if len(candidates) < 2 or reads not in roles or not any(place.is_weight_output for place in places):
                continue
            module = _common_module([place.name for place in places])
            atoms = {atom for own, _ in candidates for atom in own}
            reason, obstacles = self._obstacle(atoms, roles, kind)
            if kind == "channel" and reason is None:
                reason = _latent(places, units)
            if reason is None:
                units.append(self._group(kind, module, families, [indices for _, indices in candidates], atoms))
            else:
                refused.append(Refusal(kind, self._block, module, reason, obstacles))
        return Structure(units, refused)

    def _heads(self) -> list[_Units]:
        atoms = self._marked["batched"] - self._marked["broadcast"] - self._marked["residual"]
        return [("head", 1, group) for group in self._alike([((a,), self._occurrences(a)) for a in atoms])]

    def _queries(self) -> list[_Units]:
        repeated = self._marked["batched"] & self._marked["broadcast"]
        candidates = [(own, indices) for own, indices in self._tuples.items() if repeated.intersection(own)]
        found: list[_Units] = []
        for group in self._alike(candidates):
            # A family is what is left of the label without the repeat: the KV head. Families side by side.
            for families, ordered in self._in_families(group, repeated):
                # Heads that share no more than a part of the key (latent attention) own keys and values: whole heads.
                makers = [p for n in ordered[0][1] if (p := self._places[n]).is_weight_output]
                found.append(("head" if families == 1 and len(makers) > 1 else "query", families, ordered))
        return found

    def _in_families(
        self, group: list[tuple[tuple[int, ...], _Indices]], inner: set[int]
    ) -> list[tuple[int, list[tuple[tuple[int, ...], _Indices]]]]:
        """Put units side by side that are alike but for the ``inner`` atoms; nothing where families differ in size."""
        by_family: dict[tuple[int, ...], list[tuple[tuple[int, ...], _Indices]]] = defaultdict(list)
        for own, indices in group:
            by_family[tuple(atom for atom in own if atom not in inner)].append((own, indices))
        if len({len(family) for family in by_family.values()}) != 1:
            return []
        return [(len(by_family), [unit for family in by_family.values() for unit in family])]

    def _experts(self) -> list[_Units]:
        """What a top-k chooses among; where it chooses among groups first, every group is a family."""
        found: list[_Units] = []
        for group in self._alike(list(self._choices.items())):
            inner = {own[-1] for own, _ in group}
            found += [("expert", families, ordered) for families, ordered in self._in_families(group, inner)]
        return found

    def _minimum(self, atoms: set[int], families: int) -> int:
        """How many units have to stay in every family so that every choice finds as many as it takes."""
        least = 1
        groups_taken = min((amount for own, amount in self._chosen if len(own & atoms) == families), default=1)
        for own, amount in self._chosen:
            if not own & atoms:
                continue
            is_within_groups = families > 1 and len(own & atoms) < len(atoms)
            if families == 1 or (is_within_groups and len(own & atoms) != families):
                least = max(least, amount)
            elif not is_within_groups:
                least = max(least, -(-amount // groups_taken))
        return least

    def _channels(self) -> list[_Units]:
        attention = self._marked["batched"] | self._marked["contracted"] | self._marked["carried"]
        attention |= self._marked["chosen"]
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

    def _obstacle(self, atoms: set[int], roles: set[Role | None], kind: str) -> tuple[str | None, frozenset[str]]:
        if None in roles:
            return "one parameter is used both as their producer and as their consumer", frozenset()
        if kind == "head" and atoms & self._nested_heads():
            return "the heads have two levels, and it is not clear which of them is the head", frozenset()
        # Minus infinity leaves a softmax over experts as if they had never been.
        forbidden = [name for name in OBSTACLES if not (kind == "expert" and name == "normalised")]
        met = [name for name in forbidden if atoms & self._marked[name]]
        if not met:
            return None, frozenset()
        reason = self._reasons[met[0], min(atoms & self._marked[met[0]])]
        return reason.format(f"the {kind} units"), frozenset(met)

    def _nested_heads(self) -> set[int]:
        own = [[atom for atom in atoms if atom not in self._marked["broadcast"]] for atoms in self._tuples]
        return {atom for atoms in own if len(atoms) > 1 for atom in atoms}

    def _group(self, kind: str, module: str, families: int, units: list[_Indices], atoms: set[int]) -> UnitGroup:
        members: list[Member] = []
        norms: list[Norm] = []
        arguments: list[Argument] = []
        for number in units[0]:
            place = self._places[number]
            index_UC = np.array([unit[number] for unit in units], dtype=np.int64)
            if place.sort == "norm":
                norms.append(Norm(place.name, index_UC))
            elif place.sort == "argument":
                arguments.append(_argument(place, index_UC))
            else:
                assert place.role is not None  # refused before
                members.append(Member(place.name, place.dim, place.role, index_UC))
        least = self._minimum(atoms, families) if kind == "expert" else 1
        parts = (tuple(members), tuple(norms), tuple(arguments))
        return UnitGroup(kind, self._block, module, len(units), families, *parts, minimum=least)


def _latent(places: list[_Place], found: list[UnitGroup]) -> str | None:
    """Say why channels that queries, keys or values are made from are no channels of an MLP."""
    makers = {m.parameter for g in found if g.kind in ("head", "query") for m in g.members if m.role == "producer"}
    reader = next((place.name for place in places if place.role == "consumer" and place.name in makers), None)
    return reader and f"they are the latent space that {reader} makes heads from; only whole heads are cut"


def _argument(place: _Place, index_UC: np.ndarray) -> Argument:
    """Entries of a constant: once for each unit, or once more for each item of the batch."""
    period = place.size // BATCH if index_UC.shape[1] % BATCH == 0 else place.size
    first_UC = index_UC[:, : index_UC.shape[1] * period // place.size]
    if period != place.size and not np.array_equal(np.concatenate([first_UC, first_UC + period], 1), index_UC):
        period, first_UC = place.size, index_UC
    return Argument(place.name, place.dim, period, first_UC)


def _common_module(parameters: list[str]) -> str:
    paths = [name.split(".")[:-1] for name in parameters]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
