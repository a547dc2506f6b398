"""What a model costs after a cut, counted on shapes: parameters, bytes, and multiply-accumulates a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from secateur.allocation.pools import ShapesOf
from secateur.checkpoint.reader import Checkpoint
from secateur.quantities import Measure
from secateur.removal.decision import Removals, model_cut, within
from secateur.structure import OUTSIDE, Structure, UnitGroup, cut_shapes
from secateur.structure.cutting import Removal

CONTEXT = 2048
"""Tokens that attention looks back on where MACs are counted; fewer if the model has fewer positions."""


@dataclass(frozen=True)
class Cost:
    """Of a part of a model, or of all of it."""

    params: int = 0
    bytes: int = 0
    macs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.bytes + other.bytes, self.macs + other.macs)

    def of(self, measure: Measure) -> int:
        return int(getattr(self, measure))


class CostModel:
    """Costs of one checkpoint after any cut.

    Multiply-accumulates a token are the products of all matrices that a token meets: those of the blocks, of which an
    expert counts as often as a token goes there on average, and the head; and in every block the attention's products of
    queries with keys and of scores with values over ``context`` tokens (the full square, heads as wide in values as in
    keys). Embeddings are looked up and cost none.
    """

    def __init__(self, checkpoint: Checkpoint, structure: Structure, context: int | None = None) -> None:
        skeleton = checkpoint.skeleton
        config = checkpoint.config.get_text_config()
        self.context = context or min(CONTEXT, getattr(config, "max_position_embeddings", None) or CONTEXT)
        self._structure = structure
        self._count = len(skeleton.blocks)
        self._places = [OUTSIDE, *range(self._count)]
        prefixes = {index: skeleton.block_prefix(index) for index in range(self._count)}
        inside = skeleton.blocks_name + "."
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {place: {} for place in self._places}
        self._item: dict[int, dict[str, int]] = {place: {} for place in self._places}
        for name, tensor in checkpoint.tensors.items():
            place = int(name.removeprefix(inside).partition(".")[0]) if name.startswith(inside) else OUTSIDE
            own = name.removeprefix(prefixes.get(place, ""))
            self._shapes[place][own], self._item[place][own] = tuple(tensor.shape), tensor.dtype.itemsize
        self._stored = checkpoint.parameters(), sum(tensor.bytes for tensor in checkpoint.stored())
        tied = skeleton.tied()
        self._outer_products = [tied.get(name, name) for name in _products_outside(skeleton.model, inside)]
        self._known: dict[object, Cost] = {}

    @property
    def dense(self) -> Cost:
        """The cost of the model as its files hold it, without the biases that it was given here."""
        return Cost(self._stored[0], self._stored[1], self.after({}).macs)

    @property
    def shapes_of(self) -> ShapesOf:
        """Dense shapes of a block, or of what stands outside."""
        return self._shapes.__getitem__

    def after(self, everywhere: Mapping[int, Removals]) -> Cost:
        """The cost of the model out of which this has left."""
        cut = model_cut(everywhere, self._count)
        places = {OUTSIDE: cut.outside, **{index: cut.blocks[index] for index in cut.kept()}}
        return sum((self._cost(place, removals) for place, removals in places.items()), Cost())

    def _cost(self, place: int, removals: Sequence[Removal]) -> Cost:
        """Blocks alike that lose alike cost alike: how many units leave decides, not which."""
        counts = tuple(sorted((group.kind, group.module, len(units)) for group, units in removals if units))
        key = (place == OUTSIDE, tuple(self._shapes[place].items()), counts)
        if key not in self._known:
            self._known[key] = self._counted(place, removals)
        return self._known[key]

    def _counted(self, place: int, removals: Sequence[Removal]) -> Cost:
        stored = [(within(group, self._shapes[place]), units) for group, units in removals]
        after = cut_shapes(self._shapes[place], stored)
        sizes = {name: prod(shape) for name, shape in after.items()}
        bytes_ = sum(size * self._item[place][name] for name, size in sizes.items())
        if place == OUTSIDE:
            macs = sum(sizes[name] for name in self._outer_products if name in sizes)
        else:
            macs = self._block_macs(after, self._structure.of_block(place), removals)
        return Cost(sum(sizes.values()), bytes_, macs)

    def _block_macs(
        self, after: Mapping[str, tuple[int, ...]], groups: list[UnitGroup], removals: Sequence[Removal]
    ) -> int:
        gone = {(group.kind, group.module): len(units) for group, units in removals}
        met = {}  # parameter -> (experts that a token goes to, experts there)
        attended = {}  # the matrix that reads what attention gives -> along which dimension
        for group in groups:
            for member in group.members:
                if group.kind == "expert" and member.role != "choice":
                    met[member.parameter] = (group.minimum, group.count - gone.get((group.kind, group.module), 0))
                if group.kind in ("head", "query") and member.role == "consumer":
                    attended[member.parameter] = member.dim
        total = 0
        for name, shape in after.items():
            if len(shape) >= 2 and not name.endswith("bias"):
                chosen, there = met.get(name, (1, 1))
                total += prod(shape) * chosen // there
        return total + sum(2 * self.context * after[name][dim] for name, dim in attended.items())


def _products_outside(model: nn.Module, inside: str) -> list[str]:
    """Names of the matrices outside the blocks that are multiplied with, not looked up in."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if not name.startswith(inside) and not isinstance(module, nn.Embedding)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]
