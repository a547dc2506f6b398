"""Quantities as people write them: N:M, sizes in bytes, and targets such as ``params=-20%``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from secateur.errors import RecipeError
from secateur.files import human_bytes

Measure = Literal["params", "macs", "bytes"]


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


def is_n_of_m(unit: str) -> bool:
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


@dataclass(frozen=True)
class Target:
    """What has to remain of a model.

    Attributes:
        measure: parameters, multiply-accumulates a token, or bytes on disk.
        remains: so many, or None where a share is asked for.
        share: of the dense model's that remains.
    """

    measure: Measure
    remains: int | None
    share: Fraction = Fraction(1)

    def of(self, dense: int) -> int:
        """The most that may remain of ``dense``."""
        return int(dense * self.share) if self.remains is None else self.remains

    def describe(self, amount: int) -> str:
        """An amount of the measure, for people."""
        if self.measure == "bytes":
            return f"{human_bytes(amount)} ({amount:,} bytes)"
        return f"{amount:,} {'parameters' if self.measure == 'params' else 'multiply-accumulates a token'}"


def parse_target(text: str) -> Target:
    """Read ``params=110M``, ``params=-20%``, ``macs=-20%``, ``bytes=200MiB``.

    Raises:
        RecipeError: unknown measure, or no amount.
    """
    if "," in text:
        raise RecipeError(f"--target {text} names several amounts; give one, the others follow from what leaves")
    measure, equals, amount = (part.strip() for part in text.partition("="))
    if measure not in ("params", "macs", "bytes") or not equals:
        raise RecipeError(
            f"--target is params=, macs= or bytes= and an amount, such as params=110M or macs=-20%, not '{text}'"
        )
    known = cast(Measure, measure)
    if change := re.fullmatch(r"-(\d+(?:\.\d+)?)\s*%", amount):
        if not 0 < Fraction(change[1]) < 100:
            raise RecipeError(f"--target {text} takes nothing or everything; give a change between 0 and -100 %")
        return Target(known, None, 1 - Fraction(change[1]) / 100)
    if known == "bytes" and re.fullmatch(r"\d.*", amount):
        return Target(known, parse_bytes(amount))
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMBGT]?)", amount, flags=re.IGNORECASE)
    if number is None or known == "bytes":
        raise RecipeError(
            f"'{amount}' in --target {text} is no amount; write a change such as -20%, or what remains such as 110M"
        )
    power = {"": 0, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}[number[2].upper()]
    return Target(known, int(Fraction(number[1]) * 10**power))
