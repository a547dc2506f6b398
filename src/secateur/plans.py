"""The plan: what leaves, block by block. It can be printed, compared, saved, and carried out again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

import secateur
from secateur.checkpoint.tensorfile import TensorFile, TensorSpec
from secateur.errors import PlanError
from secateur.files import atomic_file, sha256_of_file
from secateur.planstore import (
    InFile,
    InFolder,
    InMemory,
    MaskStore,
    Numbers,
    NumbersInFolder,
    NumbersInMemory,
    as_text,
)
from secateur.recipe import Recipe
from secateur.reconstruction.base import FIT_ERRORS
from secateur.removal.decision import BlockDecision, Removals, model_cut
from secateur.removal.masks import pack, unpack, zeros_of
from secateur.removal.spread import ScoreSpread
from secateur.structure import OUTSIDE, ModelCut, Structure, UnitGroup

PLAN_FILE, MASKS_FILE, NUMBERS = "plan.json", "masks.safetensors", "weights"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelIdentity(_Strict):
    """Which model the plan is for."""

    spec: str
    hub_id: str | None
    architecture: str
    parameters: int
    sha256: str


class CalibrationIdentity(_Strict):
    """Which windows the choice was made on."""

    source: str
    description: str
    windows: int
    window_length: int
    sha256: str


class Cut(_Strict):
    """Units of one kind that leave one block."""

    kind: str
    module: str
    count: int = Field(ge=1)
    removed: list[int]


class Masked(_Strict):
    """A mask over one matrix; its bits are in the masks file under ``BLOCK.NAME``."""

    shape: tuple[int, int]
    zeros: int = Field(ge=0)

    @property
    def bytes(self) -> int:
        """Of its bits, packed."""
        return -(-self.shape[0] * self.shape[1] // 8)


class BlockPlan(_Strict):
    """What leaves one block; under the number ``OUTSIDE`` (-1) what leaves outside of them, whole blocks among it.

    Attributes:
        updated: matrices whose weights that stay get new numbers.
        numbers_sha256: of the file that holds these.
        notes: figures of the removal that are worth telling.
        scores: by kind of unit, or by the matrix's name, how the scores lie that were chosen by.
    """

    block: int = Field(ge=OUTSIDE)
    cuts: list[Cut] = []
    masks: dict[str, Masked] = {}
    updated: list[str] = []
    numbers_sha256: str | None = None
    notes: dict[str, float] = {}
    scores: dict[str, ScoreSpread] = {}


class Plan(_Strict):
    """A complete decision.

    Attributes:
        masks_sha256: ties the JSON to its masks file.
        notes: what a target and rounding came to.
    """

    format: Literal[1] = 1
    secateur: str = secateur.__version__
    model: ModelIdentity
    recipe: Recipe
    calibration: CalibrationIdentity | None
    blocks: list[BlockPlan] = []
    masks_sha256: str | None = None
    notes: dict[str, Any] = {}
    _store: MaskStore = PrivateAttr(default_factory=InMemory)
    _numbers: Numbers = PrivateAttr(default_factory=NumbersInMemory)

    def keep_in(self, folder: Path) -> Plan:
        """Keep decisions in ``folder`` from now on, a file a block, instead of in memory; returns the plan itself.

        Each is durable when ``add`` returns. Those that are there already, of a plan for the same model, recipe and
        calibration, are taken up: ``decided`` says which.
        """
        store = InFolder(folder, self._belongs_to())
        found = [_entry_of(text) for text in store.entries()]
        for entry in self.blocks:
            store.put(entry.block, as_text(entry.model_dump(mode="json")), self._store.get(entry.block))
        numbers = NumbersInFolder(folder / NUMBERS)
        for entry in self.blocks:
            if entry.numbers_sha256 is not None:
                numbers.put(entry.block, self._numbers.get(entry.block, entry.numbers_sha256))
        self._store, self._numbers = store, numbers
        decided = self.decided()
        for one in found:
            if one is not None and one.block not in decided and self._has_numbers(one):
                self._enter(one)
        return self

    def _has_numbers(self, entry: BlockPlan) -> bool:
        """Whether the new numbers that ``entry`` speaks of are there, whole."""
        try:
            return entry.numbers_sha256 is None or bool(self._numbers.get(entry.block, entry.numbers_sha256))
        except PlanError:
            return False

    def outlasting(self, file: Path | None) -> Plan:
        """This plan without the folder it was kept in: its masks in the ``file`` it was saved to, or in memory."""
        if file is not None:
            return load_plan(file)
        store = InMemory()
        for entry in self.blocks:
            store.put(entry.block, "", self._store.get(entry.block) if entry.masks else {})
        numbers = NumbersInMemory()
        for entry in self.blocks:
            if entry.numbers_sha256 is not None:
                numbers.put(entry.block, self._numbers.get(entry.block, entry.numbers_sha256))
        self._store, self._numbers = store, numbers
        return self

    def decided(self) -> set[int]:
        """The blocks whose decision is here (``OUTSIDE`` for what stands outside of them)."""
        return {entry.block for entry in self.blocks}

    def add(self, block: int, decision: BlockDecision) -> None:
        """Record the decision for one block, in whatever order blocks come; a second one takes the first one's place."""
        cuts = [
            Cut(kind=group.kind, module=group.module, count=group.count, removed=list(removed))
            for group, removed in decision.removals
        ]
        masks, bits = dict[str, Masked](), dict[str, torch.Tensor]()
        for name, mask_OI in decision.masks.items():
            rows, columns = mask_OI.shape
            masks[name] = Masked(shape=(rows, columns), zeros=zeros_of(mask_OI))
            bits[name] = pack(mask_OI)
        numbers = self._numbers.put(block, decision.numbers) if decision.numbers else None
        entry = BlockPlan(
            block=block,
            cuts=cuts,
            masks=masks,
            updated=sorted(decision.numbers),
            numbers_sha256=numbers,
            notes=dict(decision.notes),
            scores=dict(sorted(decision.scores.items())),
        )
        self._store.put(block, as_text(entry.model_dump(mode="json")), bits)
        self._enter(entry)

    def _enter(self, entry: BlockPlan) -> None:
        others = [other for other in self.blocks if other.block != entry.block]
        self.blocks = sorted([*others, entry], key=lambda one: one.block)

    def cut(self, structure: Structure, blocks: int) -> ModelCut:
        """What leaves a model with these units and so many blocks.

        Raises:
            PlanError: the plan does not fit the model, or would leave it without a unit of some kind.
        """
        everywhere = self.everywhere(structure, blocks)
        cut = model_cut(everywhere, blocks)
        hidden = [
            [units for group, units in everywhere[block] if group.kind == "hidden"] for block in (OUTSIDE, *cut.kept())
        ]
        if any(units != hidden[0] for units in hidden):
            raise PlanError(
                "it takes different hidden channels from different blocks, which leave everywhere or stay; make the plan again"
            )
        return cut

    def everywhere(self, structure: Structure, blocks: int) -> dict[int, Removals]:
        """What leaves each block and, under ``OUTSIDE``, the rest.

        Raises:
            PlanError: the plan does not fit the model.
        """
        beyond = next((entry.block for entry in self.blocks if entry.block >= blocks), None)
        if beyond is not None:
            raise PlanError(f"it names block {beyond}, and the model has 0 to {blocks - 1}; make the plan again")
        return {block: self._removals(block, structure.of_block(block)) for block in (OUTSIDE, *range(blocks))}

    def _removals(self, block: int, groups: list[UnitGroup]) -> Removals:
        entry = next((entry for entry in self.blocks if entry.block == block), None)
        removals: Removals = []
        if entry is None:
            return removals
        for cut in entry.cuts:
            group = _group_of(cut, groups, _place(block))
            _check_removed(cut, group, _place(block))
            removals.append((group, cut.removed))
        return removals

    def masks(self, block: int) -> dict[str, torch.Tensor]:
        """The masks of ``block`` by parameter name, brought in and unpacked anew each time."""
        entry = next((entry for entry in self.blocks if entry.block == block), None)
        if entry is None or not entry.masks:
            return {}
        bits = self._store.get(block)
        return {name: unpack(_bits_of(bits, name, masked, block), masked.shape) for name, masked in entry.masks.items()}

    def numbers(self, block: int) -> dict[str, torch.Tensor]:
        """The new numbers of ``block`` by the matrix's name, brought in anew each time.

        Raises:
            PlanError: they are not where the plan is, or damaged.
        """
        entry = next((entry for entry in self.blocks if entry.block == block), None)
        if entry is None or entry.numbers_sha256 is None:
            return {}
        found = self._numbers.get(block, entry.numbers_sha256)
        if sorted(found) != sorted(entry.updated):
            raise PlanError(f"the new weights of block {block} are not those the plan names; make the plan again")
        return found

    def removed_by_kind(self) -> dict[str, tuple[int, int]]:
        """For each kind of structured unit: how many leave, of how many in the blocks that may be pruned."""
        totals: dict[str, tuple[int, int]] = {}
        for entry in self.blocks:
            for cut in entry.cuts:
                if cut.kind == "hidden" and entry.block != OUTSIDE:
                    continue  # the same units in every block
                gone, there = totals.get(cut.kind, (0, 0))
                totals[cut.kind] = (gone + len(cut.removed), there + cut.count)
        return totals

    def shares(self) -> dict[str, dict[str, float]]:
        """For each kind of unit inside blocks, and for single weights, what share leaves each block, by its number."""
        found: dict[str, dict[str, float]] = {}
        for entry in (entry for entry in self.blocks if entry.block != OUTSIDE):
            for cut in entry.cuts:
                found.setdefault(cut.kind, {})[str(entry.block)] = round(len(cut.removed) / cut.count, 4)
            held = sum(masked.shape[0] * masked.shape[1] for masked in entry.masks.values())
            if held:
                zeros = sum(masked.zeros for masked in entry.masks.values())
                found.setdefault("weight", {})[str(entry.block)] = round(zeros / held, 4)
        return found

    def removal_notes(self) -> dict[str, float]:
        """Of every figure that removals gave, the largest."""
        found: dict[str, float] = {}
        for entry in self.blocks:
            for key, value in entry.notes.items():
                if key not in FIT_ERRORS:
                    found[key] = max(value, found.get(key, value))
        return found

    def fit_errors(self) -> dict[str, float]:
        """The errors before and after fitting, means over the blocks that were fitted; empty where none was."""
        fitted = [entry.notes for entry in self.blocks if FIT_ERRORS[0] in entry.notes]
        return {key: sum(notes[key] for notes in fitted) / len(fitted) for key in FIT_ERRORS} if fitted else {}

    def zeros(self) -> tuple[int, int]:
        """How many weights are masked, of how many in masked matrices."""
        masks = [masked for entry in self.blocks for masked in entry.masks.values()]
        return sum(m.zeros for m in masks), sum(m.shape[0] * m.shape[1] for m in masks)

    def removes_anything(self) -> bool:
        return any(gone for gone, _ in self.removed_by_kind().values()) or self.zeros()[0] > 0

    def save(self, path: Path, with_numbers: bool = True) -> list[Path]:
        """Write the plan to ``path`` (a ``.json`` file) with its masks and new numbers, if any, beside it.

        Args:
            with_numbers: False where they are in the result that the plan lies in.

        Returns:
            the files written.
        """
        files = [path]
        updated = [entry.block for entry in self.blocks if entry.numbers_sha256 is not None]
        if updated and with_numbers:
            self._numbers.save(numbers_beside(path), updated)
        if any(entry.masks for entry in self.blocks):
            files.append(masks_beside(path))
            with atomic_file(files[1]) as temporary:
                self._write_masks(temporary)
                self.masks_sha256 = sha256_of_file(temporary)
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        with atomic_file(path) as temporary:
            temporary.write_text(_lists_on_one_line(text) + "\n", encoding="utf-8")
        return files

    def _write_masks(self, file: Path) -> None:
        """One block's masks in memory at a time; the bytes are those that safetensors itself would write."""
        masked = {f"{entry.block}.{name}": mask for entry in self.blocks for name, mask in entry.masks.items()}
        target = TensorFile(
            file, [TensorSpec(name, (mask.bytes,), torch.uint8) for name, mask in sorted(masked.items())]
        )
        target.create()
        try:
            for entry in self.blocks:
                bits = self._store.get(entry.block) if entry.masks else {}
                for name, mask in entry.masks.items():
                    target.put(f"{entry.block}.{name}", _bits_of(bits, name, mask, entry.block))
        finally:
            target.close()

    def content_digest(self) -> str:
        """SHA-256 of everything that the written weights depend on: the model, and what leaves it."""
        digest = hashlib.sha256(self.model.sha256.encode())
        for entry in self.blocks:
            digest.update(as_text(entry.model_dump(mode="json")).encode())
            bits = self._store.get(entry.block) if entry.masks else {}
            for name, masked in entry.masks.items():
                digest.update(_bits_of(bits, name, masked, entry.block).numpy().data)
        return digest.hexdigest()

    def _belongs_to(self) -> str:
        """The digest of what the decisions depend on."""
        given = self.model_dump(mode="json", include={"secateur", "model", "calibration"})
        given["recipe"] = self.recipe.model_dump(mode="json", exclude={"memory", "device"})
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def _entry_of(text: str) -> BlockPlan | None:
    """A kept entry; None where it is not one, so that the block is decided again."""
    try:
        return BlockPlan.model_validate_json(text)
    except ValidationError:
        return None


def _bits_of(bits: Mapping[str, torch.Tensor], name: str, masked: Masked, block: int) -> torch.Tensor:
    found = bits.get(name)
    if found is None or (found.dtype, found.numel()) != (torch.uint8, masked.bytes):
        raise PlanError(f"the mask of '{name}' in block {block} is not what the plan says; make the plan again")
    return found


def masks_beside(plan_file: Path) -> Path:
    """Where the masks of a plan lie: ``masks.safetensors`` beside ``plan.json``, ``x.masks.safetensors`` beside ``x.json``."""
    name = MASKS_FILE if plan_file.name == PLAN_FILE else f"{plan_file.stem}.{MASKS_FILE}"
    return plan_file.with_name(name)


def numbers_beside(plan_file: Path) -> Path:
    """The folder of a plan's new numbers: ``weights`` beside ``plan.json``, ``x.weights`` beside ``x.json``."""
    return plan_file.with_name(NUMBERS if plan_file.name == PLAN_FILE else f"{plan_file.stem}.{NUMBERS}")


def load_plan(path: Path) -> Plan:
    """Read a plan from its file, from a folder that holds one, or from a finished output.

    Raises:
        PlanError: missing, damaged, or without its masks.
    """
    candidates = [path] if path.suffix == ".json" else [path / PLAN_FILE, path / "secateur" / PLAN_FILE, path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise PlanError(f"there is no plan at {path}; make one with: secateur plan MODEL --out {path}")
    try:
        plan = Plan.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanError(f"{file} is not a plan this version reads: {where}: {first['msg'].lower()}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{file} is not a plan: {error}; make it again") from error
    _check_entries(plan, file)
    if any(entry.masks for entry in plan.blocks):
        plan._store = _masks_file(plan, masks_beside(file))
    plan._numbers = NumbersInFolder(numbers_beside(file))
    return plan


def _check_entries(plan: Plan, file: Path) -> None:
    """Every block is named once, and outside the blocks stand only units that span the model."""
    numbers = [entry.block for entry in plan.blocks]
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise PlanError(f"{file} names block {twice} twice; make the plan again")
    for entry in plan.blocks:
        kinds = {cut.kind for cut in entry.cuts} - {"hidden", "block"}
        if entry.block == OUTSIDE and (kinds or entry.masks or entry.updated):
            raise PlanError(
                f"{file} takes {', '.join(sorted(kinds)) or 'weights'} from block {OUTSIDE}; make the plan again"
            )
        if bool(entry.updated) != (entry.numbers_sha256 is not None):
            raise PlanError(
                f"{file} does not say which new weights of block {entry.block} it was saved with; make the plan again"
            )


def _masks_file(plan: Plan, file: Path) -> InFile:
    """The masks that were saved with ``plan``, whole and of the right sizes; none of them is brought in."""
    if not file.is_file():
        raise PlanError(f"the plan's masks are missing; put {file.name} beside the plan in {file.parent}")
    if sha256_of_file(file) != plan.masks_sha256:
        raise PlanError(f"{file} is not the masks file that the plan was saved with; it is damaged or another plan's")
    masks = InFile(file)
    sizes = masks.sizes()
    for entry in plan.blocks:
        for name, masked in entry.masks.items():
            if sizes.get(f"{entry.block}.{name}") != masked.bytes:
                raise PlanError(
                    f"{file} does not hold the mask of '{name}' in block {entry.block}; make the plan again"
                )
    return masks


def _place(block: int) -> str:
    return "in the model as a whole" if block == OUTSIDE else f"in block {block}"


def _group_of(cut: Cut, groups: list[UnitGroup], place: str) -> UnitGroup:
    """The model's own group that ``cut`` speaks of.

    Raises:
        PlanError: the model has no such kind there, not in this module, or another number of it.
    """
    alike = [group for group in groups if group.kind == cut.kind]
    if not alike:
        there = ", ".join(sorted({group.kind for group in groups})) or "none at all"
        raise PlanError(f"it cuts '{cut.kind}' units {place}, where the model has: {there}; make the plan again")
    group = next((group for group in alike if group.module == cut.module), None)
    if group is None:
        there = ", ".join(sorted(f"'{group.module}'" for group in alike))
        raise PlanError(
            f"it cuts {cut.kind} units of '{cut.module}' {place}, where they are of {there}; make the plan again"
        )
    if group.count != cut.count:
        raise PlanError(
            f"it cuts from {cut.count} {cut.kind} units {place}, and the model has {group.count}; make the plan again"
        )
    return group


def _check_removed(cut: Cut, group: UnitGroup, place: str) -> None:
    strange = next((unit for unit in cut.removed if not 0 <= unit < cut.count or cut.removed.count(unit) > 1), None)
    if strange is not None:
        problem = "twice" if 0 <= strange < cut.count else f"of 0 to {cut.count - 1}"
        raise PlanError(f"it names {cut.kind} unit {strange} {place} {problem}; make the plan again")
    size = cut.count // group.families
    leaving = [sum(unit // size == family for unit in cut.removed) for family in range(group.families)]
    if max(leaving) >= size:
        raise PlanError(f"it would leave the model without a single {cut.kind} {place}; keep at least one")
    if leaving[0] and size - max(leaving) < group.minimum:
        raise PlanError(
            f"it would leave {size - max(leaving)} {cut.kind} units {place}, where {group.minimum} are needed; keep that many"
        )
    if len(set(leaving)) > 1:
        raise PlanError(
            f"it takes {leaving} {cut.kind} units from the {group.families} groups {place}; take as many from each"
        )


def _lists_on_one_line(text: str) -> str:
    """Put lists of numbers on one line each; a plan is read by people too."""
    return re.sub(r"\[\s+(-?\d+(?:,\s+-?\d+)*)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The counts of a plan, for ``--json``."""
    zeros, masked = plan.zeros()
    return {
        "units": {kind: {"removed": gone, "of": there} for kind, (gone, there) in plan.removed_by_kind().items()},
        "zeros": zeros,
        "masked_weights": masked,
    }
