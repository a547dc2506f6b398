"""A config's ``carved`` record, checked before it is believed: it was written by Secateur, but files get edited."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateur.errors import ModelError, reason_of
from secateur.structure.capture import on_meta, run_without_weights, traceable, ways_to_call

Size = Annotated[int, Field(strict=True, ge=1)]
Place = Annotated[int, Field(strict=True, ge=0)]


class _Record(BaseModel):
    """The form of what ``uneven.carve`` reads."""

    model_config = ConfigDict(extra="forbid")
    shapes: dict[str, list[Size]] = {}
    attributes: dict[str, dict[str, Size]] = {}
    arguments: dict[str, dict[str, tuple[Annotated[int, Field(strict=True)], Size, list[Place]]]] = {}


def record_of(config: Any) -> dict[str, Any]:
    """The config's record; empty where its family's own fields say all sizes."""
    return getattr(config, "carved", None) or {}


def check_record(config: Any, folder: Path) -> None:
    """Refuse a record that is not of the form that is written.

    Raises:
        ModelError: it names the entry.
    """
    try:
        _Record.model_validate(record_of(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["carved", *map(str, first["loc"])])
        raise _changed(folder, f"{where}: {first['msg'].lower()}") from error


def check_runs(model: Any, folder: Path) -> None:
    """Run ``model`` without weights, if it is a carved one: sizes that contradict each other do not fit.

    Raises:
        ModelError: it cannot be run.
    """
    if not record_of(model.config):
        return
    reason = ""
    with traceable(model):
        for inputs in ways_to_call(model):
            try:
                run_without_weights(model, on_meta(model), (), inputs)
                return
            except Exception as error:  # whatever the family's code says to sizes that do not fit
                reason = reason or reason_of(error)
    raise _changed(folder, f"the sizes of its carved record do not fit together ({reason})")


def _changed(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"{folder / 'config.json'} is not as it was written: {what}; get the folder's own config.json again"
    )
