"""The errors a user can act on: each is one sentence that says what, where and what to do.

Everything below ``SecateurError`` ends a command with exit code 2, its sentence on stderr and no traceback.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of every error whose message is written for the user."""


class Stopped(BaseException):
    """The command was told to stop by a signal; like ``KeyboardInterrupt`` it passes through every ``except Exception``."""


class ModelError(SecateurError):
    """The model cannot be opened or used: missing, damaged, mismatched or of an unsupported form."""


class CalibrationError(SecateurError):
    """The calibration or evaluation text cannot be turned into token windows."""


class TaskError(SecateurError):
    """A task to measure models on is unknown, or its questions cannot be had or are not of its shape."""


class RecipeError(SecateurError):
    """What was asked for is not possible: an unknown name, an option or ratio out of range, a contradiction."""


class StructureError(SecateurError):
    """The model's structure cannot be traced or a unit cannot be removed safely."""


class PlanError(SecateurError):
    """A saved plan is damaged, or belongs to another model."""


class OutputError(SecateurError):
    """The result cannot be written or did not pass its check after writing."""


class ResourceError(SecateurError):
    """Too little memory or disk."""


class TooLargeError(ResourceError):
    """Refused before any work: the machine does not have the memory, disk or device that was asked for."""


def reason_of(error: BaseException) -> str:
    """What a library's exception says, on one line and not longer than a sentence should be."""
    text = " ".join(str(error).split())
    return (text[:240] + " ...") if len(text) > 240 else text or type(error).__name__


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'? (there are a, b, x)"`` for an unknown ``name``."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"{hint} (there are: {', '.join(names)})"
