"""Everything a run is told: validated, to and from YAML. Where the result goes is not part of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from secateur.criteria import Criterion, criterion_from
from secateur.errors import RecipeError, reason_of, suggest

CUT_KINDS = ("head", "query", "channel")
"""Units that are physically cut out, in the order they are decided."""

DEFAULT_CUT_RATIO = 0.2
DEFAULT_MASK_RATIO = 0.5

Reduce = Literal["sum", "mean", "max", "prod", "first", "last"]


@dataclass(frozen=True)
class NofM:
    """Keep ``keep`` of every ``group`` consecutive inputs."""

    keep: int
    group: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @property
    def ratio(self) -> float:
        """The share of weights that leaves."""
        return 1 - self.keep / self.group


class Recipe(BaseModel):
    """What to prune, by what score, how much, on what text. Every field is also a flag of the same name.

    Attributes:
        model: folder, GGUF file, hub id or ``smollm2``.
        criterion: ``name:option=value,...``.
        unit: what leaves: ``weight`` or ``N:M``, and/or ``head``, ``query``, ``channel``.
        ratio: share of units of each kind in each block (global: of prunable parameters) that leaves, in [0, 1).
        within: where single weights compete: a ``row``, a ``layer`` (one matrix), or the whole model (``global``).
        allocation: ``uniform`` over blocks, or ``global`` over the model, scores taken per parameter.
        reduce: how the members of a structured unit count together.
        propagate: whether blocks see ``dense`` or already ``pruned`` inputs; by default as the criterion was published.
        blocks: ``FIRST:LAST``, blocks that may be pruned, LAST excluded as in a Python slice.
        calibration: ``self``, a file, ``hub:...`` or safetensors of token windows.
        windows: how many calibration windows.
        window_length: tokens in each.
        seed: of everything random.
        micro_batch: windows that run through a block at once. One, as the published codes do, gives their roundings too:
            under pruned propagation a flipped near-tie changes all later blocks a little.
        memory: what block inputs and kept activations may take, for example ``2GiB``.
        trust_remote_code: run code that comes with the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    criterion: str = "taylor"
    unit: tuple[str, ...] = ("channel",)
    ratio: float | None = Field(default=None, ge=0, lt=1)
    within: Literal["row", "layer", "global"] = "row"
    allocation: Literal["uniform", "global"] = "uniform"
    reduce: Reduce = "sum"
    propagate: Literal["dense", "pruned"] | None = None
    blocks: str | None = None
    calibration: str = "self"
    windows: int | None = Field(default=None, ge=1, le=1_000_000)
    window_length: int | None = Field(default=None, ge=2, le=1_000_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    micro_batch: int = Field(default=1, ge=1)
    memory: str = "2GiB"
    trust_remote_code: bool = False

    @field_validator("unit", mode="before")
    @classmethod
    def _split_units(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_text(cls, value: Any) -> Any:
        return str(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        criterion = criterion_from(self.criterion)
        object.__setattr__(self, "criterion", str(criterion))
        parse_bytes(self.memory)
        if self.blocks is not None and not re.fullmatch(r"[0-9]*:[0-9]*", self.blocks):
            raise RecipeError(f"--blocks is FIRST:LAST such as 4:30, not '{self.blocks}'")
        self._check_units()
        if self.propagate is None:
            object.__setattr__(self, "propagate", "dense" if self.is_global else criterion.propagation)
        if self.is_global and self.propagate == "pruned":
            raise RecipeError(
                "a global choice needs every block's score before anything leaves; use --propagate dense with it"
            )
        return self

    def _check_units(self) -> None:
        if not self.unit:
            raise RecipeError("--unit is empty; name at least one unit, for example channel")
        patterns = [unit for unit in self.unit if unit == "weight" or ":" in unit]
        for unit in self.unit:
            if unit not in (*CUT_KINDS, "weight") and not _is_n_of_m(unit):
                known = [*CUT_KINDS, "weight", "2:4"]
                raise RecipeError(f"there is no unit '{unit}'{suggest(unit, known)}; N:M keeps N of every M, 0 < N < M")
        if len(set(self.unit)) != len(self.unit):
            raise RecipeError(f"--unit names a unit twice: {','.join(self.unit)}")
        if len(patterns) > 1:
            raise RecipeError(f"{' and '.join(patterns)} cannot go together: one mask pattern at a time")
        pattern = self.n_of_m
        if pattern and self.ratio is not None and abs(self.ratio - pattern.ratio) > 1e-9 and not self.cut_kinds:
            raise RecipeError(
                f"{pattern} removes {pattern.ratio:g} of the weights by itself; leave --ratio {self.ratio:g} out"
            )
        if "query" in self.cut_kinds and self.allocation == "global":
            raise RecipeError(
                "query heads leave every group in equal number, so they have no global choice; use --allocation uniform"
            )
        if self.within != "row" and self.n_of_m:
            raise RecipeError(f"N:M is chosen within every group of M; leave --within {self.within} out")
        if self.within == "global" and self.cut_kinds and self.masks_weights:
            raise RecipeError(
                "--within global chooses over the whole model before anything is cut; cut and mask in two runs"
            )

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
        return (self.allocation == "global" and bool(self.cut_kinds)) or (
            self.masks_weights and self.within == "global"
        )

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
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory)

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

    def to_yaml(self) -> str:
        """Readable YAML, from which ``recipe_from`` gives the same recipe."""
        content = self.model_dump(mode="json")
        content["unit"] = ",".join(self.unit)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _is_n_of_m(unit: str) -> bool:
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", unit)
    return match is not None and 0 < int(match[1]) < int(match[2])


def parse_bytes(text: str) -> int:
    """``"4GiB" -> 4294967296``; plain numbers are bytes.

    Raises:
        RecipeError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B?)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise RecipeError(f"'{text}' is not a size; write for example 512MiB or 4GiB")
    base = 1024 if "i" in match[3].lower() or not match[3] else 1000
    return int(float(match[1]) * base ** ("", "K", "M", "G", "T").index(match[2].upper()))


def recipe_from(file: Path | None = None, **given: Any) -> Recipe:
    """The recipe in ``file`` (YAML), overridden by every value given that is not None.

    Raises:
        RecipeError: unreadable file, unknown field or impossible value.
    """
    content: dict[str, Any] = {}
    if file is not None:
        content = _read_yaml(file)
    content.update({key: value for key, value in given.items() if value is not None})
    for key in map(str, content):
        if key not in Recipe.model_fields:
            raise RecipeError(f"a recipe has no field '{key}'{suggest(key, Recipe.model_fields)}")
    if "model" not in content:
        raise RecipeError("the recipe names no model; give one, for example smollm2")
    try:
        return Recipe(**content)
    except ValidationError as error:
        raise RecipeError(_sentence(error)) from error


class _PlainNumbers(yaml.SafeLoader):
    """YAML 1.1 reads 4:30 and 2:4 as numbers to the base of sixty; here they are what they look like."""


_PlainNumbers.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainNumbers.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_PlainNumbers.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainNumbers)
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe at {file}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file} is not readable YAML: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file} is not a recipe: it has to be a YAML mapping of fields such as 'model: smollm2'")
    return content


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or "the recipe"
    if name == "ratio":
        return f"--ratio has to be a number in [0, 1), not {first['input']}"
    flag = f"--{name.replace('_', '-')}" if name in Recipe.model_fields else name
    return f"{flag} cannot be '{first['input']}': {first['msg'][0].lower()}{first['msg'][1:]}"
