"""What has been measured of a written folder, kept in it, so that its page and its card can show it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.checkpoint.manifest import RECORD
from secateur.console import log
from secateur.files import write_json
from secateur.runfolder import RUN_FILE

MEASURED = "measured.json"
PERPLEXITY, TASKS = "evaluation", "tasks"
"""Its parts: what ``evaluate`` measures, and what it measures with ``--tasks``."""


def read_measured(folder: Path) -> dict[str, Any]:
    """What was measured of ``folder`` last; nothing where nothing was, or its record is damaged.

    What ``prune --evaluate`` measured counts until something newer is there.
    """
    found = _read(folder / RECORD / MEASURED)
    own = _read(folder / RECORD / RUN_FILE).get(PERPLEXITY)
    return ({PERPLEXITY: own} if own else {}) | found


def note_measured(folder: Path, part: str, evaluation: Mapping[str, Any]) -> bool:
    """Keep ``evaluation``, a JSON-able record, in a folder that Secateur wrote; returns whether it is one.

    A folder that cannot be written is passed over with a warning: the figures have been printed all the same.
    """
    place = folder / RECORD
    if not (place / RUN_FILE).is_file():
        return False
    if not os.access(place, os.W_OK):
        log.warning("%s cannot be written, so its page and card do not get these figures.", folder)
        return False
    content = _read(place / MEASURED)
    content[part] = {**evaluation, "date": datetime.date.today().isoformat()}
    write_json(place / MEASURED, content)
    return True


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
