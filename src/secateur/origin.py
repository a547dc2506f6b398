"""The dense model that a folder was pruned from: found by the folder's record, and as its teacher."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.calibration.tokenise import load_tokenizer
from secateur.checkpoint.manifest import RECORD
from secateur.checkpoint.reader import Checkpoint, open_checkpoint
from secateur.errors import CalibrationError, ModelError, PlanError, SecateurError
from secateur.plans import load_plan


def pruned_from(folder: Path) -> str | None:
    """The model that a pruned (or recovered) folder was made from, if its record says."""
    model = _record(folder).get("model")
    found = model.get("spec") if isinstance(model, dict) else None
    return str(found) if found else None


def counted_before(folder: Path) -> dict[str, Any] | None:
    """What was counted in the dense model that a pruned (or recovered) folder was made from, if its record says."""
    record = _record(folder)
    found = record.get("dense") or record.get("before")
    return found if isinstance(found, dict) else None


def recovered_from(folder: Path) -> str | None:
    """The pruned model that a recovered folder was tuned from, if its record says."""
    model = _record(folder).get("model")
    found = model.get("recovered_from") if isinstance(model, dict) else None
    return str(found) if found else None


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def find_teacher(checkpoint: Checkpoint) -> Checkpoint:
    """The dense model that ``checkpoint`` was pruned from, opened.

    Raises:
        ModelError: no record names it, it is not there or another by now, or it does not speak of the same tokens.
    """
    spec = pruned_from(checkpoint.folder)
    if spec is None:
        raise ModelError(
            f"{checkpoint.folder} does not say which model it was pruned from, so there is no teacher; give a folder that "
            "Secateur has pruned, or another --method"
        )
    try:
        dense = open_checkpoint(spec)
    except SecateurError as error:
        raise ModelError(
            f"the model that {checkpoint.folder} was pruned from ({spec}) is to be its teacher and cannot be opened: {error}"
        ) from error
    with suppress(PlanError):
        if load_plan(checkpoint.folder).model.sha256 != dense.content_hash:
            raise ModelError(
                f"{spec} is not the model any more that {checkpoint.folder} was pruned from, so it cannot be its teacher; put that one back, "
                "or give another --method"
            )
    sizes = [opened.config.get_text_config().vocab_size for opened in (checkpoint, dense)]
    if sizes[0] != sizes[1] or _tokenizers_differ(checkpoint.folder, dense.folder):
        raise ModelError(
            f"{spec} and {checkpoint.folder} have different tokenizers, so the one cannot teach the other; give another --method"
        )
    return dense


def _tokenizers_differ(*folders: Path) -> bool:
    """Whether both have a tokenizer, and not the same words in it."""
    words = []
    for folder in folders:
        with suppress(CalibrationError):
            words.append(load_tokenizer(folder).get_vocab())
    return len(words) == 2 and words[0] != words[1]


def kept_blocks(checkpoint: Checkpoint, dense: Checkpoint) -> list[int] | None:
    """Which of the dense model's blocks the pruned one's are; None where its plan is not there."""
    try:
        plan = load_plan(checkpoint.folder)
    except PlanError:
        return None
    gone = {unit for entry in plan.blocks for cut in entry.cuts if cut.kind == "block" for unit in cut.removed}
    return [block for block in range(len(dense.skeleton.blocks)) if block not in gone]
