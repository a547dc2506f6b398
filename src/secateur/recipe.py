"""Everything a run is told: validated, to and from YAML. Where the result goes is not part of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from secateur.allocation.policies import POLICIES
from secateur.allocation.policy import Policy
from secateur.criteria import Criterion, criterion_from
from secateur.criteria.base import Normalise, Within
from secateur.errors import RecipeError, suggest
from secateur.options import parse_named
from secateur.presets import preset_fields
from secateur.quantities import NofM, Target, parse_bytes, parse_target
from secateur.recipe_rules import (
    CUT_KINDS,
    SPANNING,
    apart_from_each_other,
    check_allocation,
    check_amounts,
    check_block_criterion,
    check_units,
)
from secateur.reconstruction import Reconstruction, reconstruction_from
from secateur.removal.methods import Removal, removal_from
from secateur.statistics import GradientSource, Statistic, gradient_kinds
from secateur.yamlfile import read_yaml

PUBLISHED_ENDS = (4, 2)
"""Blocks of LLaMA-7B's 32 that LLM-Pruner keeps whole at the start and at the end (methods §14.3)."""

DEFAULT_CUT_RATIO = 0.2
DEFAULT_MASK_RATIO = 0.5

DEFAULT_QUERIES = 16
DEFAULT_PERTURBATION = 1e-3
"""MeZO's (methods §4.3); what MINI-LLM took is not known."""

PLAIN_ALLOCATIONS = ("uniform", "two-tier", "global")

Reduce = Literal["sum", "mean", "max", "prod", "first", "last"]


class Recipe(BaseModel):
    """What to prune, by what score, how much, on what text. Every field is also a flag of the same name.

    Attributes:
        model: folder, GGUF file, hub id or ``smollm2``.
        criterion: ``name:option=value,...``.
        unit: what leaves: ``weight`` or ``N:M``, and/or ``head``, ``query``, ``expert``, ``channel``, ``hidden``, ``block``.
        ratio: share of units of each kind in each block (two-tier: in the model; global: of the parameters that the units
            hold) that leaves, in [0, 1).
        target: instead of a ratio, what remains of the whole model (``params=110M``, ``bytes=200MiB``) or how it changes
            (``params=-20%``, ``macs=-20%``).
        round_to: channels and hidden channels kept are rounded up to a multiple of this; the few heads are not.
        within: where single weights compete: a ``row``, a ``share`` (each row up to the same share of its scores), a ``block`` of 128 inputs over all rows, a ``layer`` (one matrix),
            or the whole model (``global``); by default as the criterion was published.
        removal: how what was chosen leaves: ``mask`` (zeroed, units cut), or ``name:option=value,...`` of one that refines the
            mask or gives the weights or biases that stay new numbers; by default as the criterion was published.
        reconstruct: how what stays of each block is then fitted to what the dense model gives there:
            ``name:option=value,...``; None: not at all.
        allocation: ``uniform`` over blocks, ``two-tier`` (both ends kept whole, uniform between), ``global`` over the
            model, or ``name:option=value,...`` of a policy that gives each block its own ratio; by default as the criterion
            was published.
        protect: two-tier: ``FIRST:LAST``, how many blocks at each end are kept whole; by default the published 4 and 2 of
            32, scaled, at least one each.
        rank: global: whether kinds of units are ranked ``together``, or ``apart``, each kind giving its own ratio.
        normalise: global: what makes scores of different kinds and blocks comparable: they are taken per ``parameter``, or
            standardised within each kind of each block (``zscore``); by default as the criterion was published.
        steps: in how many rounds the ratio is reached, with fresh scores of what is left in each.
        reduce: how the members of a structured unit count together.
        propagate: whether blocks see ``dense`` or already ``pruned`` inputs; by default as the criterion was published.
        gradient: where gradients come from: ``exact`` backpropagation of the loss, each ``block``'s own output, or
            ``forward`` runs alone; by default as the criterion was published, None where it needs none.
        queries: forward: how many directions the loss is measured along, two runs each; by default 16.
        perturbation: forward: the step along them, in units of a weight; by default 1e-3.
        blocks: ``FIRST:LAST``, blocks that may be pruned, LAST excluded as in a Python slice.
        calibration: ``self``, a file, ``hub:...`` or safetensors of token windows.
        windows: how many calibration windows.
        window_length: tokens in each.
        seed: of everything random.
        micro_batch: windows that run through a block at once. One, as the published codes do, gives their roundings too:
            under pruned propagation a flipped near-tie changes all later blocks a little.
        memory: what the whole run may take, for example ``4GiB``; by default most of what is free. What does not fit goes to
            disk or is computed again; it changes no result.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: run code that comes with the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    criterion: str = "taylor"
    unit: tuple[str, ...] = ("channel",)
    ratio: float | None = Field(default=None, ge=0, lt=1)
    target: str | None = None
    round_to: int = Field(default=1, ge=1, le=65536)
    within: Within | None = None
    removal: str | None = None
    reconstruct: str | None = None
    allocation: str = "uniform"
    protect: str | None = None
    rank: Literal["together", "apart"] = "together"
    normalise: Normalise | None = None
    steps: int = Field(default=1, ge=1, le=1000)
    reduce: Reduce = "sum"
    propagate: Literal["dense", "pruned"] | None = None
    gradient: GradientSource | None = None
    queries: int | None = Field(default=None, ge=1, le=1_000_000)
    perturbation: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    blocks: str | None = None
    calibration: str = "self"
    windows: int | None = Field(default=None, ge=1, le=1_000_000)
    window_length: int | None = Field(default=None, ge=2, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    micro_batch: int = Field(default=1, ge=1)
    memory: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    @field_validator("unit", mode="before")
    @classmethod
    def _split_units(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_text(cls, value: Any) -> Any:
        return None if value is None else str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        criterion = criterion_from(self.criterion)
        object.__setattr__(self, "criterion", str(criterion))
        if self.memory is not None and not parse_bytes(self.memory):
            raise RecipeError(f"--memory {self.memory} leaves nothing to work in; write for example 4GiB")
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", self.device):
            raise RecipeError(f"--device is auto, cpu, cuda or cuda:N, not '{self.device}'")
        if self.blocks is not None and not re.fullmatch(r"[0-9]*:[0-9]*", self.blocks):
            raise RecipeError(f"--blocks is FIRST:LAST such as 4:30, not '{self.blocks}'")
        check_units(self)
        self._settle_masks(criterion)
        check_amounts(self)
        self._settle_allocation(criterion)
        check_allocation(self)
        check_block_criterion(self)
        self._settle_gradient(criterion)
        removal = self._settle_removal(criterion)
        self._settle_reconstruction()
        if self.propagate is None:
            needed = "pruned" if self.reconstruct else removal.propagation if removal.needs() else None
            published = needed or ("dense" if self.is_global else criterion.propagation)
            object.__setattr__(self, "propagate", published)
        if self.is_global and self.propagate == "pruned" and not self.updates:
            raise RecipeError(
                "a choice over the whole model needs every block's score before anything leaves; use --propagate dense with it"
            )
        return self

    def _settle_removal(self, criterion: Criterion) -> Removal:
        """Write out how what was chosen leaves, and refuse what it cannot do."""
        spanning = [kind for kind in self.cut_kinds if kind in SPANNING]
        published = criterion.removal if self.masks_weights else "mask" if spanning else criterion.unit_removal
        removal = removal_from(published if self.removal is None else self.removal)
        object.__setattr__(self, "removal", str(removal))
        if removal.name == "mask":
            return removal
        if not removal.updates and not self.masks_weights:
            raise RecipeError(
                f"--removal {removal.name} refines masks, and {','.join(self.unit)} are cut; leave it out"
            )
        if removal.updates and spanning:
            raise RecipeError(
                f"--removal {removal.name} gives new numbers inside blocks, and {' and '.join(spanning)} units leave the model "
                "as a whole; take them out in a run of their own"
            )
        if removal.options.model_dump().get("bits", 16) < 16 and not self.masks_weights:
            raise RecipeError(
                f"bits={removal.options.bits} rounds matrices out of which single weights leave, and "
                f"{','.join(self.unit)} are cut; add weight or N:M to --unit, or leave bits out"
            )
        if self.within == "global" and removal.updates and self.masks_weights:
            raise RecipeError(
                f"--removal {removal.name} gives new numbers block by block, and --within global chooses over the whole model; "
                "choose within row, share, block or layer"
            )
        if self.steps > 1:
            raise RecipeError(f"--removal {removal.name} works on the dense model's blocks once; leave --steps out")
        if self.is_global and not removal.updates:
            raise RecipeError(
                f"--removal {removal.name} works block by block, and this choice is over the whole model; leave one out"
            )
        return removal

    def _settle_reconstruction(self) -> None:
        """Write out how what stays is fitted, and refuse where it cannot be."""
        if self.reconstruct in (None, "none"):
            object.__setattr__(self, "reconstruct", None)
            return
        method = reconstruction_from(str(self.reconstruct))
        object.__setattr__(self, "reconstruct", str(method))
        if "hidden" in self.cut_kinds:
            raise RecipeError(
                f"--reconstruct {method.name} fits blocks to the dense model's hidden states, and hidden channels leave "
                "these; take them out in a run of their own"
            )
        if method.rechooses and (self.cut_kinds or self.parsed_removal().updates):
            raise RecipeError(
                f"--reconstruct {method.name} chooses masks of single weights anew after each round; give --unit weight or N:M "
                "and a --removal that updates nothing, or --reconstruct block"
            )
        if self.within == "global" and self.masks_weights:
            raise RecipeError(
                f"--reconstruct {method.name} goes block by block, and --within global chooses over the whole model; choose "
                "within row, share, block or layer"
            )
        if self.steps > 1:
            raise RecipeError(f"--reconstruct {method.name} fits the dense model's blocks once; leave --steps out")
        if self.propagate == "dense":
            raise RecipeError(
                f"--reconstruct {method.name} fits each block to what the pruned blocks before it give; leave "
                "--propagate dense out"
            )

    def _settle_gradient(self, criterion: Criterion) -> None:
        if gradient_kinds(criterion.needs()):
            object.__setattr__(self, "gradient", self.gradient or criterion.gradient)
        elif self.gradient is not None:
            raise RecipeError(f"{criterion.name} needs no gradients; leave --gradient {self.gradient} out")
        for name, default in (("queries", DEFAULT_QUERIES), ("perturbation", DEFAULT_PERTURBATION)):
            if self.gradient == "forward":
                object.__setattr__(self, name, getattr(self, name) or default)
            elif getattr(self, name) is not None:
                raise RecipeError(f"--{name} is about --gradient forward; add that, or leave it out")

    def _settle_masks(self, criterion: Criterion) -> None:
        pattern = self.n_of_m
        if pattern and self.ratio is not None and abs(self.ratio - pattern.ratio) > 1e-9 and not self.cut_kinds:
            raise RecipeError(
                f"{pattern} removes {pattern.ratio:g} of the weights by itself; leave --ratio {self.ratio:g} out"
            )
        if self.within not in (None, "row") and pattern:
            raise RecipeError(f"N:M is chosen within every group of M; leave --within {self.within} out")
        if self.within not in (None, "row") and not self.masks_weights:
            raise RecipeError(
                f"--within {self.within} says where single weights compete, and {','.join(self.unit)} are cut; leave it out"
            )
        if self.within is None:
            object.__setattr__(self, "within", "row" if pattern or not self.masks_weights else criterion.within)
        if self.within == "global" and self.cut_kinds and self.masks_weights:
            raise RecipeError(
                "--within global chooses over the whole model before anything is cut; cut and mask in two runs"
            )

    def _settle_allocation(self, criterion: Criterion) -> None:
        """Write out what was published, where nothing is said and the units can have it; a recipe's file says all."""
        if "allocation" not in self.model_fields_set and self.cut_kinds:
            can_be_ranked = not {"query", *SPANNING} & set(self.cut_kinds) and apart_from_each_other(self.cut_kinds)
            if criterion.allocation != "global" or can_be_ranked:
                object.__setattr__(self, "allocation", criterion.allocation)
        if (policy := self.parsed_policy()) is not None:
            object.__setattr__(self, "allocation", str(policy))
        if self.allocation == "global" and self.cut_kinds:
            object.__setattr__(self, "normalise", self.normalise or criterion.normalise)
        elif self.normalise is not None:
            raise RecipeError(
                f"--normalise {self.normalise} is about units under --allocation global; add that, or leave it out"
            )

    @property
    def names_no_blocks(self) -> bool:
        """Whether it is left to the criterion which blocks may leave."""
        return self.blocks is None and self.allocation != "two-tier"

    @property
    def cut_kinds(self) -> tuple[str, ...]:
        """The structured units asked for, in the order they are decided."""
        return tuple(kind for kind in CUT_KINDS if kind in self.unit)

    @property
    def n_of_m(self) -> NofM | None:
        """The N:M pattern asked for."""
        return next((NofM(*map(int, unit.split(":"))) for unit in self.unit if ":" in unit), None)

    @property
    def masks_weights(self) -> bool:
        """Whether single weights are zeroed."""
        return "weight" in self.unit or self.n_of_m is not None

    @property
    def is_global(self) -> bool:
        """Whether the choice in one block depends on the scores in others."""
        spans = self.allocation == "global" or any(kind in SPANNING for kind in self.cut_kinds)
        return (spans and bool(self.cut_kinds)) or (self.masks_weights and self.within == "global")

    @property
    def cut_ratio(self) -> float:
        """The share of structured units that leaves."""
        return DEFAULT_CUT_RATIO if self.ratio is None else self.ratio

    @property
    def mask_ratio(self) -> float:
        """The share of single weights that leaves."""
        if self.n_of_m:
            return self.n_of_m.ratio
        return DEFAULT_MASK_RATIO if self.ratio is None else self.ratio

    @property
    def memory_bytes(self) -> int | None:
        """The memory that was given; None: what is free."""
        return None if self.memory is None else parse_bytes(self.memory)

    def parsed_target(self) -> Target | None:
        """The target, where one was given."""
        return None if self.target is None else parse_target(self.target)

    def needs(self) -> frozenset[type[Statistic]]:
        """The statistics that scoring and removing read."""
        return self.parsed_criterion().needs() | self.parsed_removal().needs()

    @property
    def reads_text(self) -> bool:
        """Whether anything is measured on calibration windows."""
        policy = self.parsed_policy()
        return bool(self.needs() or self.reconstruct) or (
            policy is not None and (policy.measured or bool(policy.needs()))
        )

    def parsed_policy(self) -> Policy | None:
        """The policy that gives each block its own ratio; None where the allocation is not one."""
        if self.allocation in PLAIN_ALLOCATIONS:
            return None
        return parse_named(self.allocation, POLICIES, also=PLAIN_ALLOCATIONS)

    def parsed_removal(self) -> Removal:
        """How what was chosen leaves."""
        return removal_from(self.removal or "mask")

    def parsed_reconstruction(self) -> Reconstruction | None:
        """How what stays is fitted; None where it is not."""
        return None if self.reconstruct is None else reconstruction_from(self.reconstruct)

    @property
    def updates(self) -> bool:
        """Whether weights that stay get new numbers."""
        return self.parsed_removal().updates or self.reconstruct is not None

    def parsed_criterion(self) -> Criterion:
        """The criterion with its options."""
        return criterion_from(self.criterion)

    def block_range(self, count: int) -> range:
        """The blocks that may be pruned, of a model with ``count``.

        Raises:
            RecipeError: the range is empty or reaches past the last block.
        """
        first, last = (part for part in (self.blocks or ":").split(":"))
        chosen = range(int(first or 0), int(last or count))
        if not chosen or chosen.stop > count:
            raise RecipeError(f"--blocks {self.blocks} names no blocks of this model, which has 0:{count}")
        return chosen

    def middle(self, count: int) -> range:
        """The blocks between the ends that two-tier keeps whole, of a model with ``count``.

        Raises:
            RecipeError: nothing is between them.
        """
        if self.protect is None:
            first, last = (max(1, round(count * share / 32)) for share in PUBLISHED_ENDS)
        else:
            first, last = map(int, self.protect.split(":"))
        if first + last >= count:
            raise RecipeError(
                f"--allocation two-tier keeps {first} and {last} blocks at the ends whole, and the model has only {count}; "
                "give a smaller --protect FIRST:LAST"
            )
        return range(first, count - last)

    def to_yaml(self) -> str:
        """Readable YAML, from which ``recipe_from`` gives the same recipe."""
        content = self.model_dump(mode="json")
        content["unit"] = ",".join(self.unit)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def recipe_from(file: Path | None = None, **given: Any) -> Recipe:
    """The recipe in ``file`` (YAML), overridden by every value given that is not None.

    ``preset`` (``fast``, ``balanced`` or ``best``) stands for the fields that nobody gives.

    Raises:
        RecipeError: unreadable file, unknown field or impossible value.
    """
    content: dict[str, Any] = {}
    if file is not None:
        content = read_yaml(file)
    content.update({key: value for key, value in given.items() if value is not None})
    preset = content.pop("preset", None)
    if preset is not None:
        content = preset_fields(str(preset), _units_of(content)) | content
    for key in map(str, content):
        if key not in Recipe.model_fields:
            raise RecipeError(f"a recipe has no field '{key}'{suggest(key, Recipe.model_fields)}")
    if "model" not in content:
        raise RecipeError("the recipe names no model; give one, for example smollm2")
    try:
        return Recipe(**content)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from error


def _units_of(content: Mapping[str, Any]) -> tuple[str, ...]:
    given = content.get("unit", Recipe.model_fields["unit"].default)
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else tuple(given)


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "the recipe"
    if name == "ratio":
        given = first["input"]
        percent = isinstance(given, (int, float)) and 1 <= given < 100
        hint = f"; {given:g} % is {given / 100:g}" if percent else ""
        return f"--ratio has to be a number in [0, 1), not {given}{hint}"
    flag = f"--{name.replace('_', '-')}" if name in Recipe.model_fields else name
    return f"{flag} cannot be '{first['input']}': {first['msg'][0].lower()}{first['msg'][1:]}"
