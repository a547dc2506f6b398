"""Units are proved, not believed: on a small instance, a cut model has to compute what the masked dense one does.

Masked out means what the cut means (``structure.masking``): zeros where units are read, statistics over the survivors, router
logits of minus infinity, blocks that hand their input on. The proof runs the way of a real run: the same trace, the same
cut of the tensors, the same search for a config, a model built from that config.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint.architecture import example_inputs
from secateur.checkpoint.carving import Assignment, assignments
from secateur.checkpoint.shapes import OutputShape, carved_shapes, native_shapes, output_shape
from secateur.checkpoint.skeleton import Skeleton, build_skeleton
from secateur.errors import StructureError, reason_of
from secateur.reference import cut_state, logits, masked_logits
from secateur.small import SmallModel, small_model
from secateur.structure import (
    OUTSIDE,
    ModelCut,
    Structure,
    UnitGroup,
)
from secateur.structure.cutting import Removal

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest logit; sums in another order differ by about 1e-6."""
TOKENS = 9


@dataclass(frozen=True)
class Verdict:
    """What the proof of one cut found.

    Attributes:
        form: the first form of output that computes the right function; None where none does.
        difference: of its logits from the masked model's, as a share of the largest.
        assignment: how the carved form's attributes have to be read.
        failed: forms tried before -> what is wrong with them.
        effect: how far the cut moves the dense model's logits; without an effect nothing would be proved.
    """

    form: str | None
    difference: float
    assignment: Assignment | None
    failed: Mapping[str, str]
    effect: float

    @property
    def means_something(self) -> bool:
        return self.effect > 10 * max(self.difference, 1e-6)


@dataclass(frozen=True)
class Proof:
    """One line of ``inspect --prove``: a cut of one kind, and how it came out."""

    kind: str
    module: str
    case: str
    form: str
    difference: float | None
    problem: str = ""

    @property
    def holds(self) -> bool:
        return self.difference is not None


def prove_all(skeleton: Skeleton, structure: Structure) -> Iterator[Proof]:
    """Prove every kind of unit: one, many, different numbers in different blocks, and all kinds at once."""
    small = small_model(skeleton, structure)
    kinds: dict[tuple[str, str], None] = {}
    for group in small.structure.units:
        kinds.setdefault((group.kind, group.module if group.kind != "hidden" else ""))
    for kind, module in kinds:
        for case in ("one", "many", "uneven") if kind not in ("hidden", "block") else ("one", "many"):
            yield from _proved(small, [(kind, module)], case, kind, module)
    together = [key for key in kinds if key[0] != "block"]
    if len(together) > 1:
        yield from _proved(small, together, "many", "all together", "")


def prove_cut(skeleton: Skeleton, structure: Structure, cut: ModelCut) -> Verdict:
    """Prove on a small instance a cut of the same kinds, in the same blocks, of as many units.

    Raises:
        StructureError: no form of output computes what the masked dense model does; it names the modules.
    """
    small = small_model(skeleton, structure)
    alike = _alike(small, structure, cut)
    verdict = judge(small, alike)
    if verdict.form is None:
        modules = sorted({f"{group.kind} in {group.module or 'the residual stream'}" for group in _groups(cut)})
        reason = (
            "; ".join(f"{form}: {problem}" for form, problem in verdict.failed.items()) or "no config says its sizes"
        )
        raise StructureError(
            f"a cut of {', '.join(modules)} could not be proved on a small instance ({reason}); nothing was written, "
            "choose other units (please report this)"
        )
    return verdict


def proved_shape(skeleton: Skeleton, structure: Structure, cut: ModelCut, verdict: Verdict) -> OutputShape:
    """The config for what ``cut`` leaves, in a form that the proof has not refuted, best the one it has found right.

    Raises:
        StructureError: no such form can say these sizes.
    """
    return output_shape(
        skeleton, cut, structure, lambda form: form == verdict.form or form not in verdict.failed, verdict.assignment
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices are multiplied faster by one thread than by several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def small_logits(skeleton: Skeleton) -> Tensor:
    """Logits of a small instance on the inputs that proofs use."""
    return logits(skeleton, example_inputs(skeleton.model, batch=2, tokens=TOKENS))


@_one_thread()
def judge(small: SmallModel, cut: ModelCut) -> Verdict:
    """Compare every form of output of ``cut`` with the masked model; a form that is right ends the search.

    Raises:
        StructureError: the small model does not run, or there is no config for the blocks that stay.
    """
    skeleton = small.skeleton
    try:
        expected = masked_logits(skeleton, cut, _inputs(small))
        effect = _difference(logits(skeleton, _inputs(small)), expected)
    except Exception as error:  # whatever the family's code says
        raise StructureError(
            f"the small instance of {type(skeleton.config).__name__} on which units are proved does not run "
            f"({reason_of(error)}); nothing was proved"
        ) from error
    failed: dict[str, str] = {}
    for shape, assignment in _ways(small, cut):
        if shape.form in failed and shape.form != "carved":
            continue
        outcome = _tried(small, shape, cut, expected)
        if not isinstance(outcome, str):
            return Verdict(shape.form, outcome, assignment, failed, effect)
        failed[shape.form] = outcome
    return Verdict(None, float("inf"), None, failed, effect)


def _tried(small: SmallModel, shape: OutputShape, cut: ModelCut, expected: Tensor) -> float | str:
    """The difference of the model that ``shape`` describes from ``expected``, or in words why it is another one."""
    try:
        difference = _difference(logits(_loaded(shape, cut_state(small.skeleton, cut)), _inputs(small)), expected)
    except Exception as error:  # whatever the family's code says to sizes it was not written for
        return (str(error).splitlines() or [type(error).__name__])[0]
    return difference if difference <= TOLERANCE else f"logits differ by {difference:.1e}"


def _inputs(small: SmallModel) -> dict[str, Tensor]:
    return example_inputs(small.skeleton.model, batch=2, tokens=TOKENS)


def _ways(small: SmallModel, cut: ModelCut) -> Iterator[tuple[OutputShape, Assignment | None]]:
    """Forms to try: native ones; the carved one with the most telling reading; with what each kind alone has taught."""
    for shape in native_shapes(small.skeleton, cut, small.structure):
        yield shape, None
    readings = assignments(small.skeleton, cut, small.structure)
    for assignment in itertools.chain(itertools.islice(readings, 1), _learned(small, cut), readings):
        for shape in carved_shapes(small.skeleton, cut, small.structure, assignment):
            yield shape, assignment


def _learned(small: SmallModel, cut: ModelCut) -> Iterator[Assignment]:
    """How attributes have to be read for several kinds at once: as for each of them alone."""
    kinds = sorted({group.kind for group in _groups(cut)})
    if len(kinds) < 2:
        return
    learned: dict[Any, str] = {}
    for kind in kinds:
        alone = _of_kind(cut, kind)
        expected = masked_logits(small.skeleton, alone, _inputs(small))
        for assignment in assignments(small.skeleton, alone, small.structure):
            shapes = carved_shapes(small.skeleton, alone, small.structure, assignment)
            if any(not isinstance(_tried(small, shape, alone, expected), str) for shape in shapes):
                learned |= assignment
                break
    yield learned


def _of_kind(cut: ModelCut, kind: str) -> ModelCut:
    def own(removals: Sequence[Removal]) -> list[Removal]:
        return [(group, units if group.kind == kind else []) for group, units in removals]

    return ModelCut(tuple(own(removals) for removals in cut.blocks), own(cut.outside))


def example_cut(
    structure: Structure, blocks: int, kinds: Sequence[tuple[str, str]], case: str, shift: int = 0
) -> ModelCut | None:
    """A cut to prove something with: ``one`` unit, ``many``, or ``uneven`` numbers; None where nothing can leave so.

    ``shift`` chooses other units.
    """
    removals: list[list[tuple[UnitGroup, list[int]]]] = [[] for _ in range(blocks)]
    outside: list[tuple[UnitGroup, list[int]]] = []
    dropped: tuple[int, ...] = ()
    for kind, module in kinds:
        groups = [group for group in structure.units if group.kind == kind and group.module in (module, "")]
        if kind == "block":
            if blocks > 1:
                dropped = tuple(range(1, blocks, 2)) if case == "many" else (blocks // 2,)
            continue
        for group in groups:
            if kind == "hidden":
                units = _some(group, case, shift)
                (outside if group.block == OUTSIDE else removals[group.block]).append((group, units))
            elif not (case == "uneven" and group.block == 0):
                removals[group.block].append((group, _some(group, case, group.block + shift)))
    anything = dropped or any(units for entry in (*removals, outside) for _, units in entry)
    return ModelCut(tuple(removals), outside, dropped) if anything else None


def _some(group: UnitGroup, case: str, shift: int) -> list[int]:
    """Units of a group, as many from every family, at places that depend on the family and on ``shift``."""
    size = group.count // group.families
    spare = size - group.minimum
    count = min(spare, 1 if case != "many" else max(1, size // 2))
    step = 2 if size % 2 else 1
    places = [
        [(family + shift + 1 + step * number) % size for number in range(count)] for family in range(group.families)
    ]
    return sorted(family * size + place for family, own in enumerate(places) for place in own)


ATTEMPTS = 4
"""How many choices of units are tried until one has an effect: an expert may be chosen by no token of the example."""


def _proved(small: SmallModel, kinds: Sequence[tuple[str, str]], case: str, kind: str, module: str) -> Iterator[Proof]:
    """The proof of one case; nothing where no units can leave so."""
    proof = None
    for shift in range(ATTEMPTS):
        cut = example_cut(small.structure, len(small.stands_for), kinds, case, shift)
        if cut is None:
            return
        try:
            verdict = judge(small, cut)
        except StructureError as error:
            yield Proof(kind, module, case, "", None, str(error))
            return
        proof = _in_words(verdict, kind, module, case)
        if verdict.form is None or verdict.means_something:
            break
    assert proof is not None
    yield proof


def _in_words(verdict: Verdict, kind: str, module: str, case: str) -> Proof:
    problem = "; ".join(f"{form}: {reason}" for form, reason in verdict.failed.items())
    if verdict.form is None:
        return Proof(kind, module, case, "", None, problem or "no config of transformers says these sizes")
    if not verdict.means_something:
        return Proof(kind, module, case, verdict.form, None, "masking changes nothing, so nothing is proved")
    return Proof(kind, module, case, verdict.form, verdict.difference)


def _alike(small: SmallModel, structure: Structure, cut: ModelCut) -> ModelCut:
    """``cut`` of the large model, on the small one: the same units where their number is the same, else the same share."""

    def scaled(block: int, removals: Sequence[tuple[UnitGroup, Sequence[int]]]) -> list[tuple[UnitGroup, list[int]]]:
        own = {(group.kind, group.module): group for group in small.structure.of_block(block)}
        found = []
        for group, units in removals:
            if len(units) and (group.kind, group.module) in own:
                mine = own[group.kind, group.module]
                found.append(
                    (mine, sorted(units) if mine.count == group.count else _share(mine, len(units) / group.count))
                )
        return found

    blocks = tuple(scaled(number, cut.blocks[index]) for number, index in enumerate(small.stands_for))
    dropped: tuple[int, ...] = ()
    if cut.dropped:
        dropped = tuple(number for number, index in enumerate(small.stands_for) if index in cut.dropped)
        if not dropped or len(dropped) == len(small.stands_for):
            dropped = (len(small.stands_for) // 2,)
    return ModelCut(blocks, scaled(OUTSIDE, cut.outside), dropped)


def _share(group: UnitGroup, share: float) -> list[int]:
    """A share of the units of a group, at least one and as many from every family, spread evenly."""
    size = group.count // group.families
    count = min(max(1, round(share * size)), size - group.minimum)
    places = [number * size // count for number in range(count)]
    return [family * size + place for family in range(group.families) for place in places]


def _groups(cut: ModelCut) -> list[UnitGroup]:
    return [group for removals in (*cut.blocks, cut.outside) for group, units in removals if len(units)]


def _loaded(shape: OutputShape, state: Mapping[str, Tensor]) -> Skeleton:
    skeleton = build_skeleton(copy.deepcopy(shape.config))
    skeleton.model.load_state_dict(dict(state), assign=True)
    skeleton.model.tie_weights()
    return skeleton


def _difference(left: Tensor, right: Tensor) -> float:
    scale = right.abs().max().clamp_min(1e-12)
    difference = (left - right).abs().max() / scale if left.shape == right.shape else torch.tensor(torch.inf)
    return float(difference) if not difference.isnan() else float("inf")
